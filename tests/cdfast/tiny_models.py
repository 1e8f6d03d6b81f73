"""Small random LLaVA models and batches for the tests."""

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

IMAGE_TOKEN = 90
VOCAB = 100
NUM_VISUAL = 16  # 16x16 pixels in patches of 4


def vision_config(hidden=16):
    return SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )


def text_config(layers=3, hidden=32, heads=4, kv_heads=2, vocab=VOCAB, tie=False):
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def sharpen(model):
    """Larger query and key weights: attention far from uniform, so that wrong gradients show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and ("q_proj.weight" in name or "k_proj.weight" in name):
                parameter.mul_(8)
    return model


def tiny_llava(seed=0, tie=False, **text):
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(tie=tie, **text),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=NUM_VISUAL,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=tie,
    )
    return sharpen(LlavaForConditionalGeneration(config))


def tiny_teacher(seed=1, **text):
    model = tiny_llava(seed, **({"layers": 4, "hidden": 48, "heads": 6, "kv_heads": 6} | text))
    return model.requires_grad_(False).eval()


def tiny_language_model(seed=2, **text):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(text_config(**text))


def tiny_batch(batch=3, length=40, seed=0, padding="right", images=True, starts=(4, 7, 1)):
    """input_ids, attention_mask, pixel_values, labels; image spans start at `starts`.

    The last sample is padded by 5, and is text only if `images` is "mixed".
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_TOKEN, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    with_image = [
        b for b in range(batch) if images is True or (images == "mixed" and b < batch - 1)
    ]
    pad = 5 if padding else 0
    labels = torch.full_like(ids, -100)
    for b in range(batch):
        begin = starts[b % len(starts)] + (pad if padding == "left" else 0)
        if b in with_image:
            ids[b, begin : begin + NUM_VISUAL] = IMAGE_TOKEN
        labels[b, begin + NUM_VISUAL + 3 : length - pad] = 0
    labels = torch.where(labels == 0, ids, -100)
    if padding == "right":
        mask[-1, -pad:] = 0
    elif padding == "left":
        mask[-1, :pad] = 0
    ids[mask == 0] = 0
    labels[mask == 0] = -100
    out = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if with_image:
        out["pixel_values"] = torch.randn(len(with_image), 3, 16, 16, generator=generator)
    return out
