"""A processor's chat template: how it renders a conversation, and where the answers stand in it.

For every assistant message t the prompt render(messages[:t], add_generation_prompt) must be a
prefix of render(messages[:t+1]) and of the whole text, and the answer must follow it. What is
supervised is the answer and the end-of-turn token behind it; a template for which this does not
hold is refused.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

from cdfast.images import DataError


class ChatTemplate:
    """A processor's chat template: how it is rendered, and what marks an image in its text."""

    def __init__(self, processor: Any, text: str):
        self.text = text
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                source="processor",
                field="tokenizer",
                expected="a fast tokenizer, which gives character offsets for the answer mask",
                got=type(self.tokenizer).__name__,
                remedy="load it with use_fast=True, or convert it to tokenizer.json",
                reason="chat template",
            )
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        names = ("image_token", "video_token", "audio_token", "boi_token")
        media = {name: getattr(processor, name, None) for name in names}
        known = [*media.values(), *(getattr(self.tokenizer, name, None) for name in names)]
        self.media = {token for token in known if isinstance(token, str) and token}
        self.parts = True
        self.image: str | None = None
        self._probe([media["image_token"], media["boi_token"]])
        self.image_id = self.tokenizer.convert_tokens_to_ids(self.image) if self.image else None

    def _probe(self, candidates: list[Any]) -> None:
        """Find whether the template takes lists of parts or strings, and its image placeholder."""
        text = {"type": "text", "text": "probe"}
        plain = self._try([{"role": "user", "content": [text]}])
        self.parts = (
            plain is not None and "probe" in plain and not re.search("['\"]type['\"]", plain)
        )
        if self.parts:
            shown = self._try([{"role": "user", "content": [{"type": "image"}, text]}]) or ""
            for token in candidates:
                if isinstance(token, str) and shown.count(token) > (plain or "").count(token):
                    self.image = token
                    return
        # A template of a text-only model (Qwen, Vicuna) drops or prints image parts: give it
        # strings with the placeholder in place, as LLaVA does.
        strings = self._try([{"role": "user", "content": "probe"}])
        if strings is not None and "probe" in strings:
            self.parts = False
            self.image = candidates[0] if isinstance(candidates[0], str) else None
        elif not self.parts:
            self._refuse("chat template", "it renders a user message", "it does not show the text")

    def _refuse(self, source: str, expected: str, got: str, remedy: str = "") -> None:
        raise DataError(
            source=source,
            field="chat template",
            expected=expected,
            got=got,
            remedy=remedy
            or "correct the template, or set processor.chat_template to one that fits",
            reason="chat template",
        )

    def _try(self, messages: list[dict]) -> str | None:
        try:
            return self._apply(messages, False)
        except Exception:
            return None

    def _apply(self, messages: list[dict], prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.text,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    def render(self, messages: list[dict], source: str, *, prompt: bool = False) -> str:
        """Return the template's text, with one placeholder for each image."""
        shown = messages if self.parts else [_as_string(m, self.image) for m in messages]
        try:
            return self._apply(shown, prompt)
        except Exception as error:
            self._refuse(source, "it renders the conversation", f"{type(error).__name__}: {error}")
            raise

    def answers(self, messages: list[dict], source: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole text and the character span to supervise for each assistant message."""
        text = self.render(messages, source)
        spans = []
        for t, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            where = f"{source}, message {t}"
            prompt = self.render(messages[:t], source, prompt=True)
            last = t + 1 == len(messages)
            upto = text if last else self.render(messages[: t + 1], source)
            if not (upto.startswith(prompt) and text.startswith(prompt)):
                self._refuse(
                    where,
                    "the prompt (messages before the answer, add_generation_prompt=True) to be a "
                    "prefix of the conversation, which is how the answer mask is found",
                    _difference(prompt, upto if not upto.startswith(prompt) else text),
                )
            spans.append(self._span(text, upto, len(prompt), message_text(message), where))
        return text, spans

    def _span(self, text: str, upto: str, start: int, answer: str, where: str) -> tuple[int, int]:
        begin = start + len(text[start:]) - len(text[start:].lstrip())
        stop = begin + len(answer.strip())
        if text[begin:stop] != answer.strip() or upto[begin:stop] != answer.strip():
            self._refuse(
                where,
                "the answer, unchanged, right behind the generation prompt",
                f"{text[start : start + len(answer) + 20]!r} for the answer {answer!r}",
            )
        # What follows belongs to this turn only where it does not depend on the turns after it.
        rest = text[stop : stop + _common(text[stop:], upto[stop:])]
        end_of_turn = self.special.search(rest)
        stop += end_of_turn.end() if end_of_turn else len(rest.rstrip())
        return begin, stop


_templates: weakref.WeakKeyDictionary[Any, ChatTemplate] = weakref.WeakKeyDictionary()


def chat_template(processor: Any) -> ChatTemplate:
    """Return the processor's template (or its tokenizer's), examined once."""
    tokenizer = getattr(processor, "tokenizer", processor)
    text = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if isinstance(text, dict):
        text = text.get("default")
    if not text:
        raise DataError(
            source="processor",
            field="chat template",
            expected="a chat template in the processor or its tokenizer",
            got="none",
            remedy="set processor.chat_template, or load the instruction-tuned model's processor",
            reason="chat template",
        )
    known = _templates.get(processor)
    if known is None or known.text != text:
        known = _templates[processor] = ChatTemplate(processor, text)
    return known


def message_text(message: dict) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _as_string(message: dict, image: str | None) -> dict:
    """Write a message for a template of strings, with LLaVA's newline between image and text."""
    out = ""
    parts = message["content"]
    for here, part in enumerate(parts):
        out += str(image) if part["type"] == "image" else part["text"]
        after = parts[here + 1] if here + 1 < len(parts) else part
        if after["type"] != part["type"]:
            out += "\n"
    return {"role": message["role"], "content": out}


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _difference(prompt: str, text: str) -> str:
    at = _common(prompt, text)
    return f"{prompt[at : at + 30]!r} in the prompt but {text[at : at + 30]!r} at character {at}"
