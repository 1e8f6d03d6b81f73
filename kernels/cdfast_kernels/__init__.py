"""Fused attention with visual alignment: flash attention, visual attention maps, alignment losses.

Needs torch and numpy, and triton for the backend of that name. The contract of every name is in its
docstring; the mathematics is in kernels/README.md.
"""

from cdfast_kernels.layout import VisualLayout
from cdfast_kernels.ops import (
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    visual_alignment_loss,
    visual_attention_map,
)
from cdfast_kernels.recompute import keep_alignment
from cdfast_kernels.visual_map import VisualMap

__version__ = "0.1.0"

__all__ = [
    "VisualLayout",
    "VisualMap",
    "__version__",
    "available_backends",
    "flash_attention",
    "flash_attention_with_alignment",
    "keep_alignment",
    "visual_alignment_loss",
    "visual_attention_map",
]
