"""Pairs of a chosen and a rejected answer: files, refusals, encoding, batches, embedded scenes."""

import random

import pytest
import torch

from cdfast.collator import VisionTextCollator
from cdfast.data import DataError, load_dataset
from cdfast.encoding import Sample, encode
from cdfast.miniature.preference_scenes import PreferenceScenes, wrong_answer
from cdfast.miniature.questions import DEFAULT_CR_WEIGHTS, TURN_KINDS, draw_turns
from cdfast.miniature.scenes import draw_scene
from cdfast.miniature.worlds import PHOTOS
from cdfast.pairs import encode_pair
from cdfast.synthetic import SceneDataset, make_processor
from tests.cdfast.test_data import PROCESSOR, llava, root, write
from tests.cdfast.tiny_processors import IMAGE, supervised, text

__all__ = ["root"]  # a fixture

QUESTION = {"from": "human", "value": "<image>\nWhat?"}


def load(path, root, **options):
    return load_dataset(path, root, PROCESSOR, pairs=True, **options)


def messages(**other):
    said = [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": "red"},
    ]
    return {"id": 7, "messages": said, "images": ["a.png"], **other}


def both(style, rejected_question="<image>\nWhat?", **other):
    """A record of `chosen` and `rejected` conversations, as LLaVA-MoD's or TRL's data."""
    keys = {"llava": ("from", "value", "human", "gpt"), "messages": None}[style]
    role, value, user, assistant = keys or ("role", "content", "user", "assistant")
    chosen, rejected = (
        [{role: user, value: question}, {role: assistant, value: answer}]
        for question, answer in (("<image>\nWhat?", "red"), (rejected_question, "blue"))
    )
    return {"id": 7, "image": "a.png", "chosen": chosen, "rejected": rejected, **other}


# -- files -----------------------------------------------------------------------------------------

RECORDS = {
    "llava": llava(rejected="blue"),
    "messages": messages(rejected="blue"),
    "messages, parts": messages(rejected=[text("bl"), text("ue")]),
    "two conversations, llava": both("llava"),
    "two conversations, messages": both("messages"),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("turns", ["dialogue", "independent"])
def test_both_rows_share_prompt_and_image(tmp_path, root, name, turns):
    dataset = load(write(tmp_path / "p.json", [RECORDS[name]]), root, turns=turns)
    pair = dataset[0]
    other = pair["rejected"]
    assert supervised(PROCESSOR, pair) == ["red</s>"]
    assert supervised(PROCESSOR, other) == ["blue</s>"]
    prompts = [
        row["input_ids"][: int((row["labels"] != -100).nonzero()[0])] for row in (pair, other)
    ]
    assert prompts[0].tolist() == prompts[1].tolist()
    assert len(prompts[0]) > 5
    assert torch.equal(pair["images"]["pixel_values"], other["images"]["pixel_values"])
    assert "segment_ids" not in pair


def test_only_the_last_answer_of_a_dialogue_is_judged(tmp_path, root):
    record = llava(rejected="a bag")
    record["conversations"] += [
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "a box"},
    ]
    path = write(tmp_path / "p.json", [record])
    pair = load(path, root)[0]
    assert supervised(PROCESSOR, pair) == ["a box</s>"]
    assert supervised(PROCESSOR, pair["rejected"]) == ["a bag</s>"]
    assert "red" in PROCESSOR.tokenizer.decode(pair["input_ids"])
    alone = load(path, root, turns="independent")[0]
    assert supervised(PROCESSOR, alone) == ["a box</s>"]
    assert "red" not in PROCESSOR.tokenizer.decode(alone["input_ids"])
    assert alone["images"]


def test_rejected_answers_are_not_looked_at_elsewhere(tmp_path, root):
    records = [llava(rejected=3), llava("sub/b.jpg")]
    dataset = load_dataset(write(tmp_path / "p.json", records), root, PROCESSOR)
    assert len(dataset) == 2
    assert "rejected" not in dataset[0]
    chosen = load_dataset(write(tmp_path / "c.json", [both("llava")]), root, PROCESSOR)[0]
    assert supervised(PROCESSOR, chosen) == ["red</s>"]


