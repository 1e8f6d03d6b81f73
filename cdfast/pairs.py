"""A chosen and a rejected answer to the same question, encoded as two rows of the same prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cdfast.chat import message_text
from cdfast.encoding import Sample, check_answers, check_sample, encode, single_turns
from cdfast.images import MAX_PIXELS, DataError
from cdfast.losses import IGNORE_INDEX

REMEDY = (
    "add it (a string) to the record, give the preference stage data of its own "
    "(--preference.data FILE), or leave the stage out"
)


def check_pair(processor: Any, sample: Sample, *, turns: str = "dialogue") -> None:
    """Refuse a sample that is no pair of answers; see `encoding.check_sample`.

    Args:
        processor, sample, turns: as given to `encode_pair`.

    Raises:
        DataError: no rejected answer, one that cannot be used, or the chosen one again.
    """
    _, rejected = _conversations(sample, turns)
    check_sample(processor, sample, turns=turns)
    try:
        check_sample(processor, rejected)
    except DataError as error:
        raise DataError(
            source=error.source,
            field="rejected",
            expected=error.expected,
            got=error.got,
            remedy=error.remedy,
            reason=error.reason,
        ) from error


def _conversations(sample: Sample, turns: str) -> tuple[Sample, Sample]:
    """The conversation up to the last answer, with the chosen one and with the rejected one."""
    answer = message_text(sample.messages[-1])
    if sample.rejected is None:
        raise DataError(
            source=sample.source,
            field="rejected",
            expected="the answer to the last question that is not preferred",
            got="none",
            remedy=REMEDY,
        )
    if sample.rejected.split() == answer.split():
        raise DataError(
            source=sample.source,
            field="rejected",
            expected="another answer than the chosen one",
            got=sample.rejected,
            remedy="correct or remove the record",
        )
    messages = single_turns(sample)[-1] if turns == "independent" else sample.messages
    other = {"role": "assistant", "content": [{"type": "text", "text": sample.rejected}]}
    chosen = replace(sample, messages=messages)
    return chosen, replace(sample, messages=[*messages[:-1], other])


def encode_pair(
    processor: Any,
    sample: Sample,
    *,
    max_length: int | None = None,
    turns: str = "dialogue",
    max_pixels: int | None = MAX_PIXELS,
) -> dict[str, Any]:
    """Encode both answers to the last question; earlier answers are part of the prompt.

    Args:
        processor, max_pixels: see `encoding.encode`.
        sample: a conversation with `rejected`.
        max_length: the most tokens of prompt and answer. Nothing is cut: the likelihood of half an
            answer is that of another answer.
        turns: "dialogue", or "independent": the last question without those before it.

    Returns:
        What `encode` returns for the conversation with the chosen answer, and under `rejected` the
        same for the rejected one; `labels` are -100 outside the last answer.

    Raises:
        DataError: see `check_pair` and `encoding.encode`; either conversation is longer than
            max_length.
    """
    check_pair(processor, sample, turns=turns)
    chosen, rejected = (
        _last_answer(encode(processor, one, max_pixels=max_pixels), one, max_length, name)
        for one, name in zip(_conversations(sample, turns), ("messages", "rejected"))
    )
    return {**chosen, "rejected": rejected}


def _last_answer(
    encoded: dict[str, Any], sample: Sample, max_length: int | None, field: str
) -> dict[str, Any]:
    """`encoded` with the labels of the last answer alone."""
    labels = encoded["labels"].clone()
    if max_length is not None and len(labels) > max_length:
        raise DataError(
            source=sample.source,
            field=field,
            expected=f"a question and its whole answer within max_length={max_length}",
            got=f"{len(labels)} tokens",
            remedy="raise max_length, or set on_error='skip' to leave such records out",
            reason="answer beyond max_length",
        )
    if sum(m["role"] == "assistant" for m in sample.messages) > 1:
        outside = (labels == IGNORE_INDEX).nonzero().flatten()
        end = int((labels != IGNORE_INDEX).nonzero()[-1])
        labels[: int(outside[outside < end][-1])] = IGNORE_INDEX
    return {**encoded, "labels": labels}


def check_pair_answers(processor: Any, sample: Sample, encoded: dict[str, Any]) -> None:
    """As `encoding.check_answers`, for both answers of what `encode_pair` has returned.

    Args:
        processor, sample: as given to `encode_pair`.
        encoded: what it returned.

    Raises:
        DataError: the supervised tokens do not give an answer back.
    """
    for one, rows in zip(_conversations(sample, "dialogue"), (encoded, encoded["rejected"])):
        check_answers(processor, replace(one, messages=one.messages[-1:]), rows)
