"""Two processes on the CPU against one: the same steps from the same global batches."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.cdfast import photo_setup
from tests.cdfast.command import options
from tests.distributed.step_script import CASES, SETUPS, STEPS, run_case

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


def torchrun(*arguments, cwd, processes=2):
    """Processes that meet at a free port."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
    )


# -- the trainer -----------------------------------------------------------------------------------


# Sharded models choose their layers later than others: see the test of it.
LATER = "zero3, adaptive"
HALF = "zero3, bfloat16"
EXACT = [setup for setup in SETUPS if setup not in (LATER, HALF)]
RUNS = [(setup, case) for setup in EXACT for case in SETUPS[setup][1]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(setup, case) -> what both ranks ended with; the cases of a setup in one start."""
    ends = {}
    for setup, (_, cases) in SETUPS.items():
        folder = tmp_path_factory.mktemp("ranks")
        done = torchrun("-m", "tests.distributed.step_script", folder, setup, cwd=folder)
        assert done.returncode == 0, done.stderr[-4000:]
        ends |= {(setup, case): torch.load(folder / f"{case}.pt") for case in cases}
    return ends


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {case: run_case(case, folder, 1) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("setup, case", RUNS)
def test_two_ranks_take_the_step_of_one_process(setup, case, two_ranks, one_process):
    before, want, alone = one_process[case]
    (first, first_matches), (second, second_matches) = two_ranks[setup, case]["ranks"]
    assert first.keys() == want.keys() == before.keys()
    if second is None:
        assert SETUPS[setup][0]["zero_stage"] == 3
    else:
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    error = sum((first[n] - want[n]).double().square().sum() for n in want).sqrt()
    change = sum((want[n] - before[n]).double().square().sum() for n in want).sqrt()
    assert change > 0
    assert error <= TOLERANCE * change
    matches = alone.aligner.matches if alone.aligner else None
    assert first_matches == second_matches == matches


@pytest.mark.slow
@pytest.mark.parametrize("setup, case", RUNS)
def test_two_ranks_log_the_losses_of_one_process(setup, case, two_ranks, one_process):
    got = two_ranks[setup, case]["log"]
    want = [entry for entry in one_process[case][2].state.log_history if "loss" in entry]
    assert len(got) == len(want) == STEPS
    for mine, theirs in zip(got, want):
        losses = {name for name in theirs if name.startswith(("loss", "preference"))}
        assert losses == {name for name in mine if name.startswith(("loss", "preference"))}
        for name in losses:
            assert mine[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=1e-9)
        # Counts are those of the global batch, whoever had which sample.
        tokens_per_sample = [
            e["tokens_per_second"] / e["samples_per_second"] for e in (mine, theirs)
        ]
        assert tokens_per_sample[0] == pytest.approx(tokens_per_sample[1])


def difference(weights, want):
    return sum((weights[n].float() - want[n]).double().square().sum() for n in want).sqrt().item()


@pytest.mark.slow
def test_bfloat16_on_two_ranks_is_as_close_as_on_one(two_ranks, one_process, tmp_path):
    """The one error budget: at most twice the error of the same dtype without sharding."""
    done = torchrun(
        "-m", "tests.distributed.step_script", tmp_path, HALF, cwd=tmp_path, processes=1
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for case in SETUPS[HALF][1]:
        before, want, _ = one_process[case]
        alone = torch.load(tmp_path / f"{case}.pt")["ranks"][0][0]
        first, _ = two_ranks[HALF, case]["ranks"][0]
        assert 0 < difference(first, want) < difference(before, want)
        assert difference(first, want) <= 2 * difference(alone, want), case


@pytest.mark.slow
def test_sharded_models_choose_layers_when_every_rank_has_an_image(two_ranks, one_process):
    """The first two batches of the first rank have none; all ranks must run the models together."""
    end = two_ranks[LATER, "adaptive"]
    assert ["loss_alignment" in entry for entry in end["log"]] == [False, False, True]
    (_, first), (_, second) = end["ranks"]
    assert first == second
    assert first.keys() == one_process["adaptive"][2].aligner.matches.keys()


# -- the command -----------------------------------------------------------------------------------


def command(paths, folder, **changed):
    stages = [
        {"stage": "dpt", "batch_size": 1, "max_steps": 2},
        {"stage": "dft", "batch_size": 1, "max_steps": 2, "lora": True},
        {"stage": "sft", "batch_size": 2, "max_steps": 2, "gradient_accumulation_steps": 2},
    ]
    arguments = {"logging_steps": 1, "disable_tqdm": True}
    recipe = {"name": "ranks", "workers": 0, "lora_r": 4, "arguments": arguments, "stages": stages}
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return ["-m", "cdfast.train", path, *options(paths, folder / "run", **changed)]


@pytest.fixture(scope="module")
def command_run(paths, tmp_path_factory):
    """(folder, process) of the command on two ranks."""
    folder = tmp_path_factory.mktemp("command")
    return folder, torchrun(*command(paths, folder), cwd=folder)


@pytest.mark.slow
def test_the_command_under_zero_3_writes_the_same_student(paths, command_run, tmp_path):
    """Three stages, one with LoRA, one with accumulation; whole weights after each."""
    options = {"zero-stage": 3, "teacher-placement": "sharded"}
    done = torchrun(*command(paths, tmp_path, **options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    start = load_file(tmp_path / "run" / "student-init" / "model.safetensors")
    for stage in ("stages/1-dpt/model", "stages/2-dft/model", "model"):
        got = load_file(tmp_path / "run" / stage / "model.safetensors")
        want = load_file(command_run[0] / "run" / stage / "model.safetensors")
        assert got.keys() == want.keys()
        assert difference(got, want) <= TOLERANCE * difference(start, want), stage


@pytest.mark.slow
def test_the_command_on_two_ranks_writes_one_run(paths, command_run):
    tmp_path, done = command_run
    assert done.returncode == 0, done.stderr[-4000:]
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("results.json")] == [
        Path("run/results.json")
    ]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    assert [stage["steps"] for stage in results["stages"]] == [2, 2, 2]
    assert all(len(stage["log"]) == 2 for stage in results["stages"])
    assert (tmp_path / "run" / "report.html").is_file()
    # One process speaks.
    assert len(re.findall(r"^stage 1 of 3 \(dpt\)", done.stdout, re.MULTILINE)) == 1
    teacher, start, end = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict()
        for path in (paths.teacher, tmp_path / "run" / "student-init", tmp_path / "run" / "model")
    )
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert any(name.startswith("model.language_model.") for name in changed)
    assert "model.multi_modal_projector.linear_1.weight" in changed
    assert not any("vision_tower" in name or "projector.teacher." in name for name in changed)
    tower = [name for name in teacher if "vision_tower" in name]
    assert tower
    assert all(torch.equal(end[name], teacher[name]) for name in tower)


@pytest.mark.slow
def test_a_refusal_ends_both_ranks(paths, tmp_path):
    records = photo_setup.records()
    records[2]["image"] = "atlantis.jpg"
    data = photo_setup.write_records(tmp_path / "lost.json", records)
    done = torchrun(*command(paths, tmp_path, data=data), cwd=tmp_path)
    assert done.returncode != 0
    assert "error: lost.json, record 2" in done.stderr
    assert "DataError" not in done.stderr
