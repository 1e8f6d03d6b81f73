"""Attention with every map materialised, and the alignment losses on these maps.

The way the paper's authors train, and what a user would write: no code of cdfast_kernels. Samples
of a packed batch are padded to the longest, as eager attention needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """What eager training has at hand once per batch.

    Args:
        objective: "row", "map", "pooled", "mse" or "kl".
        hidden: bool (B or 1, 1, N, N), True where a row does not see a key. Rows at padding see
            themselves, so that no softmax is empty.
        target: (B, N, V), the teacher's head-mean map on the visual columns.
        columns: int64 (V,), positions that are visual in any sample.
        entries: bool (B, N, V), visible visual entries of live rows.
        live: bool (B, N), of a packed batch, whose q, k, v hold the live tokens only; else None.
    """

    objective: str
    hidden: Tensor
    target: Tensor
    columns: Tensor
    entries: Tensor
    live: Tensor | None


def repeated(x: Tensor, heads: int) -> Tensor:
    """Key heads as many times as query heads read them."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


def eager(q: Tensor, k: Tensor, v: Tensor, given: Dense) -> tuple[Tensor, Tensor]:
    """out, and the alignment loss (mean over samples).

    As models compute eager attention: softmax in float32 (float64 for float64), probabilities in
    the dtype of q.
    """
    if given.live is not None:
        q, k, v = (padded(x, given.live) for x in (q, k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probs = scores.masked_fill_(given.hidden, float("-inf")).softmax(-1, dtype=wide).to(q.dtype)
    del scores
    out = (probs @ v).transpose(1, 2)
    if given.live is not None:
        out = out[given.live]
    student = probs.mean(1)[..., given.columns].to(wide)
    return out, LOSSES[given.objective](student, given.target.to(wide), given.entries)


def padded(x: Tensor, live: Tensor) -> Tensor:
    """(sum of lengths, H, d) as (B, N, H, d), zero at padding."""
    out = x.new_zeros(*live.shape, *x.shape[1:])
    return out.masked_scatter(live[..., None, None], x)


def row_loss(s: Tensor, t: Tensor, entries: Tensor) -> Tensor:
    """Mean over rows that see a visual key of 1 - cos; those that see one have loss 0."""
    terms = 1 - F.cosine_similarity(s * entries, t * entries, -1)
    return mean_over_rows(terms, entries)


def kl_loss(s: Tensor, t: Tensor, entries: Tensor) -> Tensor:
    """Mean over rows of KL(t || s), both renormalised over the visible visual keys."""
    tiny = torch.finfo(torch.float32).tiny
    s, t = s.clamp(min=tiny) * entries, t * entries
    s, t = (x / x.sum(-1, keepdim=True).clamp(min=tiny) for x in (s, t))
    terms = torch.xlogy(t, t) - torch.where(t > 0, t * s.clamp(min=tiny).log(), 0.0)
    return mean_over_rows(terms.sum(-1), entries)


def mean_over_rows(terms: Tensor, entries: Tensor) -> Tensor:
    seen = entries.sum(-1)
    return ((terms * (seen > 1)).sum(-1) / (seen > 0).sum(-1)).mean()


def map_loss(s: Tensor, t: Tensor, entries: Tensor) -> Tensor:
    """1 - cos of the flattened maps."""
    return (1 - F.cosine_similarity((s * entries).flatten(1), (t * entries).flatten(1), -1)).mean()


def mse_loss(s: Tensor, t: Tensor, entries: Tensor) -> Tensor:
    """Mean over visible visual entries of (s - t)^2."""
    squares = ((s - t) * entries).square().sum((1, 2))
    return (squares / entries.sum((1, 2))).mean()


def pooled_loss(s: Tensor, t: Tensor, entries: Tensor) -> Tensor:
    """1 - cos of column means over visual rows, after the sink filter of the authors' code."""
    terms = []
    for student, teacher, seen in zip(s, t, entries.expand(len(s), -1, -1)):
        visual = seen.any(0)
        rows = seen[:, visual].sum(-1)
        # The first visual token is the first row that sees any, and the tokens are a run.
        start = int((rows > 0).to(torch.int8).argmax())
        square = slice(start, start + int(visual.sum()))
        terms.append(_pooled(student[square][:, visual], teacher[square][:, visual]))
    return torch.stack(terms).mean()


def _pooled(s: Tensor, t: Tensor) -> Tensor:
    keep = (s <= s.mean() + s.std()) & (t <= t.mean() + t.std())
    mask = (keep & (t != 0)).to(s.dtype)
    count = mask.sum(0).clamp(min=1)
    return 1 - F.cosine_similarity((s * mask).sum(0) / count, (t * mask).sum(0) / count, 0)


LOSSES = {
    "row": row_loss,
    "map": map_loss,
    "pooled": pooled_loss,
    "mse": mse_loss,
    "kl": kl_loss,
}
