"""Which choice a free reply means."""

import pytest

from cdfast.evaluation.answers import parse_reply

LETTERS = ("A", "B")
OPTIONS = ("red circle left blue square", "blue circle left red square")
YES_NO = ("Yes", "No")
PLACES = ("top", "top west", "center")


@pytest.mark.parametrize(
    ("reply", "meant"),
    [
        ("A", 0),
        ("B.", 1),
        ("(B)", 1),
        ("b", 1),
        ("(a)", 0),
        ("A) red circle", 0),
        ("B: the second", 1),
        ("The answer is B", 1),
        ("the correct option is (A).", 0),
        ("Answer: B", 1),
        ("I think that (B) fits", 1),
        ("Blue circle left red square.", 1),
        ("It shows a red circle left blue square", 0),
        ("A cat", None),
        ("(A) or (B)", None),
        ("Both", None),
        ("", None),
        ("C", None),
        (f"{OPTIONS[0]} or {OPTIONS[1]}", None),
    ],
)
def test_letters(reply, meant):
    assert parse_reply(reply, LETTERS, OPTIONS) == meant


@pytest.mark.parametrize(
    ("reply", "meant"),
    [
        ("Yes", 0),
        ("no.", 1),
        ("No, there is not. Yes it is far", 1),
        ("The answer is yes", 0),
        ("'Yes'", 0),
        ("yes or no", 0),
        ("It is yes or no", None),
        ("Nothing", None),
        ("There is. Yes", None),
        ("", None),
    ],
)
def test_yes_no(reply, meant):
    assert parse_reply(reply, YES_NO) == meant
    # Whatever the order of the choices.
    assert parse_reply(reply, YES_NO[::-1]) == (None if meant is None else 1 - meant)


@pytest.mark.parametrize(
    ("reply", "meant"),
    [
        ("top", 0),
        ("top west .", 1),
        ("Top-West", 1),
        ("it is top west", 1),
        ("it is center", 2),
        ("topmost", None),
        ("top or center", 0),
        ("it is center or top", None),
    ],
)
def test_words_the_longest_first(reply, meant):
    assert parse_reply(reply, PLACES) == meant
