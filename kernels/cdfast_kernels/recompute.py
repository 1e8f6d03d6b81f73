"""Activation recomputation that does not repeat the operators of this package."""

from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def keep_alignment() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` with which torch.utils.checkpoint keeps attention and alignment.

    Recomputation then takes out, the loss, the LSE, G = dL/dS and its row scale from the forward
    pass, and repeats everything else:

    ```python
    checkpoint(layer, hidden, use_reentrant=False, context_fn=keep_alignment)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_alignment})
    ```

    Kept per call, for T tokens: out (H d T numbers of q's dtype), the LSE (4 H T bytes), and with
    an alignment loss G (as large as a stored map) and 4 T bytes. The backends triton, cpu,
    sdpa, flash_attn and xformers are operators of the package; `reference` is made of torch's own
    operations, which are repeated as without this.

    Returns:
        Two context managers, for the forward pass and for the recomputation.

    Raises:
        RuntimeError: in the backward, where the recomputed function runs other operations than its
            forward did (torch's selective checkpointing asks for the same ones).

    Source: torch.utils.checkpoint.create_selective_checkpoint_contexts.
    """
    contexts: tuple[AbstractContextManager, AbstractContextManager]
    contexts = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    ours = getattr(op, "namespace", None) == "cdfast"
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE
