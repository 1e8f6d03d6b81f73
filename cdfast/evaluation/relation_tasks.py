"""Yes/no questions about relations between objects: R-Bench (image level) and Reefknot."""

from __future__ import annotations

from pathlib import Path

from cdfast.evaluation.caption_tasks import YES_NO, ask
from cdfast.evaluation.files import (
    LeftOut,
    id_of,
    image_file,
    image_of,
    open_records,
    read_ids,
    records_of,
    text_of,
    yes_or_no,
)
from cdfast.images import DataError
from cdfast.miniature.suites import Item

RBENCH_SUBSETS = (1, 2, 3, 4, 5)
_INSTRUCTION = " Please answer yes or no."


def _asked(question: str) -> str:
    """The question with the instruction, which some files have in it already."""
    return question if "yes or no" in question.lower() else question + _INSTRUCTION


def read_rbench(folder: Path, left_out: LeftOut) -> list[Item]:
    """R-Bench, image level: `image-level_filterd.json` and `image-level_ids_1.json` to `_5.json`.

    The questions are a JSON list of `question_id`, `image`, `text` and `label` ("yes" or "no"),
    under the authors' spelling of the file's name; the five lists of `question_id`s are the random
    subsets with as many positive as negative questions over which the authors average. Questions
    in none of them are left aside. Images (nocaps, of Open Images) in `images/`.

    Source: Wu et al. 2024, arXiv 2406.16449; eval.py in the authors' repository.

    Raises:
        DataError: a subset names a question that the file does not have (and that was not left
            out as broken).
    """
    lists = {
        s: [str(i) for i in read_ids(folder / f"image-level_ids_{s}.json")] for s in RBENCH_SUBSETS
    }
    members: dict[str, list[str]] = {}
    for subset, ids in lists.items():
        for name in dict.fromkeys(map(str, ids)):
            members.setdefault(name, []).append(f"subset {subset}")
    file = open_records(folder / "image-level_filterd.json")
    items, seen = [], set()
    for _, source, record in records_of(file, left_out, ids="question_id"):
        with left_out.record():
            name = id_of(record, "question_id", source)
            if name in seen:
                raise DataError(
                    source=source,
                    field="question_id",
                    expected="a number that stands once in the file",
                    got=name,
                    remedy="remove one of the two records, or set --on-error skip",
                )
            seen.add(name)
            if name not in members:
                continue
            image = image_of(record, "image", source, folder)
            answer = yes_or_no(record, "label", source)
            text = _asked(text_of(record, "text", source))
            question = ask("yes_no", image, text, YES_NO, answer)
            items.append(Item(name, tuple(members[name]), image.name, (question,), source))
    unknown = next((name for name in members if name not in seen), None)
    if unknown is not None and not left_out.counts:
        raise DataError(
            source=f"{folder.name}/image-level_ids_{members[unknown][0][-1]}.json",
            field="file",
            expected="ids of questions in image-level_filterd.json",
            got=unknown,
            remedy="use the id lists that belong to this question file",
            reason="file unreadable",
        )
    return items


def read_reefknot(folder: Path, left_out: LeftOut) -> list[Item]:
    """Reefknot's yes/no questions: `YESNO.jsonl`.

    `image_id` (of Visual Genome, with or without `.jpg`), `query_prompt`, `label` ("yes" or "no")
    and `relation_type` ("perception" or "cognitive"), which is a subset. Images in `images/`, or
    in `VG_100K/` and `VG_100K_2/`.

    Source: Zheng et al. 2024, arXiv 2408.09429.
    """
    items = []
    file = open_records(folder / "YESNO.jsonl")
    for index, source, record in records_of(file, left_out, ids="image_id"):
        with left_out.record():
            name = id_of(record, "image_id", source).removesuffix(".jpg")
            image = image_file(f"{name}.jpg", folder, "VG_100K", "VG_100K_2")
            text = _asked(text_of(record, "query_prompt", source))
            answer = yes_or_no(record, "label", source)
            subset = text_of(record, "relation_type", source)
            question = ask("yes_no", image, text, YES_NO, answer)
            items.append(Item(str(index), (subset,), image.name, (question,), source))
    return items
