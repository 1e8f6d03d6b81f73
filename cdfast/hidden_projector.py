"""The student-to-teacher MLP of the hidden-state loss: part of the student while it trains.

Being a submodule, it is wrapped, sharded and optimised with the student. Saved students do not have
it: it is a file of its own, in checkpoints for a resumed run, beside a finished stage for the next.

Source: LLaVADI (arXiv 2407.19409); two layers with GELU of the teacher's width: its authors' code.
Initial weights and what the MLP is saved as are our choice.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdfast.storage import staged_file

NAME = "hidden_projector"
FILE = f"{NAME}.safetensors"
RESUME = "Resume with the hidden_weight and the teacher that the run was started with."


def add_hidden_projector(student: Any, teacher_width: int, seed: int) -> None:
    """Give `student` a trainable f: h -> W_2 GELU(W_1 h), (d_s) to (d_t); an old one is replaced.

    Weights are normal with std 1/sqrt(fan_in), biases 0, and no random number of the run is used.

    Args:
        student: transformers model, not the PEFT model around it.
        teacher_width: d_t.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    width = student.config.get_text_config(decoder=True).hidden_size
    layers = []
    for inputs in (width, teacher_width):
        layer = nn.utils.skip_init(nn.Linear, inputs, teacher_width)
        with torch.no_grad():
            layer.weight.normal_(std=1 / math.sqrt(inputs), generator=generator)
            layer.bias.zero_()
        layers.append(layer)
    projector = nn.Sequential(layers[0], nn.GELU(), layers[1])
    setattr(student, NAME, projector.to(student.device, student.dtype))


def hidden_projector_size(student_width: int, teacher_width: int) -> int:
    """Parameters of the MLP."""
    return teacher_width * (student_width + 1) + teacher_width * (teacher_width + 1)


def hidden_projector(student: Any) -> nn.Module:
    """The MLP that `add_hidden_projector` has given to the student."""
    module = getattr(student, NAME, None)
    if module is None:
        raise ValueError(
            f"student: expected the MLP of the hidden-state loss in it ({NAME}); got none. Train "
            "with DistillationTrainer(hidden_weight > 0), or call add_hidden_projector first."
        )
    return module


def has_hidden_projector(model: nn.Module) -> bool:
    """Whether the student, or the PEFT model around it, has the MLP."""
    return any(name.rpartition(".")[2] == NAME for name, _ in model.named_modules())


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the student's entries, the MLP's) of a whole state dict, a PEFT model's too."""
    mine = {name: value for name, value in state.items() if f"{NAME}." in name}
    return {n: v for n, v in state.items() if n not in mine}, mine


def save_hidden_projector(state: dict[str, Tensor], folder: Path) -> None:
    """Write the MLP's entries of `split_state`, if there are any: whole or not at all."""
    if state:
        named = {n.rpartition(f"{NAME}.")[2]: v.contiguous().cpu() for n, v in state.items()}
        with staged_file(folder / FILE) as partial:
            save_file(named, partial)


def load_hidden_projector(student: Any, folder: Path, remedy: str = RESUME) -> None:
    """Read it back into the student's MLP, if the student has one.

    Args:
        folder: a checkpoint, or a finished stage.
        remedy: last sentence of the error.

    Raises:
        ValueError: the folder has none, or one of other sizes.
    """
    module = getattr(student, NAME, None)
    if module is None:
        return
    try:
        module.load_state_dict(load_file(folder / FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder / FILE}: expected the MLP of the hidden-state loss of this run; got {error}. "
            f"{remedy}"
        ) from error
