"""Checkpoints of two ranks: damage, planted pickles, other layouts, export, restarts."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from cdfast.checkpoint import verify
from cdfast.export import export_checkpoint
from tests.cdfast import photo_setup
from tests.cdfast.test_checkpoint import DAMAGE, Planted, names, rewrite_manifest
from tests.distributed.step_script import make_student
from tests.distributed.test_faults import KILLED
from tests.distributed.warm import ROOT

STAGES = {"ddp": 0, "zero3": 3}
SHARD = "global_step3/zero_pp_rank_{}_mp_rank_00_{}_states.pt"
FILES = {
    "ddp": ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"],
    "zero3": [
        "latest",
        "model.safetensors",
        "rng_state_1.pth",
        "scheduler.pt",
        "zero_to_fp32.py",
        *[SHARD.format(rank, kind) for rank in (0, 1) for kind in ("model", "optim")],
    ],
}
CASES = [(stage, name) for stage, names_of in FILES.items() for name in names_of]
PICKLES = [(stage, name) for stage, name in CASES if name.endswith((".pt", ".pth"))]


def train(warm, folder, run, **job):
    """(exit codes, output of all ranks)"""
    log = folder / "log"
    ranks = job.get("ranks", 2)
    for rank in range(ranks):
        (folder / f"log-{rank}.log").unlink(missing_ok=True)
    given = {"ranks": ranks, "steps": 3, "trace": str(folder / "trace"), **job}
    codes = warm.run(log=str(log), folder=str(run), **given)
    return codes, "".join((folder / f"log-{rank}.log").read_text() for rank in range(ranks))


@pytest.fixture(scope="module")
def trained(warm, tmp_path_factory):
    """Stage -> (folder of a run of three steps, file of the weights at its end)."""
    folders = {}
    for stage, number in STAGES.items():
        folder = tmp_path_factory.mktemp(stage)
        codes, output = train(
            warm, folder, folder / "run", stage=number, end=str(folder / "end.pt")
        )
        assert codes == [0, 0], output[-3000:]
        folders[stage] = folder
    return folders


@pytest.fixture
def copied(trained, tmp_path):
    def copy(stage):
        return shutil.copytree(trained[stage] / "run", tmp_path / "run")

    return copy


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_of_two_ranks_are_whole(trained, stage):
    for path in (trained[stage] / "run").iterdir():
        assert verify(path, STAGES[stage]) is None
        manifest = json.loads((path / "manifest.json").read_text())
        assert (manifest["world_size"], manifest["zero_stage"]) == (2, STAGES[stage])


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("stage, name", CASES)
def test_damage_to_any_file_is_found(copied, stage, name, damage):
    run = copied(stage)
    DAMAGE[damage](run / "checkpoint-3" / name)
    assert verify(run / "checkpoint-3", STAGES[stage]).startswith(f"{name} ")


@pytest.mark.slow
@pytest.mark.parametrize("stage, name", [("ddp", "rng_state_1.pth"), ("zero3", CASES[-1][1])])
def test_ranks_resume_from_the_older_checkpoint(warm, trained, copied, tmp_path, stage, name):
    run = copied(stage)
    (run / "checkpoint-3" / name).unlink()
    codes, output = train(warm, tmp_path, run, stage=STAGES[stage])
    assert codes == [0, 0], output[-3000:]
    said = re.findall(r"^(?:skipping|resuming).*", output, re.MULTILINE)  # by one rank
    assert said == [
        f"skipping {run}/checkpoint-3: {name} is missing",
        f"resuming from {run}/checkpoint-2",
    ]
    want = (trained[stage] / "trace").read_text().splitlines()
    assert (tmp_path / "trace").read_text().splitlines() == want[2:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_resume_at_every_zero_stage(warm, tmp_path, stage):
    for folder, halves in ((tmp_path / "whole", [2]), (tmp_path / "halves", [1, 1])):
        folder.mkdir()
        for steps in halves:
            codes, output = train(warm, folder, folder / "run", stage=stage, stop_after=steps)
            assert codes == [0, 0], output[-3000:]
    assert f"resuming from {folder}/run/checkpoint-1" in output
    traces = [(tmp_path / name / "trace").read_text() for name in ("whole", "halves")]
    assert traces[0] == traces[1]


# -- pickles ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage, name", PICKLES)
def test_a_planted_pickle_is_refused_by_name(copied, tmp_path, stage, name):
    run, marker = copied(stage), tmp_path / "executed"
    torch.save({"module": Planted(marker)}, run / "checkpoint-3" / name)
    rewrite_manifest(run / "checkpoint-3")
    assert verify(run / "checkpoint-3", STAGES[stage]).startswith(f"{name} holds more than data")
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "optim"])
def test_deepspeed_itself_executes_nothing(warm, copied, tmp_path, kind):
    """Not even where our own verification has been fooled."""
    run, marker = copied("zero3"), tmp_path / "executed"
    torch.save({"module": Planted(marker)}, run / "checkpoint-3" / SHARD.format(0, kind))
    codes, output = train(warm, tmp_path, run, stage=3, steps=4, verified=False)
    assert all(codes)
    assert "Weights only load failed" in output
    assert not marker.exists()


# -- other layouts ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, changed, said",
    [
        ("ddp", {"ranks": 1}, "processes: it was saved with 2; this run has 1"),
        ("zero3", {"ranks": 3}, "processes: it was saved with 2; this run has 3"),
        ("zero3", {"stage": 0}, "ZeRO stage: it was saved with 3; this run has 0"),
    ],
)
def test_another_layout_is_refused_before_the_first_step(
    warm, copied, tmp_path, stage, changed, said
):
    run = copied(stage)
    job = {"stage": STAGES[stage], "steps": 4, **changed}
    codes, output = train(warm, tmp_path, run, **job)
    assert set(codes) == {2}, output[-3000:]
    assert f"error: {run}/checkpoint-3: {said}" in output
    assert f"python -m cdfast.export {run}/checkpoint-3" in output
    assert not (tmp_path / "trace").exists()
    assert names(run) == ["checkpoint-2", "checkpoint-3"]


# -- export ----------------------------------------------------------------------------------------


def exported(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_export_has_the_trained_weights(trained, tmp_path, stage):
    export_checkpoint(trained[stage] / "run" / "checkpoint-3", tmp_path / "out")
    want, got = torch.load(trained[stage] / "end.pt"), exported(tmp_path / "out")
    assert got.keys() == want.keys()
    assert any("vision_tower" in name for name in want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_export_merges_adapters(warm, tmp_path, stage):
    end, run = tmp_path / "end.pt", tmp_path / "run"
    codes, output = train(
        warm, tmp_path, run, stage=STAGES[stage], what="lora", steps=2, end=str(end)
    )
    assert codes == [0, 0], output[-3000:]
    _, base = make_student("everything")
    base.save_pretrained(tmp_path / "base")
    export_checkpoint(run / "checkpoint-2", tmp_path / "out", base=tmp_path / "base")
    got, trained = exported(tmp_path / "out"), torch.load(end)
    before, checked = base.state_dict(), set()
    for name, value in before.items():
        inner = f"base_model.model.{name.removesuffix('.weight')}"
        module = name.rpartition(".")[0]
        saved = f"base_model.model.{module}.modules_to_save.default.{name.rpartition('.')[2]}"
        if f"{inner}.lora_A.default.weight" in trained:
            a, b = (trained[f"{inner}.lora_{f}.default.weight"] for f in "AB")
            value = value + b @ a * (8 / 4)  # alpha / r
            checked.add("merged")
        elif saved in trained:
            value = trained[saved]
            checked.add("saved")
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
    assert checked == {"merged", "saved"}


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Arguments of a run of two stages on photographs, without its output folder."""
    folder = tmp_path_factory.mktemp("photos")
    paths = photo_setup.make_checkpoints(folder)
    arguments = {"logging_steps": 1, "save_steps": 1, "disable_tqdm": True}
    stages = [
        {"stage": "dpt", "batch_size": 1, "max_steps": 1},
        {"stage": "dft", "batch_size": 1, "max_steps": 3, "lora": True},
    ]
    recipe = {"name": "run", "workers": 0, "lora_r": 4, "arguments": arguments, "stages": stages}
    (folder / "given.yaml").write_text(yaml.safe_dump({**recipe, "lora_dropout": 0.1}))
    options = {
        "teacher": paths.teacher,
        "student": paths.student,
        "data": paths.data,
        "image-root": paths.images,
    }
    flat = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [str(folder / "given.yaml"), *flat]