BROKEN = {
    "none": (llava(), r"rejected: expected the answer .*got none.*--preference\.data"),
    "a number": (llava(rejected=3), "rejected: expected a string or a list of text parts, got 3"),
    "empty": (llava(rejected=" "), "rejected: expected an answer, got an empty one"),
    "the chosen one": (llava(rejected=" red\n"), "rejected: expected another answer"),
    "an image mark": (llava(rejected="<image>\nblue"), "rejected: expected text, got an image"),
    "an image part": (messages(rejected=[IMAGE, text("b")]), "rejected: expected text, got an"),
    "an audio part": (messages(rejected=[{"type": "audio"}]), r"rejected\[0\]: expected"),
    "half a character": (messages(rejected="b\ud800"), "rejected: expected text that UTF-8"),
    "another question": (
        both("llava", "<image>\nWho?"),
        "rejected: expected the turns of 'chosen'",
    ),
    "no list of turns": (both("llava", rejected="blue"), "rejected: expected a list of turns"),
    "no answer": (both("llava", rejected=[QUESTION]), "rejected: expected .*the assistant last"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pair_is_named_or_skipped(tmp_path, root, name):
    record, words = BROKEN[name]
    good = {"chosen": both("llava"), "messages": messages(rejected="blue")}
    good = next((g for key, g in good.items() if key in record), llava(rejected="blue"))
    path = write(tmp_path / "p.json", [good, record])
    with pytest.raises(DataError, match=words) as error:
        load(path, root)
    assert str(error.value).startswith("p.json, record 1 (id ")
    assert "Remedy" in str(error.value)
    with pytest.warns(UserWarning, match=r"1 records left out.*p\.json, record 1"):
        dataset = load(path, root, on_error="skip")
    assert len(dataset) == 1
    assert dict(dataset.skipped) == {"broken record": 1}


@pytest.mark.parametrize("answer, long", [("messages", 0), ("rejected", 1)])
def test_no_answer_is_cut(tmp_path, root, answer, long):
    texts = ["red", "blue"]
    texts[long] = " ".join(["red"] * 30)
    records = [llava(rejected="blue"), llava(answer=texts[0], rejected=texts[1])]
    path = write(tmp_path / "p.json", records)
    length = len(load(path, root)[0]["input_ids"]) + 5
    dataset = load(path, root, max_length=length)
    words = rf"record 1 .*{answer}: .*whole answer within max_length={length}.*raise max_length"
    with pytest.raises(DataError, match=words):
        dataset[1]
    dataset = load(path, root, max_length=length, on_error="skip")
    with pytest.warns(UserWarning, match="next good record"):
        taken = dataset[1]
    assert supervised(PROCESSOR, taken) == ["red</s>"]
    assert dict(dataset.skipped) == {"answer beyond max_length": 1}


# -- batches ---------------------------------------------------------------------------------------


def pair(name, chosen, rejected, image=1.0):
    def row(answer):
        ids = torch.arange(1, 4 + answer)
        labels = ids.clone()
        labels[:3] = -100
        images = {"pixel_values": torch.full((1, 3, 2, 2), image)}
        return {"input_ids": ids, "labels": labels, "images": images, "source": name}

    return {**row(chosen), "rejected": row(rejected)}


def test_batch_has_the_chosen_rows_first():
    batch = VisionTextCollator(0)([pair("a", 1, 4), pair("b", 3, 2, image=2.0)])
    assert batch["pairs"] == 2
    assert batch["sample_ids"] == ["a", "b"]
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 3, 4, 2]
    assert batch["input_ids"].shape == (4, 7)
    assert batch["attention_mask"].sum(1).tolist() == [4, 6, 7, 5]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 2.0, 1.0, 2.0]


def test_pairs_and_other_samples_do_not_mix():
    other = pair("b", 1, 2)
    del other["rejected"]
    with pytest.raises(ValueError, match="pairs of answers throughout, or none; got 1 of 2"):
        VisionTextCollator(0)([pair("a", 1, 2), other])
    assert "pairs" not in VisionTextCollator(0)([other])


# -- embedded scenes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TURN_KINDS)
def test_wrong_answers_are_wrong(kind):
    """A question about a scene has one answer, and the wrong one differs from it in one word."""
    rng = random.Random(0)
    for number in range(30):
        scene = draw_scene(rng, "train")
        right: dict[str, set] = {}
        for _ in range(20):
            for question, answer in draw_turns(scene, {kind: 3}, rng, DEFAULT_CR_WEIGHTS):
                right.setdefault(question, set()).add(answer)
        for question, answers in right.items():
            [answer] = answers  # one right answer to each question
            wrong = wrong_answer(answer, random.Random(number))
            changed = [a != b for a, b in zip(answer.split(), wrong.split(), strict=True)]
            assert sum(changed) == 1, (question, answer, wrong)


def test_wrong_answers_take_every_alternative():
    rng = random.Random(1)
    assert {wrong_answer("A", rng) for _ in range(9)} == {"B"}
    assert {wrong_answer("left above", rng) for _ in range(99)} == {"right above", "left below"}
    assert {wrong_answer("red", rng) for _ in range(99)} == {"green", "blue", "yellow"}
    with pytest.raises(ValueError, match=r"expected a word of .*got 'purple'"):
        wrong_answer("purple", rng)
    digit, *others = PHOTOS.shapes
    assert {wrong_answer(digit, rng, PHOTOS) for _ in range(99)} == {*others}


def test_scene_pairs_depend_on_split_seed_and_index_alone():
    processor = make_processor()

    def said(split="train", seed=3, size=5):
        scenes = SceneDataset(split, seed=seed, size=size, turns_mix=[0, 2, 1, 1, 3, 2])
        items = PreferenceScenes(scenes, processor)
        samples = [items.sample(i) for i in range(5)]
        return [(str(s.messages), s.rejected) for s in samples]

    assert said() == said(size=9)
    assert said() != said(seed=4)
    assert said() != said(split="validation")


def test_scene_pair_is_one_question_with_its_image():
    processor = make_processor()
    items = PreferenceScenes(SceneDataset("train", seed=3, size=4), processor)
    sample, encoded = items.sample(2), items[2]
    answers = [sample.messages[-1]["content"][0]["text"], sample.rejected]
    for row, answer in zip((encoded, encoded["rejected"]), answers):
        assert supervised(processor, row) == [f"{answer} <eos>"]
        assert row["images"]["pixel_values"].shape == (1, 3, 48, 48)
    alone = encode(processor, Sample(sample.messages, sample.images))
    assert encoded["input_ids"].tolist() == alone["input_ids"].tolist()


def test_a_pair_that_is_none_is_refused_by_the_encoder():
    with pytest.raises(DataError, match="rejected: expected the answer"):
        encode_pair(
            PROCESSOR,
            Sample(
                [
                    {"role": "user", "content": [text("q")]},
                    *[{"role": "assistant", "content": [text("a")]}],
                ]
            ),
        )
