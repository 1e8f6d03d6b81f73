"""The loss that bench_logits measures, in every way it is computed: sizes, tensors, variants.

    LM   sum over answer rows of -log softmax(h W^T)[label]
    KL   sum over answer rows of KL(teacher || student)

Every variant takes the hidden states of all tokens, as a model's decoder returns them, and the
output embedding; it returns (LM, KL), whose sum is differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DTYPES

OURS = "chunked"


@dataclass(frozen=True)
class Case:
    """`rows` answer rows among `tokens`; a student of width `width`, a wider teacher."""

    rows: int
    tokens: int
    vocabulary: int
    width: int
    teacher_width: int
    dtype: str

    @property
    def name(self) -> str:
        shape = f"{self.rows} of {self.tokens} rows x {self.vocabulary}"
        return f"{shape}, d {self.width}/{self.teacher_width}, {self.dtype}"


def gpu_cases(quick: bool) -> list[Case]:
    """In order of value; 151936 is the vocabulary of Qwen."""
    shape = (151936, 2048, 2560, "bf16")
    cases = [Case(8192, 32768, *shape), Case(2048, 8192, *shape)]
    if quick:
        return cases[1:]
    narrow = (151936, 1024, 2048, "bf16")
    return [*cases, Case(8192, 32768, *narrow), Case(2048, 8192, *narrow)]


def cpu_cases(quick: bool) -> list[Case]:
    """Small enough for a minute on one core; the second has more rows than one chunk holds."""
    if quick:
        return [Case(2048, 3072, 2048, 64, 96, "fp32")]
    return [
        Case(256, 512, 32000, 128, 192, "fp32"),
        Case(2048, 3072, 8192, 128, 192, "fp32"),
        Case(64, 128, 151936, 128, 192, "fp32"),
    ]


class Problem:
    """Inputs of one case on the device; weights are scaled to logits of unit variance."""

    def __init__(self, case: Case, device: str):
        dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device)
            return (scale * drawn).to(dtype)

        self.case, self.dtype = case, dtype
        self.hidden = draw(case.tokens, case.width).requires_grad_()
        self.weight = draw(case.vocabulary, case.width, scale=case.width**-0.5).requires_grad_()
        self.teacher_hidden = draw(case.tokens, case.teacher_width)
        self.teacher_weight = draw(
            case.vocabulary, case.teacher_width, scale=case.teacher_width**-0.5
        )
        # Answers stand together, at the end of a sample.
        self.rows = torch.zeros(case.tokens, dtype=torch.bool, device=device)
        self.rows[case.tokens - case.rows :] = True
        self.labels = torch.randint(
            case.vocabulary, (case.rows,), generator=generator, device=device
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Arguments of a variant; the first two are differentiated."""
        teacher = (self.teacher_hidden, self.teacher_weight)
        return self.hidden, self.weight, *teacher, self.rows, self.labels

    def exact(self) -> tuple[Tensor, ...]:
        """The same numbers in float64."""
        return tuple(
            x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for x in self.tensors()
        )


Variant = Callable[..., tuple[Tensor, Tensor]]


def losses_of(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """LM and KL of logits, in their dtype."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    lm = F.nll_loss(log_s, labels, reduction="sum")
    return lm, F.kl_div(log_s, log_t, log_target=True, reduction="sum")


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, as models hand them to their loss; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def dense(
    hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor, rows: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of the answer rows, all held at once, in float32."""
    student, teacher = F.linear(hidden[rows], weight), F.linear(t_hidden[rows], t_weight)
    return losses_of(wide(student), wide(teacher), labels)


def dense_all_rows(
    hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor, rows: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of all tokens, as a model's own forward makes them; then those of the answer rows."""
    student, teacher = F.linear(hidden, weight), F.linear(t_hidden, t_weight)
    return losses_of(wide(student[rows]), wide(teacher[rows]), labels)


def eager_in_dtype(
    hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor, rows: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Every operation in the dtype of the inputs: what the error budget of the tests refers to."""
    student, teacher = F.linear(hidden[rows], weight), F.linear(t_hidden[rows], t_weight)
    return losses_of(student, teacher, labels)


def chunked(
    hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor, rows: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The trainer's own, as cdfast/distill.py calls it."""
    from cdfast.losses import kl_loss_sum, lm_loss_sum

    lm = lm_loss_sum(hidden[rows], weight, labels)
    return lm, kl_loss_sum(hidden[rows], weight, t_hidden[rows], t_weight)


@functools.cache
def compiled_dense() -> Variant:
    """`dense` for static shapes, compiled anew for every case. Loads the compiler."""
    return torch.compile(dense, dynamic=False)


def variants() -> dict[str, Variant]:
    """name -> function of Problem.tensors(); one that cannot run here raises at its first call."""
    return {
        "dense": dense,
        "dense, all rows": dense_all_rows,
        "torch.compile(dense)": lambda *tensors: compiled_dense()(*tensors),
        OURS: chunked,
    }


def whole(run: Variant, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """LM, KL, and the gradient of their sum in the hidden states and in the output embedding."""
    lm, kl = run(*tensors)
    return lm, kl, *torch.autograd.grad(lm + kl, tensors[:2])


def rows_at_once(case: Case) -> int:
    """Most rows whose logits the chunked KL holds at once."""
    from cdfast.losses import KL_ROWS

    return min(case.rows, KL_ROWS)
