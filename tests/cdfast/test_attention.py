"""The seam to transformers' attention: what it takes, what it leaves alone, what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from cdfast_kernels import VisualLayout
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import cdfast.attention
from cdfast import VisualAttentionAligner
from cdfast.aligner import build_layout
from cdfast.attention import (
    ATTENTION_NAME,
    AlignmentContext,
    cdfast_attention_forward,
    use_cdfast_attention,
)
from tests.cdfast.tiny_models import (
    IMAGE_TOKEN,
    NUM_VISUAL,
    VOCAB,
    text_config,
    tiny_batch,
    tiny_language_model,
    tiny_llava,
    tiny_teacher,
    vision_config,
)

LAYERS = 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llava_with(text, seed=0):
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config(),
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_seq_length=NUM_VISUAL,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )


def aligned_context(model, batch):
    """A context that asks every layer for its map."""
    layout = build_layout(batch, IMAGE_TOKEN)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return AlignmentContext(layout, map_layers=frozenset(range(layers)))


def test_fsdp_hands_on_the_context_that_the_caller_holds():
    """Mixed precision casts tensors among the arguments and rebuilds what contains them."""
    from torch.distributed.utils import _apply_to_tensors

    context = aligned_context(tiny_llava(), tiny_batch())
    cast = _apply_to_tensors(lambda t: t.bfloat16(), {"x": torch.ones(1), "alignment": context})
    assert cast["x"].dtype == torch.bfloat16
    assert cast["alignment"] is context


# -- models that are refused -----------------------------------------------------------------------


def gemma2_with_full_layers():
    full = ["full_attention"] * LAYERS
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, layer_types=full, attn_logit_softcapping=50.0))


def gemma3(**text):
    vision = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**SIZES, **text},
            vision_config={**vision, "num_hidden_layers": 1, "num_attention_heads": 2},
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
        )
    )


def paligemma():
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=vision_config(),
            text_config=GemmaConfig(**SIZES).to_dict(),
            image_token_index=IMAGE_TOKEN,
            projection_dim=32,
        )
    )


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4))


def qwen2_with_sliding_layers():
    options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **options))


def bidirectional_llama():
    config = LlamaConfig(**SIZES)
    config.is_causal = False
    return LlamaForCausalLM(config)


REFUSED = {
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)), "gemma2: .*sliding_attention"),
    "gemma2-softcap": (gemma2_with_full_layers, "gemma2: .*attn_logit_softcapping"),
    "gemma3": (gemma3, "gemma3: .*bidirectional image mask.*sliding_attention"),
    "gemma3-global": (
        lambda: gemma3(layer_types=["full_attention"] * LAYERS),
        r"gemma3: .*\(bidirectional image mask\)\. Expected full causal",
    ),
    "paligemma": (paligemma, "paligemma: .*bidirectional image mask"),
    "qwen2-sliding": (qwen2_with_sliding_layers, "qwen2: .*sliding_attention"),
    "bidirectional": (bidirectional_llama, "llama: .*not causal"),
    "bloom": (bloom, "bloom: .*AttentionInterface"),
}


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=list(REFUSED))
def test_refusal_names_the_model_and_the_reason(make, reason):
    model = make()
    before = model.config.get_text_config(decoder=True)._attn_implementation
    with pytest.raises(ValueError, match=reason):
        use_cdfast_attention(model)
    assert model.config.get_text_config(decoder=True)._attn_implementation == before


def test_aligner_refuses_the_teacher_too():
    with pytest.raises(ValueError, match=r"gemma3: .*sliding_attention"):
        VisualAttentionAligner(gemma3(), tiny_llava())


def test_text_only_model_is_refused_for_its_image_token():
    with pytest.raises(ValueError, match="qwen2: expected image_token_id"):
        VisualAttentionAligner(tiny_teacher(), tiny_language_model())


def test_attention_dropout_is_refused_in_training_only():
    text = text_config()
    text.attention_dropout = 0.1
    teacher, student = tiny_teacher(), llava_with(text)
    aligner = VisualAttentionAligner(teacher, student, layers="all")
    batch = tiny_batch()
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**batch)
    student.train()
    with pytest.raises(ValueError, match=r"Qwen2Attention 0 .*dropout 0.1.*attention_dropout=0"):
        aligner.student_forward(targets, **batch)
    student.eval()
    _, alignment = aligner.student_forward(targets, **batch)
    assert alignment.loss > 0


@pytest.mark.parametrize("name", ["softcap", "sliding_window", "position_bias", "s_aux"])
def test_layer_that_asks_for_more_than_plain_softmax_is_refused(name):
    q = torch.randn(1, 2, 6, 4)
    visual = torch.tensor([[False, True, True, False, False, False]])
    context = AlignmentContext(VisualLayout.from_mask(visual), map_layers=frozenset({5}))
    module = SimpleNamespace(layer_idx=5, training=False)
    out, _ = cdfast_attention_forward(module, q, q, q, None, alignment=context, **{name: None})
    assert out.shape == (1, 6, 2, 4)
    with pytest.raises(ValueError, match=f"SimpleNamespace 5 uses {name}=7"):
        cdfast_attention_forward(module, q, q, q, None, alignment=context, **{name: 7})


def mistral(sliding_window):
    return llava_with(MistralConfig(**SIZES, sliding_window=sliding_window))


def test_sliding_window_mask_is_refused():
    """Mistral names its window in no layer_types: it shows in the mask that the model asks for."""
    model, batch = mistral(8), tiny_batch()
    use_cdfast_attention(model)
    with pytest.raises(ValueError, match=r"mistral asks for an attention mask .*not plain causal"):
        model(**batch, alignment=aligned_context(model, batch), use_cache=False)


def test_mistral_without_a_window_is_aligned():
    model, batch = mistral(None), tiny_batch()
    want = model(**batch).logits
    use_cdfast_attention(model)
    context = aligned_context(model, batch)
    got = model(**batch, alignment=context, use_cache=False).logits
    live = batch["attention_mask"].bool()
    assert sorted(context.maps) == list(range(LAYERS))
    torch.testing.assert_close(got[live], want[live], atol=1e-5, rtol=1e-5)


def test_an_image_block_sees_keys_behind_its_rows():
    """What the refusal of PaliGemma says, seen in eager attention."""
    model, batch = paligemma(), tiny_batch(padding=None)
    model.set_attn_implementation("eager")
    batch["token_type_ids"] = (batch["labels"] != -100).long()
    attentions = model(**batch, output_attentions=True, use_cache=False).attentions
    behind = torch.ones(40, 40, dtype=torch.bool).triu(1)
    assert attentions[0][0, :, behind].max() > 0.01


def test_a_model_that_is_not_in_the_list_is_refused_by_its_mask(monkeypatch):
    monkeypatch.setattr(cdfast.attention, "_BIDIRECTIONAL_IMAGES", ())
    model, batch = paligemma(), tiny_batch()
    use_cdfast_attention(model)
    batch["token_type_ids"] = (batch["labels"] != -100).long()
    with pytest.raises(ValueError, match=r"gemma asks for an attention mask .*not plain causal"):
        model(**batch, alignment=aligned_context(model, batch), use_cache=False)


def test_packed_positions_without_a_mask_are_refused():
    model, batch = tiny_llava(), tiny_batch(batch=1, padding=None)
    use_cdfast_attention(model)
    context = aligned_context(model, batch)
    batch.pop("attention_mask")
    batch["position_ids"] = torch.cat([torch.arange(25), torch.arange(15)])[None]
    with pytest.raises(ValueError, match=r"packed position_ids without an attention_mask"):
        model(**batch, alignment=context, use_cache=False)


# -- what is left alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_vision_tower_keeps_its_attention(own):
    model = tiny_llava()
    model.set_attn_implementation({"vision_config": own})
    use_cdfast_attention(model)
    assert model.config.text_config._attn_implementation == ATTENTION_NAME
    assert model.config.vision_config._attn_implementation == own
    towers = [m for m in model.model.vision_tower.modules() if hasattr(m, "config")]
    assert towers
    assert {m.config._attn_implementation for m in towers} == {own}


def refuse_to_run(*args, **kwargs):
    raise AssertionError("the fused op ran")


@pytest.mark.parametrize("padding", ["right", "left", None])
def test_without_a_context_attention_is_stock(padding, monkeypatch):
    model, batch = tiny_llava(), tiny_batch(padding=padding)
    model.set_attn_implementation("eager")
    want = model(**batch).logits
    use_cdfast_attention(model)
    for name in ("flash_attention", "flash_attention_with_alignment", "visual_attention_map"):
        monkeypatch.setattr(cdfast.attention, name, refuse_to_run)
    live = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[live], want[live], atol=1e-5, rtol=1e-5)
    # The same calls with a context do run it: the patch is where the op is called from.
    with pytest.raises(AssertionError, match="the fused op ran"):
        model(**batch, alignment=aligned_context(model, batch), use_cache=False)


def test_text_model_alone_can_be_switched():
    model = tiny_language_model()
    ids = torch.randint(3, IMAGE_TOKEN, (2, 12), generator=torch.Generator().manual_seed(0))
    want = model(input_ids=ids).logits
    use_cdfast_attention(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    torch.testing.assert_close(model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


# -- padding ---------------------------------------------------------------------------------------


def move_padding_left(batch):
    """The same samples with each one's padding moved in front."""
    moved = dict(batch)
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    for name in ("input_ids", "attention_mask", "labels"):
        moved[name] = batch[name].gather(1, order)
    return moved


@pytest.mark.parametrize("aligned", [(0, 1, 2), (1,), ()], ids=["all", "some", "none"])
def test_left_padding_equals_right_padding(aligned):
    """With every layer aligned, some, or none: fused and stock layers read the same layout."""
    model = tiny_llava()
    use_cdfast_attention(model)
    right = tiny_batch(padding="right")
    left = move_padding_left(right)
    assert not torch.equal(left["input_ids"], right["input_ids"])
    logits, maps = [], []
    for batch in (right, left):
        context = AlignmentContext(build_layout(batch, IMAGE_TOKEN), map_layers=frozenset(aligned))
        with torch.no_grad():
            out = model(**batch, alignment=context, use_cache=False).logits
        live = batch["attention_mask"].bool()
        logits.append(out[live])
        maps.append(
            [
                context.maps[layer].to_dense()[b][live[b]][:, live[b]]
                for layer in aligned
                for b in range(len(live))
            ]
        )
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    assert len(maps[0]) == len(aligned) * 3
    for got, want in zip(maps[1], maps[0]):
        assert want.sum() > 1
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
