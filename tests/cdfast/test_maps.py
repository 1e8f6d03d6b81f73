"""cdfast.maps against eager attention, and what it leaves behind in the model."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cdfast
from cdfast.images import DataError
from cdfast.maps import attention_maps, batch_attention_maps
from cdfast.observe import AttentionRows, observed
from cdfast.overlay import draw_overlay
from cdfast.planes import GeometryError
from cdfast.prompts import encode_prompts, make_prompt
from tests.cdfast.test_attention import bloom
from tests.cdfast.tiny_families import (
    FAMILIES,
    HEADS,
    LAYERS,
    llava,
    llava_onevision,
    photo,
    qwen,
    smolvlm,
)
from tests.cdfast.tiny_processors import IMAGE, user

QUESTIONS = [
    ([photo(100, 60), photo(50, 90, 1)], "What is left of the cat?", "the red dog"),
    ([photo(64, 64, 2)], "Where is it?", "left"),
    ([photo(40, 120, 3), photo(90, 30, 4), photo(70, 71, 5)], "Any more to the left side?", "no"),
]


def prompts_of(processor):
    return [make_prompt(processor, *question) for question in QUESTIONS]


def eager(model, batch):
    """(layers, B, H, N, N), by transformers' own eager attention."""
    own = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**batch, output_attentions=True, use_cache=False)
    model.set_attn_implementation(own)
    return torch.stack(out.attentions).float()


def positions(ids, wanted):
    """Where the ids of a text stand, found without offsets or templates."""
    ids, n = ids.tolist(), len(wanted)
    return [p for p in range(len(ids)) if ids[p : p + n] == wanted]


@pytest.fixture(scope="module", params=FAMILIES)
def read(request):
    """A padded batch of three prompts with 2, 1 and 3 images, read eagerly and by cdfast.maps."""
    model, processor = FAMILIES[request.param]()
    prompts = prompts_of(processor)
    batch = encode_prompts(processor, prompts)
    assert batch["attention_mask"].min() == 0  # padded
    return (
        model,
        processor,
        batch,
        eager(model, batch),
        batch_attention_maps(model, processor, prompts),
    )


@pytest.mark.parametrize("head", ["mean", "max", 0, HEADS - 1])
def test_every_row_equals_eager_attention(read, head):
    model, _, batch, attentions, maps = read
    for b, one in enumerate(maps):
        visual = batch["input_ids"][b] == model.config.image_token_id
        for layer in range(LAYERS):
            rows = attentions[layer, b][:, list(one.rows)][:, :, visual]
            want = rows.mean(0) if head == "mean" else rows.amax(0) if head == "max" else rows[head]
            torch.testing.assert_close(one.layers[layer].reduced(head), want, atol=1e-5, rtol=0)
            assert want.max() > 0.01  # the tolerance is far below what is compared
        live = batch["attention_mask"][b].bool()
        behind = live & ~visual & (visual.cumsum(0) > 0)
        assert list(one.rows) == behind.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("row", ["own", "before"])
def test_a_word_is_the_mean_over_its_tokens(read, row):
    model, processor, batch, attentions, maps = read
    word = processor.tokenizer("left", add_special_tokens=False)["input_ids"]
    assert len(word) == 4
    for b, one in enumerate(maps):
        [start] = positions(batch["input_ids"][b], word)
        visual = batch["input_ids"][b] == model.config.image_token_id
        shift = row == "before"
        rows = attentions[:, b, :, start - shift : start + 4 - shift][..., visual]
        got = one.vector([0, 2], word="left", row=row)
        assert got.dtype == np.float32
        want = rows.mean((1, 2))[[0, 2]].mean(0)
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5, rtol=0)


def test_the_answer_is_read_where_it_is_predicted(read):
    model, processor, batch, attentions, maps = read
    for b, (one, (_, _, answer)) in enumerate(zip(maps, QUESTIONS)):
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        start = positions(batch["input_ids"][b], ids)[-1]
        visual = batch["input_ids"][b] == model.config.image_token_id
        rows = attentions[1, b, :, start - 1 : start - 1 + len(ids)][..., visual]
        np.testing.assert_allclose(one.vector(1), rows.mean((0, 1)).numpy(), atol=1e-5, rtol=0)


