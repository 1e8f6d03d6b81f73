"""Questions about scenes: recognition, places, relations, and which of two captions fits.

The kinds are those of training turns (`TURN_KINDS`); the evaluation asks the caption pairs (`ab`)
and the recognition kinds (`VQA_KINDS`). Like `scenes`, the module holds no random state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from cdfast.miniature.scenes import (
    COLOURS,
    COLUMNS,
    CR_KINDS,
    OBJECTS_PER_SCENE,
    ROWS,
    Scene,
    SceneObject,
    Statement,
    World,
    caption_pair,
    true_relations,
)

VQA_KINDS = ("exist", "colour", "count", "shape")
TURN_KINDS = ("list", "vqa", "loc", "rel", "verify", "ab")

# How often each kind is drawn for training turns; relations and counts are the hardest to learn.
DEFAULT_CR_WEIGHTS = dict(zip(CR_KINDS, (2, 3, 3, 1, 1, 1, 1)))
VQA_WEIGHTS = dict(zip(VQA_KINDS, (0.2, 0.3, 0.3, 0.2)))
KIND_ATTEMPTS = 20

Turn = tuple[str, str]


def vqa_choices(world: World) -> dict[str, tuple[str, ...]]:
    """The candidate answers of each recognition kind."""
    return {
        "exist": ("yes", "no"),
        "colour": tuple(COLOURS),
        "count": tuple(str(n) for n in range(OBJECTS_PER_SCENE[0], OBJECTS_PER_SCENE[1] + 1)),
        "shape": world.shapes,
    }


def ab_question(first: Statement, second: Statement) -> str:
    """`which fits A <first> B <second> ?`"""
    return f"which fits A {first} B {second} ?"


def vqa_question(scene: Scene, kind: str, rng: random.Random) -> Turn | None:
    """A recognition question and its answer, or None if the scene has no such question."""
    objects = scene.objects
    if kind == "exist":
        present = [o.pair for o in objects]
        if rng.random() < 0.5:
            return _exist(rng.choice(present)), "yes"
        absent = [pair for pair in scene.world.pairs if pair not in present]
        hard = [pair for pair in absent if pair[0] in {p[0] for p in present}]
        return _exist(rng.choice(hard if hard and rng.random() < 0.5 else absent)), "no"
    if kind == "count":
        return "how many objects ?", str(len(objects))
    if kind == "colour":
        unique = [o for o in objects if sum(p.shape == o.shape for p in objects) == 1]
        if not unique:
            return None
        o = rng.choice(unique)
        return f"what colour {o.shape} ?", o.colour
    if kind == "shape":
        unique = [o for o in objects if sum(p.colour == o.colour for p in objects) == 1]
        if not unique:
            return None
        o = rng.choice(unique)
        return f"what shape {o.colour} ?", o.shape
    raise ValueError(f"kind: expected one of {VQA_KINDS}, got {kind!r}")


def _exist(pair: tuple[str, str]) -> str:
    return f"is there {pair[0]} {pair[1]} ?"


def _vqa_turn(scene: Scene, rng: random.Random) -> Turn:
    kind = rng.choices(VQA_KINDS, list(VQA_WEIGHTS.values()))[0]
    turn = vqa_question(scene, kind, rng) or vqa_question(scene, "exist", rng)
    assert turn is not None
    return turn


def _position(o: SceneObject) -> str:
    return f"{ROWS[o.row]} {COLUMNS[o.column]}"


def _name(scene: Scene, o: SceneObject, rng: random.Random) -> str:
    """The object by its shape alone, its colour alone, or both; never ambiguous."""
    draw = rng.random()
    if draw < 0.5 and sum(p.shape == o.shape for p in scene.objects) == 1:
        return o.shape
    if 0.5 <= draw < 0.65 and sum(p.colour == o.colour for p in scene.objects) == 1:
        return o.colour
    return f"{o.colour} {o.shape}"


def _list_turn(scene: Scene) -> Turn:
    ordered = sorted(scene.objects, key=lambda o: o.cell)
    return "list objects :", " , ".join(f"{o.colour} {o.shape} {_position(o)}" for o in ordered)


def _loc_turn(scene: Scene, rng: random.Random) -> Turn:
    o = rng.choice(scene.objects)
    return f"where is {_name(scene, o, rng)} ?", _position(o)


def _rel_turn(scene: Scene, rng: random.Random) -> Turn:
    a, b = rng.sample(scene.objects, 2)
    question = f"where is {_name(scene, a, rng)} to {_name(scene, b, rng)} ?"
    return question, " ".join(true_relations(a, b))


def _draw_pair(
    scene: Scene, rng: random.Random, weights: Mapping[str, float]
) -> tuple[Statement, Statement]:
    """A pair of some kind; kinds that this scene does not have are drawn again."""
    for kind in rng.choices(list(weights), list(weights.values()), k=KIND_ATTEMPTS):
        pair = caption_pair(scene, kind, rng)
        if pair is not None:
            return pair
    # Every scene has this kind: two objects never have the same name.
    pair = caption_pair(scene, "swap_obj", rng)
    assert pair is not None
    return pair


def normalise_mix(mix: Mapping[str, int] | Sequence[int]) -> dict[str, int]:
    """Numbers of turns per image by kind, from a mapping or six numbers in `TURN_KINDS` order."""
    if isinstance(mix, Mapping):
        unknown = set(mix) - set(TURN_KINDS)
        if unknown:
            raise ValueError(f"turns_mix: expected kinds {TURN_KINDS}, got {sorted(unknown)}")
        counts = {kind: int(mix.get(kind, 0)) for kind in TURN_KINDS}
    else:
        if len(mix) != len(TURN_KINDS):
            raise ValueError(f"turns_mix: expected {len(TURN_KINDS)} numbers, got {len(mix)}")
        counts = dict(zip(TURN_KINDS, map(int, mix)))
    if min(counts.values()) < 0 or sum(counts.values()) == 0:
        raise ValueError(f"turns_mix: expected at least one turn and none negative, got {counts}")
    return counts


def draw_turns(
    scene: Scene,
    mix: Mapping[str, int],
    rng: random.Random,
    cr_weights: Mapping[str, float] | None = None,
) -> list[Turn]:
    """(question, answer) turns about one scene, in random order.

    Args:
        mix: number of turns by kind (`TURN_KINDS`).
        cr_weights: relative frequency of the caption kinds in `verify` and `ab` turns.
    """
    weights = DEFAULT_CR_WEIGHTS if cr_weights is None else cr_weights
    turns = [_list_turn(scene) for _ in range(mix.get("list", 0))]
    turns += [_vqa_turn(scene, rng) for _ in range(mix.get("vqa", 0))]
    turns += [_loc_turn(scene, rng) for _ in range(mix.get("loc", 0))]
    turns += [_rel_turn(scene, rng) for _ in range(mix.get("rel", 0))]
    for _ in range(mix.get("verify", 0)):
        pair = _draw_pair(scene, rng, weights)
        true = rng.random() < 0.5
        turns.append((f"true {pair[0 if true else 1]} ?", "yes" if true else "no"))
    for _ in range(mix.get("ab", 0)):
        pair = _draw_pair(scene, rng, weights)
        turn = (ab_question(*pair), "A")
        turns.append(turn if rng.random() < 0.5 else (ab_question(pair[1], pair[0]), "B"))
    rng.shuffle(turns)
    return turns
