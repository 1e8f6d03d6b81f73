"""Benchmarks of captions: SugarCrepe, SADE-format files, Winoground and BiVLC.

Which of two captions fits an image is asked in both orders. Whether a caption fits an image at all
is asked for every image and caption of a pair, which is what the text, image and group scores of
Winoground and BiVLC are made of. A prompt never holds more than one image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdfast.evaluation.files import (
    LeftOut,
    StoredImage,
    image_file,
    image_of,
    open_records,
    read_object,
    records_of,
    text_of,
)
from cdfast.images import DataError
from cdfast.miniature.scenes import CR_KINDS
from cdfast.miniature.suites import Item, Question

CHOICE_PROMPT = (
    "Which caption fits the image?\n(A) {}\n(B) {}\n"
    "Answer with the option's letter from the given choices directly."
)
MATCH_PROMPT = 'Does this figure show "{}"? Please answer yes or no.'
LETTERS = ("A", "B")
YES_NO = ("Yes", "No")


def ask(
    kind: str,
    image: Any,
    text: str,
    choices: tuple[str, ...],
    answer: str,
    options: tuple[str, ...] = (),
    pair: int = 0,
) -> Question:
    """A question about one image, which stands in front of the text."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return Question(kind, "", image, messages, choices, answer, pair, options=options)


def _which(image: Any, right: str, wrong: str, pair: int = 0) -> tuple[Question, Question]:
    """Which caption fits, asked with the right one first and second."""
    orders = ((right, wrong), (wrong, right))
    return tuple(  # type: ignore[return-value]
        ask("choice", image, CHOICE_PROMPT.format(*order), LETTERS, letter, order, pair)
        for order, letter in zip(orders, LETTERS)
    )


def _distinct(right: str, wrong: str, source: str) -> tuple[str, str]:
    if right == wrong:
        raise DataError(
            source=source,
            field="caption",
            expected="two captions that differ",
            got=right,
            remedy="correct the record, or set --on-error skip to leave such records out",
        )
    return right, wrong


def _matching(
    images: tuple[Any, Any], captions: tuple[str, str], source: str
) -> tuple[Question, ...]:
    """The eight questions of two images and their captions.

    Four choices: (image 0, image 1) x both orders. Four matches: (image i, caption j) for ij = 00,
    01, 10, 11.
    """
    _distinct(*captions, source)
    choices = [q for i in (0, 1) for q in _which(images[i], captions[i], captions[1 - i], i)]
    matches = [
        ask("match", images[i], MATCH_PROMPT.format(captions[j]), YES_NO, YES_NO[i != j], pair=i)
        for i in (0, 1)
        for j in (0, 1)
    ]
    return (*choices, *matches)


def read_sugarcrepe(folder: Path, left_out: LeftOut) -> list[Item]:
    """SugarCrepe: seven files, each one JSON object of records.

    `swap_obj.json`, `swap_att.json`, `replace_obj.json`, `replace_att.json`, `replace_rel.json`,
    `add_obj.json`, `add_att.json`, as in the authors' repository: `{"0": {"filename": ...,
    "caption": ..., "negative_caption": ...}, ...}`. Images (COCO val2017) in `images/` or
    `val2017/`.

    Source: Hsieh et al. 2023, arXiv 2306.14610.
    """
    items = []
    for subset in CR_KINDS:
        name = f"{folder.name}/{subset}.json"
        for key, record in read_object(folder / f"{subset}.json").items():
            source = f"{name}, record {key}"
            with left_out.record():
                if not isinstance(record, dict):
                    raise DataError(
                        source=source,
                        field="record",
                        expected="an object",
                        got=record,
                        remedy="correct the record, or set --on-error skip to leave it out",
                    )
                image = image_file(text_of(record, "filename", source), folder, "val2017")
                captions = _distinct(
                    text_of(record, "caption", source),
                    text_of(record, "negative_caption", source),
                    source,
                )
                questions = _which(image, *captions)
                items.append(Item(f"{subset}/{key}", (subset,), image.name, questions, source))
    return items


def read_sade(folder: Path, left_out: LeftOut) -> list[Item]:
    """SADE's caption pairs in a file of the user's own: no public data was found.

    `sade.jsonl` (or `sade.json`, a list): `image`, `caption`, `negative_caption`, and optionally
    `type`, which is a subset. Images in `images/`.

    Source: Ma et al. 2024, arXiv 2308.10509 (the benchmark; the format is this project's).
    """
    path = folder / "sade.json"
    file = open_records(path if path.exists() else folder / "sade.jsonl")
    items = []
    for index, source, record in records_of(file, left_out):
        with left_out.record():
            image = image_of(record, "image", source, folder)
            captions = _distinct(
                text_of(record, "caption", source),
                text_of(record, "negative_caption", source),
                source,
            )
            subset = text_of(record, "type", source) if "type" in record else "all"
            questions = _which(image, *captions)
            items.append(Item(str(index), (subset,), image.name, questions, source))
    return items


def read_winoground(folder: Path, left_out: LeftOut) -> list[Item]:
    """Winoground: `examples.jsonl` and `images/`, as on the hub (`facebook/winoground`, data/).

    `image_0`, `image_1` (names without `.png`), `caption_0`, `caption_1`, and `collapsed_tag`,
    which is a subset.

    Source: Thrush et al. 2022, arXiv 2204.03162.
    """
    items = []
    for index, source, record in records_of(open_records(folder / "examples.jsonl"), left_out):
        with left_out.record():
            names = [text_of(record, f"image_{i}", source) for i in (0, 1)]
            names = [name if Path(name).suffix else f"{name}.png" for name in names]
            images = (image_file(names[0], folder), image_file(names[1], folder))
            captions = (text_of(record, "caption_0", source), text_of(record, "caption_1", source))
            tag = text_of(record, "collapsed_tag", source) if "collapsed_tag" in record else "all"
            questions = _matching(images, captions, source)
            items.append(Item(str(index), (tag,), str(index), questions, source))
    return items


def read_bivlc(folder: Path, left_out: LeftOut) -> list[Item]:
    """BiVLC: the parquet files of `imirandam/BiVLC` on the hub, in `data/` or beside it.

    `image` and `negative_image` (image columns), `caption`, `negative_caption`, `type` and
    `subtype` (such as "replace" and "obj"), which together are a subset. A pair of images is a
    cluster of its own.

    Source: Miranda et al. 2024, arXiv 2406.09952.
    """
    paths = sorted([*folder.glob("*.parquet"), *(folder / "data").glob("*.parquet")])
    items = []
    for path in paths or [folder / "test.parquet"]:
        file = open_records(path)
        for index, source, record in records_of(file, left_out):
            with left_out.record():
                images = (
                    StoredImage(file.records, index, "image"),
                    StoredImage(file.records, index, "negative_image"),
                )
                for image in images:
                    image.read(source)
                captions = (
                    text_of(record, "caption", source),
                    text_of(record, "negative_caption", source),
                )
                kind = f"{text_of(record, 'type', source)}_{text_of(record, 'subtype', source)}"
                name = f"{path.stem}/{index}"
                questions = _matching(images, captions, source)
                items.append(Item(name, (kind.lower(),), name, questions, source))
    return items