def test_arrays_are_the_images_own_tokens(read):
    _, _, _, _, maps = read
    for one in maps:
        start = 0
        for image, count in enumerate(one.counts):
            own = one.vector(2, word="left")[start : start + count]
            array = one.array(2, image=image, word="left")
            assert array.dtype == np.float32
            assert array.shape == one.grids[image].shape
            parts = one.grids[image].planes
            placed = np.concatenate([plane.tokens.ravel() for plane in parts.values()])
            # A class token or newline tokens have no place; every other token has one.
            assert len(set(placed)) == len(placed) >= 0.8 * count
            np.testing.assert_allclose(array.sum(), own[placed].sum(), rtol=1e-5)
            start += count
            if len(parts) == 1 and count == array.size:
                np.testing.assert_array_equal(array.ravel(), own)
            for part in parts:
                cells = one.array(2, image=image, word="left", part=part)
                assert set(cells.ravel()) <= set(own) | {0}


def test_words_between_images_are_found(read):
    model, processor, _, _, _ = read
    messages = [user(IMAGE, "the first ", IMAGE, " and\n\n", IMAGE, "\nthe second")]
    prompt = make_prompt(processor, [photo(100, 60), photo(40, 120), photo(48, 48)], messages)
    [ids] = encode_prompts(processor, [prompt])["input_ids"]
    [maps] = batch_attention_maps(model, processor, [prompt], layers=[0])
    for word in ("first", "and", "second"):
        wanted = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
        [start] = positions(ids, wanted)
        assert [maps.tokens[n].position for n in maps.find(None, word, None)] == list(
            range(start, start + len(wanted))
        )


def test_one_prompt_equals_the_same_prompt_in_a_batch(read):
    model, processor, _, _, maps = read
    for one, (images, question, answer) in zip(maps, QUESTIONS):
        alone = attention_maps(model, processor, images, question, answer, layers=[1])
        np.testing.assert_allclose(alone.vector(1), one.vector(1), atol=1e-5, rtol=0)
        assert alone.counts == one.counts
        assert list(alone.layers) == [1]


def test_two_lines(tmp_path):
    model, processor = llava()
    maps = cdfast.maps.attention_maps(model, processor, photo(48, 40), "What is left of it?")
    maps.overlay(layer=2, token="W").save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_without_an_answer_the_end_of_the_prompt_is_read():
    model, processor = llava()
    maps = attention_maps(model, processor, photo(48, 48), "What is left of it?")
    with_answer = attention_maps(model, processor, photo(48, 48), "What is left of it?", "dog")
    assert maps.prompt.answer is None
    assert (
        with_answer.find(None, None, None)
        == [n for n, t in enumerate(with_answer.tokens) if t.start >= with_answer.prompt.answer[0]][
            :3
        ]
    )
    np.testing.assert_allclose(
        maps.vector(0), with_answer.vector(0, token=with_answer.find(None, None, None)[0] - 1)
    )


def test_the_model_can_write_the_answer():
    model, processor = llava()
    maps = attention_maps(model, processor, photo(48, 48), "What is it?", max_new_tokens=3)
    inputs = encode_prompts(processor, [make_prompt(processor, photo(48, 48), "What is it?")])
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    written = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    start, end = maps.prompt.answer
    assert maps.prompt.text[start:end] == written


def test_a_raw_prompt_and_messages():
    model, processor = llava()
    picture = photo(48, 48)
    raw = "USER: <image>\nWhat is it? ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    made = [
        attention_maps(model, processor, picture, prompt, "dog").vector(1)
        for prompt in ("What is it?", [{"role": "user", "content": content}])
    ]
    np.testing.assert_array_equal(made[0], made[1])
    own = make_prompt(processor, picture, raw, "dog")
    assert own.text == raw + " dog"
    assert own.text[slice(*own.answer)] == "dog"
    np.testing.assert_allclose(
        attention_maps(model, processor, picture, raw, "dog").vector(1), made[0], atol=1e-6
    )


# -- what is asked for -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    model, processor = llava()
    question = "the cat and the dog; concat"
    return attention_maps(model, processor, photo(48, 48), question, "a cat")


REFUSED = {
    "unknown word": ({"word": "bird"}, "word: 'bird' is not in the prompt"),
    "several": ({"word": "the"}, "'the' is in the prompt 2 times. Give occurrence=0"),
    "too high": ({"word": "the", "occurrence": 2}, "occurrence: expected a number below 2"),
    "both": ({"word": "the", "token": 3}, "token, word: expected one of them"),
    "before the image": ({"word": "USER"}, "expected one whose attention is kept; its row sees no"),
    "no such token": ({"token": 10_000}, "token: expected a number below"),
    "no single token": ({"token": "cat"}, "Use word= for a text of several tokens"),
    "row": ({"row": "after"}, "row: expected 'own' or 'before'"),
    "head": ({"head": HEADS}, f"head: expected a number from 0 to {HEADS - 1}"),
    "heads": ({"head": "median"}, "heads: expected 'mean', 'max' or a head's number"),
    "image": ({"image": 1}, "image: expected a number from 0 to 0"),
    "part": ({"part": "tiles"}, "part: expected one of all, image"),
}


