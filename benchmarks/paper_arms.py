"""The tables of the paper in miniature: which runs each has, as recipes and options.

An arm is a recipe, the options that a user would type behind it, and its steps. Arms
are named once and may be in several tables: one run serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Test scenes that no setting was chosen on and no earlier number is of.
EVALUATION = {"evaluate_split": "test", "evaluate_seed": 20261124}
# Of the stages of the long runs: captions, which take long, are asked from the third on.
CURVE_STEPS = (100, 400, 3400, 100)
# Of SFT once more: after CURVE_STEPS one of its five seeds had only begun to leave chance.
LONGER_STEPS = (100, 400, 7400, 100)
CURVE_QUESTIONS = 30
EQUAL_COMPUTE = "equal compute"
_KD = {"taf": False, "alignment_weight": 0}
_LM = {**_KD, "kl_weight": 0}


@dataclass(frozen=True)
class Arm:
    """One system or setting.

    Args:
        label: in tables.
        recipe: name of a shipped recipe.
        options: as on the command line of cdfast.train.
        steps: factor of every stage's steps; or the steps of each stage; or EQUAL_COMPUTE: as many
            as cost the counted operations of the arm `compute_of`.
        curve: whether it is measured during training as well.
    """

    label: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: float | tuple[int, ...] | str = 1.0
    compute_of: str = ""
    curve: bool = False


@dataclass(frozen=True)
class Table:
    """Arms side by side.

    Args:
        letter: of the issue.
        title: above it.
        arms: their names, in the order of the rows.
        reference: arm that differences are against.
        note: what this table's rows do not say themselves.
        teacher_of: arm whose teacher has a row, and with which similarity is shown; none: no row.
        curve: whether it is drawn over training steps.
        also: further differences, below the rows: an arm, and the arm that it is against.
    """

    letter: str
    title: str
    arms: tuple[str, ...]
    reference: str
    note: str = ""
    teacher_of: str = ""
    curve: bool = False
    also: tuple[tuple[str, str], ...] = ()


# Behind every table that has a teacher's rows: what alignment copies is what was supervised.
TEACHERS = (
    "Teachers: `miniature` and `miniature-photos` were trained with privileged supervision of "
    "their attention maps (ground-truth boxes), `miniature-unprivileged` (table g1) by language "
    "modelling alone."
)

ARMS: dict[str, Arm] = {
    "sft": Arm("SFT", "miniature-sft"),
    "sft-equal-compute": Arm(
        "SFT at equal compute", "miniature-sft", steps=EQUAL_COMPUTE, compute_of="compodistill"
    ),
    "llavadi": Arm("LLaVADI", "miniature-llavadi"),
    "llava-kd": Arm("LLaVA-KD", "miniature-llava-kd"),
    "llava-mod": Arm("LLaVA-MoD dense", "miniature-llava-mod"),
    "compodistill": Arm("CompoDistill, paper", "miniature"),
    "compodistill-weight-1": Arm(
        "CompoDistill, paper, weight 1", "miniature", {"alignment_weight": 1}
    ),
    "official": Arm("CompoDistill, official", "miniature-official"),
    "kd": Arm("KD: neither VAT nor TAF", "miniature", _KD),
    "vat": Arm("VAT", "miniature", {"taf": False}),
    "taf": Arm("TAF, no alignment", "miniature", {"alignment_weight": 0}),
    "mse": Arm("MSE", "miniature", {"objective": "mse"}),
    "mse-weighed": Arm(
        "MSE, weight 4000", "miniature", {"objective": "mse", "alignment_weight": 4000}
    ),
    "kl": Arm("KL", "miniature", {"objective": "kl"}),
    "early": Arm("early", "miniature", {"layers": "early"}),
    "later": Arm("later", "miniature", {"layers": "later"}),
    "all": Arm("all", "miniature", {"layers": "all"}),
    "simple": Arm("simple", "miniature", {"layers": "all", "matching": "simple"}),
    "adaptive": Arm("adaptive", "miniature", {"layers": "all", "matching": "adaptive"}),
    "sft-long": Arm("SFT", "miniature-sft", steps=CURVE_STEPS, curve=True),
    "sft-longer": Arm(
        f"SFT, {sum(LONGER_STEPS):,} steps", "miniature-sft", steps=LONGER_STEPS, curve=True
    ),
    "kd-long": Arm("KD", "miniature", _KD, CURVE_STEPS, curve=True),
    "compodistill-long": Arm("CompoDistill, paper", "miniature", {}, CURVE_STEPS, curve=True),
    "kd-unprivileged": Arm("KD", "miniature", {**_KD, "teacher": "miniature-unprivileged"}),
    "compodistill-unprivileged": Arm(
        "CompoDistill, paper", "miniature", {"teacher": "miniature-unprivileged"}
    ),
    "sft-photos": Arm("SFT", "miniature-photos", _LM),
    "kd-photos": Arm("KD", "miniature-photos", _KD),
    "compodistill-photos": Arm("CompoDistill, paper", "miniature-photos"),
}
TABLES: dict[str, Table] = {
    "main": Table(
        "a",
        "The systems",
        (
            "sft",
            "sft-equal-compute",
            "llavadi",
            "llava-kd",
            "llava-mod",
            "compodistill",
            "compodistill-weight-1",
            "official",
        ),
        "sft",
        "520 steps, 300 of them with captions, are where CR begins to leave chance without "
        "alignment, in some seeds: those rows are not ranked by it, and table f says how it goes "
        "on. SFT at equal compute has more steps. Steps, optimizer "
        "and learning rates of all rows are CompoDistill's; LLaVA-MoD's preference stage has a "
        "rate of its own. The other systems' losses have their sources' "
        "weights; CompoDistill's alignment has weight 4 here, taken over from first experiments on "
        "such scenes, and 1 in the recipes for real models and in one row. Official aligns maps "
        "pooled over image rows; what was supervised in this teacher, and what similarity is of, "
        "are text rows. It sums its two layers, so its alignment weighs twice as much.",
        teacher_of="compodistill",
        also=(("compodistill", "sft-equal-compute"), ("compodistill", "compodistill-weight-1")),
    ),
    "vat-taf": Table(
        "b",
        "VAT and TAF",
        ("kd", "vat", "taf", "compodistill"),
        "kd",
        also=(("compodistill", "vat"), ("compodistill", "taf")),
    ),
    "objective": Table(
        "c",
        "Alignment objective",
        ("taf", "mse", "mse-weighed", "kl", "compodistill"),
        "taf",
        "All objectives have the weight that was chosen for the cosine, 4. The loss of MSE, a mean "
        "over map entries, is some hundreds of times smaller there, so it has a second row: the "
        "best of 1200, 4000 and 12000 by one run each on validation scenes.",
        also=(("kl", "compodistill"), ("mse-weighed", "compodistill"), ("kl", "mse-weighed")),
    ),
    "layers": Table(
        "d",
        "Aligned layers",
        ("early", "compodistill", "later", "all"),
        "compodistill",
        "The supervised heads of the teacher are in its two intermediate layers, so which layers "
        "are best follows from how it was trained. Similarity is that of the layers which the row "
        "aligns: it is not of the same layers in all rows.",
    ),
    "matching": Table(
        "e",
        "Layer matching",
        ("simple", "adaptive", "all"),
        "all",
        "All layers are aligned, 4 of the student with 6 of the teacher. Of the intermediate ones "
        "both have 2: group matching is simple there. Group averages the teacher's two supervised "
        "layers with their neighbours, simple and adaptive may match each with a layer of its own. "
        "Adaptive chooses when alignment begins, after 20 steps of the projector alone, and keeps "
        "its choice. Similarity is that of each row's own matches.",
    ),
    "steps": Table(
        "f",
        "Accuracy against steps",
        ("sft-long", "sft-longer", "kd-long", "compodistill-long"),
        "sft-long",
        f"The stages have {', '.join(map(str, CURVE_STEPS[:-1]))} and {CURVE_STEPS[-1]} steps; "
        f"SFT has a second row with {LONGER_STEPS[2]} in the third, in case that its seeds need "
        "more. Captions are asked after the first "
        f"{sum(CURVE_STEPS[:2])}. The rows are the end, on the test scenes; the curves, and the "
        "first of their steps at which a seed has a CR of 0.9 (median of the seeds, first and "
        "last), are of validation scenes, during training. The rate of the long stage falls to 0, "
        "so a curve that flattens only at its end need not have converged.",
        curve=True,
        also=(
            ("compodistill-long", "kd-long"),
            ("kd-long", "sft-long"),
            ("compodistill-long", "sft-longer"),
        ),
    ),
    "unprivileged": Table(
        "g1",
        "Teacher without privileged attention supervision",
        ("sft", "kd-unprivileged", "compodistill-unprivileged"),
        "sft",
        "SFT is the run of (a): it has no teacher.",
        teacher_of="compodistill-unprivileged",
        also=(("compodistill-unprivileged", "kd-unprivileged"),),
    ),
    "photos": Table(
        "g2",
        "Scenes of real picture content",
        ("sft-photos", "kd-photos", "compodistill-photos"),
        "sft-photos",
        "SFT has the stages of the recipe with the LM loss alone.",
        teacher_of="compodistill-photos",
        also=(("compodistill-photos", "kd-photos"),),
    ),
}
# Names of rows whose arm has another name in its table.
ROW_LABELS = {
    ("vat-taf", "kd"): "neither",
    ("vat-taf", "taf"): "TAF",
    ("vat-taf", "compodistill"): "VAT + TAF",
    ("objective", "taf"): "none",
    ("objective", "compodistill"): "cosine",
    ("layers", "compodistill"): "intermediate",
    ("matching", "all"): "group",
}
