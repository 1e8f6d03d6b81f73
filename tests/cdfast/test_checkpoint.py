"""Checkpoints as files: what is written, what is found out, what is refused; one process."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cdfast.checkpoint import newest_checkpoint, rotate, safe_pickles, verify
from cdfast.config import load_recipe, to_dict
from cdfast.export import _recipe_of, export_checkpoint
from cdfast.export import main as export_main
from cdfast.manifest import describe, manifest_text
from cdfast.storage import (
    CheckpointError,
    _require_visible,
    prepare_run_folder,
    staged_folder,
    together,
    write_text,
)
from tests.cdfast.test_trainer import make_trainer

OPTIONS = {
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "matching": "adaptive",
}
# Every kind of file that a checkpoint of one process has.
FILES = [
    "alignment.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
]
PICKLES = [name for name in FILES if name.endswith((".pt", ".pth"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, losses) of a run of three steps, each saved."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, **OPTIONS)
    trainer.train()
    return folder, losses(trainer)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def losses(trainer):
    return [e["loss"].hex() for e in trainer.state.log_history if "loss" in e]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rewrite_manifest(checkpoint):
    """What an attacker does after a change."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {name: describe(checkpoint / name) for name in manifest["files"]}
    rest = {k: v for k, v in manifest.items() if k not in ("sha256", "format")}
    (checkpoint / "manifest.json").write_text(manifest_text({**rest, "files": files}))


# -- what a save leaves ----------------------------------------------------------------------------


def test_a_checkpoint_lists_all_its_files_and_nothing_else_is_left(trained):
    folder, _ = trained
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for path in folder.iterdir():
        assert names(path) == sorted([*FILES, "manifest.json"])
        manifest = json.loads((path / "manifest.json").read_text())
        assert sorted(manifest["files"]) == FILES
        assert (manifest["world_size"], manifest["zero_stage"]) == (1, 0)
        assert f"checkpoint-{manifest['step']}" == path.name
        assert verify(path, 0) is None


