"""Oracle of the kernel tests: api.md rewritten with plain loops, one sample at a time.

Shares no code with cdfast_kernels except the layout constructors under test. Works in any dtype, so
that in float64 it is the exact value and in the dtype of the inputs it is eager PyTorch.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cdfast_kernels import VisualLayout
from torch import Tensor

KINDS = ("full", "left", "right", "packed", "segments", "turns")
OBJECTIVES = ("row", "map", "pooled", "mse", "kl")


@dataclass
class Case:
    """A layout, and the same described sample by sample."""

    layout: VisualLayout
    tokens: list[Tensor]  # positions of the live tokens of each sample on its row, ascending
    visual: list[list[bool]]  # of the live tokens
    segment: list[list[int]]
    packed: bool
    shape: tuple[int, ...]

    def take(self, x: Tensor, sample: int) -> Tensor:
        """Live tokens of one sample of a (B, N, ...) or (total, ...) tensor."""
        return x[self.tokens[sample]] if self.packed else x[sample, self.tokens[sample]]

    def visible(self, sample: int) -> Tensor:
        ids = self.segment[sample]
        n = len(ids)
        mask = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            for j in range(i + 1):
                mask[i, j] = ids[i] == ids[j] or ids[j] == 0
        return mask

    def entries(self, sample: int) -> Tensor:
        visual = torch.tensor(self.visual[sample], dtype=torch.bool)
        return self.visible(sample) & visual[None, :]

    @property
    def n_samples(self) -> int:
        return len(self.tokens)


def random_visual(n: int, generator: torch.Generator, text_only: bool = False) -> Tensor:
    """One or two spans of visual tokens, sometimes touching the ends."""
    mask = torch.zeros(n, dtype=torch.bool)
    if n and not text_only:
        for _ in range(int(torch.randint(1, 3, (1,), generator=generator))):
            a, b = torch.randint(0, n + 1, (2,), generator=generator).tolist()
            mask[min(a, b) : max(a, b) + 1] = True
    return mask


def make_case(kind: str, seed: int, batch: int = 3, length: int = 11) -> Case:
    """A random layout; the last sample of a batch has no image."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=g).tolist()
    lengths[0], lengths[1] = length, length - 3
    if kind == "packed":
        return _packed_case([*lengths, 0, 1], g)
    live = torch.ones(batch, length, dtype=torch.bool)
    if kind in ("left", "right", "turns"):
        for b, n in enumerate(lengths):
            live[b] = torch.arange(length) >= length - n
        if kind == "right":
            live = live.flip(1)
    visual = torch.stack([random_visual(length, g, b == batch - 1) for b in range(batch)])
    segment = torch.zeros(batch, length, dtype=torch.int64)
    if kind in ("segments", "turns"):
        # "turns" has the image in a shared prefix; "segments" starts without a prefix.
        steps = torch.rand(batch, length, generator=g) < 0.25
        segment = steps.cumsum(1) + (kind == "segments")
        if kind == "turns":
            segment[:, : length // 2] = 0
        segment = torch.where(live, segment, 7)
    mask = live if kind in ("left", "right", "turns") else None
    if kind in ("segments", "turns"):
        layout = VisualLayout.from_segments(segment, visual, mask)
    else:
        layout = VisualLayout.from_mask(visual, mask)
    return Case(
        layout,
        [row.nonzero().flatten() for row in live],
        [visual[b][live[b]].tolist() for b in range(batch)],
        [segment[b][live[b]].tolist() for b in range(batch)],
        False,
        (batch, length),
    )


def _packed_case(lengths: list[int], g: torch.Generator) -> Case:
    spans = [random_visual(n, g, b == 2) for b, n in enumerate(lengths)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    layout = VisualLayout.from_packed(ends.to(torch.int32), torch.cat(spans))
    return Case(
        layout,
        [torch.arange(int(a), int(b)) for a, b in itertools.pairwise(ends)],
        [s.tolist() for s in spans],
        [[0] * n for n in lengths],
        True,
        (int(ends[-1]),),
    )


def random_qkv(
    case: Case, seed: int, heads=4, kv_heads=2, dim=32, dtype=torch.float64, spread=1.5
) -> list[Tensor]:
    g = torch.Generator().manual_seed(1000 + seed)

    def draw(h: int) -> Tensor:
        x = torch.randn(*case.shape, h, dim, generator=g, dtype=torch.float64)
        return (spread * x).to(dtype).requires_grad_()

    return [draw(heads), draw(kv_heads), draw(kv_heads)]


def plain_probs(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax probabilities (H, n, n) and LSE (H, n) of one sample, q (n, H, d), k (n, Hk, d)."""
    heads = q.shape[1]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1)


def plain_attention(case: Case, q, k, v, scale=None) -> tuple[Tensor, Tensor]:
    """out and lse in the layout of the public function; 0 and -inf at padding."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = q.shape[-2]
    out = torch.zeros_like(q)
    rows = torch.full((*case.shape, heads), float("-inf"), dtype=q.dtype)
    for s, tokens in enumerate(case.tokens):
        if not len(tokens):
            continue
        probs, lse = plain_probs(case.take(q, s), case.take(k, s), case.visible(s), scale)
        values = case.take(v, s).repeat_interleave(heads // v.shape[-2], dim=1)
        index = (tokens,) if case.packed else (torch.full_like(tokens, s), tokens)
        out = out.index_put(index, torch.einsum("hij,jhd->ihd", probs, values))
        rows = rows.index_put(index, lse.transpose(0, 1))
    return out, rows.transpose(-1, -2)


def plain_maps(case: Case, q, k, scale=None) -> list[Tensor]:
    """Head mean on visible visual entries, per sample (n, n) over the live tokens."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    maps = []
    for s in range(case.n_samples):
        probs, _ = plain_probs(case.take(q, s), case.take(k, s), case.visible(s), scale)
        maps.append(probs.mean(0) * case.entries(s))
    return maps


def authors_loss(s: Tensor, t: Tensor) -> Tensor:
    """The authors' loss on the visual x visual squares of one sample."""
    keep = (s <= s.mean() + s.std()) & (t <= t.mean() + t.std())
    s_kept, t_kept = s * keep, t * keep
    mask = (t_kept != 0).to(s.dtype)
    count = mask.sum(0).clamp(min=1)
    s_vector = (s_kept * mask).sum(0) / count
    t_vector = (t_kept * mask).sum(0) / count
    return 1 - F.cosine_similarity(s_vector, t_vector, dim=0)


def plain_sample_loss(objective: str, s: Tensor, t: Tensor, entries: Tensor, visual: list[bool]):
    """Loss of one sample, or None for a sample without rows."""
    rows = [i for i in range(len(entries)) if entries[i].any()]
    if not rows:
        return None
    zero = s.sum() * 0
    if objective == "map":
        a, b = s[entries], t[entries]
        return 1 - a @ b / (a.norm() * b.norm()) if a.any() and b.any() else zero
    if objective == "mse":
        return ((s[entries] - t[entries]) ** 2).mean()
    if objective == "pooled":
        index = torch.tensor(visual, dtype=torch.bool).nonzero().flatten()
        if len(index) < 2:
            return zero
        return authors_loss(s[index][:, index], t[index][:, index])
    losses = []
    for i in rows:
        a, b = s[i][entries[i]], t[i][entries[i]]
        if len(a) == 1 or not b.any():
            losses.append(zero)
        elif objective == "row":
            losses.append(1 - a @ b / (a.norm() * b.norm()) if a.any() else zero)
        else:
            # float16 cannot hold the floor: eager takes the divergence in float32, like autocast.
            a, b = (x.float() if x.dtype == torch.float16 else x for x in (a, b))
            a = a.clamp(min=torch.finfo(torch.float32).tiny)
            a, b = a / a.sum(), b / b.sum()
            losses.append(sum(y * (y / x).log() for x, y in zip(a, b) if y > 0))
    return sum(losses) / len(rows)


def plain_loss(case: Case, objective: str, maps, targets, reduction: str = "mean") -> Tensor:
    zero = sum(m.sum() for m in maps) * 0
    losses, n_images = [], 0
    for s, (student, teacher) in enumerate(zip(maps, targets)):
        loss = plain_sample_loss(objective, student, teacher, case.entries(s), case.visual[s])
        n_images += loss is not None
        losses.append(zero if loss is None else loss + zero)
    stacked = torch.stack(losses)
    if reduction == "none":
        return stacked
    return stacked.sum() if reduction == "sum" else stacked.sum() / max(n_images, 1)


def dense_maps(case: Case, visual_map) -> list[Tensor]:
    """to_dense() cut to the live tokens of each sample."""
    dense = visual_map.to_dense()
    if case.packed:
        return list(dense)
    return [dense[s][t][:, t] for s, t in enumerate(case.tokens)]
