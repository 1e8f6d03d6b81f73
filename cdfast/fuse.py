"""The command: `python -m cdfast.fuse MODEL OUTPUT`.

Writes a student with a fetched teacher adapter (TAF) as a plain LLaVA model that needs no code of
its own, for programs that know the classes of transformers only. MODEL is a folder that a run has
written (`runs/mine/model`) or that `python -m cdfast.export` has.

    x_v = P_s(P_t(z)),  P_t(z) = W_2 act(W_1 z + b_1) + b_2,  P_s(y) = W y + b
        = (W W_2) act(W_1 z + b_1) + (W b_2 + b)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from cdfast.config import ConfigError
from cdfast.export import has_processor
from cdfast.modeling_cdfast_llava import CdfastLlavaConfig, FetchedAdapterProjector
from cdfast.models import load_config, load_model
from cdfast.sharing.model_card import write_card_of
from cdfast.storage import CheckpointError, staged_folder, write_text

# What the student's configuration has beyond that of a plain LLaVA model.
_OWN_FIELDS = ("architectures", "auto_map", "model_type", "student_projector")
_CHECKED_FEATURES = 256
# SigLIP and CLIP, as transformers 5 writes them.
_TOWER = re.compile(r"^vision_tower\.(?=(?:embeddings|encoder|head)\.|pre_|post_)")


def fuse_student(student: Any) -> LlavaForConditionalGeneration:
    """A plain LLaVA model that computes what a TAF student with a linear P_s computes.

    The products are computed in float64 and rounded once to the student's dtype. LLaVA's projector
    is as wide inside as the text; a narrower teacher leaves hidden units over, which are 0 on both
    sides and change nothing.

    Args:
        student: `CdfastLlavaForConditionalGeneration`; the new model shares its vision encoder and
            language model, tied embeddings included.

    Raises:
        ConfigError: see `check_fusable`.
    """
    config: Any = student.config
    check_fusable(config)
    values = {k: v for k, v in config.to_dict().items() if k not in _OWN_FIELDS}
    del values["teacher_hidden_size"]
    # Without memory: every part is replaced below.
    with torch.device("meta"):
        plain: Any = LlavaForConditionalGeneration(LlavaConfig(**values))
    plain.model.vision_tower = student.model.vision_tower
    plain.model.language_model = student.model.language_model
    plain.lm_head = student.lm_head
    ours, theirs = student.model.multi_modal_projector, plain.model.multi_modal_projector
    theirs.load_state_dict(
        fused_state(ours, config.get_text_config(decoder=True).hidden_size), assign=True
    )
    plain.generation_config = student.generation_config
    plain.config.dtype = config.dtype
    return plain.train(student.training)


def check_fusable(config: Any) -> None:
    """Refuse a model whose adapter cannot be written as LLaVA's, by its configuration.

    Raises:
        ConfigError: it has no fetched adapter; P_s is an MLP; or the teacher is wider than the
            student.
    """
    if config.model_type != CdfastLlavaConfig.model_type:
        raise ConfigError(
            f"model: expected a student with a fetched teacher adapter (model_type "
            f"{CdfastLlavaConfig.model_type!r}); got {config.model_type!r}, which has nothing to "
            "fuse: it loads without code of its own as it is."
        )
    instead = (
        "Load it with trust_remote_code=True as it is (its folder has the code), or distil with "
    )
    if config.student_projector != "linear":
        raise ConfigError(
            f"student_projector: expected 'linear', which fuses with the teacher's adapter; got "
            f"{config.student_projector!r}: P_s has an activation of its own, and LLaVA's "
            f"projector has room for one. {instead}--student-projector linear (as the authors' "
            "code does)."
        )
    width = config.get_text_config(decoder=True).hidden_size
    if config.teacher_hidden_size > width:
        raise ConfigError(
            f"teacher_hidden_size: expected at most {width}, the width of the student, to which "
            f"the inside of LLaVA's projector is bound; got {config.teacher_hidden_size}. "
            f"{instead}--taf false."
        )


def fused_state(projector: FetchedAdapterProjector, width: int) -> dict[str, Tensor]:
    """State of a `LlavaMultiModalProjector` that computes P_s(P_t(z)).

    Args:
        projector: with a linear P_s.
        width: of the student's text, W; the teacher's is T <= W.

    Returns:
        linear_1: (W, V) with W - T rows of zeros; linear_2: (W, W) with W - T columns of zeros.
    """
    inner: Any = projector.teacher["linear_1"]
    outer: Any = projector.teacher["linear_2"]
    own = projector.linear_1
    missing = width - inner.out_features
    weight = own.weight.double() @ outer.weight.double()
    state = {
        "linear_1.weight": nn.functional.pad(inner.weight, (0, 0, 0, missing)),
        "linear_2.weight": nn.functional.pad(weight, (0, missing)).to(own.weight.dtype),
    }
    if own.bias is not None:
        bias = own.weight.double() @ outer.bias.double() + own.bias.double()
        state["linear_1.bias"] = nn.functional.pad(inner.bias, (0, missing))
        state["linear_2.bias"] = bias.to(own.bias.dtype)
    return {name: value.detach().contiguous() for name, value in state.items()}


@torch.no_grad()
def largest_difference(student: Any, plain: Any) -> float:
    """max |x_v - x_v'| / max |x_v| of the two projectors on random features, in their dtype."""
    theirs = plain.model.multi_modal_projector
    weight = theirs.linear_1.weight
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(_CHECKED_FEATURES, weight.shape[1], generator=generator)
    features = features.to(weight.dtype)
    want = student.model.multi_modal_projector(features).double()
    return float((theirs(features).double() - want).abs().max() / want.abs().max())


