"""Asking a model the questions of a task: results written as they come, and gone on with.

A results file (JSON lines) begins with what the results depend on: the model's files, the task, the
dtype and the options. Behind it stands one line for each record, written in one piece when the
record is done. A file of another model or of other options is refused, and so is a line whose
record has changed since; a line that an interruption cut short is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cdfast.config import EMBEDDED_TEACHERS
from cdfast.encoding import Sample, check_sample
from cdfast.evaluation.files import LeftOut, StoredImage
from cdfast.evaluation.scoring import likelihoods, replies
from cdfast.images import DataError, load_image
from cdfast.manifest import describe
from cdfast.miniature.suites import Item, Question
from cdfast.synthetic import teacher_path

FORMAT = 1
SCORINGS = ("both", "likelihood", "generation")
_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|json|jinja|model|txt|py)")


class ResultsError(ValueError):
    """A results file that cannot be gone on with."""


def model_identity(name: str, config: Any) -> dict[str, Any]:
    """What tells a model from every other one: a digest of its files, or its commit on the hub."""
    folder = teacher_path(name) if name in EMBEDDED_TEACHERS else Path(name)
    if not folder.is_dir():
        return {"name": name, "commit": getattr(config, "_commit_hash", None)}
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and _WEIGHTS.fullmatch(p.name)]
    digests = {path.name: describe(path)["sha256"] for path in files}
    return {"sha256": hashlib.sha256(json.dumps(digests).encode()).hexdigest()}


def results_file(folder: Path, model: str, task: str) -> Path:
    """Where the results of a model and a task stand below the output folder."""
    name = re.sub(r"[^\w.-]+", "--", model.strip("/")).lstrip(".") or "model"
    return folder / name / f"{task}.jsonl"


def item_digest(item: Item) -> str:
    """What a record asks: its questions, answers and images by name or content."""
    digest = hashlib.sha256()
    for question in item.questions:
        image = question.image
        if isinstance(image, np.ndarray):
            shown = hashlib.sha256(image.tobytes()).hexdigest()
        elif isinstance(image, StoredImage):
            shown = hashlib.sha256(image.read(item.source)).hexdigest()
        else:
            shown = str(getattr(image, "name", None))
        content = [question.messages, question.choices, question.answer, shown]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:16]


def read_results(path: Path, header: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """The records that are done, by id; a last line cut short is removed from the file.

    Args:
        path: the results file; it need not exist.
        header: what the results depend on.
        digests: `item_digest` of the task's records, by id. Lines of other records are kept in
            the file (a smaller `--limit` now), and not returned.

    Raises:
        ResultsError: another model or other options, a changed record, or a damaged file.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    done: dict[str, Any] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            if number == 1:
                require_same(path, entry, header)
                continue
            name, digest = entry["id"], entry["asked"]
        except ResultsError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResultsError(
                f"{path}, line {number}: expected a JSON object of this format; got "
                f"{type(error).__name__}: {error}. Delete the file to evaluate again."
            ) from error
        if name in digests and digests[name] != digest:
            raise ResultsError(
                f"{path}, line {number}: record {name} has changed since it was scored (its "
                "question, answer or image). Give another --output-dir, or delete the file."
            )
        if name in digests:
            done[name] = entry
    return done


