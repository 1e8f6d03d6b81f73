"""cdfast: CompoDistill for large multimodal LLMs, with fused visual attention alignment.

`import cdfast` also registers the student with a fetched teacher adapter (TAF), so that
`AutoModelForImageTextToText.from_pretrained` loads its checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

try:
    from cdfast.adapters import register_taf_classes
except ImportError as error:
    # transformers hides why one of its modules does not import behind errors of its own.
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if "torchvision" in str(cause):
        raise ImportError(
            f"transformers cannot be imported: {cause}. The torchvision that is installed does not "
            "fit this torch. Uninstall it (pip uninstall torchvision; cdfast does not need it), or "
            "install the one of the same version and build."
        ) from error
    raise ImportError(
        f"cdfast needs the packages of its extra [train] ({cause}). Install them with "
        "pip install 'cdfast[train]'. The fused op alone is the package cdfast_kernels."
    ) from error

if TYPE_CHECKING:
    from cdfast import maps as maps
    from cdfast.aligner import VisualAttentionAligner
    from cdfast.trainer import DistillationConfig, DistillationTrainer

register_taf_classes()

__all__ = ["DistillationConfig", "DistillationTrainer", "VisualAttentionAligner"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Trainer pulls in accelerate and datasets: loaded when asked for, not to load a checkpoint.
    if name == "VisualAttentionAligner":
        from cdfast.aligner import VisualAttentionAligner

        return VisualAttentionAligner
    if name in ("DistillationTrainer", "DistillationConfig"):
        from cdfast import trainer

        return getattr(trainer, name)
    if name == "maps":
        return importlib.import_module("cdfast.maps")
    raise AttributeError(f"module 'cdfast' has no attribute {name!r}")
