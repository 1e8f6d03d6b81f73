"""The trainers that bench_text_step compares, each set to the same objective on the same answers.

    L = sum over answer tokens of KL(teacher || student), over their number

No LM loss: TRL's trainers have none. Models are Qwen2 with random weights; cdfast's trainer takes
vision-language models, so its two are LLaVA models around the same language models, without an
image in any batch: their vision tower and projector are frozen and never run. All use AdamW
(fused), a constant rate, gradient clipping at 1, no gradient checkpointing, the same attention, and
batches of samples of equal length, so that none has padding.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import DTYPES

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
LEARNING_RATE = 1e-4


def stay_alone(folder: str) -> None:
    """Before Hugging Face's libraries are imported: no network, no telemetry, caches in `folder`.

    TRL's trainers report their use over the network when they are made, unless told not to.
    """
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": folder,
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, f"{folder}/{name}")


def absent(name: str) -> str | None:
    """Why a trainer cannot be had here, if it cannot."""
    if name != OURS and importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    return None


def language_model(options: argparse.Namespace, role: str) -> Any:
    """Teacher or student; the same random weights in every process."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import is_flash_attn_2_available

    teacher = role == "teacher"
    width = options.teacher_width if teacher else options.width
    heads = max(1, width // 64)
    config = Qwen2Config(
        vocab_size=options.vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=options.teacher_layers if teacher else options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(2048, options.tokens),
        tie_word_embeddings=False,
        # Logits of a variance worth distilling: with the default 0.02 both are nearly uniform.
        initializer_range=0.06,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(1 if teacher else 0)
    model = Qwen2ForCausalLM(config).to(options.device, DTYPES[options.dtype])
    if (
        options.device.startswith("cuda")
        and options.dtype != "fp32"
        and is_flash_attn_2_available()
    ):
        # What cdfast's trainer takes by itself where it can.
        model.set_attn_implementation("flash_attention_2")
    return model.requires_grad_(False).eval() if teacher else model


def around(text: Any, options: argparse.Namespace) -> Any:
    """A LLaVA model whose language model has the weights of `text`; its last token is the image."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=dict(VISION),
        text_config=text.config.to_dict(),
        image_token_index=options.vocabulary - 1,
        image_seq_length=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).to(options.device, DTYPES[options.dtype])
    model.requires_grad_(False)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    trained = next(text.parameters()).requires_grad
    model.model.language_model.requires_grad_(trained)
    model.lm_head.requires_grad_(trained)
    return model


def samples(options: argparse.Namespace, steps: int) -> list[dict[str, Any]]:
    """Random prompts and answers, `options.batch` for each step."""
    generator = torch.Generator().manual_seed(2)
    shape = (options.tokens,)
    # The last token is the image's, the first three are the tokenizer's own.
    ids = [
        torch.randint(3, options.vocabulary - 1, shape, generator=generator).tolist()
        for _ in range(steps * options.batch)
    ]
    prompt = options.tokens - options.answer
    return [
        {"input_ids": row, "prompt": "", "prompt_ids": row[:prompt], "answer": row[prompt:]}
        for row in ids
    ]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, : len(rows[0]["prompt_ids"])] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def common_arguments(options: argparse.Namespace, folder: str, steps: int) -> dict[str, Any]:
    """What all three trainers are told; all of them are transformers.Trainer."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": options.batch,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        # On a GPU all parameters are bfloat16, as are the states of AdamW: no autocast.
        "bf16": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not options.device.startswith("cuda"),
        "dataloader_pin_memory": options.device.startswith("cuda"),
    }


def tokenizer() -> Any:
    """TRL's trainers ask for one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def cdfast_trainer(options: argparse.Namespace, folder: str, steps: int) -> tuple[Any, Any]:
    from datasets import Dataset

    from cdfast import DistillationConfig, DistillationTrainer

    student, teacher = (language_model(options, role) for role in ("student", "teacher"))
    arguments = DistillationConfig(
        **common_arguments(options, folder, steps),
        train_sampling_strategy="sequential",
        lm_weight=0.0,
        kl_weight=1.0,
        alignment_weight=0.0,
    )
    model = around(student, options)
    trainer = DistillationTrainer(
        model,
        arguments,
        teacher=around(teacher, options),
        data_collator=collate,
        train_dataset=Dataset.from_list(samples(options, steps)),
    )
    return trainer, text_parameters(model.model.language_model, model.lm_head)


def gkd_trainer(options: argparse.Namespace, folder: str, steps: int) -> tuple[Any, Any]:
    """TRL's trainer that distils on given answers (lmbda=0), forward KL (beta=0)."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model = language_model(options, "student")
    arguments = GKDConfig(
        **common_arguments(options, folder, steps),
        train_sampling_strategy="sequential",
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        seq_kd=False,
        max_length=None,
    )
    trainer = GKDTrainer(
        model=model,
        teacher_model=language_model(options, "teacher"),
        args=arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list(samples(options, steps)),
        processing_class=tokenizer(),
    )
    return trainer, text_parameters(model.model, model.lm_head)


def chunked_trainer(options: argparse.Namespace, folder: str, steps: int) -> tuple[Any, Any]:
    """TRL's stable trainer: a chunked loss, but answers of the student only.

    It is given the dataset's answers where it would generate: a method of this benchmark, not an
    option of TRL's. What follows, the step, is TRL's own.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class OnGivenAnswers(DistillationTrainer):
        def _prepare_inputs(self, rows: Any) -> dict[str, Any]:
            device = self.accelerator.device
            prompt = torch.tensor([row["prompt_ids"] for row in rows], device=device)
            answer = torch.tensor([row["answer"] for row in rows], device=device)
            return {
                "prompt_ids": prompt,
                "prompt_mask": torch.ones_like(prompt),
                "completion_ids": answer,
                "completion_mask": torch.ones_like(answer),
                "num_items_in_batch": self.accelerator.gather(torch.tensor(answer.numel())).sum(),
            }

    model = language_model(options, "student")
    arguments = DistillationConfig(
        **common_arguments(options, folder, steps),
        shuffle_dataset=False,
        beta=0.0,
        temperature=1.0,
    )
    trainer = OnGivenAnswers(
        model=model,
        teacher_model=language_model(options, "teacher"),
        args=arguments,
        train_dataset=Dataset.from_list(samples(options, steps)),
        processing_class=tokenizer(),
    )
    return trainer, text_parameters(model.model, model.lm_head)


OURS, GIVEN, CHUNKED = "cdfast", "TRL GKDTrainer", "TRL DistillationTrainer, given answers"
TRAINERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    OURS: cdfast_trainer,
    GIVEN: gkd_trainer,
    CHUNKED: chunked_trainer,
}


def text_parameters(decoder: Any, head: Any) -> dict[str, torch.Tensor]:
    """Parameters of a language model, under names that are the same inside a LLaVA model."""
    named = {f"decoder.{name}": p for name, p in decoder.named_parameters()}
    return named | {f"head.{name}": p for name, p in head.named_parameters()}
