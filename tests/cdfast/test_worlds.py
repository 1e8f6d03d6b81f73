"""The miniature's worlds: the default one as it always was, photographs by split, no shortcuts."""

import hashlib
import itertools
import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast import synthetic
from cdfast.config import EMBEDDED_SCENES, EMBEDDED_TEACHERS, ConfigError, load_recipe
from cdfast.evaluate import main as evaluate_main
from cdfast.miniature import worlds
from cdfast.miniature.questions import VQA_KINDS, ab_question, vqa_choices, vqa_question
from cdfast.miniature.scenes import (
    COLOURS,
    CR_KINDS,
    SPLITS,
    TOYS,
    Statement,
    caption_pair,
    draw_scene,
    render,
    split_of,
)
from cdfast.miniature.suites import miniature_suite
from cdfast.miniature.worlds import PHOTOS, WORLDS
from cdfast.models import check_models
from cdfast.synthetic import (
    EncodedScenes,
    SceneDataset,
    assets_path,
    check_disjoint,
    make_processor,
    make_student,
    teacher_path,
)

BOTH = pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
MADE = [name for name in EMBEDDED_TEACHERS if (assets_path(name) / "card.json").is_file()]
# Of the scenes, questions, tokens and weights before there was a second world.
TOYS_SHA256 = "d89a302fb815e0d52fdd5318f448db68c478f3528b00d1e330e2cce821b6e648"
TEACHER_SHA256 = "f15a8d7cca2bc2aac520ab3cbe5cbb08cdb97009591ea8c152cf7cf2d5a5cff3"


def test_default_world_is_bit_identical():
    digest = hashlib.sha256()
    processor = make_processor()
    for split in SPLITS:
        scenes = SceneDataset(split, 7, 12, [1] * 6)
        for index in range(12):
            sample = scenes[index]
            digest.update(repr(sample.messages).encode())
            digest.update(sample.images[0].tobytes())
            ids = EncodedScenes(scenes, processor)[index]["input_ids"]
            digest.update(ids.numpy().astype("<i8").tobytes())
        for q in miniature_suite("test" if split == "train" else split, 2, 2, 3):
            digest.update(repr((q.kind, q.messages, q.answer, q.source)).encode())
            digest.update(q.image.tobytes())
    assert digest.hexdigest() == TOYS_SHA256


def test_default_teacher_is_bit_identical():
    weights = (teacher_path() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == TEACHER_SHA256


def test_worlds_have_the_names_of_the_options():
    assert set(WORLDS) == set(EMBEDDED_SCENES) == set(EMBEDDED_TEACHERS.values())
    assert {"miniature", "miniature-photos"} <= set(MADE)


def test_teacher_that_is_not_made_is_refused_with_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(synthetic, "assets_path", lambda name: tmp_path / name)
    recipe = load_recipe("miniature")
    with pytest.raises(ConfigError, match=r"cdfast\.miniature\.build --which miniature"):
        check_models(recipe)


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_are_those_of_the_scenes_split(split, monkeypatch):
    """Blackened pictures of the other splits change nothing, of the own split everything."""
    scenes = [draw_scene(random.Random(seed), split, PHOTOS) for seed in range(20)]
    before = [render(scene) for scene in scenes]
    content = worlds._content()
    others = {k: v if k.endswith(f"_{split}") else v * 0 for k, v in content.items()}
    monkeypatch.setattr(worlds, "_content", lambda: others)
    for scene, image in zip(scenes, before):
        np.testing.assert_array_equal(render(scene), image)
    own = {k: v * 0 if k.endswith(f"_{split}") else v for k, v in content.items()}
    monkeypatch.setattr(worlds, "_content", lambda: own)
    assert all((render(scene) != image).any() for scene, image in zip(scenes, before))


def test_no_instance_of_a_digit_is_in_two_splits():
    content = worlds._content()
    for digit in PHOTOS.shapes:
        of_split = [{i.tobytes() for i in content[f"{digit}_{split}"]} for split in SPLITS]
        assert sum(map(len, of_split)) == len(set.union(*of_split)) > 100


def test_digits_have_their_colour_and_place():
    for seed in range(40):
        scene = draw_scene(random.Random(seed), "train", PHOTOS)
        image = render(scene)
        assert image.shape == (48, 48, 3)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, render(scene))
        for o in scene.objects:
            row, column = 16 * o.row, 16 * o.column
            cell = image[row : row + 16, column : column + 16].reshape(-1, 3).astype(float)
            distance = np.abs(cell - COLOURS[o.colour]).max(1)
            assert (distance < 60).sum() >= 6, (seed, o)


def test_worlds_differ_only_in_shapes_and_looks():
    """The same draws give the same colours, cells and kinds of questions."""
    for split in ("validation", "test"):
        asked = {q.source for q in miniature_suite(split, 5, 5, world=PHOTOS)}
        assert all(split_of(key) == split for key in asked)
        assert {shape for key in asked for _, shape, _ in key} == set(PHOTOS.shapes)