def fuse_folder(source: Path, output: Path) -> float:
    """Write the student in `source` as a plain LLaVA model with its processor and card.

    Returns:
        `largest_difference` of what was written.

    Raises:
        ConfigError: `source` holds no model that can be fused.
        CheckpointError: `output` exists or cannot be written.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists already. Give another folder to write to.")
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"model: expected a folder with config.json, such as runs/mine/model; got "
            f"{str(source)!r}. A checkpoint with LoRA adapters, or of ZeRO, is exported first: "
            "python -m cdfast.export CHECKPOINT FOLDER."
        )
    config = load_config(source)
    check_fusable(config)
    student = load_model(source, str(config.dtype or torch.float32).removeprefix("torch.")).eval()
    plain = fuse_student(student)
    with staged_folder(output) as folder:
        plain.save_pretrained(folder)
        publish_names(folder)
        if has_processor(source):
            AutoProcessor.from_pretrained(source).save_pretrained(folder)
        write_card_of(source, folder, fused=True)
    return largest_difference(student, plain)


def publish_names(folder: Path) -> None:
    """Give the vision encoder's weights the names they have in published LLaVA checkpoints.

    transformers 5 writes `vision_tower.encoder` and reads `vision_tower.vision_model.encoder` too,
    the only one that others know.
    """
    for path in folder.glob("*.safetensors"):
        tensors = {_TOWER.sub(r"\g<0>vision_model.", k): v for k, v in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text())
        names = {_TOWER.sub(r"\g<0>vision_model.", k): v for k, v in index["weight_map"].items()}
        write_text(path, json.dumps({**index, "weight_map": names}, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m cdfast.fuse`."""
    parser = argparse.ArgumentParser(
        prog="python -m cdfast.fuse",
        description="Write a student with a fetched teacher adapter as a plain LLaVA model.",
    )
    parser.add_argument("model", type=Path, help="folder of the student, such as runs/mine/model")
    parser.add_argument("output", type=Path, help="folder to make")
    options = parser.parse_args(argv)
    try:
        difference = fuse_folder(options.model, options.output)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"{options.model} -> {options.output} (visual tokens of random features differ by at most "
        f"{difference:.1e} of the largest)"
    )


if __name__ == "__main__":
    main()
