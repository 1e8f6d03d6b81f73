"""The preference loss of LLaVA-MoD: KTO on pairs of answers, with the teacher as the reference.

With r = log pi_student(y|x) - log pi_teacher(y|x), summed over the tokens of an answer y:

    L = 1/2 mean over pairs of (1 - sigmoid(beta (r_chosen - KL_rejected)))
                             + (1 - sigmoid(beta (KL_chosen - r_rejected)))
    KL_y = max(0, mean of r_y over the pairs of one forward pass on all ranks), without gradient

Source: LLaVA-MoD (arXiv 2408.15881), preference distillation; the loss is `kto_pair` of its
authors' DPOTrainer, which is that of TRL up to 0.9. Two things are as in the KTO paper (arXiv
2402.01306) and TRL's KTOTrainer instead, and not as in that code: no gradient flows through KL, and
its mean is over all ranks (theirs is over one rank's pairs, in their script one pair).

Maintained implementations do not compute it. TRL has dropped `kto_pair` for `KTOTrainer`, whose one
KL is estimated on answers to other questions and costs a third forward pass. Liger's
`LigerFusedLinearKTOLoss` takes KL as given, so log-probabilities of all answers must be there
before it computes them a second time; it also wants padded sequences. Given KL, its loss and
gradients are those of this module (tests/cdfast/test_preference.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cdfast.losses import answer_rows, next_labels

# Rows whose logits are held at once.
CHUNK = 1024


def answer_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over its answer tokens of each row's log softmax(hidden W^T)[token].

    Logits exist for `CHUNK` answer tokens at a time: backward makes them again.

    Args:
        hidden: (B, N, d) last hidden states.
        weight: (V, d) output embedding.
        labels: (B, N) int64, not shifted; -100 outside answers.

    Returns:
        (B,) in float32 (float64 for float64), 0 for a row without answer tokens.
    """
    rows = answer_rows(labels)
    chosen, tokens = hidden[rows], next_labels(labels, rows)
    parts = [
        checkpoint(_log_probs, h, weight, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(chosen.split(CHUNK), tokens.split(CHUNK))
    ]
    each = torch.cat(parts)
    # Not index_add, whose order of summation on a GPU changes from run to run.
    return each.new_zeros(rows.shape).masked_scatter(rows, each).sum(1)


def _log_probs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(wide, tokens, reduction="none")


def reference_kl(ratios: Tensor) -> Tensor:
    """What a forward pass says of KL(student || teacher) on the chosen and the rejected answers.

    Args:
        ratios: (ranks, 3): for each rank the sum of r over its chosen answers, that over its
            rejected ones, and its number of pairs. A rank whose sums are not finite is left out:
            its own loss shows it, and those of the others stay what they are.

    Returns:
        (2,) KL of chosen and rejected answers, without gradient.
    """
    ratios = ratios.detach()
    finite = ratios.isfinite().all(1, keepdim=True)
    total = torch.where(finite, ratios, torch.zeros_like(ratios)).sum(0)
    return (total[:2] / total[2].clamp_min(1)).clamp_min(0)


def kto_pair_sum(ratios: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Sum over pairs of the mean of both answers' losses; see the module's text.

    Args:
        ratios: (2B,) r of the chosen answers, then of the rejected ones.
        kl: (2,) of `reference_kl`.
        beta: how soon the loss saturates as the student leaves the teacher, above 0.

    Returns:
        Scalar.
    """
    chosen, rejected = ratios.chunk(2)
    losses = torch.sigmoid(-beta * (chosen - kl[1])) + torch.sigmoid(-beta * (kl[0] - rejected))
    return losses.sum() / 2


def larger_reward_sum(ratios: Tensor) -> Tensor:
    """Number of pairs whose chosen answer has the larger reward beta r; ratios as above."""
    chosen, rejected = ratios.detach().chunk(2)
    return (chosen > rejected).sum()
