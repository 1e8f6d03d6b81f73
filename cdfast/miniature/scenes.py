"""Compositional scenes in a 3x3 grid, and true and false captions in SugarCrepe's seven kinds.

What the objects are and how a scene looks is a `World`: `TOYS` draws coloured shapes, and
`cdfast.miniature.worlds` has handwritten digits on photographs.

Everything is drawn from a `random.Random` that the caller passes in; the module holds no random
state. A scene belongs to one split by a hash of what is in it (colour, shape and cell of every
object), so no scene of one split can be drawn in another, whatever the seeds.

No question can be answered from its words: colours, shapes and cells are drawn uniformly, and the
two captions of a pair have equally many words and differ only in what is right or wrong.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GRID = 3
CELL_SIZE = 16
IMAGE_SIZE = GRID * CELL_SIZE
OBJECTS_PER_SCENE = (2, 3)
NOISE_STD = 12.0
BACKGROUND = (10, 70)
CENTRE_JITTER = 2.0
RADII = (5.5, 6.5, 7.5)

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 40),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left", "right", "above", "below")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("west", "center", "east")

CR_KINDS = (
    "swap_att",
    "swap_obj",
    "replace_rel",
    "replace_att",
    "replace_obj",
    "add_att",
    "add_obj",
)
SPLITS = ("train", "validation", "test")
PAIR_ATTEMPTS = 12
SPLIT_BUCKETS = 10

SceneKey = tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape: its cell (row-major, 0..8), centre and radius in pixels."""

    colour: str
    shape: str
    cell: int
    x: float
    y: float
    radius: float

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class World:
    """What scenes are made of and how they look.

    Args:
        name: as data, in recipes and on command lines.
        shapes: the words for what an object can be; colours, places and relations are common to
            all worlds.
        render: scene -> uint8 (48, 48, 3). What varies beside the objects comes from the scene's
            own seed, so a scene always looks the same.
    """

    name: str
    shapes: tuple[str, ...]
    render: Callable[[Scene], np.ndarray]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every (colour, shape)."""
        return tuple((colour, shape) for colour in COLOURS for shape in self.shapes)


def render_toys(scene: Scene) -> np.ndarray:
    """Coloured shapes on grey, with noise, as uint8 (48, 48, 3)."""
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), scene.background, np.float32)
    for o in scene.objects:
        dy, dx = np.meshgrid(axis - o.y, axis - o.x, indexing="ij")
        if o.shape == "circle":
            inside = dx * dx + dy * dy <= o.radius**2
        elif o.shape == "square":
            inside = np.maximum(abs(dx), abs(dy)) <= o.radius * 0.86
        else:
            inside = (dy <= o.radius * 0.8) & (abs(dx) * 1.7 <= dy + o.radius)
        image[inside] = COLOURS[o.colour]
    noise = np.random.default_rng(scene.noise_seed).standard_normal(image.shape, np.float32)
    return np.clip(image + NOISE_STD * noise, 0, 255).astype(np.uint8)


TOYS = World("miniature", SHAPES, render_toys)


@dataclass(frozen=True)
class Scene:
    """Two or three objects, no two of the same colour and shape.

    Args:
        objects: in the order they were drawn.
        background: its brightness, in `BACKGROUND`.
        noise_seed: of what is seen beside the objects' names, colours and places.
        world: what the scene is made of.
    """

    objects: tuple[SceneObject, ...]
    background: int
    noise_seed: int
    world: World = TOYS


@dataclass(frozen=True)
class Statement:
    """`[colour] shape relation [colour] shape [and colour shape]`, true or false of a scene."""

    first: tuple[str | None, str]
    relation: str
    second: tuple[str | None, str]
    extra: tuple[str, str] | None = None

    def __str__(self) -> str:
        words = [*self.first, self.relation, *self.second]
        if self.extra is not None:
            words += ["and", *self.extra]
        return " ".join(word for word in words if word is not None)


def scene_key(scene: Scene) -> SceneKey:
    """What is in the scene, up to noise and sub-cell position: its sorted (colour, shape, cell)."""
    return tuple(sorted((o.colour, o.shape, o.cell) for o in scene.objects))


def split_of(key: SceneKey) -> str:
    """The split that owns a scene: 8 in 10 train, 1 in 10 validation, 1 in 10 test, by hash."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "little") % SPLIT_BUCKETS
    return {0: "validation", 1: "test"}.get(bucket, "train")