def test_everything_is_on_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename

    def fsynced(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source, target, **options):
        calls.append((str(source), str(target)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(os, "rename", renamed)
    make_trainer(tmp_path, **{**OPTIONS, "max_steps": 1}).train()
    staged = tmp_path / "_staging-checkpoint-1" / "checkpoint-1"
    at = calls.index((str(staged), str(tmp_path / "checkpoint-1")))
    before = {str(path) for path in calls[:at] if isinstance(path, str)}
    assert {str(staged / name) for name in FILES} | {str(staged)} <= before
    assert any(path.startswith(str(staged)) and "manifest" in path for path in before)
    assert str(tmp_path) in calls[at:]


@pytest.mark.parametrize("limit, best, kept", [(2, None, [2, 3]), (1, 1, [1, 3]), (2, 1, [1, 3])])
def test_rotation_keeps_the_newest_and_the_best(run, limit, best, kept):
    rotate(run / "checkpoint-3", limit, str(run / f"checkpoint-{best}") if best else None)
    assert names(run) == [f"checkpoint-{step}" for step in kept]


def test_rotation_does_not_count_later_checkpoints_that_resume_has_skipped(run):
    rotate(run / "checkpoint-2", 1, None)
    assert names(run) == ["checkpoint-2", "checkpoint-3"]


def test_the_best_checkpoint_has_its_final_path(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **OPTIONS,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=make_trainer(tmp_path / "other").train_dataset,
        metric_for_best_model="eval_loss",
        save_total_limit=1,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best
    assert (tmp_path / best).is_dir()


def test_what_a_crash_has_left_is_removed_and_what_it_replaced_is_put_back(run):
    (run / "checkpoint-3").rename(run / "_replaced-checkpoint-3")
    shutil.copytree(run / "checkpoint-1", run / "_replaced-checkpoint-1")
    (run / "_staging-checkpoint-4" / "checkpoint-4").mkdir(parents=True)
    (run / "_trash-checkpoint-0").mkdir()
    prepare_run_folder(run)
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert verify(run / "checkpoint-3", 0) is None


def test_a_folder_that_not_all_machines_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cdfast.storage._SHARED_STORAGE_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="must be on storage that all machines share"):
        _require_visible(tmp_path, "token")


def test_save_on_each_node_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, **OPTIONS, save_on_each_node=True)
    with pytest.raises(CheckpointError, match="save_on_each_node: expected false"):
        trainer.train()


# -- resume ----------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"truncated": truncate, "bit flipped": flip_a_bit, "deleted": os.remove}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_to_any_file_is_found_and_the_older_checkpoint_used(run, name, damage):
    DAMAGE[damage](run / "checkpoint-3" / name)
    said = []
    assert newest_checkpoint(run, 0, said.append) == run / "checkpoint-2"
    skipped, resumed = said
    assert skipped.startswith(f"skipping {run / 'checkpoint-3'}: ")
    assert name in skipped
    assert "\n" not in skipped
    assert resumed == f"resuming from {run / 'checkpoint-2'}"


def test_a_part_that_the_save_has_not_written_is_found(run):
    (run / "checkpoint-3" / "rng_state.pth").unlink()
    path = run / "checkpoint-3" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["rng_state.pth"], manifest["sha256"]
    path.write_text(manifest_text(manifest))
    assert verify(run / "checkpoint-3", 0) == "rng_state.pth is missing from the save"
    assert newest_checkpoint(run, 0, print) == run / "checkpoint-2"


def test_resume_from_a_damaged_run_ends_with_the_same_losses(run, trained, capsys):
    truncate(run / "checkpoint-3" / "optimizer.pt")
    trainer = make_trainer(run, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == trained[1]
    assert f"resuming from {run / 'checkpoint-2'}" in capsys.readouterr().out
    # The broken one has been replaced.
    assert verify(run / "checkpoint-3", 0) is None
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_resume_without_any_whole_checkpoint_starts_afresh(run, trained, capsys):
    for path in run.iterdir():
        truncate(path / "manifest.json")
    trainer = make_trainer(run, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == trained[1]
    assert f"no whole checkpoint in {run}: starting afresh" in capsys.readouterr().out


def test_resume_before_the_first_save_starts_afresh(tmp_path, trained, capsys):
    trainer = make_trainer(tmp_path / "new", **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == trained[1]
    assert "no checkpoint in" in capsys.readouterr().out


def test_resume_after_the_last_step_takes_none(run, trained):
    trainer = make_trainer(run, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert losses(trainer) == trained[1]


def test_a_named_checkpoint_that_is_damaged_is_refused(run):
    truncate(run / "checkpoint-3" / "optimizer.pt")
    trainer = make_trainer(run, **OPTIONS)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: .*optimizer.pt has \d+ bytes"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("world_size", 4, "processes: it was saved with 4; this run has 1"),
        ("zero_stage", 3, "ZeRO stage: it was saved with 3; this run has 0"),
    ],
)
def test_another_layout_is_refused_with_both_numbers_and_the_remedy(
    run, key, value, said, monkeypatch
):
    path = run / "checkpoint-3" / "manifest.json"
    manifest = {**json.loads(path.read_text()), key: value}
    del manifest["sha256"]
    described = next(iter(manifest["files"].values()))
    added = [f"rng_state_{rank}.pth" for rank in range(4)] if key == "world_size" else []
    if key == "zero_stage":
        added = ["latest", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    for name in added:
        (run / "checkpoint-3" / name).parent.mkdir(exist_ok=True)
        shutil.copy(run / "checkpoint-3" / "rng_state.pth", run / "checkpoint-3" / name)
        manifest["files"][name] = described
    path.write_text(manifest_text(manifest))
    rewrite_manifest(run / "checkpoint-3")
    # Where DeepSpeed is not installed, the reason is the same.
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(CheckpointError) as refusal:
        newest_checkpoint(run, 0, print)
    assert said in str(refusal.value)
    assert f"python -m cdfast.export {run / 'checkpoint-3'}" in str(refusal.value)
    export_checkpoint(run / "checkpoint-3", run / "exported")  # and the remedy works
    assert (run / "exported" / "model.safetensors").exists()


# -- pickles ---------------------------------------------------------------------------------------


class Planted:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_planted_pickle_is_refused_by_name_and_not_executed(run, tmp_path, name, zipped):
    path, marker = run / "checkpoint-3" / name, tmp_path / "executed"
    torch.save({"state": Planted(marker)}, path, _use_new_zipfile_serialization=zipped)
    rewrite_manifest(run / "checkpoint-3")
    said = []
    assert newest_checkpoint(run, 0, said.append) == run / "checkpoint-2"
    assert f"{name} holds more than data" in said[0]
    assert not marker.exists()
    # The file does what it says once it is loaded without the list.
    torch.load(path, weights_only=False)
    assert marker.is_dir()


def test_a_save_that_could_not_be_loaded_again_fails_at_once(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **OPTIONS)

    def save(folder):
        torch.save({"state": Planted(tmp_path)}, f"{folder}/optimizer.pt")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(CheckpointError, match=r"cannot be read back: optimizer.pt holds more .*mk"):
        trainer.train()
    assert names(tmp_path) == []


def test_no_load_inside_safe_pickles_executes_anything(tmp_path):
    marker = tmp_path / "executed"
    torch.save(Planted(marker), tmp_path / "planted.pt")
    with safe_pickles(0), pytest.raises(Exception, match="mkdir"):
        torch.load(tmp_path / "planted.pt", weights_only=False)
    assert not marker.exists()


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, remedy",
    [
        (errno.ENOSPC, "Free space or keep fewer checkpoints"),
        (errno.EROFS, "Make the disk writable"),
        (errno.EIO, "Remove the cause"),
    ],
)
def test_a_failed_save_says_why_what_is_whole_and_what_to_do(run, code, remedy, monkeypatch):
    def failing(descriptor):
        raise OSError(code, os.strerror(code))

    trainer = make_trainer(run, **{**OPTIONS, "max_steps": 5})
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError) as failure:
        trainer.train(resume_from_checkpoint=True)
    text = str(failure.value)
    assert f"{run / '_staging-checkpoint-4'}: cannot be written: {os.strerror(code)}" in text
    assert "GiB free" in text
    assert f"{run / 'checkpoint-3'} is whole" in text
    assert remedy in text
    assert "--resume" in text
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_what_is_no_failure_of_storage_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError, match="bug"):
        together(lambda: {}["bug"], tmp_path)


def test_a_staged_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(FileNotFoundError), staged_folder(target) as folder:
        shutil.copytree(tmp_path / "missing", folder / "half")
    assert names(tmp_path) == []
    for content in ("first", "second"):
        with staged_folder(target) as folder:
            (folder / "file").write_text(content)
            assert not target.exists() or (target / "file").read_text() == "first"
        assert (target / "file").read_text() == content
    assert names(tmp_path) == ["model"]


def test_a_text_file_is_replaced_whole(tmp_path):
    for content in ("first", "second"):
        write_text(tmp_path / "file.json", content)
        assert (tmp_path / "file.json").read_text() == content
    assert names(tmp_path) == ["file.json"]


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_writes_a_model_that_loads(trained, tmp_path, dtype):
    checkpoint = trained[0] / "checkpoint-3"
    export_checkpoint(checkpoint, tmp_path / "out", dtype=dtype)
    assert "Nothing is known about its training" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    want = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    expected = getattr(torch, dtype or "float32")
    for name, value in model.state_dict().items():
        assert value.dtype == expected
        assert torch.equal(value, want[name].to(expected)), name
    assert load_file(checkpoint / "model.safetensors").keys() == (
        load_file(tmp_path / "out" / "model.safetensors").keys()
    )


def test_export_says_of_which_run_and_step_it_is(trained, tmp_path):
    place = tmp_path / "run" / "stages" / "2-dft" / "checkpoint-3"
    shutil.copytree(trained[0] / "checkpoint-3", place)
    recipe = yaml.safe_dump(to_dict(load_recipe("miniature")))
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    export_checkpoint(place, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The weights are those of 2-dft/checkpoint-3" in card
    assert "from the teacher miniature" in card
    assert "Not measured: the run evaluated no suite" in card


@pytest.mark.parametrize("place", ["/ckpt", "/mnt/ckpt", "a/b/c"])
def test_export_of_a_checkpoint_that_is_in_no_run_says_nothing_of_one(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("of: another program")
    assert _recipe_of(Path(place)) is None


def test_export_refuses_to_overwrite_and_to_read_what_is_damaged(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        export_main([str(run / "checkpoint-3"), str(tmp_path / "out")])
    assert "exists already. Give another folder" in capsys.readouterr().err
    flip_a_bit(run / "checkpoint-3" / "model.safetensors")
    with pytest.raises(SystemExit):
        export_main([str(run / "checkpoint-3"), str(tmp_path / "new")])
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert names(tmp_path) == ["out", "run"]
