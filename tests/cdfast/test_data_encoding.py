"""The answer mask, independent turns and the collator, on four processors."""

import random

import pytest
import torch

from cdfast.data import DataError, Sample, VisionTextCollator, check_answers, encode
from tests.cdfast.tiny_processors import (
    CHATML,
    END,
    IMAGE,
    LLAVA,
    MAKERS,
    WORDS,
    assistant,
    byte_tokenizer,
    llava_processor,
    picture,
    supervised,
    text,
    user,
)


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


def image_tokens(processor, encoded):
    return int((encoded["input_ids"] == processor.image_token_id).sum())


def check_encoded(processor, encoded):
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert ids.dtype == labels.dtype == torch.int64
    assert ids.shape == labels.shape
    kept = labels != -100
    assert torch.equal(labels[kept], ids[kept])
    assert not (ids[kept] == processor.image_token_id).any()


def test_single_turn_is_the_processors_own_encoding(kind):
    processor = MAKERS[kind]()
    sample = Sample([user(IMAGE, "w1 w2"), assistant("w3 w4")], (picture(),))
    encoded = encode(processor, sample)
    check_encoded(processor, encoded)
    check_answers(processor, sample, encoded)
    assert supervised(processor, encoded)[0].replace(" ", "") == "w3w4" + END[kind]
    assert encoded["truncated"] is False
    messages = sample.messages
    if kind == "chatml":
        messages = [
            {"role": "user", "content": "<image>\nw1 w2"},
            {"role": "assistant", "content": "w3 w4"},
        ]
        rendered = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        rendered = processor.apply_chat_template(messages)
    own = processor(text=[rendered], images=[picture()], return_tensors="pt")
    assert torch.equal(encoded["input_ids"], own["input_ids"][0])
    assert torch.equal(encoded["images"]["pixel_values"], own["pixel_values"])
    assert image_tokens(processor, encoded) == (9 if kind == "qwen" else 36)
    if kind == "qwen":
        assert torch.equal(encoded["images"]["image_grid_thw"], own["image_grid_thw"])


@pytest.mark.parametrize("seed", range(12))
def test_random_dialogues_supervise_exactly_the_answers(kind, seed):
    processor = MAKERS[kind]()
    draw = random.Random(seed)
    phrases = ["", "ünïcödé 猫 ", "a: b? ", "\nUSER: ", "  "] if kind != "words" else [""]

    def say():
        return draw.choice(phrases) + " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))

    messages, answers, images = [], [], []
    if draw.random() < 0.4:
        messages.append({"role": "system", "content": [text(say())]})
    for _ in range(draw.randint(1, 4)):
        parts = [text(say())]
        for _ in range(draw.choice([0, 0, 1, 2])):
            parts.insert(draw.randint(0, len(parts)), IMAGE)
            images.append(picture(len(images), 32 + 16 * draw.randint(0, 2), 48))
        answers.append(say())
        messages += [user(*parts), assistant(answers[-1])]
    sample = Sample(messages, tuple(images), "random")
    encoded = encode(processor, sample)
    check_encoded(processor, encoded)
    check_answers(processor, sample, encoded)
    want = ["".join((answer + END[kind]).split()) for answer in answers]
    assert ["".join(run.split()) for run in supervised(processor, encoded)] == want
    if not images:
        assert encoded["images"] == {}


def test_generation_template_without_end_of_turn_is_supervised_and_said():
    processor = llava_processor(LLAVA.replace("</s>", " "))
    sample = Sample([user(IMAGE, "w1"), assistant("w2")], (picture(),), "f.json, record 0")
    encoded = encode(processor, sample)
    assert supervised(processor, encoded) == ["w2"]
    with pytest.warns(UserWarning, match=r"f\.json, record 0.*end-of-turn"):
        check_answers(processor, sample, encoded)