@pytest.fixture(scope="module")
def undisturbed(warm, given, tmp_path_factory):
    """Folder of the finished run of two ranks, and the events of its first rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fault = {"rank": 0, "root": str(folder / "run"), "events": str(folder / "events")}
    codes = warm.run(
        ranks=2,
        log=str(folder / "log"),
        argv=[*given, "--output-dir", str(folder / "run")],
        fault=fault,
    )
    assert codes == [0, 0], (folder / "log-0.log").read_text()[-3000:]
    return folder


def require_same_run(got, want):
    losses = []
    for folder in (got, want):
        stages = json.loads((folder / "results.json").read_text())["stages"]
        assert [stage["steps"] for stage in stages] == [1, 3]
        losses.append([[e["loss"].hex() for e in stage["log"]] for stage in stages])
    assert losses[0] == losses[1]
    ours, theirs = exported(got / "model"), exported(want / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def kill_command(warm, given, folder, at, phase):
    """Kill the command at an event of its first rank; the same command with --resume ends it."""
    run = folder / "run"
    argv = [*given, "--output-dir", str(run), "--resume"]
    fault = {"rank": 0, "root": str(run), "events": str(folder / "events"), "action": "kill"}
    codes = warm.run(
        ranks=2, log=str(folder / "log"), argv=argv, fault={**fault, "at": at, "phase": phase}
    )
    assert codes[0] == KILLED, (folder / "log-0.log").read_text()[-3000:]
    codes = warm.run(ranks=2, log=str(folder / "again"), argv=argv)
    assert codes == [0, 0], (folder / "again-0.log").read_text()[-3000:]


def command_events(undisturbed):
    """(number, kind, path) of what the run writes outside of its checkpoints."""
    lines = [line.split(" ", 3) for line in (undisturbed / "events").read_text().splitlines()]
    return [(int(n), kind, path) for n, kind, _, path in lines if "checkpoint-" not in path]


HAND_OVER = [
    ("rename", r"^student-init$", "before"),
    ("write", r"1-dpt/_staging-model/.*\.(tmp|safetensors)", "halfway"),
    ("write", r"2-dft/.*stage\.json", "halfway"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, pattern, phase", HAND_OVER)
def test_a_command_killed_between_its_stages_ends_the_same(
    warm, given, undisturbed, tmp_path, kind, pattern, phase
):
    at = next(
        n for n, k, path in command_events(undisturbed) if k == kind and re.search(pattern, path)
    )
    kill_command(warm, given, tmp_path, at, phase)
    require_same_run(tmp_path / "run", undisturbed / "run")


@pytest.mark.full
@pytest.mark.parametrize("phase", ["before", "halfway", "after"])
def test_a_command_killed_at_any_point_outside_its_checkpoints_ends_the_same(
    warm, given, undisturbed, tmp_path, phase
):
    points = [n for n, k, _ in command_events(undisturbed) if phase != "halfway" or k == "write"]
    for at in points:
        folder = tmp_path / str(at)
        folder.mkdir()
        kill_command(warm, given, folder, at, phase)
        require_same_run(folder / "run", undisturbed / "run")
        shutil.rmtree(folder)
    print(f"{phase}: {len(points)} points")


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(given, undisturbed, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["--max-restarts", "1", "-m", "tests.distributed.restart_script"]
    done = subprocess.run(
        [sys.executable, *launcher, *script, *given, "--output-dir", str(tmp_path / "run")],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            # With the shared store, a restart often fails to meet again.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"resuming from {tmp_path}/run/stages/2-dft/checkpoint-2" in done.stdout
    require_same_run(tmp_path / "run", undisturbed / "run")
