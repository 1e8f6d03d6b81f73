"""The terms of the training loss: what each is called, counted by and measured in.

The one list that options (`<name>_weight`), logs (`loss_<name>`), metrics, plots and reports go by.
How a term is computed is in losses.py and distill.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What a term is a mean over, counted over the whole global step.
ANSWER_ROWS, VISUAL_ROWS, IMAGE_SAMPLES = "answer rows", "visual rows", "samples with an image"
PAIRS = "pairs of answers"
# A rate, not a loss: how many pairs have the larger reward on the chosen answer.
PREFERENCE_ACCURACY = "preference_accuracy"


@dataclass(frozen=True)
class Term:
    """One term L_name of L = sum of name_weight L_name.

    Attributes:
        name: of its weight, its log entry and its metric.
        label: in tables and on axes, before "loss".
        counted: what its sum is divided by.
        unit: of its value; None where that depends on the recipe.
        needs_teacher: whether it compares the student with a teacher.
    """

    name: str
    label: str
    counted: str
    unit: str | None
    needs_teacher: bool = True

    @property
    def weight(self) -> str:
        return f"{self.name}_weight"

    @property
    def logged(self) -> str:
        return f"loss_{self.name}"


TERMS = (
    Term("lm", "LM", ANSWER_ROWS, "nats per answer token", needs_teacher=False),
    Term("kl", "KL", ANSWER_ROWS, "nats per answer token"),
    Term("alignment", "alignment", IMAGE_SAMPLES, None),
    Term("hidden", "hidden-state", ANSWER_ROWS, None),
    Term("visual_kl", "visual KL", VISUAL_ROWS, "nats per visual token"),
    Term("relation", "relation", IMAGE_SAMPLES, "1 − cosine"),
    Term("preference", "preference", PAIRS, "0 to 1"),
)
# CompoDistill's own: tables have them even where they are 0.
OWN = ("lm", "kl", "alignment")
LOSS_NAMES = tuple(term.name for term in TERMS)
WEIGHTS = tuple(term.weight for term in TERMS)
TEACHER_WEIGHTS = tuple(term.weight for term in TERMS if term.needs_teacher)
KL_OBJECTIVES = ("kl", "soft_ce")
HIDDEN_OBJECTIVES = ("cosine", "mse")


def weighted_terms(stage: Any) -> str:
    """The terms of a stage of a recipe with their weights: LM 1 + KL 1."""
    used = [(term.label, getattr(stage, term.weight)) for term in TERMS]
    return " + ".join(f"{label} {weight:g}" for label, weight in used if weight)
