"""Small random checkpoints on disk and real photographs in LLaVA's layout, for the real command.

The photographs are those that scikit-image carries in its package; nothing is downloaded.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import skimage
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

PHOTO_FOLDER = Path(skimage.__file__).parent / "data"
IMAGE_SIZE, PATCH_SIZE = 32, 8
NUM_VISUAL = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# File, and pairs of a question and an answer.
PHOTOS = [
    ("astronaut.png", [("Who is this?", "An astronaut."), ("What is behind her?", "A flag.")]),
    ("chelsea.png", [("Which animal is it?", "A cat."), ("Its eyes?", "Green, half shut.")]),
    ("coffee.png", [("What is on the table?", "A cup of coffee and a spoon.")]),
    ("rocket.jpg", [("What is starting?", "A rocket."), ("Is it day?", "Yes."), ("Sure?", "Yes!")]),
    ("camera.png", [("What does the man hold?", "A camera on a tripod.")]),
    ("hubble_deep_field.jpg", [("What is this?", "Many far galaxies.")]),
    ("coins.png", [("What lies here?", "Old coins, in rows.")]),
]
TEXT_ONLY = [("What is the capital of France?", "Paris.")]


def records():
    """Seven photographs, one of them twice, and a record without an image."""
    made = [
        {"id": f"photo-{n}", "image": name, "conversations": conversation(turns, "<image>\n")}
        for n, (name, turns) in enumerate([*PHOTOS, PHOTOS[0]])
    ]
    made.insert(3, {"id": "text", "conversations": conversation(TEXT_ONLY)})
    return made


def conversation(turns, head=""):
    said = []
    for n, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": ("" if n else head) + question})
        said.append({"from": "gpt", "value": answer})
    return said


def write_records(path, made):
    path.write_text(json.dumps(made))
    return path


def make_tokenizer():
    """Byte-level BPE, trained here on the conversations."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = [said["value"] for record in records() for said in record["conversations"]]
    core.train_from_iterator(
        [*text, "user\nassistant\n"],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<image>", "<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_image_processor():
    return SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def make_processor():
    return LlavaProcessor(
        image_processor=make_image_processor(),
        tokenizer=make_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def vision_config():
    return SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )


def text_config(tokenizer, layers, hidden, **options):
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )


def llava(tokenizer, seed, layers, hidden):
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config(),
            text_config=text_config(tokenizer, layers, hidden),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=NUM_VISUAL,
            vision_feature_select_strategy="full",
            vision_feature_layer=-2,
        )
    )


def make_checkpoints(folder):
    """Write teacher, students, a vision encoder and the data; returns where they are.

    `llava_student` has the teacher's vision encoder, `other_student` one of its own.
    """
    processor = make_processor()
    tokenizer = processor.tokenizer
    paths = SimpleNamespace(
        images=PHOTO_FOLDER,
        **{
            name: folder / name
            for name in ("teacher", "student", "llava_student", "other_student", "vision")
        },
    )
    teacher = llava(tokenizer, seed=1, layers=5, hidden=48)
    teacher.save_pretrained(paths.teacher)
    torch.manual_seed(2)
    student = Qwen2ForCausalLM(text_config(tokenizer, layers=3, hidden=32))
    student.save_pretrained(paths.student)
    tokenizer.save_pretrained(paths.student)
    other = llava(tokenizer, seed=3, layers=3, hidden=32)
    other.save_pretrained(paths.other_student)
    other.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    other.save_pretrained(paths.llava_student)
    for path in (paths.teacher, paths.llava_student, paths.other_student):
        processor.save_pretrained(path)
    torch.manual_seed(4)
    SiglipVisionModel(vision_config()).save_pretrained(paths.vision)
    make_image_processor().save_pretrained(paths.vision)
    paths.data = write_records(folder / "photos.json", records())
    return paths