def require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse results that depend on something else than is wanted, naming what differs."""
    names = dict.fromkeys([*wanted, *found])
    differing = [n for n in names if found.get(n) != wanted.get(n)]
    if differing:
        shown = "; ".join(f"{n}: {found.get(n)!r} there, {wanted.get(n)!r} now" for n in differing)
        raise ResultsError(
            f"{path}: expected results of this model and these options; got others ({shown}). "
            "Give another --output-dir, or delete the file."
        )


def run_task(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    path: Path,
    header: dict[str, Any],
    left_out: LeftOut,
    *,
    batch_size: int,
    advance: Callable[[int], Any] = lambda number: None,
) -> dict[str, Any]:
    """Ask a model what is not in the results file yet.

    Args:
        model, processor: see `cdfast.evaluation.scoring.likelihoods`.
        items: of the task.
        path: the results file.
        header: what the results depend on; `scoring` and `max_new_tokens` say what is asked for.
        left_out: raises or counts records whose image cannot be decoded or whose text does not fit
            the processor.
        batch_size: questions at a time.
        advance: called with a number of questions that are done.

    Returns:
        For each record that is done, by id, its line of the file: `log_likelihood` and `tokens`
        (questions x choices; null where the model gave NaN), `replies`.

    Raises:
        ResultsError: see `read_results`.
        DataError: a record that cannot be used, unless `left_out` skips.
    """
    digests = {item.id: item_digest(item) for item in items}
    if len(digests) < len(items):
        raise AssertionError("ids of items: expected unique ones")
    done = read_results(path, header, digests)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(json.dumps(header) + "\n")
        advance(sum(len(item.questions) for item in items if item.id in done))
        waiting = [item for item in items if item.id not in done]
        # As many as keep the batches full: images are decoded for these only.
        for window in _windows(waiting, 2 * batch_size):
            usable = [item for item in map(_Opener(processor, left_out), window) if item]
            lines = _ask(model, processor, usable, header, batch_size, advance)
            for item, line in zip(usable, lines):
                done[item.id] = {"id": item.id, "asked": digests[item.id], **line}
            # In one write, so that an interruption cuts one line at most.
            file.write("".join(json.dumps(done[item.id]) + "\n" for item in usable))
            file.flush()
            os.fsync(file.fileno())
            advance(sum(len(i.questions) for i in window) - sum(len(i.questions) for i in usable))
    return done


def _windows(items: Sequence[Item], questions: int) -> Iterator[list[Item]]:
    window: list[Item] = []
    for item in items:
        window.append(item)
        if sum(len(i.questions) for i in window) >= questions:
            yield window
            window = []
    if window:
        yield window


class _Opener:
    """Decodes the images of records; the same file once for a window."""

    def __init__(self, processor: Any, left_out: LeftOut):
        self.processor, self.left_out = processor, left_out
        self.opened: dict[Any, Any] = {}

    def __call__(self, item: Item) -> Item | None:
        try:
            questions = tuple(self._question(question, item.source) for question in item.questions)
        except DataError as error:
            self.left_out.note(error)
            return None
        return replace(item, questions=questions)

    def _question(self, question: Question, source: str) -> Question:
        answer = {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
        images = () if question.image is None else (question.image,)
        check_sample(self.processor, Sample([*question.messages, answer], images, source))
        image = question.image
        if image is None or isinstance(image, np.ndarray):
            return question
        key = id(image) if isinstance(image, StoredImage) else image
        if key not in self.opened:
            content = image.read(source) if isinstance(image, StoredImage) else image
            self.opened[key] = load_image(content, source)
        return replace(question, image=self.opened[key])


def _ask(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    header: dict[str, Any],
    batch_size: int,
    advance: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """For each item what its line of the file says beside its id."""
    questions = [question for item in items for question in item.questions]
    if not questions:
        return []
    scoring = header["scoring"]
    columns: dict[str, list[Any]] = {"answers": [question.answer for question in questions]}
    if scoring != "generation":
        last = advance if scoring == "likelihood" else lambda number: None
        found = likelihoods(model, processor, questions, batch_size=batch_size, advance=last)
        # JSON has no NaN.
        columns["log_likelihood"] = [[v if np.isfinite(v) else None for v in s.log] for s in found]
        columns["tokens"] = [list(s.tokens) for s in found]
    if scoring != "likelihood":
        columns["replies"] = replies(
            model,
            processor,
            questions,
            batch_size=batch_size,
            max_new_tokens=header["max_new_tokens"],
            advance=advance,
        )
    lines = []
    at = 0
    for item in items:
        end = at + len(item.questions)
        lines.append({name: values[at:end] for name, values in columns.items()})
        at = end
    return lines