BAD_TEMPLATES = {
    "other header": (LLAVA.replace("'ASSISTANT: '", "'BOT: '"), "prefix"),
    "changed answer": (
        LLAVA.replace("{{ c.text }}", "{{ c.text.replace('a b', 'A B') }}"),
        "unchanged",
    ),
    "hidden thought": (
        LLAVA.replace("{% for c", "{{ '(hm) ' if m.role == 'assistant' }}{% for c"),
        "right behind the generation prompt",
    ),
    "counts turns": ("{{ messages | length }}" + LLAVA, "prefix"),
    "no prompt": (LLAVA.split("{% if add_generation_prompt")[0], "right behind"),
    "raises": ("{{ raise_exception('only poems') if messages | length > 1 }}" + LLAVA, "poems"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_template_that_fails_the_check_is_refused(name):
    template, words = BAD_TEMPLATES[name]
    sample = Sample([user(IMAGE, "q"), assistant("a b")], (picture(),), "f.json, record 7")
    with pytest.raises(DataError, match=words) as error:
        encode(llava_processor(template), sample)
    assert "f.json, record 7" in str(error.value)
    assert "chat template" in str(error.value)
    assert "processor.chat_template" in str(error.value)
    assert error.value.reason == "chat template"


def test_end_of_turn_only_at_the_end_is_not_invented_before():
    template = LLAVA.replace("'</s>' if", "('</s>' if loop.last else '') if")
    processor = llava_processor(template)
    sample = Sample([user(IMAGE, "q"), assistant("one"), user("q"), assistant("two")], (picture(),))
    assert supervised(processor, encode(processor, sample)) == ["one", "two</s>"]


def test_missing_template_names_the_remedy():
    sample = Sample([user("q"), assistant("a")])
    with pytest.raises(DataError, match=r"set processor\.chat_template"):
        encode(llava_processor(None), sample)


def test_bare_tokenizer_for_text():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    encoded = encode(tokenizer, Sample([user("q"), assistant("a")]))
    assert tokenizer.decode(encoded["labels"][encoded["labels"] != -100]) == "a<|im_end|>"


BAD_SAMPLES = {
    "too few images": ([user(IMAGE, IMAGE, "q"), assistant("a")], 1, "2, one for each"),
    "too many images": ([user("q"), assistant("a")], 1, "one for each image part"),
    "image in answer": ([user("q"), {"role": "assistant", "content": [IMAGE]}], 1, "user messages"),
    "media token in text": ([user(IMAGE, "see <image>"), assistant("a")], 1, "media tokens"),
    "empty answer": ([user(IMAGE, "q"), assistant(" ")], 1, "answer"),
    "no answer": ([user(IMAGE, "q")], 1, "assistant"),
    "role": ([{"role": "bot", "content": [text("q")]}], 0, "role"),
    "string content": ([{"role": "user", "content": "q"}], 0, "list of parts"),
    "part": ([user({"type": "video"}), assistant("a")], 0, "parts of type"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_sample_is_named(name):
    messages, images, words = BAD_SAMPLES[name]
    sample = Sample(messages, tuple(picture() for _ in range(images)), "x.json, record 3 (id 9)")
    with pytest.raises(DataError, match=words) as error:
        encode(llava_processor(), sample)
    assert error.value.source == "x.json, record 3 (id 9)"
    assert "x.json, record 3 (id 9)" in str(error.value)
    assert "Remedy" in str(error.value)


def test_turns_option_is_checked():
    with pytest.raises(ValueError, match="turns"):
        encode(llava_processor(), Sample([user("q"), assistant("a")]), turns="both")


def test_max_length_cuts_the_end_and_never_the_images(kind):
    processor = MAKERS[kind]()
    sample = Sample([user(IMAGE, "w1"), assistant("w2 w3 w4 w5")], (picture(),), "s.json, record 1")
    whole = encode(processor, sample)
    n = len(whole["input_ids"])
    first = int((whole["labels"] != -100).nonzero()[0])
    for length in (n + 5, n, n - 1, first + 1):
        cut = encode(processor, sample, max_length=length)
        assert torch.equal(cut["input_ids"], whole["input_ids"][:length])
        assert torch.equal(cut["labels"], whole["labels"][:length])
        assert cut["truncated"] is (length < n)
        check_answers(processor, sample, cut)
    for length in (first, 20, 1):
        with pytest.raises(DataError, match=r"s\.json, record 1.*max_length") as error:
            encode(processor, sample, max_length=length)
        assert error.value.reason == "nothing left within max_length"


@pytest.mark.parametrize("with_image", [True, False])
def test_independent_turns_are_single_conversations(kind, with_image):
    processor = MAKERS[kind]()
    images = (picture(),) if with_image else ()
    parts = [IMAGE] if with_image else []
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6"), ("w7 w8 w9", "w1")]
    messages = [user(*parts, pairs[0][0]), assistant(pairs[0][1])]
    for question, answer in pairs[1:]:
        messages += [user(question), assistant(answer)]
    encoded = encode(processor, Sample(messages, images), turns="independent")
    check_encoded(processor, encoded)
    segments, positions = encoded["segment_ids"], encoded["position_ids"]
    assert segments.tolist() == sorted(segments.tolist())
    assert set(segments.tolist()) == ({0, 1, 2, 3} if with_image else {1, 2, 3})
    for turn, (question, answer) in enumerate(pairs, 1):
        alone = encode(processor, Sample([user(*parts, question), assistant(answer)], images))
        here = (segments == 0) | (segments == turn)
        assert torch.equal(encoded["input_ids"][here], alone["input_ids"])
        assert torch.equal(encoded["labels"][here], alone["labels"])
        assert positions[here].tolist() == list(range(len(alone["input_ids"])))
        for name, value in alone["extras"].items():
            assert torch.equal(encoded["extras"][name][here], value)
    if with_image:
        last_image = (encoded["input_ids"] == processor.image_token_id).nonzero()[-1]
        assert int((segments == 0).sum()) == int(last_image) + 1
        assert len(encoded["images"]["pixel_values"]) == len(alone["images"]["pixel_values"])


def test_independent_turns_refuse_what_cannot_share_a_prefix():
    processor = llava_processor()
    cases = [
        [user("before", IMAGE), assistant("a"), user("q"), assistant("b")],
        [user(IMAGE, "q"), assistant("a"), user(IMAGE, "q"), assistant("b")],
        [user(IMAGE, "q"), assistant("a"), assistant("b")],
    ]
    for messages in cases:
        images = tuple(picture() for m in messages for p in m["content"] if p == IMAGE)
        with pytest.raises(DataError, match=r"s, .*independent|s: .*independent"):
            encode(processor, Sample(messages, images, "s"), turns="independent")


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_pads_and_concatenates(kind, side):
    processor = MAKERS[kind]()
    samples = [
        encode(processor, Sample([user(IMAGE, "w1"), assistant("w2")], (picture(),), "a")),
        encode(processor, Sample([user("w1 w2 w3"), assistant("w4")], (), "b")),
        encode(
            processor,
            Sample(
                [user(IMAGE, "w1", IMAGE), assistant("w2")], (picture(1), picture(2, 32, 48)), "c"
            ),
        ),
    ]
    pad = processor.tokenizer.pad_token_id
    batch = VisionTextCollator(pad, side, pad_to_multiple_of=16)(samples)
    assert batch["sample_ids"] == ["a", "b", "c"]
    width = batch["input_ids"].shape[1]
    assert width % 16 == 0
    for row, sample in enumerate(samples):
        n = len(sample["input_ids"])
        live = slice(0, n) if side == "right" else slice(width - n, width)
        assert torch.equal(batch["input_ids"][row, live], sample["input_ids"])
        assert torch.equal(batch["labels"][row, live], sample["labels"])
        mask = torch.zeros(width, dtype=torch.int64)
        mask[live] = 1
        assert torch.equal(batch["attention_mask"][row], mask)
        assert (batch["input_ids"][row][mask == 0] == pad).all()
        assert (batch["labels"][row][mask == 0] == -100).all()
    values = [s["images"]["pixel_values"] for s in samples if s["images"]]
    assert torch.equal(batch["pixel_values"], torch.cat(values))
    if kind == "qwen":
        assert len(batch["image_grid_thw"]) == 3
        assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
        on_image = batch["input_ids"] == processor.image_token_id
        assert torch.equal(batch["mm_token_type_ids"] == 1, on_image)


def test_collator_of_text_only_and_of_independent_turns():
    processor = llava_processor()
    words = encode(processor, Sample([user("q"), assistant("a")]))
    collate = VisionTextCollator(0)
    batch = collate([words])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "sample_ids"}
    sample = Sample([user(IMAGE, "q"), assistant("a"), user("r"), assistant("b")], (picture(),))
    turns = encode(processor, sample, turns="independent")
    both = collate([turns, turns])
    assert both["segment_ids"].shape == both["position_ids"].shape == both["input_ids"].shape
    assert "segment_ids" not in collate([turns, words])


def test_collator_pads_images_of_several_sizes():
    def fake(patches):
        row = torch.ones(2, dtype=torch.int64)
        values = torch.ones(1, patches, 3, 4, 4)
        return {"input_ids": row, "labels": row, "images": {"pixel_values": values}, "source": "x"}

    batch = VisionTextCollator(0)([fake(2), fake(5)])
    assert batch["pixel_values"].shape == (2, 5, 3, 4, 4)
    assert batch["pixel_values"][0, 2:].abs().sum() == 0


def test_collator_options_are_checked():
    for options, word in [
        ((None,), "pad_token_id"),
        ((0, "middle"), "padding_side"),
        ((0, "left", 0), "multiple"),
    ]:
        with pytest.raises(ValueError, match=word):
            VisionTextCollator(*options)
    with pytest.raises(ValueError, match="samples"):
        VisionTextCollator(0)([])
