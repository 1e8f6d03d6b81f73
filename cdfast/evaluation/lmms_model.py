"""The model that cdfast registers with lmms-eval, for its own command:

    python -m lmms_eval --model cdfast --model_args pretrained=runs/mine/model --tasks gqa ...

Found through the entry point `lmms_eval.models` of this package; needs the extra `[eval]`.
`python -m cdfast.evaluate --tasks` gives the same model to lmms-eval in its own process.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast.evaluation.delegated import answering
from cdfast.models import load_config

CdfastModel = answering(lmms)


class PretrainedCdfastModel(CdfastModel):  # type: ignore[misc, valid-type]
    """A checkpoint by name, as lmms-eval's command makes its models.

    Args:
        pretrained: checkpoint folder or hub name; a student with a fetched adapter (TAF) too.
        batch_size: prompts at a time.
        device: where it runs.
        dtype: of the weights; "auto": the checkpoint's own.
        max_batch_size: given by lmms-eval; batches do not grow here.

    Raises:
        ValueError: a batch size that is no number.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str = "cpu",
        dtype: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size: expected a whole number, at least 1; got {batch_size!r}. Give one."
            )
        load_config(pretrained)  # refuses code from the hub
        model: Any = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype)
        processor = AutoProcessor.from_pretrained(pretrained)
        super().__init__(model.to(device).eval(), processor, int(batch_size))


def manifest() -> ModelManifest:
    """What lmms-eval reads through the entry point."""
    name = f"{__name__}.{PretrainedCdfastModel.__name__}"
    return ModelManifest("cdfast", simple_class_path=name)
