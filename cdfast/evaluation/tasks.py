"""The evaluation tasks: their files, what is measured, and the averages they count in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdfast.evaluation.caption_tasks import read_bivlc, read_sade, read_sugarcrepe, read_winoground
from cdfast.evaluation.files import LeftOut, StoredImage
from cdfast.evaluation.relation_tasks import read_rbench, read_reefknot
from cdfast.images import DataError, check_image
from cdfast.miniature.scenes import TOYS, World
from cdfast.miniature.suites import Item, Question, miniature_suite
from cdfast.miniature.worlds import PHOTOS


@dataclass(frozen=True)
class Task:
    """What `--tasks` can name.

    Args:
        name: as on the command line; also the folder of its files below `--data`.
        title: as in tables.
        family: "choice" (accuracy; orders of a question averaged), "matching" (choice, text, image
            and group score), "yes_no" (F1, yes-ratio).
        headline: the metric in the table of all models.
        read: reads its files; None: the miniature, which needs none.
        group: the average it counts in; None: in none.
        over_subsets: the score is the mean over subsets; otherwise all records count alike.
        world: of the miniature's scenes; None for every other task.
    """

    name: str
    title: str
    family: str
    headline: str
    read: Callable[[Path, LeftOut], list[Item]] | None = None
    over_subsets: bool = False
    world: World | None = None


# Group -> the tasks of its average in the paper.
AVERAGES = {
    "CR": ("sugarcrepe", "sade", "bivlc", "winoground"),
    "VQA": ("vqav2", "vizwiz", "gqa", "textvqa", "mme"),
}

TASKS = {
    task.name: task
    for task in (
        Task("sugarcrepe", "SugarCrepe", "choice", "accuracy", read_sugarcrepe, True),
        Task("sade", "SADE", "choice", "accuracy", read_sade),
        Task("bivlc", "BiVLC", "matching", "choice", read_bivlc),
        Task("winoground", "Winoground", "matching", "choice", read_winoground),
        Task("rbench", "R-Bench", "yes_no", "f1", read_rbench, True),
        Task("reefknot", "Reefknot", "yes_no", "f1", read_reefknot),
        *(
            Task(f"{name}_{group}", title, "choice", "accuracy", None, True, world)
            for name, group, title, world in (
                ("miniature", "cr", "miniature CR", TOYS),
                ("miniature", "vqa", "miniature VQA", TOYS),
                ("miniature_photos", "cr", "miniature-photos CR", PHOTOS),
                ("miniature_photos", "vqa", "miniature-photos VQA", PHOTOS),
            )
        ),
        Task("vqav2", "VQAv2", "delegated", "score"),
        Task("gqa", "GQA", "delegated", "score"),
        Task("textvqa", "TextVQA", "delegated", "score"),
        Task("vizwiz", "VizWiz", "delegated", "score"),
        Task("mme", "MME", "delegated", "score"),
        Task("pope", "POPE", "delegated", "score"),
    )
}
SHORTHANDS = {
    "miniature": ("miniature_cr", "miniature_vqa"),
    "miniature-photos": ("miniature_photos_cr", "miniature_photos_vqa"),
    "cr": AVERAGES["CR"],
    "vqa": AVERAGES["VQA"],
    "relations": ("rbench", "reefknot"),
}


def chosen_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks that the command line names, each once.

    Raises:
        ValueError: an unknown name.
    """
    listed: list[str] = []
    for name in names:
        if name not in TASKS and name not in SHORTHANDS:
            known = ", ".join([*TASKS, *SHORTHANDS])
            raise ValueError(f"--tasks: expected some of {known}; got {name!r}")
        listed += SHORTHANDS.get(name, (name,))
    return [TASKS[name] for name in dict.fromkeys(listed)]


def load_items(
    task: Task,
    data: Path | None,
    left_out: LeftOut,
    *,
    limit: int | None = None,
    split: str = "test",
    per_kind: int = 300,
    vqa_per_kind: int = 150,
    seed: int = 0,
) -> list[Item]:
    """The records of a task; the place, format and size of every image is checked.

    Args:
        task: one of `TASKS` that is not delegated.
        data: the folder that holds the task's folder; None for the miniature.
        left_out: raises or counts records that cannot be used.
        limit: only the first so many records of every subset.
        split, per_kind, vqa_per_kind, seed: of the miniature.

    Raises:
        DataError: a missing or damaged file; a broken record, unless `left_out` skips; no record.
        ValueError: no data folder for a task that needs one.
    """
    if task.world is not None:
        vqa = task.name.endswith("_vqa")
        sizes = (1, vqa_per_kind) if vqa else (per_kind, 1)
        questions = miniature_suite(split, *sizes, seed, task.world)
        items = items_of([q for q in questions if q.group == ("VQA" if vqa else "CR")])
        return _first(items, limit)
    assert task.read is not None
    if data is None:
        raise ValueError(
            f"--data: expected the folder that holds {task.name}/ with the files of {task.title}; "
            "got none. See docs/evaluation.md for the files of every task."
        )
    items = []
    for item in _first(task.read(data / task.name, left_out), limit):
        with left_out.record():
            for question in {id(q.image): q for q in item.questions}.values():
                _check(question, item.source)
            items.append(item)
    if not items:
        raise DataError(
            source=f"{task.title} ({data / task.name})",
            field="records",
            expected="at least one that can be used",
            got=f"none: {dict(left_out.counts)}",
            remedy="correct the files; without --on-error skip the first error is shown",
            reason="file unreadable",
        )
    return items


def _check(question: Question, source: str) -> None:
    image = question.image
    check_image(image.read(source) if isinstance(image, StoredImage) else image, source)


def _first(items: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` items of every subset; an item of several counts in its first one."""
    taken: Counter[str] = Counter()
    kept = []
    for item in items:
        if limit is None or taken[item.subsets[0]] < limit:
            kept.append(item)
            taken[item.subsets[0]] += 1
    return kept


def items_of(questions: Sequence[Question]) -> list[Item]:
    """Questions of the miniature as items: the orders of a pair together."""
    grouped: dict[tuple[str, int], list[Question]] = {}
    for question in questions:
        grouped.setdefault((question.kind, question.pair), []).append(question)
    return [
        Item(f"{kind}/{pair}", (kind,), f"{kind}/{pair}", tuple(members), f"{kind}, pair {pair}")
        for (kind, pair), members in grouped.items()
    ]
