"""The command: `python -m cdfast.export CHECKPOINT OUTPUT [--dtype bfloat16] [--base FOLDER]`.

Writes the student in a checkpoint of any ZeRO stage as a plain Hugging Face model: for
`from_pretrained`, or for a new run with another number of processes. LoRA is merged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast.checkpoint import verify
from cdfast.engine import unsharded_loading
from cdfast.hidden_projector import split_state
from cdfast.sharing.model_card import write_model_card
from cdfast.storage import CheckpointError, staged_folder
from cdfast.yaml_file import read_yaml

DTYPES = ("float32", "bfloat16", "float16")
_ADAPTER = "adapter_config.json"
# One of these is beside the weights wherever a processor or tokenizer was saved.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the student of a checkpoint as plain weights with its processor.

    Args:
        checkpoint: folder that a run has saved; verified before anything is read from it.
        output: folder to make; it is there whole or, after a failure, not at all.
        dtype: of the weights; None: as saved.
        base: with LoRA, the student without adapters; None: the one that the checkpoint names.
        trust_remote_code: allow the checkpoint to bring its own code.

    Raises:
        CheckpointError: `output` exists, the checkpoint is not whole, or its base is not found.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists already. Give another folder to export to.")
    problem = verify(checkpoint, zero_stage=None)
    if problem:
        raise CheckpointError(f"{checkpoint}: cannot be exported: {problem}.")
    options = {
        "dtype": getattr(torch, dtype) if dtype else "auto",
        "trust_remote_code": trust_remote_code,
    }
    processor = checkpoint
    if (checkpoint / _ADAPTER).exists():
        processor = base or _named_base(checkpoint)
        model = merge_adapters(processor, checkpoint, **options)
    else:
        model = _load(checkpoint, **options)
    if has_processor(checkpoint):
        processor = checkpoint
    with staged_folder(output) as folder:
        model.save_pretrained(folder)
        if has_processor(processor):
            AutoProcessor.from_pretrained(
                processor, trust_remote_code=trust_remote_code
            ).save_pretrained(folder)
        write_model_card(folder, _recipe_of(checkpoint))


def _recipe_of(checkpoint: Path) -> dict[str, Any] | None:
    """What is known of the run that wrote <run>/stages/<stage>/<checkpoint>; None: nothing."""
    place = checkpoint.resolve()
    if len(place.parents) < 4 or place.parents[1].name != "stages":
        return None
    path = place.parents[2] / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        recipe = read_yaml(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {"name": recipe["name"], "checkpoint": "/".join(place.parts[-2:]), "recipe": recipe}


def write_student(
    model: Any, state: dict[str, torch.Tensor], folder: Path, base: Path, **options: Any
) -> None:
    """Write a trained student as plain weights; one process.

    Args:
        model: the student, or a PEFT model around one; its own parameters may be sharded.
        state: its whole state dict.
        folder: to write into.
        base: the student before training, into which LoRA adapters are merged.
        options: for from_pretrained of `base`.
    """
    state, _ = split_state(state)
    if not hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder, state_dict=state)
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="_staging-") as adapter:
        model.save_pretrained(adapter, state_dict=state)
        merge_adapters(base, Path(adapter), **options).save_pretrained(folder)


def merge_adapters(base: Path, adapter: Path, **options: Any) -> Any:
    """The model in `base` with the LoRA adapters in `adapter` merged into its weights."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(_load(base, **options), str(adapter))
    return model.merge_and_unload()


def _load(folder: Path, **options: Any) -> Any:
    with unsharded_loading():
        return AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **options)


def _named_base(checkpoint: Path) -> Path:
    name = json.loads((checkpoint / _ADAPTER).read_text())["base_model_name_or_path"]
    if not name or not Path(name).is_dir():
        raise CheckpointError(
            f"{checkpoint}: holds LoRA adapters of the student in {name!r}, which is not found "
            "from here. Give its folder as --base (student-init, or the model of the stage before)."
        )
    return Path(name)


def has_processor(folder: Path) -> bool:
    """Whether a processor or tokenizer was saved in a folder."""
    return any((folder / name).exists() for name in _PROCESSOR_FILES)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m cdfast.export`."""
    parser = argparse.ArgumentParser(
        prog="python -m cdfast.export",
        description="Write the student of a checkpoint as a plain Hugging Face model.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-<step> folder of a run")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as saved)")
    parser.add_argument("--base", type=Path, help="LoRA: the student without adapters")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(argv)
    try:
        export_checkpoint(
            options.checkpoint,
            options.output,
            dtype=options.dtype,
            base=options.base,
            trust_remote_code=options.trust_remote_code,
        )
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{options.checkpoint} -> {options.output}")


if __name__ == "__main__":
    main()
