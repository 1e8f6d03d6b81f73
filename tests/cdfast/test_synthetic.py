"""The miniature's scenes, questions, splits, processor and models."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast import synthetic
from cdfast.collator import VisionTextCollator
from cdfast.config import EMBEDDED_TEACHERS
from cdfast.encoding import encode
from cdfast.miniature.build import build
from cdfast.miniature.build_teacher import hop_targets, lookup_targets, turn_mask
from cdfast.miniature.build_vision import patch_labels
from cdfast.miniature.questions import (
    DEFAULT_CR_WEIGHTS,
    TURN_KINDS,
    VQA_KINDS,
    ab_question,
    draw_turns,
    normalise_mix,
    vqa_choices,
    vqa_question,
)
from cdfast.miniature.scenes import (
    COLOURS,
    CR_KINDS,
    SHAPES,
    SPLITS,
    TOYS,
    Scene,
    SceneObject,
    caption_pair,
    draw_scene,
    render,
    scene_key,
    split_of,
)
from cdfast.miniature.worlds import PHOTOS, WORLDS
from cdfast.report import PRIVILEGED_TEACHERS
from cdfast.synthetic import (
    VISUAL_TOKENS,
    EncodedScenes,
    SceneDataset,
    assets_path,
    build_miniature_model,
    check_disjoint,
    make_processor,
    make_student,
    miniature_configs,
    read_card,
    teacher_path,
    vocabulary,
)

MADE = [name for name in EMBEDDED_TEACHERS if (assets_path(name) / "card.json").is_file()]
BOTH = pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)


def _scenes(split, number, seed=0, world=TOYS):
    rng = random.Random(seed)
    return [draw_scene(rng, split, world) for _ in range(number)]


def _scene(*objects):
    """Objects as (colour, shape, cell), at the centre of their cells."""
    made = [
        SceneObject(c, s, cell, 16 * (cell % 3) + 8.0, 16 * (cell // 3) + 8.0, 6.5)
        for c, s, cell in objects
    ]
    return Scene(tuple(made), 30, 0)


def _says(scene, words):
    """An independent reading of a caption, from its words: is it true of the scene?"""
    objects = [(o.colour, o.shape, o.cell % 3, o.cell // 3) for o in scene.objects]
    relation = next(w for w in words if w in ("left", "right", "above", "below"))
    first, rest = words[: words.index(relation)], words[words.index(relation) + 1 :]
    second, extra = rest, []
    if "and" in rest:
        second, extra = rest[: rest.index("and")], rest[rest.index("and") + 1 :]

    def named(words):
        return [o for o in objects if set(words) <= set(o[:2])]

    sign, axis = {"left": (-1, 2), "right": (1, 2), "above": (-1, 3), "below": (1, 3)}[relation]
    related = any(
        sign * (a[axis] - b[axis]) > 0 for a in named(first) for b in named(second) if a != b
    )
    return related and (not extra or bool(named(extra)))


@BOTH
def test_splits_share_no_scene(world):
    keys = {
        split: {scene_key(s) for seed in (0, 1) for s in _scenes(split, 1500, seed, world)}
        for split in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not keys[a] & keys[b]
    assert all(split_of(key) == split for split in SPLITS for key in keys[split])


def test_split_shares():
    rng = random.Random(0)
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    keys = []
    for _ in range(4000):
        cells = rng.sample(range(9), 3)
        keys.append(tuple(sorted((*p, cell) for p, cell in zip(rng.sample(pairs, 3), cells))))
    shares = Counter(map(split_of, keys))
    assert shares["train"] / 4000 == pytest.approx(0.8, abs=0.03)
    assert shares["test"] / 4000 == pytest.approx(0.1, abs=0.02)


def test_scene_key_ignores_order_noise_and_position():
    a = _scene(("red", "circle", 0), ("blue", "square", 5))
    b = Scene(tuple(reversed(a.objects)), 60, 123)
    assert scene_key(a) == scene_key(b)
    assert scene_key(a) != scene_key(_scene(("red", "circle", 0), ("blue", "square", 4)))


def test_rendered_objects_have_their_colour_and_place():
    for scene in _scenes("train", 40):
        image = render(scene)
        assert image.shape == (48, 48, 3)
        assert image.dtype == np.uint8
        for o in scene.objects:
            y, x = int(o.y), int(o.x)
            seen = image[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
            assert np.abs(seen - COLOURS[o.colour]).max() < 25
            assert (int(o.x) // 16, int(o.y) // 16) == (o.cell % 3, o.cell // 3)
        np.testing.assert_array_equal(image, render(scene))


@BOTH
@pytest.mark.parametrize("kind", CR_KINDS)
def test_captions_one_true_one_false_same_length(kind, world):
    rng = random.Random(kind)
    made = 0
    for scene in _scenes("train", 400, world=world):
        pair = caption_pair(scene, kind, rng)
        if pair is None:
            continue
        made += 1
        true, false = (str(statement).split() for statement in pair)
        assert _says(scene, true)
        assert not _says(scene, false)
        assert len(true) == len(false)
        if kind.startswith("swap"):
            assert sorted(true) == sorted(false)
        else:
            changed = [(t, f) for t, f in zip(true, false) if t != f]
            assert 1 <= len(changed) <= (2 if kind == "add_obj" else 1)
    assert made > 150


@BOTH
@pytest.mark.parametrize("kind", CR_KINDS)
def test_no_word_tells_the_true_caption(kind, world):
    """A word that is in one caption only stands in the true one half of the time."""
    rng = random.Random(kind)
    in_true, in_any = Counter(), Counter()
    made = 0
    for scene in _scenes("test", 4000, seed=3, world=world):
        pair = caption_pair(scene, kind, rng)
        if pair is None:
            continue
        made += 1
        true, false = (set(enumerate(str(statement).split())) for statement in pair)
        for mark in true ^ false:
            in_any[mark] += 1
            in_true[mark] += mark in true
    assert made > 1500
    for mark, n in in_any.items():
        # Five standard deviations.
        assert abs(in_true[mark] / n - 0.5) < 2.5 / n**0.5, mark


@BOTH
def test_vqa_answers(world):
    rng = random.Random(0)
    for scene in _scenes("validation", 300, world=world):
        pairs = {o.pair for o in scene.objects}
        for kind in VQA_KINDS:
            turn = vqa_question(scene, kind, rng)
            if turn is None:
                assert kind in ("colour", "shape")
                continue
            question, answer = turn
            words = question.split()
            assert answer in vqa_choices(world)[kind]
            if kind == "exist":
                assert answer == ("yes" if (words[2], words[3]) in pairs else "no")
            elif kind == "count":
                assert answer == str(len(pairs))
            elif kind == "colour":
                assert [c for c, s in pairs if s == words[2]] == [answer]
            else:
                assert [s for c, s in pairs if c == words[2]] == [answer]


@BOTH
def test_turns_are_true(world):
    rng = random.Random(1)
    mix = dict.fromkeys(TURN_KINDS, 2)
    answers = Counter()
    for scene in _scenes("train", 300, world=world):
        turns = draw_turns(scene, mix, rng)
        assert len(turns) == 12
        for question, answer in turns:
            words = question.split()
            assert set(words + answer.split()) <= set(vocabulary(world))
            if words[0] == "true":
                assert answer == ("yes" if _says(scene, words[1:-1]) else "no")
                answers["verify", answer] += 1
            elif words[0] == "which":
                middle = words.index("B")
                captions = {"A": words[3:middle], "B": words[middle + 1 : -1]}
                assert [k for k, words in captions.items() if _says(scene, words)] == [answer]
                answers["ab", answer] += 1
            elif words[0] == "where" and "to" in words:
                first, second = words[2 : words.index("to")], words[words.index("to") + 1 : -1]
                for relation in ("left", "right", "above", "below"):
                    assert _says(scene, [*first, relation, *second]) == (relation in answer.split())
            elif words[0] == "list":
                assert len(answer.split(" , ")) == len(scene.objects)
    for kind, answer in (("verify", "yes"), ("ab", "A")):
        total = sum(n for (k, _), n in answers.items() if k == kind)
        assert answers[kind, answer] / total == pytest.approx(0.5, abs=0.08)


def test_kinds_that_a_scene_lacks_do_not_hang():
    scene = _scene(("red", "circle", 0), ("blue", "square", 5))
    turns = draw_turns(scene, {"ab": 3}, random.Random(0), {"add_obj": 1})
    assert len(turns) == 3


def test_mix_is_checked():
    assert normalise_mix((0, 2, 1, 1, 3, 2))["ab"] == 2
    assert normalise_mix({"loc": 3})["loc"] == 3
    for wrong in ((1, 2), {"lok": 1}, (0,) * 6, (-1, 2, 0, 0, 0, 0)):
        with pytest.raises(ValueError, match="turns_mix"):
            normalise_mix(wrong)
    with pytest.raises(ValueError, match="split"):
        SceneDataset("eval")
    with pytest.raises(ValueError, match="split"):
        draw_scene(random.Random(0), "all")


def _same(a, b):
    assert a.messages == b.messages
    np.testing.assert_array_equal(a.images[0], b.images[0])


def test_items_depend_on_seed_and_index_alone():
    first = SceneDataset("train", 3, 20)
    for index in (7, 2, 7):
        _same(first[index], SceneDataset("train", 3, 50)[index])
    assert first[0].messages != first[1].messages
    assert first[0].messages != SceneDataset("train", 4, 20)[0].messages
    assert len(list(first)) == 20
    _same(first[-1], first[19])
    with pytest.raises(IndexError):
        first[20]


def test_global_random_state_is_left_alone():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    SceneDataset(size=3)[1]
    build_miniature_model(miniature_configs()[0], 5)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_workers_agree():
    dataset = EncodedScenes(SceneDataset(size=8), make_processor())
    collate = VisionTextCollator(0)
    alone = list(DataLoader(dataset, 4, collate_fn=collate))
    apart = list(DataLoader(dataset, 4, collate_fn=collate, num_workers=2))
    for a, b in zip(alone, apart):
        for name in ("input_ids", "labels", "segment_ids", "position_ids", "pixel_values"):
            assert torch.equal(a[name], b[name])


def test_evaluation_scene_in_training_is_refused():
    training = SceneDataset("train", 0, 50).scene_keys()
    assert training == {scene_key(SceneDataset("train", 0, 50).draw(i)[0]) for i in range(50)}
    check_disjoint(SceneDataset("test", 0, 50).scene_keys(), training)
    with pytest.raises(ValueError, match="1 evaluation scenes are training scenes"):
        check_disjoint([next(iter(training))], training)


def test_processor_renders_one_turn(tmp_path):
    make_processor().save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    question = {"type": "text", "text": "which fits A red circle B blue square ?"}
    user = {"role": "user", "content": [{"type": "image"}, question]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    want = "<bos> <image> Q which fits A red circle B blue square ? ans"
    assert prompt == want
    assert processor.apply_chat_template([user, answer], tokenize=False) == want + " A <eos>"
    image = SceneDataset(size=1)[0].images[0]
    batch = processor(text=[prompt], images=[image], return_tensors="pt")
    words = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words == ["<bos>"] + ["<image>"] * VISUAL_TOKENS + want.split()[2:]
    pixels = torch.from_numpy((image.transpose(2, 0, 1) / 255 - 0.5) / 0.5).float()
    torch.testing.assert_close(batch["pixel_values"][0], pixels)


@BOTH
def test_every_question_word_is_known(world):
    processor = make_processor(world)
    scenes = SceneDataset(size=100, turns_mix=[1] * 6, world=world)
    for index in range(100):
        item = encode(processor, scenes[index])
        assert (item["input_ids"] != processor.tokenizer.unk_token_id).all()


def test_each_turn_is_as_if_asked_alone():
    """Several turns after one image, with their mask, give the logits of single questions."""
    processor = make_processor()
    model = build_miniature_model(miniature_configs()[0], 0).eval()
    model.set_attn_implementation("eager")
    sample = SceneDataset(size=1, turns_mix=[1] * 6)[0]
    batch = VisionTextCollator(0)([encode(processor, sample, turns="independent")])
    with torch.no_grad():
        together = model(
            input_ids=batch["input_ids"],
            pixel_values=batch["pixel_values"],
            attention_mask=turn_mask(batch["segment_ids"]),
            position_ids=batch["position_ids"],
        ).logits[0]
    for turn in range(6):
        user, answer = sample.messages[2 * turn : 2 * turn + 2]
        content = [{"type": "image"}, user["content"][-1]]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}, answer], tokenize=False
        )
        alone = processor(text=[text], images=list(sample.images), return_tensors="pt")
        with torch.no_grad():
            logits = model(**alone).logits[0, 1 + VISUAL_TOKENS :]
        chosen = batch["segment_ids"][0] == turn + 1
        assert torch.equal(batch["input_ids"][0, chosen], alone["input_ids"][0, 37:])
        torch.testing.assert_close(together[chosen], logits, rtol=1e-4, atol=1e-5)


def test_privileged_targets():
    scene = _scene(("red", "circle", 0), ("blue", "square", 5), ("red", "square", 8))
    text = (
        "Q which fits A red circle left square and blue square B circle above blue square ? ans A"
    )
    words = text.split()
    ids = [vocabulary().index(word) for word in words]
    lookup, hop = lookup_targets(ids, scene), hop_targets(ids)
    named = {position: lookup[position].reshape(6, 6) for position in np.flatnonzero(lookup.any(1))}
    # The bare "square" (position 7) names two objects, so it has no target.
    assert sorted(named) == [5, 10, 12, 15]
    assert named[5][:2, :2].all()
    assert named[5].sum() == 4
    assert named[15][2:4, 4:].all()
    assert {int(p): int(hop[p]) for p in np.flatnonzero(hop)} == {7: 5, 15: 12}
    labels = patch_labels(scene).reshape(6, 6, 2)
    assert labels[0, 0].tolist() == [1, 1]
    assert labels[5, 5].tolist() == [1, 2]
    assert labels[0, 5].tolist() == [0, 0]


def test_sizes():
    teacher, student = miniature_configs()
    assert (teacher.text_config.num_hidden_layers, student.num_hidden_layers) == (6, 4)
    assert (teacher.text_config.hidden_size, student.hidden_size) == (96, 96)
    assert teacher.image_token_id == vocabulary().index("<image>")
    assert teacher.image_seq_length == VISUAL_TOKENS
    assert student.vocab_size == len(vocabulary()) == len(set(vocabulary()))
    teacher, student = miniature_configs(PHOTOS)
    assert (teacher.vision_config.hidden_size, teacher.vision_config.num_hidden_layers) == (96, 3)
    assert teacher.image_token_id == vocabulary(PHOTOS).index("<image>")
    assert student.vocab_size == len(vocabulary(PHOTOS)) == len(set(vocabulary(PHOTOS)))


def test_student_checkpoint(tmp_path):
    path = make_student(tmp_path / "a", seed=1)
    student = AutoModelForImageTextToText.from_pretrained(path)
    teacher = AutoModelForImageTextToText.from_pretrained(teacher_path())
    assert student.dtype == teacher.dtype == torch.float32
    for (name, a), b in zip(
        student.model.vision_tower.state_dict().items(),
        teacher.model.vision_tower.state_dict().values(),
    ):
        assert torch.equal(a, b), name
    again = AutoModelForImageTextToText.from_pretrained(make_student(tmp_path / "b", seed=1))
    other = AutoModelForImageTextToText.from_pretrained(make_student(tmp_path / "c", seed=2))
    assert torch.equal(student.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(student.lm_head.weight, other.lm_head.weight)
    processor = AutoProcessor.from_pretrained(path)
    assert processor.chat_template == make_processor().chat_template


@pytest.mark.parametrize("name", MADE)
def test_card_and_shipped_processor(name):
    card = read_card(name)
    assert card["evaluation"]["scenes_shared_with_training"] == 0
    for kind in (*CR_KINDS, *VQA_KINDS):
        assert card["teacher"][kind] > 0.9, kind
    shipped = AutoProcessor.from_pretrained(teacher_path(name))
    expected = make_processor(WORLDS[EMBEDDED_TEACHERS[name]])
    assert shipped.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert shipped.chat_template == synthetic.CHAT_TEMPLATE


@pytest.mark.parametrize("name", MADE)
def test_model_trained_without_images_stays_at_chance(name):
    """Within the 99% interval of chance, counting a pair of captions as one observation."""
    card = read_card(name)
    for kind in (*CR_KINDS, *VQA_KINDS):
        number = card["evaluation"]["questions"][kind] / (2 if kind in CR_KINDS else 1)
        chance = card["chance"][kind]
        margin = 2.576 * (chance * (1 - chance) / number) ** 0.5
        assert abs(card["text_only"][kind] - chance) < margin, kind


@pytest.mark.parametrize("name", MADE)
def test_report_tells_privileged_teachers(name):
    privileged = read_card(name)["supervision"].startswith("privileged")
    assert privileged == (name in PRIVILEGED_TEACHERS)


@pytest.mark.skipif("miniature-unprivileged" not in MADE, reason="has not been made")
def test_teachers_of_one_world_share_their_vision_tower():
    first, second = (
        AutoModelForImageTextToText.from_pretrained(teacher_path(name)).model.vision_tower
        for name in ("miniature", "miniature-unprivileged")
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("kind", CR_KINDS)
def test_words_alone_do_not_tell(kind, world):
    """An MLP on the words of both captions stays near chance."""
    torch.manual_seed(0)
    rng = random.Random(kind)
    words = {word: index for index, word in enumerate(vocabulary(world))}
    inputs, answers = [], []
    while len(inputs) < 9000:
        scene = draw_scene(rng, "train", world)
        pair = caption_pair(scene, kind, rng)
        if pair is None:
            continue
        swap = rng.random() < 0.5
        text = ab_question(*(pair[::-1] if swap else pair)).split()
        row = torch.zeros(24, len(words))
        row[torch.arange(len(text)), [words[word] for word in text]] = 1
        inputs.append(row.flatten())
        answers.append(float(swap))
    x, y = torch.stack(inputs), torch.tensor(answers)
    model = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 96), torch.nn.ReLU(), torch.nn.Linear(96, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(6):
        for rows in torch.randperm(6000).split(200):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                model(x[rows])[:, 0], y[rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = ((model(x[6000:])[:, 0] > 0) == (y[6000:] > 0)).float().mean().item()
    assert right == pytest.approx(0.5, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED_TEACHERS)
def test_build_command_makes_the_assets(tmp_path, name):
    card = build(tmp_path, name, fraction=0.003)
    assert card["name"] == name
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "teacher")
    assert model.dtype == torch.float32
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_size < 2.2e6
    assert set(card["teacher"]) == {*CR_KINDS, *VQA_KINDS, "CR", "VQA"}
    assert set(DEFAULT_CR_WEIGHTS) == set(CR_KINDS)
