"""From a conversation with images to token ids, labels and image tensors.

The processor replaces each image placeholder of the rendered text by many tokens. So the answer
mask is made on the text before this (see chat.py) and carried over to the processor's ids piece by
piece between placeholders.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdfast.chat import ChatTemplate, chat_template, message_text
from cdfast.images import MAX_PIXELS, DataError, load_image
from cdfast.losses import IGNORE_INDEX

TURNS = ("dialogue", "independent")
ROLES = ("system", "user", "assistant")
# Tokens that may merge with the text a processor puts around an image.
_EDGE = 3
# Characters of the longest end-of-turn text a template may put behind an answer.
_END_OF_TURN = 32


@dataclass(frozen=True)
class Sample:
    """A conversation, its images, and where it stands.

    Args:
        messages: `{"role": "system" | "user" | "assistant", "content": [parts]}`, a part being
            `{"type": "image"}` or `{"type": "text", "text": ...}`.
        images: in the order of the image parts: PIL images, uint8 arrays (H, W, 3), bytes,
            `cdfast.images.ImageFile`, or paths of the caller's own (opened as they are).
        source: file and record, such as `"llava.json, record 12 (id 000123)"`.
        rejected: the answer to the last question that is not preferred, for `pairs.encode_pair`.
    """

    messages: list[dict]
    images: tuple = ()
    source: str = "sample"
    rejected: str | None = None


def check_sample(processor: Any, sample: Sample, *, turns: str = "dialogue") -> None:
    """Refuse a conversation that would put labels or images in the wrong place.

    Args:
        processor: as given to `encode`.
        sample: as given to `encode`; its images are not opened.
        turns: as given to `encode`.

    Raises:
        DataError: a role, part, number of images, or media token in the text that does not fit.
        ValueError: `turns` is not "dialogue" or "independent".
    """
    if turns not in TURNS:
        raise ValueError(f"turns: expected one of {TURNS}, got {turns!r}")
    template = chat_template(processor)

    def refuse(field: str, expected: str, got: Any, remedy: str) -> None:
        raise DataError(
            source=sample.source, field=field, expected=expected, got=got, remedy=remedy
        )

    images = 0
    for t, message in enumerate(sample.messages):
        where = f"messages[{t}]"
        if message.get("role") not in ROLES:
            refuse(f"{where}.role", f"one of {', '.join(ROLES)}", message.get("role"), "rename it")
        if not isinstance(message.get("content"), list):
            refuse(f"{where}.content", "a list of parts", message.get("content"), "make it a list")
        for part in message["content"]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                images += 1
                if message["role"] != "user":
                    refuse(where, "images in user messages only", "one elsewhere", "move it")
            elif kind != "text" or not isinstance(part.get("text"), str):
                refuse(where, "parts of type 'image', or 'text' with a string", part, "correct it")
            else:
                found = [token for token in template.media if token in part["text"]]
                if found:
                    refuse(
                        where,
                        "text without the processor's own media tokens",
                        f"{found[0]!r} in {part['text'][:80]!r}",
                        "use an image part, or remove the token",
                    )
                if not _is_unicode(part["text"]):
                    refuse(
                        where,
                        "text that UTF-8 can write",
                        f"half a character in {part['text'][:80]!r}",
                        "remove the lone \\ud800 to \\udfff",
                    )
        if message["role"] == "assistant" and not message_text(message).strip():
            refuse(where, "an answer", "an empty one", "remove the turn")
    if images != len(sample.images):
        refuse("images", f"{images}, one for each image part", len(sample.images), "match them")
    if images and template.image is None:
        refuse(
            "images",
            "a processor and template with an image placeholder",
            "a text-only one",
            "use the model's processor, or a template that shows image parts",
        )
    if not any(message["role"] == "assistant" for message in sample.messages):
        refuse("messages", "an assistant message", "none", "add the answer")
    if turns == "independent":
        single_turns(sample)


def _is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is left: JSON can write one, tokenizers take none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def begins_with_bos(tokenizer: Any, text: str) -> bool:
    """Whether a rendered text has its own BOS token, so that the tokenizer must add none."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _tokenize(
    template: ChatTemplate, texts: list[str], spans: list[list[tuple[int, int]]]
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of texts that still have one placeholder per image."""
    tokenizer = template.tokenizer
    batch = tokenizer(
        texts,
        add_special_tokens=not begins_with_bos(tokenizer, texts[0]),
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    out = []
    for ids, offsets, wanted in zip(batch["input_ids"], batch["offset_mapping"], spans):
        labels = [IGNORE_INDEX] * len(ids)
        at = 0
        for i, (a, b) in enumerate(offsets):
            while at < len(wanted) and wanted[at][1] <= a:
                at += 1
            if at < len(wanted) and a < b and b > wanted[at][0]:
                labels[i] = ids[i]
        out.append((ids, labels))
    return out


def _carry_over(
    ids: list[int], labels: list[int], expanded: list[int], image_id: int | None, source: str
) -> tuple[list[int], int]:
    """Carry labels over to the ids in which each placeholder became many tokens.

    Returns:
        The labels of `expanded`, and the position behind the last image's tokens (0: no image).
    """
    cuts = [i for i, token in enumerate(ids) if token == image_id] if image_id is not None else []
    pieces = [(a + 1, b) for a, b in zip([-1, *cuts], [*cuts, len(ids)])]
    for edge in range(_EDGE + 1):
        out = [IGNORE_INDEX] * len(expanded)
        at, found = 0, True
        for n, (a, b) in enumerate(pieces):
            first, last = n == 0, n == len(pieces) - 1
            supervised = any(label != IGNORE_INDEX for label in labels[a:b])
            # At an image's edge the processor's own text may have merged with ours.
            a, b = (a if first else a + edge), (b if last else b - edge)
            if b <= a or (edge and not supervised and not last):
                continue
            begin = _find(expanded, ids[a:b], at, len(expanded), first=first, last=last)
            if begin is None:
                found = False
                break
            out[begin : begin + b - a] = labels[a:b]
            at = begin + b - a + (0 if last else 1)
        kept = sum(label != IGNORE_INDEX for label in out)
        if found and kept == sum(label != IGNORE_INDEX for label in labels):
            a, b = pieces[-1]
            return out, len(expanded) - (b - a) if cuts else 0
    raise DataError(
        source=source,
        field="processor",
        expected="the same tokens around the images as its tokenizer gives",
        got="other tokens, so the answers cannot be found",
        remedy="check that the processor and its tokenizer belong to the same model",
        reason="chat template",
    )


def _find(
    ids: list[int], piece: list[int], start: int, stop: int, *, first: bool, last: bool
) -> int | None:
    """Position of a piece at or behind start; the first piece begins, the last one ends the ids."""
    size = len(piece)
    if first or last:
        begin = 0 if first else stop - size
        fits = ids[begin : begin + size] == piece and begin >= start
        return begin if fits and (not (first and last) or size == stop) else None
    while True:
        try:
            begin = ids.index(piece[0], start, stop)
        except ValueError:
            return None
        if ids[begin : begin + size] == piece:
            return begin
        start = begin + 1


def process(
    processor: Any, template: ChatTemplate, text: str, images: list, source: str
) -> tuple[list[int], dict, dict]:
    """Run the processor once: expanded ids, per-token extras (N,), image tensors."""
    options: dict[str, Any] = {
        "text": [text],
        "add_special_tokens": not begins_with_bos(template.tokenizer, text),
        "return_tensors": "pt",
    }
    if processor is not template.tokenizer:
        # Nested, as apply_chat_template(tokenize=True) does: the images of one conversation.
        options["images"] = [images] if images else None
    try:
        data = processor(**options)
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(
            source=source,
            field="images" if images else "messages",
            expected=f"what {type(processor).__name__} can process",
            got=f"{type(error).__name__}: {error}",
            remedy="check the image's size and shape, or leave the record out",
        ) from error
    rest = {name: value for name, value in data.items() if isinstance(value, Tensor)}
    ids = rest.pop("input_ids")
    rest.pop("attention_mask", None)
    # Such as mm_token_type_ids: one number per token, which must be cut and padded with the ids.
    extras = {n: v[0] for n, v in rest.items() if v.shape == ids.shape and n.endswith("_ids")}
    tensors = {name: value for name, value in rest.items() if name not in extras}
    return ids[0].tolist(), extras, tensors if images else {}


def single_turns(sample: Sample) -> list[list[dict]]:
    """Split a sample into conversations of one question each, all with the images of the first."""
    system = [m for m in sample.messages[:1] if m["role"] == "system"]
    turns = sample.messages[len(system) :]
    roles = [m["role"] for m in turns]
    if len(turns) % 2 or roles != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            source=sample.source,
            field="messages",
            expected="pairs of a user and an assistant message (turns='independent')",
            got=roles,
            remedy="use turns='dialogue' for this file",
        )
    if any(part["type"] == "image" for m in turns[1:] for part in m["content"]):
        raise DataError(
            source=sample.source,
            field="messages",
            expected="all images in the first question (turns='independent')",
            got="an image in a later one",
            remedy="use turns='dialogue' for this file",
        )
    images = [part for part in turns[0]["content"] if part["type"] == "image"]
    first = [turns[0], turns[1]]
    later = [
        [{"role": "user", "content": [*images, *q["content"]]}, a]
        for q, a in zip(turns[2::2], turns[3::2])
    ]
    return [[*system, *turn] for turn in [first, *later]]


def conversations_of(sample: Sample, turns: str) -> list[list[dict]]:
    """What of a sample sees itself alone: with turns="independent" every turn, else all of it."""
    return single_turns(sample) if turns == "independent" else [sample.messages]


def _encode_independent(
    processor: Any,
    template: ChatTemplate,
    conversations: list[list[dict]],
    images: list,
    source: str,
) -> tuple[list[int], list[int], dict, dict, int, list[int]]:
    rendered = [template.answers(messages, source) for messages in conversations]
    texts, spans = [text for text, _ in rendered], [span for _, span in rendered]
    expanded, extras, tensors = process(processor, template, texts[0], images, source)
    turns = _tokenize(template, texts, spans)
    # The images stand in front, so every turn's text begins with the same tokens.
    starts = [_behind_last(ids, template.image_id) if images else 0 for ids, _ in turns]
    shared = turns[0][0][: starts[0]]
    for n, ((ids, _), start) in enumerate(zip(turns, starts)):
        if ids[:start] != shared:
            raise DataError(
                source=f"{source}, turn {n}",
                field="messages",
                expected="the same tokens up to the last image in every turn (turns='independent')",
                got="other tokens",
                remedy="put the image in front of the text, or use turns='dialogue'",
            )
    _, prefix = _carry_over(*turns[0], expanded, template.image_id if images else None, source)
    ids, labels, segments = expanded[:prefix], [IGNORE_INDEX] * prefix, [0] * prefix
    for n, ((turn, turn_labels), start) in enumerate(zip(turns, starts)):
        ids = ids + turn[start:]
        labels = labels + turn_labels[start:]
        segments = segments + [n + 1] * (len(turn) - start)
    extras = {n: torch.cat([v[:prefix], v.new_zeros(len(ids) - prefix)]) for n, v in extras.items()}
    return ids, labels, extras, tensors, prefix, segments


def _behind_last(ids: list[int], token: int | None) -> int:
    return max((i + 1 for i, here in enumerate(ids) if here == token), default=0)


def _positions(segments: list[int]) -> list[int]:
    """Positions that start again behind the prefix for every turn."""
    prefix = segments.count(0)
    out: list[int] = []
    previous = 0
    for i, segment in enumerate(segments):
        at = i if segment == 0 else prefix if segment != previous else out[-1] + 1
        out.append(at)
        previous = segment
    return out


@dataclass(frozen=True)
class Uncut:
    """A whole encoded sample, before max_length.

    Args:
        ids: N token ids, image placeholders expanded.
        labels: N, the token id where it is supervised, else -100.
        extras: the processor's other per-token tensors, each (N,).
        images: the processor's image tensors.
        prefix: how many tokens there are up to the last image's last one; 0 without an image.
        visual: how many of the tokens stand for an image.
        segments: N, with turns="independent"; else empty.
        source: the sample's.
    """

    ids: list[int]
    labels: list[int]
    extras: dict[str, Tensor]
    images: dict[str, Tensor]
    prefix: int
    visual: int
    segments: list[int]
    source: str


def encode(
    processor: Any,
    sample: Sample,
    *,
    max_length: int | None = None,
    turns: str = "dialogue",
    max_pixels: int | None = MAX_PIXELS,
    others: Sequence[Sample] = (),
) -> dict[str, Any]:
    """Encode one sample with the model's own processor and chat template.

    With turns="dialogue" the ids are exactly the processor's for the rendered conversation. With
    turns="independent" each question and answer is a conversation of its own over the same images:
    the ids are the shared prefix (all up to the last image token) followed by every turn's own
    tokens, `segment_ids` are 0 for the prefix and 1..T for the turns, and `position_ids` start
    again behind the prefix, so that a turn sees what it would see alone. With `others` every
    conversation (of independent turns: every turn) of all these samples is such a segment.

    Args:
        processor: a Hugging Face processor with a fast tokenizer (or the tokenizer, for text only).
        sample: the conversation; its last answer may be cut by max_length.
        max_length: the most tokens to keep; the end is cut, never the image tokens.
        turns: "dialogue" or "independent".
        max_pixels: the largest image, checked before it is decoded; None is no limit.
        others: further samples with the same text up to the last image, and the same images, which
            are taken from `sample`.

    Returns:
        `input_ids` (N,) and `labels` (N,), int64, not shifted: the token id on answer tokens and
        their end-of-turn token, else -100; `images`: the processor's image tensors ({} without
        images); `extras`: the processor's other per-token tensors, each (N,); `source`; `truncated`
        (bool); and for independent turns, or with others, `segment_ids` and `position_ids`, each
        (N,).

    Raises:
        DataError: a message, image or template that cannot be used, or nothing left to learn from
            within max_length.
        ValueError: `turns` is not one of the two.
    """
    uncut = encode_uncut(processor, sample, turns=turns, max_pixels=max_pixels, others=others)
    return cut(uncut, max_length)


def encode_uncut(
    processor: Any,
    sample: Sample,
    *,
    turns: str = "dialogue",
    max_pixels: int | None = MAX_PIXELS,
    others: Sequence[Sample] = (),
) -> Uncut:
    """Encode one sample as `encode` does, whatever its length.

    Args:
        processor, sample, turns, max_pixels, others: see `encode`.

    Raises:
        DataError, ValueError: see `encode`; the length is no reason.
    """
    for one in (sample, *others):
        check_sample(processor, one, turns=turns)
    template = chat_template(processor)
    images = [
        load_image(image, sample.source, field=f"images[{n}]", max_pixels=max_pixels)
        for n, image in enumerate(sample.images)
    ]
    image_id = template.image_id if images else None
    segments: list[int] = []
    if turns == "independent" or others:
        conversations = [c for one in (sample, *others) for c in conversations_of(one, turns)]
        ids, labels, extras, tensors, prefix, segments = _encode_independent(
            processor, template, conversations, images, sample.source
        )
    else:
        text, spans = template.answers(sample.messages, sample.source)
        ids, extras, tensors = process(processor, template, text, images, sample.source)
        [unexpanded] = _tokenize(template, [text], [spans])
        labels, prefix = _carry_over(*unexpanded, ids, image_id, sample.source)
    visual = 0 if image_id is None else ids.count(image_id)
    return Uncut(ids, labels, extras, tensors, prefix, visual, segments, sample.source)


def cut(uncut: Uncut, max_length: int | None) -> dict[str, Any]:
    """The first max_length tokens of an encoded sample, as `encode` returns them.

    Raises:
        DataError: an image would be cut, or no answer token is left.
    """
    full = len(uncut.ids)
    length = full if max_length is None else min(full, max_length)
    labels = uncut.labels[:length]
    if length < uncut.prefix or all(label == IGNORE_INDEX for label in labels):
        raise DataError(
            source=uncut.source,
            field="messages",
            expected=f"the images and a part of an answer within max_length={max_length}",
            got=f"{uncut.prefix} tokens up to the last image and {full} in all",
            remedy="raise max_length, or set on_error='skip' to leave such records out",
            reason="nothing left within max_length",
        )
    out: dict[str, Any] = {
        "input_ids": torch.tensor(uncut.ids[:length]),
        "labels": torch.tensor(labels),
        "images": uncut.images,
        "extras": {name: value[:length] for name, value in uncut.extras.items()},
        "source": uncut.source,
        "truncated": length < full,
    }
    if uncut.segments:
        out["segment_ids"] = torch.tensor(uncut.segments[:length])
        out["position_ids"] = torch.tensor(_positions(uncut.segments[:length]))
    return out


def check_answers(processor: Any, sample: Sample, encoded: dict[str, Any]) -> None:
    """Decode the supervised tokens and compare them with the sample's answers.

    Run on the first sample of a data set: it catches a tokenizer whose offsets do not fit its text.
    White space and special tokens do not count.

    Args:
        processor: as given to `encode`.
        sample: as given to `encode`.
        encoded: what `encode` returned.

    Raises:
        DataError: the tokens do not give the answers back.
    """
    tokenizer = getattr(processor, "tokenizer", processor)

    def bare(ids: list[int]) -> str:
        return "".join(tokenizer.decode(ids, skip_special_tokens=True).split())

    runs = answer_runs(encoded["labels"].tolist())
    got = [bare(run) for run in runs]
    answers = [message_text(m) for m in sample.messages if m["role"] == "assistant"]
    # Through the tokenizer and back, since it may lower the case or drop unknown words.
    want = [bare(tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers]
    fits = len(got) == len(want) or (encoded["truncated"] and len(got) < len(want))
    for n, (shown, answer) in enumerate(zip(got, want)):
        cut = encoded["truncated"] and n == len(got) - 1 and answer.startswith(shown)
        # An end-of-turn token that is not marked as special is shown, but nothing longer.
        whole = shown.startswith(answer) and len(shown) - len(answer) <= _END_OF_TURN
        fits = fits and (cut or whole)
    if not fits:
        raise DataError(
            source=sample.source,
            field="labels",
            expected=f"tokens that decode to the answers {want}",
            got=got,
            remedy="check that the tokenizer's offsets and the chat template fit the model",
            reason="chat template",
        )
    if not encoded["truncated"] and not _ends_with_added(tokenizer, runs[-1][-1]):
        warnings.warn(
            f"{sample.source}: the chat template puts no end-of-turn token behind the answer, so "
            "the model does not learn to stop; set a chat template that does",
            stacklevel=2,
        )


def answer_runs(labels: list[int]) -> list[list[int]]:
    """The supervised tokens, one list for each unbroken stretch."""
    runs: list[list[int]] = []
    for before, label in zip([IGNORE_INDEX, *labels], labels):
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
    return runs


def _ends_with_added(tokenizer: Any, last: int) -> bool:
    return last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder
