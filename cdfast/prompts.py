"""Prompts with images for reading attention: rendered, encoded, and each token found again.

A processor replaces every image placeholder by many tokens, and may write text of its own around
them. Tokens get their characters from the text before that, and their positions by finding the
pieces between images again in the processor's ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cdfast.chat import chat_template
from cdfast.images import DataError, load_image

# Tokens that may merge with the text a processor puts around an image.
_EDGE = 3


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        images: decoded, in the order of the placeholders.
        text: rendered, with one placeholder for each image.
        placeholder: what stands for an image in `text`.
        answer: characters [start, end) of the answer in `text`; None for a prompt alone.
        prompt_end: characters of `text` before the answer and what separates it.
    """

    images: tuple[Image.Image, ...]
    text: str
    placeholder: str
    answer: tuple[int, int] | None
    prompt_end: int


@dataclass(frozen=True)
class Token:
    """A text token: its characters [start, end) in the prompt, and its position.

    `position` is None where it cannot be told from the text that the processor puts around images.
    """

    text: str
    start: int
    end: int
    position: int | None


def make_prompt(
    processor: Any, images: Any, prompt: str | Sequence[dict[str, Any]], answer: str | None = None
) -> Prompt:
    """Render a question about images, or take a text that has the placeholders already.

    Args:
        processor: the model's.
        images: an image or several: PIL images, uint8 arrays (H, W, 3), bytes or paths.
        prompt: a question, put behind the images by the chat template; a text with the
            processor's image placeholder in it, used as it is; or a list of messages
            `{"role": ..., "content": [parts]}`.
        answer: what the model says after the prompt.

    Raises:
        DataError: an image, template or number of placeholders that does not fit.
    """
    several = isinstance(images, (list, tuple))
    loaded = tuple(
        load_image(image, "prompt", field=f"images[{n}]")
        for n, image in enumerate(images if several else [images])
    )
    image_token = getattr(processor, "image_token", None)
    if isinstance(prompt, str) and isinstance(image_token, str) and image_token in prompt:
        made = _raw(prompt, image_token, answer, loaded)
    else:
        made = _rendered(processor, prompt, answer, loaded)
    shown = made.text.count(made.placeholder)
    if not loaded or shown != len(loaded):
        raise DataError(
            source="prompt",
            field="images",
            expected=f"at least one image, and one for each of {shown} placeholders "
            f"{made.placeholder!r}",
            got=len(loaded),
            remedy="give as many images as the prompt shows",
        )
    return made


def _raw(prompt: str, placeholder: str, answer: str | None, images: tuple) -> Prompt:
    if answer is None:
        return Prompt(images, prompt, placeholder, None, len(prompt))
    # One space between them, unless the prompt or the answer brings its own.
    space = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    text = prompt + space + answer
    start = len(text) - len(answer.lstrip())
    return Prompt(images, text, placeholder, (start, len(text.rstrip())), len(prompt))


def _rendered(
    processor: Any, prompt: str | Sequence[dict[str, Any]], answer: str | None, images: tuple
) -> Prompt:
    template = chat_template(processor)
    if isinstance(prompt, str):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        messages: list[dict] = [{"role": "user", "content": content}]
    else:
        messages = list(prompt)
    if template.image is None:
        raise DataError(
            source="prompt",
            field="images",
            expected="a processor and template with an image placeholder",
            got="a text-only one",
            remedy="use the model's processor, or a template that shows image parts",
        )
    before = template.render(messages, "prompt", prompt=True)
    if answer is None:
        return Prompt(images, before, template.image, None, len(before))
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    text, spans = template.answers([*messages, reply], "prompt")
    start = spans[-1][0]
    return Prompt(images, text, template.image, (start, start + len(answer.strip())), len(before))


def encode_prompts(processor: Any, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The processor's tensors of a batch of prompts, padded on the right."""
    tokenizer = getattr(processor, "tokenizer", processor)
    data = processor(
        text=[prompt.text for prompt in prompts],
        images=[list(prompt.images) for prompt in prompts],
        padding=True,
        padding_side="right",
        add_special_tokens=not _begins_with_bos(tokenizer, prompts[0].text),
        return_tensors="pt",
    )
    return {name: value for name, value in data.items() if isinstance(value, Tensor)}


def _begins_with_bos(tokenizer: Any, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def locate_tokens(
    processor: Any, prompt: Prompt, ids: Sequence[int], images: Sequence[tuple[int, int]]
) -> list[Token]:
    """The prompt's text tokens, and their positions among the processor's ids.

    Args:
        processor: the model's, with a fast tokenizer.
        prompt: what was encoded.
        ids: its ids, without padding.
        images: of each image the positions of its first and last visual token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    encoded = tokenizer(
        prompt.text,
        add_special_tokens=not _begins_with_bos(tokenizer, prompt.text),
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
    )
    own, offsets = encoded["input_ids"], encoded["offset_mapping"]
    marker = tokenizer.convert_tokens_to_ids(prompt.placeholder)
    cuts = [i for i, token in enumerate(own) if token == marker]
    if len(cuts) != len(images):
        raise DataError(
            source="prompt",
            field="images",
            expected=f"{len(images)} placeholders {prompt.placeholder!r} among the tokens",
            got=len(cuts),
            remedy="use the model's own processor and placeholder",
        )
    positions: list[int | None] = [None] * len(own)
    bounds = [-1, *(end for _, end in images)], [*(start for start, _ in images), len(ids)]
    for n, (a, b) in enumerate(zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(own)])):
        found = _find_piece(own[a:b], ids, bounds[0][n] + 1, bounds[1][n], n == 0, n == len(cuts))
        for i, position in found.items():
            positions[a + i] = position
    return [
        Token(prompt.text[start:end], start, end, position)
        for i, ((start, end), position) in enumerate(zip(offsets, positions))
        if i not in cuts
    ]


def _find_piece(
    piece: Sequence[int], ids: Sequence[int], low: int, high: int, first: bool, last: bool
) -> dict[int, int]:
    """Position of each token of a piece of text that lies in ids[low:high]; {} if it is not there.

    The first piece begins there and the last one ends there. At an image's edge some tokens may
    have merged with the processor's own: without them the piece is looked for again.
    """
    for edge in range(_EDGE + 1):
        a, b = (0 if first else edge), len(piece) - (0 if last else edge)
        if b <= a:
            break
        wanted = list(piece[a:b])
        starts = range(low, high - len(wanted) + 1)
        if first:
            starts = starts[:1]
        elif last:
            starts = starts[-1:]
        for start in starts:
            if list(ids[start : start + len(wanted)]) == wanted:
                return {a + i: start + i for i in range(len(wanted))}
    return {}


def find_tokens(
    prompt: Prompt,
    tokens: Sequence[Token],
    token: int | str | None = None,
    word: str | None = None,
    occurrence: int | None = None,
) -> list[int]:
    """Numbers of a token, of all tokens that a word touches, or (neither given) of the answer's.

    Args:
        prompt, tokens: from `locate_tokens`.
        token: a number, or the text of one token; spaces around it do not count.
        word: characters of the text, not continued by a letter or digit at either end.
        occurrence: which one, where there are several.

    Raises:
        ValueError: there is none, or there are several and no `occurrence`.
    """
    if token is not None and word is not None:
        raise ValueError(f"token, word: expected one of them; got {token!r} and {word!r}.")
    if isinstance(token, int):
        if not -len(tokens) <= token < len(tokens):
            raise ValueError(
                f"token: expected a number below {len(tokens)}, the number of text tokens; got "
                f"{token}."
            )
        return [token % len(tokens)]
    if token is not None:
        at = [[n] for n, t in enumerate(tokens) if t.text.strip() == token.strip()]
        remedy = "Use word= for a text of several tokens."
        return _choose("token", token, at, occurrence, tokens, remedy)
    if word is not None:
        text, size = prompt.text, len(word)
        starts = [n for n in range(len(text)) if size and text.startswith(word, n)]
        at = [_touching(tokens, n, n + size) for n in starts if _is_whole(text, n, n + size)]
        return _choose("word", word, at, occurrence, tokens, "It must be there as a whole word.")
    return [] if prompt.answer is None else _touching(tokens, *prompt.answer)


def _touching(tokens: Sequence[Token], start: int, end: int) -> list[int]:
    return [n for n, t in enumerate(tokens) if t.start < end and t.end > start]


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether no letter or digit continues a word at either end."""
    left = start > 0 and text[start].isalnum() and text[start - 1].isalnum()
    right = end < len(text) and text[end - 1].isalnum() and text[end].isalnum()
    return not left and not right


def _choose(
    name: str,
    wanted: str,
    found: list[list[int]],
    occurrence: int | None,
    tokens: Sequence[Token],
    remedy: str,
) -> list[int]:
    if not found:
        shown = ", ".join(repr(t.text) for t in tokens[-12:])
        raise ValueError(
            f"{name}: {wanted!r} is not in the prompt; its last tokens are {shown}. {remedy}"
        )
    if occurrence is None and len(found) > 1:
        raise ValueError(
            f"{name}: {wanted!r} is in the prompt {len(found)} times. Give occurrence=0 for the "
            "first, -1 for the last."
        )
    occurrence = occurrence or 0
    if not -len(found) <= occurrence < len(found):
        raise ValueError(
            f"occurrence: expected a number below {len(found)}, how often {wanted!r} is in the "
            f"prompt; got {occurrence}."
        )
    return found[occurrence]


def visual_spans(positions: Tensor, counts: Sequence[int], images: int) -> list[tuple[int, int]]:
    """First and last position of each image's visual tokens, which follow one another.

    Where the counts are not known (()), every image has the span of all: text between images then
    is not found, all other text is.
    """
    if not counts:
        return [(int(positions[0]), int(positions[-1]))] * images
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [(int(positions[end - n]), int(positions[end - 1])) for end, n in zip(ends, counts)]
