"""Muon for the matrices of the decoder layers and AdamW for everything else, as one optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_DECODER_MATRIX = re.compile(r"(^|\.)layers\.\d+\.")
_VISION = re.compile(r"vision|visual")

MUON_MOMENTUM = 0.9
NEWTON_SCHULZ_STEPS = 4


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps a `torch.optim.Muon` and a `torch.optim.AdamW` together.

    It owns the parameter groups (Muon's first) and the state; the two share them, so learning rate
    schedulers, `state_dict` and `load_state_dict` are those of any optimizer.

    Args:
        muon: over matrices only.
        adamw: over other parameters; none may be in both.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.muon = muon
        self.adamw = adamw
        self._muon_groups = len(muon.param_groups)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        self.muon.param_groups = self.param_groups[: self._muon_groups]
        self.adamw.param_groups = self.param_groups[self._muon_groups :]
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def muon_with_adamw(
    model: nn.Module,
    lr: float,
    muon_lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
) -> MuonWithAdamW:
    """Muon on the trainable 2-D matrices inside decoder layers, AdamW on the other trainable ones.

    Args:
        model: parameters that need no gradient are left out; a vision tower's layers go to AdamW.
        lr: AdamW's learning rate.
        muon_lr: Muon's, in its original scaling (update times sqrt(max(1, rows / columns))).
        weight_decay: decoupled, of both.
        betas: AdamW's.

    Raises:
        ValueError: the model has no trainable matrix in a decoder layer, or nothing else.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decoder = _DECODER_MATRIX.search(name) and not _VISION.search(name)
        (matrices if decoder and parameter.dim() == 2 else others).append(parameter)
    if not matrices or not others:
        raise ValueError(
            "model: expected trainable matrices in decoder layers and other trainable parameters, "
            f"got {len(matrices)} and {len(others)}; use torch.optim.AdamW instead"
        )
    muon = torch.optim.Muon(
        matrices,
        lr=muon_lr,
        weight_decay=weight_decay,
        momentum=MUON_MOMENTUM,
        ns_steps=NEWTON_SCHULZ_STEPS,
        adjust_lr_fn="original",
    )
    return MuonWithAdamW(
        muon, torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas)
    )