@pytest.mark.parametrize("select, message", REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_found_is_named(asked, select, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        asked.array(1, **select)


def test_layers_that_were_not_kept_are_named():
    model, processor = llava()
    maps = attention_maps(model, processor, photo(48, 48), "it", layers=[0, 2])
    with pytest.raises(ValueError, match=r"layer: expected one of \[0, 2\]; got 1"):
        maps.array(1)
    with pytest.raises(ValueError, match=rf"layers: expected numbers from 0 to {LAYERS - 1}"):
        attention_maps(model, processor, photo(48, 48), "it", layers=[3])


def test_occurrences_count_whole_words(asked):
    """`cat` is in the question, inside another word, and in the answer."""
    text = asked.prompt.text
    starts = [asked.tokens[asked.find(None, "cat", n)[0]].start for n in (0, 1)]
    assert starts == [text.index("cat"), text.rindex("cat")]
    with pytest.raises(ValueError, match="is in the prompt 2 times"):
        asked.find(None, "cat", None)


def test_images_and_placeholders_must_agree():
    model, processor = llava()
    with pytest.raises(DataError, match=r"one for each of 2 placeholders '<image>', got 1"):
        attention_maps(model, processor, photo(48, 48), "<image> <image> what?")


# -- geometry that is not known --------------------------------------------------------------------


@pytest.fixture
def unknown(monkeypatch):
    """LLaVA-OneVision, as if it were not known."""
    monkeypatch.setattr(cdfast.geometry, "ANYRES", ())
    return llava_onevision()


def test_unknown_geometry_is_refused_by_name_and_the_vector_stays(unknown):
    model, processor = unknown
    prompt = make_prompt(processor, *QUESTIONS[1])
    [maps] = batch_attention_maps(model, processor, [prompt])
    batch = encode_prompts(processor, [prompt])
    visual = batch["input_ids"][0] == model.config.image_token_id
    want = eager(model, batch)[1, 0][:, list(maps.rows)][:, :, visual].mean(0)
    torch.testing.assert_close(maps.layers[1].reduced(), want, atol=1e-5, rtol=0)
    assert maps.vector(1, image=0).shape == (int(visual.sum()),)
    for look in (maps.array, maps.overlay):
        with pytest.raises(GeometryError, match=r"llava_onevision: it is not known .*Use .vector"):
            look(1)


def test_several_images_of_unknown_geometry_share_one_vector(unknown):
    model, processor = unknown
    maps = attention_maps(model, processor, *QUESTIONS[0])
    assert maps.vector(1, word="left").shape == (maps.layers[1].k.shape[0],)
    with pytest.raises(GeometryError, match="Which of them are image 1's is not known"):
        maps.vector(1, image=1)


# -- the model is left as it was -------------------------------------------------------------------


def state(model):
    """Training flags, attention implementations and hooks of every module.

    Take it after a forward: transformers sets hooks of its own in the first one.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (
            name,
            module.training,
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            [len(getattr(module, hook)) for hook in hooks],
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("make", [llava, qwen, smolvlm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("own", ["eager", "sdpa", "mixed"])
def test_the_model_is_left_as_it_was(make, own):
    model, processor = make()
    text, vision = ("sdpa", "eager") if own == "mixed" else (own, own)
    model.set_attn_implementation({"text_config": text, "vision_config": vision})
    model.train()
    model.base_model.get_decoder().layers[1].eval()  # a part that its owner keeps frozen
    model(**encode_prompts(processor, [make_prompt(processor, photo(64, 40), "What?")]))
    before = state(model)
    attention_maps(model, processor, photo(64, 40), "What?", max_new_tokens=2)
    assert state(model) == before
    assert {text, vision} <= {own for _, _, own, _ in before}


def test_it_is_left_as_it_was_after_an_error(monkeypatch):
    model, processor = llava()
    model.train()
    model(**encode_prompts(processor, [make_prompt(processor, photo(48, 48), "What?")]))
    before = state(model)
    layer = model.model.language_model.layers[2]

    def broken(*args, **kwargs):
        assert not model.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer.mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_maps(model, processor, photo(48, 48), "What?")
    assert state(model) == before


def test_a_model_that_cannot_be_observed_is_refused_by_name():
    model = bloom()
    with pytest.raises(ValueError, match=r"bloom: .*AttentionInterface"), observed(model):
        pass
    assert model.config._attn_implementation == bloom().config._attn_implementation


def test_no_gradient_and_the_same_logits_afterwards():
    model, processor = llava()
    inputs = encode_prompts(processor, [make_prompt(processor, photo(48, 48), "What?")])
    with torch.no_grad():
        want = model(**inputs).logits
    maps = attention_maps(model, processor, photo(48, 48), "What?")
    assert not maps.layers[0].q.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, want, atol=0, rtol=0)


def test_half_precision_is_close():
    model, processor = llava()
    want = attention_maps(model, processor, photo(48, 48), "What?").vector(1)
    got = attention_maps(model.bfloat16(), processor, photo(48, 48), "What?")
    assert got.layers[1].q.dtype == torch.bfloat16
    np.testing.assert_allclose(got.vector(1), want, atol=5e-3)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_no_map_of_all_rows_is_ever_formed():
    model, processor = llava()
    question = "word " * 120
    with LargestTensor() as seen:
        maps = attention_maps(model, processor, [photo(48, 48)] * 12, question)
        maps.array(1, image=3)
    n = len(maps.rows) + 12 * 36
    assert n > 1000
    assert seen.largest < n * n / 4
    with LargestTensor() as seen:
        inputs = encode_prompts(processor, [maps.prompt])
        model.set_attn_implementation("eager")
        model(**inputs, output_attentions=True)
    assert seen.largest >= HEADS * n * n


# -- sinks and overlays ----------------------------------------------------------------------------


def rows_with(probabilities):
    """AttentionRows of one head whose probabilities are these: q = 1, k = log p, lse = 0."""
    rows, keys = probabilities.shape
    q = torch.eye(rows)[:, None]
    k = probabilities.clamp(min=1e-30).log().T[:, None]
    visible = torch.ones(rows, keys, dtype=torch.bool)
    return AttentionRows(q, k.contiguous(), torch.zeros(1, rows), visible, 1.0)


def test_sinks_are_above_the_authors_threshold_in_most_rows(asked):
    rows, keys = len(asked.rows), 36
    probabilities = torch.full((rows, keys), 0.002)
    probabilities[:, 7] = 0.3  # asked about or not
    probabilities[3, 20] = 0.5  # a target: high in its own row only
    probabilities[: rows // 2 + 1, 30] = 0.2
    probabilities[: rows // 2 - 1, 33] = 0.2
    threshold = probabilities.mean() + probabilities.std()
    assert 0.002 < threshold < 0.2
    asked.layers[7] = rows_with(probabilities)
    assert np.flatnonzero(asked.sinks(7)).tolist() == [7, 30]
    assert np.flatnonzero(asked.sinks(7, share=0.0)).tolist() == [7, 20, 30, 33]
    assert np.flatnonzero(asked.sinks(7, share=0.9)).tolist() == [7]
    np.testing.assert_allclose(asked.layers[7].reduced(), probabilities, rtol=1e-5)


def test_overlay_lights_up_the_patch_and_marks_the_sink():
    values = np.zeros((6, 6), np.float32)
    values[1, 4], values[5, 0] = 1.0, 5.0
    sinks = values == 5.0
    grey = photo(48, 48).convert("L").convert("RGB")
    drawn = np.asarray(draw_overlay(grey, values, (0, 0, 48, 48), sinks, 1.0)).astype(int)
    assert drawn.shape == (480, 480, 3)
    spread = drawn.max(2) - drawn.min(2)  # grey has none
    lit = spread > 60
    assert lit[80:160, 320:400].mean() > 0.9
    assert lit[:80].sum() == 0
    # White on black along the diagonals of the sink's patch, and nowhere else.
    white = (drawn == 255).all(2)
    assert white[400:, :80].sum() > 20
    assert not white[:400].any()
    plain = draw_overlay(grey, values, (0, 0, 48, 48), np.zeros((6, 6), bool), 1.0)
    assert not (np.asarray(plain) == 255).all(2).any()


def test_overlay_scale_ends_at_the_largest_value_that_is_no_sink(asked):
    probabilities = torch.full((len(asked.rows), 36), 0.001)
    probabilities[:, 0] = 0.9
    probabilities[:, 35] = 0.05
    asked.layers[8] = rows_with(probabilities)
    picture = np.asarray(asked.overlay(8)).astype(int)
    spread = picture.max(2) - picture.min(2)
    assert (spread[-80:, -80:] > 60).mean() > 0.9  # 0.05 is the top of the scale
    with_sink = np.asarray(asked.overlay(8, sinks=False)).astype(int)
    assert ((with_sink.max(2) - with_sink.min(2))[-80:, -80:] > 60).mean() < 0.1
