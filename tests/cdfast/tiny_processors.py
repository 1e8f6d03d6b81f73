"""Processors of LLaVA's and Qwen's kind with tiny tokenizers, made without any download."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

# llava-hf's template with an end-of-turn token.
LLAVA = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for c in m.content %}{% if c.type == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
# A text-only model's template: content is a string.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are helpful.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def word_tokenizer(**extra):
    extra_words = ["USER:", "ASSISTANT:", "user", "assistant", "system"]
    vocab = {word: n for n, word in enumerate([*SPECIAL, *WORDS, *extra_words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(core, **extra)


def byte_tokenizer(**extra):
    """Every byte a token, as byte-level BPE without merges: splits characters of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if extra.pop("bos", False):
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return wrap(core, **extra)


def wrap(core, **extra):
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[4:],
        clean_up_tokenization_spaces=False,
        **extra,
    )


def llava_processor(template=LLAVA, tokenizer=None):
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 48, "width": 48}),
        tokenizer=tokenizer or byte_tokenizer(bos=True),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def qwen_processor():
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    processor = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    tokenizer = byte_tokenizer()
    processor.image_processor, processor.tokenizer = images, tokenizer
    processor.chat_template, processor.video_processor = QWEN, None
    for name in ("image", "video"):
        setattr(processor, f"{name}_token", f"<|{name}_pad|>")
        setattr(
            processor,
            f"{name}_token_id",
            tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"),
        )
    return processor


MAKERS = {
    "llava": llava_processor,
    "words": lambda: llava_processor(LLAVA.replace("</s>", " </s> "), word_tokenizer()),
    "chatml": lambda: llava_processor(None, byte_tokenizer(chat_template=CHATML)),
    "qwen": qwen_processor,
}
END = {"llava": "</s>", "words": "</s>", "chatml": "<|im_end|>", "qwen": "<|im_end|>"}


def picture(seed=0, height=48, width=48):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


def user(*parts):
    return {
        "role": "user",
        "content": [p if isinstance(p, dict) else text(p) for p in parts],
    }


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


def supervised(processor, encoded):
    """The supervised runs, decoded."""
    labels = encoded["labels"].tolist()
    runs, run = [], []
    for label in [*labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(processor.tokenizer.decode(run))
            run = []
    return runs
