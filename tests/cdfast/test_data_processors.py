"""Processors that write more around an image than a placeholder: Gemma 3, Idefics 3, OneVision."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from cdfast.data import Sample, VisionTextCollator, check_answers, encode
from tests.cdfast.tiny_processors import (
    IMAGE,
    QWEN,
    SPECIAL,
    assistant,
    picture,
    supervised,
    text,
    user,
)

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{{ ':' if m.content[0].type == 'image' else ': ' }}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
NEWLINE = "Ċ"


def newline_tokenizer(special=(), **named):
    """Bytes, with tokens of two and three newlines: they merge across an image's edges."""
    special = [*SPECIAL, *special, *named.values()]
    merges = [(NEWLINE, NEWLINE), (NEWLINE * 2, NEWLINE)]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), NEWLINE * 2, NEWLINE * 3]
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named,
    )


def gemma():
    tokenizer = newline_tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Gemma3Processor(images, tokenizer, chat_template=GEMMA, image_seq_length=5)


def idefics():
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    extra = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles]
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 64}
    )
    return Idefics3Processor(
        images, newline_tokenizer(extra), image_seq_len=4, chat_template=IDEFICS
    )


def onevision():
    # Not through the constructor, which wants a video processor and so torchvision.
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": 48, "width": 48}, image_grid_pinpoints=[[48, 48], [96, 96], [48, 96]]
    )
    processor.tokenizer = newline_tokenizer()
    processor.video_processor = None
    processor.chat_template = QWEN.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    processor.image_token, processor.video_token = "<image>", "<video>"
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.video_token_id = None
    processor.num_image_tokens, processor.vision_feature_select_strategy = 9, "full"
    processor.vision_aspect_ratio = "anyres_max_9"
    return processor


CASES = {
    "gemma3": (gemma, "<end_of_turn>"),
    "idefics3": (idefics, "<end_of_utterance>"),
    "onevision": (onevision, "<|im_end|>"),
}


@pytest.fixture(params=CASES)
def case(request):
    make, end = CASES[request.param]
    return make(), end


def test_ids_are_the_processors_and_labels_the_answers(case):
    processor, end = case
    images = (picture(0, 70, 100), picture(1), picture(2, 90, 60))
    answers = ["it is red", "\nno", "a: b"]
    messages = [
        user(IMAGE, "\nWhat?"),
        assistant(answers[0]),
        user("And ", IMAGE, "\n this", IMAGE),
        assistant(answers[1]),
        user("q"),
        assistant(answers[2]),
    ]
    sample = Sample(messages, images)
    encoded = encode(processor, sample)
    check_answers(processor, sample, encoded)
    runs = [run.strip() for run in supervised(processor, encoded)]
    assert runs == [answer.strip() + end for answer in answers]
    given = iter(images)
    own = [
        {
            "role": m["role"],
            "content": [
                {"type": "image", "image": Image.fromarray(next(given))} if c == IMAGE else c
                for c in m["content"]
            ],
        }
        for m in messages
    ]
    own = processor.apply_chat_template(own, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(encoded["input_ids"], own["input_ids"][0])
    for name, value in encoded["images"].items():
        assert torch.equal(value, own[name]), name


def test_independent_turns_and_mixed_batch(case):
    processor, _ = case
    images = (picture(0, 70, 100),)
    pairs = [("What?", "x y"), ("And?", "no")]
    messages = [user(IMAGE, "What?"), assistant("x y"), user("And?"), assistant("no")]
    turns = encode(processor, Sample(messages, images), turns="independent")
    for number, (question, answer) in enumerate(pairs, 1):
        alone = encode(processor, Sample([user(IMAGE, question), assistant(answer)], images))
        here = (turns["segment_ids"] == 0) | (turns["segment_ids"] == number)
        assert torch.equal(turns["input_ids"][here], alone["input_ids"])
        assert torch.equal(turns["labels"][here], alone["labels"])
    words = encode(processor, Sample([user("q"), {"role": "assistant", "content": [text("a")]}]))
    batch = VisionTextCollator(0)([alone, words])
    assert torch.equal(batch["pixel_values"], alone["images"]["pixel_values"])
    assert len(batch["input_ids"]) == 2
