"""What importing the package brings in, and what it exports."""

import inspect
import subprocess
import sys
from pathlib import Path

import cdfast_kernels
import pytest

# What the trainer, or a user of the trainer, brings; the operation needs none of it.
FOREIGN = ("cdfast", "transformers", "deepspeed", "accelerate", "peft", "datasets")


def test_it_imports_neither_the_trainer_nor_transformers():
    code = f"import sys, cdfast_kernels; print([m for m in {FOREIGN!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"


def test_public_names():
    assert sorted(cdfast_kernels.__all__) == sorted(
        {
            "VisualLayout",
            "VisualMap",
            "__version__",
            "available_backends",
            "flash_attention",
            "flash_attention_with_alignment",
            "keep_alignment",
            "visual_alignment_loss",
            "visual_attention_map",
        }
    )


def test_version_is_the_distribution_version():
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert f'version = "{cdfast_kernels.__version__}"' in pyproject.read_text()


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("flash_attention", "q k v * softmax_scale layout backend"),
        ("visual_attention_map", "q k lse layout * softmax_scale backend storage"),
        (
            "visual_alignment_loss",
            "q k lse target layout * objective softmax_scale reduction backend",
        ),
        (
            "flash_attention_with_alignment",
            "q k v target layout * objective softmax_scale reduction backend",
        ),
    ],
)
def test_signatures(name, parameters):
    function = getattr(cdfast_kernels, name)
    positional, keyword = (part.split() for part in parameters.split("*"))
    kinds = {p.name: p.kind for p in inspect.signature(function).parameters.values()}
    assert list(kinds) == positional + keyword
    assert all(kinds[p] is inspect.Parameter.KEYWORD_ONLY for p in keyword)
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert section in function.__doc__
