"""Pairs of a right and a wrong answer about the embedded scenes, for preference training.

One question per sample. The wrong answer differs from the right one in one word, which is replaced
by another of its kind: the other letter, another colour, another row.
"""

from __future__ import annotations

import random
from typing import Any

from torch.utils.data import Dataset

from cdfast.encoding import Sample
from cdfast.miniature.questions import vqa_choices
from cdfast.miniature.scenes import COLOURS, COLUMNS, ROWS, TOYS, World, render
from cdfast.pairs import encode_pair
from cdfast.synthetic import SceneDataset, turns_as_messages


def _exclusive(world: World) -> tuple[tuple[str, ...], ...]:
    """Words that exclude each other as (a word of) an answer; of relations only opposites do."""
    return (
        *(("A", "B"), ("yes", "no"), vqa_choices(world)["count"], tuple(COLOURS), world.shapes),
        *(ROWS, COLUMNS, ("left", "right"), ("above", "below")),
    )


def wrong_answer(answer: str, rng: random.Random, world: World = TOYS) -> str:
    """`answer` with one word, drawn at random, replaced by another that excludes it.

    Args:
        answer: to a question about a scene of `world`.
        rng: draws the word.
        world: whose words there are.

    Raises:
        ValueError: the answer has no word that could be replaced.
    """
    words, groups = answer.split(), _exclusive(world)
    open_to_change = [
        (n, group) for n, word in enumerate(words) for group in groups if word in group
    ]
    if not open_to_change:
        raise ValueError(
            f"answer: expected a word of {sorted({w for g in groups for w in g})}; got "
            f"{answer!r}. Add its words to preference_scenes."
        )
    n, group = rng.choice(open_to_change)
    words[n] = rng.choice([word for word in group if word != words[n]])
    return " ".join(words)


class PreferenceScenes(Dataset[dict[str, Any]]):
    """One encoded pair per scene; item i depends on (split, seed, i) of `scenes` alone.

    Args:
        scenes: whose questions are asked: the first of each item's turns, which are in random
            order, so that its `turns_mix` says how often each kind comes.
        processor: encodes the pairs.
    """

    def __init__(self, scenes: SceneDataset, processor: Any) -> None:
        self.scenes = scenes
        self.processor = processor

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, index: int) -> Sample:
        """Item `index` before it is encoded."""
        scene, turns = self.scenes.draw(index)
        question, answer = turns[0]
        split, seed, world = self.scenes.split, self.scenes.seed, self.scenes.world
        rng = random.Random(f"rejected/{split}/{seed}/{index % len(self)}")
        source = f"{world.name} {split} pairs, seed {seed}, scene {index}"
        messages = turns_as_messages([(question, answer)])
        return Sample(messages, (render(scene),), source, wrong_answer(answer, rng, world))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return encode_pair(self.processor, self.sample(index))
