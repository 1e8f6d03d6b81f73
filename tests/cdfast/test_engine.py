"""ZeRO options that cannot be met are refused; one process needs no DeepSpeed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cdfast import DistillationConfig
from cdfast.engine import full_state_dict, gathered, is_sharded, require_stage, zero_config
from tests.cdfast.tiny_models import tiny_teacher

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"zero_stage": 4}, "zero_stage: expected 0, 1, 2 or 3; got 4"),
        ({"teacher_placement": "nowhere"}, "teacher_placement: expected one of replicated, shar"),
        ({"deepspeed": "absent.json"}, "deepspeed: expected a JSON file with a .*absent.json"),
        ({"offload_optimizer": True}, "offload_optimizer: expected zero_stage 1, 2 or 3"),
        (
            {"zero_stage": 1, "muon_learning_rate": 0.02},
            "muon_learning_rate: expected zero_stage 0, because Muon needs whole matrices",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("options", [{"zero_stage": 3}, {"teacher_placement": "sharded"}])
def test_sharding_asks_for_a_launcher(options, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="expected a process started by torchrun"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_sharding_asks_for_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what an import finds where it is absent
    with pytest.raises(ValueError, match=r"expected DeepSpeed to be installed.*cdfast\[zero\]"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, zero_stage=2)


def test_one_process_and_data_parallelism_need_no_deepspeed():
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import cdfast.train, cdfast.trainer\n"
        "cdfast.trainer.DistillationConfig(output_dir='unused', use_cpu=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_run_without_the_engine_it_asked_for_is_refused():
    require_stage(torch.nn.Linear(1, 1), 0)
    require_stage(SimpleNamespace(zero_optimization_stage=lambda: 3), 3)
    with pytest.raises(RuntimeError, match="ZeRO stage 3; got Linear with stage 0"):
        require_stage(torch.nn.Linear(1, 1), 3)
    with pytest.raises(RuntimeError, match="ZeRO stage 3; got SimpleNamespace with stage 2"):
        require_stage(SimpleNamespace(zero_optimization_stage=lambda: 2), 3)


def test_the_configuration_says_what_was_asked_for():
    assert zero_config(2)["zero_optimization"] == {"stage": 2}
    offloaded = zero_config(3, offload_optimizer=True)["zero_optimization"]
    assert offloaded["stage"] == 3
    assert offloaded["offload_optimizer"]["device"] == "cpu"


def test_whole_models_are_their_own_state():
    model = tiny_teacher()
    assert not is_sharded(model)
    state, want = full_state_dict(model), model.state_dict()
    assert state.keys() == want.keys()
    with gathered(model.parameters()):
        assert all(torch.equal(state[name], want[name]) for name in want)


SCRIPT = """
import os, sys
from cdfast import DistillationConfig
config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
args = DistillationConfig(output_dir="unused", use_cpu=True, deepspeed=config)
assert args.zero_stage == 2
try:
    DistillationConfig(output_dir="unused", use_cpu=True, deepspeed=config, zero_stage=3)
except ValueError as error:
    assert "zero_stage: expected 2, as in the DeepSpeed configuration given; got 3" in str(error)
else:
    raise AssertionError("accepted")
"""


@pytest.mark.slow
def test_a_configuration_of_ones_own_sets_the_stage(tmp_path):
    pytest.importorskip("deepspeed")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
