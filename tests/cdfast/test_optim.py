"""Muon and AdamW as one optimizer."""

import copy

import pytest
import torch
from torch import nn

from cdfast.optim import muon_with_adamw


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
        self.vision_tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})

    def forward(self, x):
        x = self.vision_tower["layers"][0](self.embed(x))
        return self.layers[1](self.layers[0](x).relu())


def _step(model, optimizer, seed):
    x = torch.randint(5, (16,), generator=torch.Generator().manual_seed(seed))
    loss = (model(x) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _model():
    torch.manual_seed(0)
    return _Model()


def test_muon_gets_the_decoder_matrices_only():
    model = _model()
    model.layers[1].weight.requires_grad_(False)
    optimizer = muon_with_adamw(model, 1e-3, 0.02)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(12, 8)]
    assert optimizer.param_groups[0]["params"][0] is model.layers[0].weight
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trainable)


def test_same_steps_as_the_two_optimizers_apart():
    model, expected = _model(), _model()
    optimizer = muon_with_adamw(model, 1e-3, 0.02, weight_decay=0.1, betas=(0.8, 0.9))
    matrices = [layer.weight for layer in expected.layers]
    others = [p for p in expected.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(
        matrices, 0.02, weight_decay=0.1, momentum=0.9, ns_steps=4, adjust_lr_fn="original"
    )
    adamw = torch.optim.AdamW(others, 1e-3, weight_decay=0.1, betas=(0.8, 0.9))
    for seed in range(3):
        _step(model, optimizer, seed)
        x = torch.randint(5, (16,), generator=torch.Generator().manual_seed(seed))
        expected.zero_grad()
        (expected(x) - 1).square().mean().backward()
        muon.step()
        adamw.step()
    for got, want in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_schedulers_reach_both():
    optimizer = muon_with_adamw(_model(), 1e-3, 0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0005]
    assert optimizer.muon.param_groups[0]["lr"] == 0.01
    assert optimizer.adamw.param_groups[0]["lr"] == 0.0005


def test_resume_is_exact():
    model = _model()
    optimizer = muon_with_adamw(model, 1e-3, 0.02)
    for seed in range(3):
        _step(model, optimizer, seed)
    resumed = copy.deepcopy(model)
    other = muon_with_adamw(resumed, 1.0, 1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.02, 1e-3]
    for seed in range(3, 6):
        assert _step(model, optimizer, seed) == _step(resumed, other, seed)
    for got, want in zip(resumed.parameters(), model.parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_closure_and_zero_grad():
    model = _model()
    optimizer = muon_with_adamw(model, 1e-3, 0.02)

    def closure():
        loss = model(torch.arange(5)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_refuses_a_model_without_decoder_layers():
    with pytest.raises(ValueError, match="decoder layers"):
        muon_with_adamw(nn.Linear(3, 3), 1e-3, 0.02)