@BOTH
def test_evaluation_scenes_are_disjoint_from_training(world):
    training = SceneDataset("train", 0, 3000, world=world).scene_keys()
    suites = {
        split: {q.source for q in miniature_suite(split, 20, 20, world=world)}
        for split in ("validation", "test")
    }
    for keys in suites.values():
        check_disjoint(keys, training)
    check_disjoint(suites["validation"], suites["test"])
    with pytest.raises(ValueError, match="evaluation scenes are training scenes"):
        check_disjoint(suites["test"] | {next(iter(training))}, training)


def _question(scene, kind, rng):
    """(words of the question by place, answer) or None; which caption is A is drawn."""
    if kind in VQA_KINDS:
        turn = vqa_question(scene, kind, rng)
        return turn and (turn[0].split(), turn[1])
    pair = caption_pair(scene, kind, rng)
    if pair is None:
        return None
    swap = rng.random() < 0.5
    words = ab_question(*(pair[::-1] if swap else pair)).split()
    middle = words.index("B")
    marked = [f"A:{word}" for word in words[3:middle]], [f"B:{w}" for w in words[middle + 1 : -1]]
    return marked[0] + marked[1], "B" if swap else "A"


def words_alone(kind, world, number=2400):
    """Accuracy on fresh questions of a softmax regression on bags of words and bigrams."""
    rng = random.Random(f"{kind}/{world.name}")
    texts, answers = [], []
    while len(texts) < number:
        asked = _question(draw_scene(rng, "train", world), kind, rng)
        if asked is not None:
            words, answer = asked
            texts.append(Counter([*words, *itertools.pairwise(words)]))
            answers.append(answer)
    seen = {word: column for column, word in enumerate(dict.fromkeys(w for t in texts for w in t))}
    x = torch.zeros(number, len(seen))
    for row, counts in enumerate(texts):
        x[row, [seen[word] for word in counts]] = torch.tensor(list(counts.values())).float()
    choices = vqa_choices(world).get(kind, ("A", "B"))
    y = torch.tensor([choices.index(answer) for answer in answers])
    torch.manual_seed(0)
    model = torch.nn.Linear(len(seen), len(choices))
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.3)
    half = number // 2
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(x[:half]), y[:half])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (model(x[half:]).argmax(-1) == y[half:]).float().mean().item()
    return right, 1 / len(choices), half


@BOTH
@pytest.mark.parametrize("kind", [*CR_KINDS, *VQA_KINDS])
def test_words_alone_stay_at_chance(kind, world, one_thread):
    right, chance, number = words_alone(kind, world)
    # Four standard deviations: 22 of these run.
    assert abs(right - chance) < 4 * (chance * (1 - chance) / number) ** 0.5


def test_words_alone_find_a_planted_leak(monkeypatch, one_thread):
    """Where a false colour is yellow more often than the others, the same learner sees it."""

    honest = caption_pair

    def leaking(scene, kind, rng):
        pair = honest(scene, kind, rng)
        if pair is None or rng.random() < 0.5:
            return pair
        true, false = pair
        leaked = Statement(("yellow", false.first[1]), false.relation, false.second, false.extra)
        return true, leaked

    monkeypatch.setitem(globals(), "caption_pair", leaking)
    right, chance, number = words_alone("replace_att", TOYS)
    assert right > chance + 4 * (chance * (1 - chance) / number) ** 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "miniature-photos"},
        {"student": "miniature-photos"},
        {"data": ["miniature-photos"]},
        {"evaluate": "miniature-photos"},
        {"data": ["miniature", "miniature-photos"]},
    ],
    ids=str,
)
def test_parts_of_two_worlds_are_refused(options):
    with pytest.raises(ConfigError, match="miniature: expected teacher, student, data and"):
        replace(load_recipe("miniature"), **options).check_runnable()


def test_parts_of_one_world_are_runnable():
    replace(load_recipe("miniature"), teacher="miniature-unprivileged").check_runnable()
    load_recipe("miniature-photos").check_runnable()


def test_student_of_photographs(tmp_path):
    path = make_student(tmp_path, 1, PHOTOS)
    student = AutoModelForImageTextToText.from_pretrained(path)
    teacher = AutoModelForImageTextToText.from_pretrained(teacher_path(PHOTOS.name))
    for a, b in zip(
        student.model.vision_tower.parameters(), teacher.model.vision_tower.parameters()
    ):
        assert torch.equal(a, b)
    words = AutoProcessor.from_pretrained(path).tokenizer.get_vocab()
    assert set(PHOTOS.shapes) < set(words)


@pytest.mark.parametrize("name", MADE)
def test_evaluate_takes_embedded_teachers(name, tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--per-kind", "3", "--vqa-per-kind", "3", "--split", "validation"]
    options += ["--suite", EMBEDDED_TEACHERS[name], "--json", str(file)]
    assert evaluate_main([name, *options]) == 0
    assert "replace_rel" in capsys.readouterr().out
    assert json.loads(file.read_text())["models"][name]["averages"]["CR"] > 0.75
