"""A small random model of each family with its processor: Llava, Qwen2.5-VL, SmolVLM, others."""

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from tests.cdfast.test_data_processors import IDEFICS, idefics, newline_tokenizer, onevision
from tests.cdfast.tiny_processors import LLAVA, byte_tokenizer, llava_processor, qwen_processor

LAYERS, HEADS, KV_HEADS = 3, 4, 2


def text_sizes(tokenizer, hidden=32, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


def sharpen(model):
    """Attention far from uniform, so that a wrong row, head or key shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "visi" not in name and name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(8)
    return model.eval()


def llava(image_processor=None, vision=None, strategy="full", seed=0, **text):
    """48 x 48 pixels in patches of 8."""
    processor = llava_processor()
    if image_processor is not None:
        processor = LlavaProcessor(
            image_processor=image_processor,
            tokenizer=byte_tokenizer(bos=True),
            patch_size=8,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(vision is CLIPVisionConfig),
            chat_template=LLAVA,
        )
    torch.manual_seed(seed)
    vision_config = (vision or SiglipVisionConfig)(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=8,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config,
            text_config={**text_sizes(processor.tokenizer, **text), "model_type": "qwen2"},
            image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=36,
            vision_feature_select_strategy=strategy,
            vision_feature_layer=-1,
        )
    )
    return sharpen(model), processor


def llava_crop(strategy="default"):
    """LLaVA-1.5: the shorter side resized, the rest cut off, a class token."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    return llava(images, CLIPVisionConfig, strategy)


def llava_pad():
    """Padded to a square first."""
    images = LlavaImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_pad=True
    )
    return llava(images, CLIPVisionConfig, "default")


def qwen():
    """Patches of 8, merged 2 x 2, as many as the picture takes."""
    processor = qwen_processor()
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    image, video, start, end = map(processor.tokenizer.convert_tokens_to_ids, names)
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text_sizes(processor.tokenizer), "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 32,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )
    return sharpen(model), processor


def tiled(processor, config, model):
    """Tiles of 64 pixels, patches of 16 merged 2 x 2: 4 tokens a tile, and the global image."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "image_size": 64, "patch_size": 16}
    return (
        sharpen(
            model(
                config(
                    text_config={**text_sizes(processor.tokenizer), "model_type": "llama"},
                    vision_config={**vision, "num_hidden_layers": 2, "num_attention_heads": 2},
                    image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
                    scale_factor=2,
                    pad_token_id=0,
                )
            )
        ),
        processor,
    )


def idefics3():
    return tiled(idefics(), Idefics3Config, Idefics3ForConditionalGeneration)


def smolvlm():
    return tiled(smolvlm_processor(), SmolVLMConfig, SmolVLMForConditionalGeneration)


def smolvlm_processor():
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    extra = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles]
    # Not through the constructor, which wants num2words and a video processor.
    processor = SmolVLMProcessor.__new__(SmolVLMProcessor)
    processor.tokenizer = newline_tokenizer(extra)
    processor.image_processor = SmolVLMImageProcessorPil(
        size={"longest_edge": 192}, max_image_size={"longest_edge": 64}
    )
    processor.video_processor, processor.chat_template = None, IDEFICS
    processor.image_seq_len, processor.image_token = 4, "<image>"
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.video_token, processor.video_token_id = "<video>", None
    processor.fake_image_token = "<fake_token_around_image>"
    processor.global_image_token = "<global-img>"
    return processor


def llava_onevision():
    """A family whose geometry is not known to cdfast: tiles with newline tokens between rows."""
    processor = onevision()
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "image_size": 48, "patch_size": 16}
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config={
                **vision,
                "model_type": "siglip_vision_model",
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vision_use_head": False,
            },
            text_config={**text_sizes(processor.tokenizer), "model_type": "qwen2"},
            image_token_index=processor.image_token_id,
            video_token_index=1,
            image_grid_pinpoints=[[48, 48], [96, 96], [48, 96]],
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )
    return sharpen(model), processor


FAMILIES = {
    "llava": llava,
    "llava-crop": llava_crop,
    "llava-pad": llava_pad,
    "qwen2.5-vl": qwen,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}


def photo(width, height, seed=0):
    """Noise, so that no two patches are alike."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
