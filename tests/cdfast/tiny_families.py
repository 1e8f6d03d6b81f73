"""A small random model of each family with its processor: Llava, Qwen, InternVL, SmolVLM, others.

Every maker takes a seed and sizes of the text model; the processor does not depend on them, so two
models of a family can read one batch.
"""

import re

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from tests.cdfast.test_data_processors import (
    IDEFICS,
    idefics,
    newline_tokenizer,
    onevision,
)
from tests.cdfast.tiny_processors import (
    LLAVA,
    QWEN,
    byte_tokenizer,
    llava_processor,
    qwen_processor,
)

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


def llava_crop(strategy="default", **text):
    """LLaVA-1.5: the shorter side resized, the rest cut off, a class token."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    return llava(images, CLIPVisionConfig, strategy, **text)


def llava_pad(**text):
    """Padded to a square first."""
    images = LlavaImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_pad=True
    )
    return llava(images, CLIPVisionConfig, "default", **text)


QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def qwen(seed=0, **text):
    """Patches of 8, merged 2 x 2, as many as the picture takes."""
    processor = qwen_processor()
    torch.manual_seed(seed)
    sizes = text_sizes(processor.tokenizer, **text)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**sizes, "rope_parameters": rope},
            vision_config={
                **QWEN_VISION,
                "out_hidden_size": sizes["hidden_size"],
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
            **qwen_tokens(processor),
        )
    )
    return sharpen(model), processor


def qwen_tokens(processor):
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    image, video, start, end = map(processor.tokenizer.convert_tokens_to_ids, names)
    return {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }


def qwen3(seed=0, **text):
    """As Qwen2.5-VL; features of both vision layers are added in the first two decoder layers."""
    old = qwen_processor()
    # Not through the constructor, which wants a video processor and so torchvision.
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    vars(processor).update(vars(old))
    torch.manual_seed(seed)
    sizes = text_sizes(processor.tokenizer, **text)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                **sizes,
                "head_dim": 8,
                "rope_parameters": {**rope, "mrope_interleaved": True},
            },
            vision_config={
                **QWEN_VISION,
                "out_hidden_size": sizes["hidden_size"],
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            **qwen_tokens(processor),
        )
    )
    return sharpen(model), processor


def tiled(processor, config, model, seed=0, **text):
    """Tiles of 64 pixels, patches of 16 merged 2 x 2: 4 tokens a tile, and the global image."""
    torch.manual_seed(seed)
    vision = {"hidden_size": 16, "intermediate_size": 32, "image_size": 64, "patch_size": 16}
    return (
        sharpen(
            model(
                config(
                    text_config={**text_sizes(processor.tokenizer, **text), "model_type": "llama"},
                    vision_config={**vision, "num_hidden_layers": 2, "num_attention_heads": 2},
                    image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
                    scale_factor=2,
                    pad_token_id=0,
                )
            )
        ),
        processor,
    )


def idefics3(**sizes):
    return tiled(idefics(), Idefics3Config, Idefics3ForConditionalGeneration, **sizes)


def smolvlm(**sizes):
    return tiled(smolvlm_processor(), SmolVLMConfig, SmolVLMForConditionalGeneration, **sizes)


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


def llava_onevision(seed=0, pinpoints=([48, 48], [96, 96], [48, 96]), **text):
    """A picture alone: base image, and tiles with a newline token behind each row. Among others:
    base image and one newline token."""
    processor = onevision()
    processor.num_image_tokens = 36
    pinpoints = list(pinpoints)
    processor.image_processor.image_grid_pinpoints = pinpoints
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 48,
                "patch_size": 8,
                "vision_use_head": False,
            },
            text_config={**text_sizes(processor.tokenizer, **text), "model_type": "qwen2"},
            image_token_index=processor.image_token_id,
            video_token_index=1,
            image_grid_pinpoints=pinpoints,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )
    return sharpen(model), processor


def llava_next(seed=0, pinpoints=([48, 96], [96, 48], [96, 96], [144, 48], [48, 144]), **text):
    """As LLaVA-OneVision, but every picture is cut into tiles, and a class token is left out."""
    pinpoints = list(pinpoints)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 48},
        crop_size={"height": 48, "width": 48},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=byte_tokenizer(bos=True),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 48,
                "patch_size": 8,
            },
            text_config={**text_sizes(processor.tokenizer, **text), "model_type": "llama"},
            image_token_index=processor.image_token_id,
            image_grid_pinpoints=pinpoints,
            vision_feature_select_strategy="default",
            vision_feature_layer=-1,
        )
    )
    return sharpen(model), processor


def internvl(seed=0, **text):
    """Tiles of 48 pixels, patches of 8 merged 2 x 2: 9 tokens a tile, and the thumbnail."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    # Not through the constructor, which wants a video processor and so torchvision.
    processor = InternVLProcessor.__new__(InternVLProcessor)
    tokenizer = newline_tokenizer(**names)
    processor.tokenizer, processor.video_processor = tokenizer, None
    processor.image_processor = GotOcr2ImageProcessorPil(
        size={"height": 48, "width": 48}, max_patches=6
    )
    processor.chat_template = QWEN.replace(
        "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"
    )
    processor.image_seq_length = 9
    for name in ("start_image_token", "end_image_token", "video_token"):
        setattr(processor, name, names[name])
    processor.image_token = names["context_image_token"]
    processor.image_token_id = tokenizer.context_image_token_id
    processor.start_image_token_id = tokenizer.start_image_token_id
    processor.end_image_token_id = tokenizer.end_image_token_id
    processor.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [48, 48],
                "patch_size": [8, 8],
            },
            text_config={**text_sizes(tokenizer, **text), "model_type": "qwen2"},
            image_token_id=processor.image_token_id,
            image_seq_length=9,
            downsample_ratio=0.5,
        )
    )
    return sharpen(model), processor


FAMILIES = {
    "llava": llava,
    "llava-crop": llava_crop,
    "llava-pad": llava_pad,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "internvl": internvl,
    "qwen2.5-vl": qwen,
    "qwen3-vl": qwen3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}


def photo(width, height, seed=0):
    """Noise, so that no two patches are alike."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
