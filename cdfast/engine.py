"""DeepSpeed ZeRO: configuration, the teacher's engine, and whole weights out of sharded ones.

Of this package only `engine` and `checkpoint` know DeepSpeed, and only where an option asks for it:
one process and plain data parallelism (ZeRO stage 0) run without it.

Source: ZeRO (Rajbhandari et al., 2020), stages 1 to 3; DeepSpeed's configuration reference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "pip install 'cdfast[zero]'"


def start_zero(timeout_s: float) -> None:
    """Join the process group that DeepSpeed uses, before any model is loaded; again is harmless.

    Args:
        timeout_s: seconds after which a collective gives up.

    Raises:
        ValueError: DeepSpeed is not installed, or the process was not started by a launcher.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"zero_stage: expected DeepSpeed to be installed for ZeRO or a sharded teacher; got "
            f"{error}. Install it with {INSTALL}, or use zero_stage 0 and a replicated teacher."
        ) from error
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "zero_stage: expected a process started by torchrun for ZeRO or a sharded teacher; got "
            "one without WORLD_SIZE in its environment. Start with "
            "torchrun --nproc-per-node N -m cdfast.train ..."
        )
    deepspeed.init_distributed(
        "nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )


def zero_config(stage: int, offload_optimizer: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for the student; "auto" takes what TrainingArguments says.

    Args:
        stage: 1 shards optimizer states, 2 gradients too, 3 parameters too.
        offload_optimizer: keep optimizer states in CPU memory and step there.
    """
    zero: dict[str, Any] = {"stage": stage}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        # Per-step messages of its own; ours say more.
        "steps_per_print": 10**9,
    }


def stage_of(config: str | dict[str, Any], asked: int) -> int:
    """The ZeRO stage of a DeepSpeed configuration that the user has written.

    Raises:
        ValueError: it is not the one `asked` for, where that is not 0, or there is no such file.
    """
    try:
        values = json.loads(Path(config).read_text()) if isinstance(config, str) else config
    except (OSError, ValueError) as error:
        raise ValueError(
            f"deepspeed: expected a JSON file with a DeepSpeed configuration; got {config!r}: "
            f"{error}. Correct the path or the file, or give --zero-stage alone."
        ) from error
    stage = int(values.get("zero_optimization", {}).get("stage", 0))
    if asked not in (0, stage):
        raise ValueError(
            f"zero_stage: expected {stage}, as in the DeepSpeed configuration given; got {asked}. "
            "Give one of the two."
        )
    return stage


def place_teacher(teacher: nn.Module, placement: str, device: torch.device) -> nn.Module:
    """What runs the teacher's forward: the model itself, or a ZeRO-3 engine without optimizer.

    Args:
        teacher: frozen model.
        placement: "replicated": whole on every device. "sharded": ZeRO-3 over all ranks.
            "offloaded": ZeRO-3 with the shards in CPU memory, fetched layer by layer.
        device: of this rank.
    """
    if hasattr(teacher, "module"):  # placed by an earlier trainer
        return teacher
    if placement == "replicated":
        make_whole(teacher)
        return teacher.to(device)
    import deepspeed

    zero: dict[str, Any] = {"stage": 3}
    if placement == "offloaded":
        zero["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    config = _inference_config(next(teacher.parameters()).dtype, zero)
    with unsharded_loading():  # its own configuration must not replace the student's
        engine, *_ = deepspeed.initialize(model=teacher, config=config)
    engine.eval()
    return engine


def _inference_config(dtype: torch.dtype, zero: dict[str, Any]) -> dict[str, Any]:
    return {
        # Of no consequence without an optimizer, but DeepSpeed asks for it.
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 10**9,
    }


def release_engine(engine: Any) -> None:
    """Let go of an engine's shards, buffers and hooks; nothing to do for anything else."""
    if hasattr(engine, "zero_optimization_stage"):
        engine.destroy()


def require_stage(engine: Any, stage: int) -> None:
    """Refuse to train when the student is not run by what was asked for.

    Args:
        engine: what Trainer runs the student with.
        stage: the ZeRO stage asked for.

    Raises:
        RuntimeError: another stage, or no engine where one was asked for.
    """
    actual = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0
    if int(actual) != stage:
        raise RuntimeError(
            f"zero_stage: expected the student to run under ZeRO stage {stage}; got "
            f"{type(engine).__name__} with stage {int(actual)}. Is ACCELERATE_USE_CPU or "
            "ACCELERATE_USE_DEEPSPEED set in the environment? Unset it."
        )


# -- sharded parameters ------------------------------------------------------------------------


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of `module` is partitioned by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """The whole parameters, on every rank, for reading; nothing to do for those that are whole.

    A collective: every rank must enter it with the same parameters.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """`model.state_dict()` with whole tensors: on rank 0 in CPU memory if sharded, None elsewhere.

    A collective when sharded: one parameter at a time is gathered, so that no GPU holds more.
    """
    if not is_sharded(model):
        return model.state_dict()
    main = torch.distributed.get_rank() == 0
    whole: dict[int, Tensor] = {}
    for parameter in model.parameters():
        with gathered([parameter]):
            if main:
                whole[id(parameter)] = parameter.detach().to("cpu", copy=True)
    if not main:
        return None
    # keep_vars, because the partitioned parameters are what identifies the entries.
    state = model.state_dict(keep_vars=True)
    return {
        name: whole[id(value)] if id(value) in whole else value.detach().cpu()
        for name, value in state.items()
    }


def make_whole(module: nn.Module) -> None:
    """Replace parameters that `zero.Init` has partitioned by ordinary ones, on every rank."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if hasattr(parameter, "ds_id"):
                with gathered([parameter]):
                    value = parameter.detach().clone()
                setattr(child, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


@contextmanager
def sharded_loading(dtype: torch.dtype) -> Iterator[None]:
    """`from_pretrained` partitions the model over all ranks as it is loaded (`zero.Init`) here.

    A collective: every rank loads the same model. No rank ever holds it whole.
    """
    from transformers.integrations import HfDeepSpeedConfig

    with unsharded_loading():  # restores what was active
        config = HfDeepSpeedConfig(_inference_config(dtype, {"stage": 3}))
        yield
        del config  # transformers holds it weakly: it must outlive the loading


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """`from_pretrained` loads whole weights here.

    Once training arguments with ZeRO-3 exist, transformers partitions every model as it is
    loaded; that hangs where one rank loads alone, and splits a vision tower that is to stay whole.
    """
    from transformers.integrations import deepspeed as integration

    active = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = active
