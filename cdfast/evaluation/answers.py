"""Which choice a free reply means. What cannot be told is None: it counts as wrong, and is counted.

Rules, the first that applies (letters: questions with options (A), (B), ...):

1. letters: the reply is a letter, alone or followed by `)`, `.`, `:` or `,`, with or without `(`
   and words such as "The answer is" before it; or a letter in parentheses stands in it. With two
   letters in parentheses it is neither. "A cat" is no letter.
2. letters: the reply has the text of exactly one option in it.
3. yes/no: its first word is yes or no; or one of the two words stands in its first sentence, and
   not the other one.
4. other choices: the reply begins with one (the longest counts), or has exactly one in it.

Case, quotes and end punctuation do not matter. A lower-case letter counts only alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LEAD = r"(?:(?:the )?(?:correct |right |best )?(?:answer|option|choice|caption)(?: is)?:? *)?"


def parse_reply(reply: str, choices: Sequence[str], options: Sequence[str] = ()) -> int | None:
    """The index of the choice that a reply means, or None.

    Args:
        reply: what the model said.
        choices: the possible answers, such as ("A", "B") or ("Yes", "No").
        options: what the choices stand for, where they are letters.
    """
    text = reply.strip().strip("\"'`*").strip()
    if all(len(choice) == 1 and choice.isalpha() for choice in choices):
        found = _letter(text, choices)
        return found if found is not None or not options else _only(text, options)
    if sorted(choice.lower() for choice in choices) == ["no", "yes"]:
        return _yes_no(text, [choice.lower() for choice in choices])
    normal = _normal(text)
    begun = [i for i, choice in enumerate(choices) if _begins(normal, _normal(choice))]
    if begun:
        return max(begun, key=lambda i: len(choices[i]))
    return _only(text, choices)


def _letter(text: str, choices: Sequence[str]) -> int | None:
    letters = "".join(choices)
    alone = text.strip("().:, ").upper()
    if len(alone) == 1 and alone in letters:
        return letters.index(alone)
    named = set(re.findall(rf"\(([{letters}])\)", text))
    found = re.match(rf"(?i:{_LEAD})\(?([{letters}])(?:[).:,]|\s*$)", text)
    if found and len(named) < 2:
        return letters.index(found[1])
    return letters.index(named.pop()) if len(named) == 1 else None


def _yes_no(text: str, choices: list[str]) -> int | None:
    words = re.findall(r"[a-z']+", re.split(r"[.!?\n]", text.lower(), maxsplit=1)[0])
    if words and words[0] in choices:
        return choices.index(words[0])
    named = {word for word in words if word in choices}
    return choices.index(named.pop()) if len(named) == 1 else None


def _only(text: str, wanted: Sequence[str]) -> int | None:
    """The only one of the texts that stands in the reply; a part of a longer one does not count."""
    normal = f" {_normal(text)} "
    found = [i for i, one in enumerate(wanted) if f" {_normal(one)} " in normal]
    found = [
        i
        for i in found
        if not any(i != j and f" {_normal(wanted[i])} " in f" {_normal(wanted[j])} " for j in found)
    ]
    return found[0] if len(found) == 1 else None


def _begins(text: str, choice: str) -> bool:
    return f"{text} ".startswith(f"{choice} ")


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
