"""Evaluation suites: questions with candidate answers.

The miniature's scenes come from splits that no training set draws from; this is checked whenever
the suite is made.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cdfast.miniature.questions import VQA_KINDS, ab_question, vqa_choices, vqa_question
from cdfast.miniature.scenes import (
    CR_KINDS,
    TOYS,
    World,
    caption_pair,
    draw_scene,
    render,
    scene_key,
    split_of,
)

# Draws for each question wanted; about one in three scenes has no question of the rarest kind.
MAX_DRAWS = 100


@dataclass(frozen=True)
class Question:
    """One question with its candidate answers.

    Args:
        kind: results are reported per kind.
        group: kinds are averaged within groups, such as "CR" and "VQA".
        image: what the processor takes (PIL image or uint8 array), or None.
        messages: the conversation up to the question, with an image part if there is an image.
        choices: the candidate answers, at least two.
        answer: the right one of them.
        pair: questions of a kind with the same number are one question asked in another order.
        source: what the image shows, compared with the training set's.
        options: what the choices stand for, where they are letters; to understand a free reply.
    """

    kind: str
    group: str
    image: Any
    messages: list[dict[str, Any]]
    choices: tuple[str, ...]
    answer: str
    pair: int
    source: Any = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.choices)) < 2 or len(set(self.choices)) != len(self.choices):
            raise ValueError(f"choices: expected at least two, all different, got {self.choices}")
        if self.answer not in self.choices:
            raise ValueError(f"answer: expected one of {self.choices}, got {self.answer!r}")


@dataclass(frozen=True)
class Item:
    """One record of a benchmark: the questions that are scored together.

    Args:
        id: unique in its task; results of several models are compared by it.
        subsets: the subsets it belongs to, one or (R-Bench) several.
        cluster: items with the same image or pair of images are not independent: intervals draw
            whole clusters.
        questions: in the order that the task's metric expects.
        source: file and record, for errors.
    """

    id: str
    subsets: tuple[str, ...]
    cluster: str
    questions: tuple[Question, ...]
    source: str


def miniature_suite(
    split: str = "test",
    per_kind: int = 300,
    vqa_per_kind: int = 150,
    seed: int = 0,
    world: World = TOYS,
) -> list[Question]:
    """Questions about scenes that no training set contains.

    Args:
        split: "test", or "validation" for choosing settings.
        per_kind: caption pairs for each of the seven kinds; each is asked in both orders.
        vqa_per_kind: questions for each of the four recognition kinds.
        seed: another seed draws other scenes of the split.
        world: what the scenes are made of.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"split: expected 'validation' or 'test', got {split!r}")
    questions: list[Question] = []
    for kind in CR_KINDS:
        questions += _ask(kind, "CR", split, per_kind, seed, world)
    for kind in VQA_KINDS:
        questions += _ask(kind, "VQA", split, vqa_per_kind, seed, world)
    for question in questions:
        if split_of(question.source) != split:
            raise AssertionError(f"scene {question.source} is not one of split {split}")
    return questions


def _ask(kind: str, group: str, split: str, number: int, seed: int, world: World) -> list[Question]:
    rng = random.Random(f"evaluation/{split}/{seed}/{kind}")
    questions: list[Question] = []
    asked: set[Any] = set()
    draws = 0
    while len(asked) < number:
        draws += 1
        if draws > MAX_DRAWS * number:
            raise ValueError(
                f"number of questions of kind {kind}: expected at most about {len(asked)}, "
                f"got {number}; split {split!r} has no more scenes for it"
            )
        scene = draw_scene(rng, split, world)
        if group == "CR":
            pair = caption_pair(scene, kind, rng)
            if pair is None:
                continue
            turns = [(ab_question(*pair), "A"), (ab_question(*pair[::-1]), "B")]
            choices: tuple[str, ...] = ("A", "B")
        else:
            turn = vqa_question(scene, kind, rng)
            if turn is None:
                continue
            turns = [turn]
            choices = vqa_choices(world)[kind]
        key = (scene_key(scene), turns[0])
        if key in asked:
            continue
        image = render(scene)
        for text, answer in turns:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            questions.append(
                Question(kind, group, image, messages, choices, answer, len(asked), key[0])
            )
        asked.add(key)
    return questions


def with_shuffled_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Give every question the image of another one of its kind; orders of one pair stay together.

    A model that still scores above chance answers from the words alone.
    """
    images: dict[str, dict[int, Any]] = {}
    for question in questions:
        images.setdefault(question.kind, {})[question.pair] = question.image
    rng = random.Random(seed)
    for kind, of_kind in images.items():
        if len(of_kind) < 2:
            raise ValueError(f"questions: expected at least two of kind {kind!r}, got one")
        pairs = list(of_kind)
        rng.shuffle(pairs)
        images[kind] = {a: of_kind[b] for a, b in zip(pairs, [*pairs[1:], pairs[0]])}
    return [replace(q, image=images[q.kind][q.pair]) for q in questions]
