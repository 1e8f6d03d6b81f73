"""Batches change neither likelihoods nor replies, whatever the processor; greedy means greedy."""

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from cdfast.evaluation.caption_tasks import ask
from cdfast.evaluation.scoring import likelihoods, replies

from . import tiny_processors

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llava(tokenizer):
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=48,
                patch_size=8,
                vision_use_head=False,
            ),
            text_config=Qwen2Config(vocab_size=len(tokenizer), **TEXT),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=36,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )


def qwen(tokenizer):
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"out_hidden_size": 16, "window_size": 32, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(v) for k, v in names.items()}
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    )


@pytest.fixture(scope="module", params=["llava", "words", "chatml", "qwen"])
def pair(request):
    """A model that prefers some answers, and its processor."""
    processor = tiny_processors.MAKERS[request.param]()
    torch.manual_seed(4)
    model = (qwen if request.param == "qwen" else llava)(processor.tokenizer).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        for name, parameter in model.named_parameters():
            if "visi" not in name and "_proj.weight" in name and "self_attn" in name:
                parameter.mul_(20)
    return model, processor


def questions():
    """Prompts and answers of unequal lengths, about images of unequal sizes."""
    sizes = [(48, 48), (64, 32), (48, 48), (40, 80), (48, 48), (32, 32), (48, 48), (96, 48)]
    return [
        ask(
            "choice",
            tiny_processors.picture(n, *size),
            " ".join(f"w{n + k}" for k in range(1 + 3 * n)),
            ("w1", "w2 w3 w4", "w2 w3 w5", "w6"),
            "w6",
        )
        for n, size in enumerate(sizes)
    ]


def test_likelihoods_do_not_depend_on_the_batch(pair):
    model, processor = pair
    one = likelihoods(model, processor, questions(), batch_size=1)
    eight = likelihoods(model, processor, questions(), batch_size=8)
    for a, b in zip(one, eight):
        assert a.log == pytest.approx(b.log, abs=1e-5, rel=0)
        assert a.tokens == b.tokens
        assert a.greedy == b.greedy
    # The scores say something: questions and choices differ.
    assert len({round(value, 3) for a in one for value in a.log}) > 20
    assert one[0].tokens[1] > one[0].tokens[0]


def test_likelihoods_depend_on_the_image(pair):
    model, processor = pair
    [first, *_] = questions()
    other = ask("choice", tiny_processors.picture(99), "w0", first.choices, "w6")
    a, b = likelihoods(model, processor, [first, other], batch_size=2)
    assert a.log != pytest.approx(b.log, abs=1e-4)


def test_replies_do_not_depend_on_the_batch(pair):
    model, processor = pair
    one = replies(model, processor, questions(), batch_size=1, max_new_tokens=5)
    eight = replies(model, processor, questions(), batch_size=8, max_new_tokens=5)
    assert one == eight
    assert len(set(one)) > 1


def test_replies_are_plain_greedy_generation(pair):
    model, processor = pair
    asked = questions()[:3]
    # A checkpoint's own settings must not turn greedy replies into something else.
    model.generation_config.repetition_penalty = 7.0
    model.generation_config.do_sample = True
    try:
        said = replies(model, processor, asked, batch_size=3, max_new_tokens=4)
    finally:
        model.generation_config.repetition_penalty = 1.0
        model.generation_config.do_sample = False
    template = processor.chat_template or processor.tokenizer.chat_template
    for question, reply in zip(asked, said):
        messages = question.messages
        if processor.chat_template is None:
            text = messages[0]["content"][1]["text"]
            messages = [{"role": "user", "content": f"<image>\n{text}"}]
        prompt = processor.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        batch = processor(text=[prompt], images=[question.image], return_tensors="pt")
        ids = batch["input_ids"]
        with torch.no_grad():
            for _ in range(4):
                extras = {k: v for k, v in batch.items() if k not in ("input_ids",)}
                extras["attention_mask"] = torch.ones_like(ids)
                if "mm_token_type_ids" in extras:
                    more = ids.shape[1] - extras["mm_token_type_ids"].shape[1]
                    extras["mm_token_type_ids"] = torch.nn.functional.pad(
                        extras["mm_token_type_ids"], (0, more)
                    )
                logits = model(input_ids=ids, **extras).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
                if ids[0, -1] == processor.tokenizer.eos_token_id:
                    break
        new = ids[0, batch["input_ids"].shape[1] :]
        assert reply == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_choices_that_the_tokenizer_cannot_tell_apart_are_refused():
    processor = tiny_processors.MAKERS["words"]()
    model = llava(processor.tokenizer).eval()
    question = ask("match", tiny_processors.picture(), "w1", ("Yes", "No"), "No")
    with pytest.raises(ValueError, match=r"tokens that differ.*Score by generation"):
        likelihoods(model, processor, [question], batch_size=1)


def test_progress_counts_every_question_once(pair):
    model, processor = pair
    for ask_model, options in ((likelihoods, {}), (replies, {"max_new_tokens": 1})):
        told = []
        ask_model(model, processor, questions(), batch_size=3, advance=told.append, **options)
        assert sum(told) == 8
