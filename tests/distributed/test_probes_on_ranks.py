"""Evaluation during training on two processes: sharded models run on both or hang."""

import pytest
import torch

from tests.cdfast import photo_setup
from tests.distributed.probe_script import SETUPS, STEPS
from tests.distributed.test_two_ranks import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# The others once per change: each start of two ranks takes a quarter of a minute.
IN_CI = ("ddp", "zero3, sharded teacher")
CASES = [s if s in IN_CI else pytest.param(s, marks=pytest.mark.full) for s in SETUPS]
MEASURED = ("eval_CR", "eval_VQA", "eval_similarity/mean", "eval_similarity/layer_2")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """setup -> what its run ended with, with and without evaluation."""
    found = {}

    def ends(setup):
        if setup not in found:
            folder = tmp_path_factory.mktemp("probes")
            photo_setup.write_records(folder / "photos.json", photo_setup.records())
            done = torchrun("-m", "tests.distributed.probe_script", folder, setup, cwd=folder)
            assert done.returncode == 0, done.stderr[-4000:]
            found[setup] = torch.load(folder / "ends.pt")
        return found[setup]

    return ends


def evaluations(log):
    return [entry for entry in log if "eval_runtime" in entry]


@pytest.mark.parametrize("setup", CASES)
def test_ranks_train_as_if_nothing_were_measured(setup, ends):
    plain, probed = ends(setup)["plain"], ends(setup)["probed"]
    names = ("loss", "loss_lm", "loss_kl", "loss_alignment", "grad_norm")
    losses = [
        [[entry[name] for name in names] for entry in end["logs"][0] if "loss" in entry]
        for end in (plain, probed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    want, got = plain["weights"], probed["weights"]
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("setup", CASES)
def test_every_rank_has_the_numbers_of_one_setup(setup, ends):
    first, second = (evaluations(log) for log in ends(setup)["probed"]["logs"])
    reference = evaluations(ends("ddp")["probed"]["logs"][0])
    assert len(first) == len(second) == len(reference) == STEPS + 1
    assert not evaluations(ends(setup)["plain"]["logs"][0])
    for mine, other, want in zip(first, second, reference):
        assert [mine[name] for name in MEASURED] == [other[name] for name in MEASURED]
        for name in MEASURED[2:]:
            assert mine[name] == pytest.approx(want[name], abs=1e-4)
    # Before training nothing differs between the setups but the order of sums.
    assert [first[0][name] for name in MEASURED[:2]] == [reference[0][n] for n in MEASURED[:2]]
