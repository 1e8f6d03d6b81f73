"""Questions with known answers for the analysis: where they come from, and how they are encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cdfast_kernels import VisualLayout
from torch import Tensor

from cdfast.aligner import build_layout
from cdfast.config import ConfigError
from cdfast.images import DataError
from cdfast.miniature.suites import Question
from cdfast.prompts import (
    Prompt,
    encode_prompts,
    find_tokens,
    locate_tokens,
    make_prompt,
    visual_spans,
)
from cdfast.records import RecordFile

ANSWER_TOKENS = ("first", "all")


@dataclass(frozen=True)
class Case:
    """A question about images, and its answer.

    Attributes:
        kind, group: results are reported for both.
        unit: cases of one unit (a question asked in two orders) are resampled together.
        images: as `make_prompt` takes them.
        messages: the conversation up to the answer.
        answer: the right answer.
        choices: the candidates, the answer among them; () where there are none.
    """

    kind: str
    group: str
    unit: str
    images: tuple[Any, ...]
    messages: list[dict[str, Any]]
    answer: str
    choices: tuple[str, ...] = ()

    def prompt(self, processor: Any) -> Prompt:
        return make_prompt(processor, self.images, self.messages, self.answer)


def cases_of_questions(questions: Sequence[Question], limit: int | None = None) -> list[Case]:
    """Questions that have an image; of each kind at most `limit`."""
    cases = [
        Case(
            q.kind,
            q.group,
            f"{q.kind} {q.pair}",
            (q.image,),
            q.messages,
            q.answer,
            tuple(q.choices),
        )
        for q in questions
        if q.image is not None
    ]
    return _limited(cases, limit)


def cases_of_file(
    path: Path, image_roots: Sequence[str | Path], limit: int | None = None
) -> list[Case]:
    """Records of LLaVA JSON or `messages` with an image: the first answer of each.

    A record's kind and group are the file's name; there are no choices, so an answer counts as
    right where greedy decoding gives it.

    Raises:
        DataError: a broken record, or no record with an image.
    """
    file = RecordFile(path, tuple(map(str, image_roots)), path.name)
    layout = file.layout()
    cases: list[Case] = []
    for index in range(len(file.records)):
        if limit is not None and len(cases) == limit:
            break
        sample = file.sample(index, layout)
        at = next((n for n, m in enumerate(sample.messages) if m["role"] == "assistant"), None)
        if at is None or not sample.images:
            continue
        before = sample.messages[:at]
        shown = sum(part["type"] == "image" for m in before for part in m["content"])
        answer = "".join(part["text"] for part in sample.messages[at]["content"])
        if shown:
            images = tuple(sample.images[:shown])
            unit = f"{path.stem} {index}"
            cases.append(Case(path.stem, path.stem, unit, images, before, answer))
    if not cases:
        raise DataError(
            source=str(path),
            field="records",
            expected="at least one with an image and an answer",
            got="none",
            remedy="give image-text data, or leave --data out for the miniature's scenes",
        )
    return cases


def _limited(cases: list[Case], limit: int | None) -> list[Case]:
    if limit is None:
        return cases
    seen: dict[str, int] = {}
    kept = []
    for case in cases:
        seen[case.kind] = seen.get(case.kind, 0) + 1
        if seen[case.kind] <= limit:
            kept.append(case)
    return kept


@dataclass(frozen=True)
class EncodedCases:
    """A padded batch of cases.

    Attributes:
        batch: the processor's tensors.
        layout: padding and visual tokens.
        answer_rows: of each case the positions that predict the chosen answer tokens.
        targets: of each case these tokens' ids.
        choices: of each case the first token of every choice; () where there are none.
    """

    cases: Sequence[Case]
    batch: dict[str, Tensor]
    layout: VisualLayout
    answer_rows: list[Tensor]
    targets: list[Tensor]
    choices: list[tuple[int, ...]]

    def text_rows(self) -> list[Tensor]:
        """Positions behind an image, no visual token, up to the last one that predicts."""
        behind = self.layout.live & ~self.layout.visual & (self.layout.visual.cumsum(1) > 0)
        ends = [int(rows[-1]) for rows in self.answer_rows]
        return [seen[: end + 1].nonzero()[:, 0] for seen, end in zip(behind, ends)]

    def live_rows(self) -> list[Tensor]:
        """Every position that sees a visual token, up to the last one that predicts."""
        sees = self.layout.live & (self.layout.visual.cumsum(1) > 0)
        ends = [int(rows[-1]) for rows in self.answer_rows]
        return [seen[: end + 1].nonzero()[:, 0] for seen, end in zip(sees, ends)]

    def visual_keys(self) -> list[Tensor]:
        return [visual.nonzero()[:, 0] for visual in self.layout.visual]

    def live_keys(self) -> list[Tensor]:
        return [live.nonzero()[:, 0] for live in self.layout.live]


def batches(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    return (cases[i : i + size] for i in range(0, len(cases), size))


def encode_cases(
    processor: Any, cases: Sequence[Case], token: int, answer_tokens: str = "first"
) -> EncodedCases:
    """Encode cases with their answers.

    Args:
        processor: of the models.
        cases: of one batch.
        token: id of the image placeholder in input_ids.
        answer_tokens: "first" or "all" of the answer's tokens.

    Raises:
        ConfigError: choices that begin with the same token.
        DataError: an answer that has no token of its own.
    """
    prompts = [case.prompt(processor) for case in cases]
    batch = encode_prompts(processor, prompts)
    layout = build_layout(batch, token)
    rows, targets, choices = [], [], []
    for n, (case, prompt) in enumerate(zip(cases, prompts)):
        ids = batch["input_ids"][n, layout.live[n]]
        visual = layout.visual[n].nonzero()[:, 0]
        spans = visual_spans(visual, (), len(prompt.images))
        tokens = locate_tokens(processor, prompt, ids.tolist(), spans)
        found = [tokens[i].position for i in find_tokens(prompt, tokens)]
        positions = [position for position in found if position is not None]
        if not positions or len(positions) < len(found):
            raise DataError(
                source=f"{case.kind}, {case.unit}",
                field="answer",
                expected="tokens of its own behind the images",
                got=case.answer,
                remedy="check the record, and that the processor belongs to the model",
            )
        chosen = torch.tensor(positions[:1] if answer_tokens == "first" else positions)
        rows.append(chosen - 1)
        targets.append(ids[chosen])
        choices.append(_choice_tokens(processor, case, prompt))
    return EncodedCases(cases, batch, layout, rows, targets, choices)


def _choice_tokens(processor: Any, case: Case, own: Prompt) -> tuple[int, ...]:
    """The token that each choice begins with, in its place behind the prompt."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = []
    for choice in case.choices:
        # With the images that are decoded already.
        prompt = make_prompt(processor, own.images, case.messages, choice)
        assert prompt.answer is not None
        encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
        tokens.append(
            next(
                token
                for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"])
                if end > prompt.answer[0]
            )
        )
    if len(set(tokens)) < len(tokens):
        raise ConfigError(
            f"choices: expected answers that differ in their first token, by which the analysis "
            f"scores them; got {case.choices} ({case.kind}). Score them with cdfast.evaluate."
        )
    return tuple(tokens)
