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
from transformers import AutoModelForImageTextToText

from tests.cdfast import photo_setup
from tests.distributed.step_script import CASES, STEPS, run_case

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on more, several times over on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(*arguments, cwd):
    """Two processes that meet at a free port."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
    )


# -- the trainer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Case -> what both ranks ended with; all cases in one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun("-m", "tests.distributed.step_script", folder, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: torch.load(folder / f"{case}.pt") for case in CASES}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {case: run_case(case, folder, 1) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_step_of_one_process(case, two_ranks, one_process):
    before, want, alone = one_process[case]
    (first, first_matches), (second, second_matches) = two_ranks[case]["ranks"]
    assert first.keys() == second.keys() == want.keys() == before.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    error = sum((first[n] - want[n]).double().square().sum() for n in want).sqrt()
    change = sum((want[n] - before[n]).double().square().sum() for n in want).sqrt()
    assert change > 0
    assert error <= TOLERANCE * change
    assert first_matches == second_matches == alone.aligner.matches


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_log_the_losses_of_one_process(case, two_ranks, one_process):
    got = two_ranks[case]["log"]
    want = [entry for entry in one_process[case][2].state.log_history if "loss" in entry]
    assert len(got) == len(want) == STEPS
    for mine, theirs in zip(got, want):
        losses = {name for name in theirs if name.startswith("loss")}
        assert losses == {name for name in mine if name.startswith("loss")}
        for name in losses:
            assert mine[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=1e-9)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return photo_setup.make_checkpoints(tmp_path_factory.mktemp("photos"))


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
    given = {
        "teacher": paths.teacher,
        "student": paths.student,
        "data": paths.data,
        "image-root": paths.images,
        "output-dir": folder / "run",
        **changed,
    }
    return ["-m", "cdfast.train", path, *(t for k, v in given.items() for t in (f"--{k}", v))]


@pytest.mark.slow
def test_the_command_on_two_ranks_writes_one_run(paths, tmp_path):
    done = torchrun(*command(paths, tmp_path), cwd=tmp_path)
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