def draw_scene(rng: random.Random, split: str, world: World = TOYS) -> Scene:
    """A uniformly drawn scene of `split` ("train", "validation" or "test")."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    while True:
        number = rng.randint(*OBJECTS_PER_SCENE)
        cells = rng.sample(range(GRID**2), number)
        pairs = rng.sample(world.pairs, number)
        key = tuple(sorted((*pair, cell) for pair, cell in zip(pairs, cells)))
        if split_of(key) == split:
            break
    objects = tuple(_place(rng, pair, cell) for pair, cell in zip(pairs, cells))
    return Scene(objects, rng.randint(*BACKGROUND), rng.getrandbits(63), world)


def _place(rng: random.Random, pair: tuple[str, str], cell: int) -> SceneObject:
    x = (cell % GRID + 0.5) * CELL_SIZE + rng.uniform(-CENTRE_JITTER, CENTRE_JITTER)
    y = (cell // GRID + 0.5) * CELL_SIZE + rng.uniform(-CENTRE_JITTER, CENTRE_JITTER)
    return SceneObject(*pair, cell, x, y, rng.choice(RADII))


def render(scene: Scene) -> np.ndarray:
    """The scene as uint8 (48, 48, 3), as its world draws it."""
    return scene.world.render(scene)


def true_relations(a: SceneObject, b: SceneObject) -> list[str]:
    """The relations of `a` to `b` that hold: one or two of left, right, above, below."""
    holds = (a.column < b.column, a.column > b.column, a.row < b.row, a.row > b.row)
    return [relation for relation, true in zip(RELATIONS, holds) if true]


def is_true(scene: Scene, statement: Statement) -> bool:
    """Whether some two objects of the scene satisfy the statement (and the third exists)."""

    def fits(o: SceneObject, name: tuple[str | None, str]) -> bool:
        return o.shape == name[1] and name[0] in (None, o.colour)

    if statement.extra is not None and statement.extra not in {o.pair for o in scene.objects}:
        return False
    return any(
        statement.relation in true_relations(a, b)
        for a in scene.objects
        if fits(a, statement.first)
        for b in scene.objects
        if b is not a and fits(b, statement.second)
    )


def caption_pair(scene: Scene, kind: str, rng: random.Random) -> tuple[Statement, Statement] | None:
    """A true and a false statement that differ as `kind` says, or None if the scene has none.

    Args:
        kind: one of `CR_KINDS`. Both statements of a pair always have equally many words: for the
            `add_*` kinds both add something to the same bare caption, one of them wrongly.
    """
    for _ in range(PAIR_ATTEMPTS):
        pair = _propose_pair(scene, kind, rng)
        if pair is not None and is_true(scene, pair[0]) and not is_true(scene, pair[1]):
            return pair
    return None


def _propose_pair(
    scene: Scene, kind: str, rng: random.Random
) -> tuple[Statement, Statement] | None:
    a, b = rng.sample(scene.objects, 2)
    relation = rng.choice(true_relations(a, b))
    first: tuple[str | None, str] = a.pair
    second: tuple[str | None, str] = b.pair
    true = Statement(first, relation, second)

    if kind == "swap_att":
        if a.colour == b.colour or a.shape == b.shape:
            return None
        return true, Statement((b.colour, a.shape), relation, (a.colour, b.shape))

    if kind in ("swap_obj", "replace_rel"):
        # Bare shapes in 4 of 10 questions, where they name two different things.
        if a.shape != b.shape and rng.random() < 0.4:
            first, second = (None, a.shape), (None, b.shape)
            true = Statement(first, relation, second)
        if kind == "swap_obj":
            return true, Statement(second, relation, first)
        other = rng.choice([r for r in RELATIONS if r != relation])
        return true, Statement(first, other, second)

    about_first = rng.random() < 0.5
    target, unchanged = (a, b) if about_first else (b, a)
    if kind in ("replace_att", "replace_obj", "add_att"):
        wrong_colour = rng.choice([c for c in COLOURS if c != target.colour])
        wrong_shape = rng.choice([s for s in scene.world.shapes if s != target.shape])
        if kind == "replace_obj":
            wrong = (target.colour, wrong_shape)
        else:
            wrong = (wrong_colour, target.shape)
        kept: tuple[str | None, str] = unchanged.pair
        if kind == "add_att":
            kept = (None, unchanged.shape)
        elif wrong == unchanged.pair:
            return None

        def say(name: tuple[str, str]) -> Statement:
            return (
                Statement(name, relation, kept) if about_first else Statement(kept, relation, name)
            )

        return say(target.pair), say(wrong)

    if kind == "add_obj":
        present = [o.pair for o in scene.objects]
        rest = [pair for pair in present if pair not in (a.pair, b.pair)]
        if not rest:
            return None
        absent = rng.choice([pair for pair in scene.world.pairs if pair not in present])
        return (
            Statement(first, relation, second, rng.choice(rest)),
            Statement(first, relation, second, absent),
        )
    raise ValueError(f"kind: expected one of {CR_KINDS}, got {kind!r}")
