"""A step that is not finite on one rank is skipped on both, without and with ZeRO-3."""

import pytest
import torch

from tests.distributed.nonfinite_script import BAD, STEPS
from tests.distributed.test_two_ranks import torchrun

HOW = ("ddp", "zero3", *(pytest.param(f"zero{n}", marks=pytest.mark.full) for n in (1, 2)))


@pytest.fixture(scope="module", params=HOW)
def cases(request, tmp_path_factory):
    """Case -> what each rank ended with."""
    if request.param != "ddp":
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    done = torchrun("-m", "tests.distributed.nonfinite_script", folder, request.param, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: torch.load(folder / f"{case}.pt") for case in STEPS}


def trace(log):
    wanted = ("loss", "loss_lm", "loss_kl", "loss_alignment", "grad_norm", "learning_rate")
    return [{name: entry[name] for name in wanted} for entry in log if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["skipped", "first"])
def test_the_step_is_skipped_on_both_ranks(cases, case):
    for got, want in zip(cases[case], cases["not taken"]):
        assert trace(got["log"]) == trace(want["log"])[:3]
        assert got["weights"][0] == got["weights"][1] == want["weights"][0]
        assert got["weights"][2:] == want["weights"][1:3]
        assert want["weights"][0] != want["weights"][1]
        assert [entry.get("skipped_steps", 0) for entry in got["log"]] == [0, 1, 1, 1]
    first, second = cases[case]
    assert first["weights"] == second["weights"]
    (said,) = first["said"]
    assert said.startswith(
        f"step 2 skipped, not finite: kl and teacher on rank 1 (samples: tiny, sample {BAD})."
    )
    assert second["said"] == []


@pytest.mark.slow
def test_both_ranks_end_with_the_samples_of_the_other(cases):
    first, second = cases["too many"]
    assert first["error"] == second["error"]
    for step in (2, 3):
        cause = f"step {step}: kl and teacher on rank 1 (samples: tiny, sample {BAD})"
        assert cause in first["error"]
    assert len(first["weights"]) == 2
