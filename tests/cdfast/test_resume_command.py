"""--resume and restarts by torchrun: where the command goes on, without training anything."""

import json

import pytest
import yaml

import cdfast.train
from cdfast.config import ConfigError, load_recipe, override, to_dict
from cdfast.miniature.suites import miniature_suite
from cdfast.results import measure_accuracy
from cdfast.storage import CheckpointError
from cdfast.train import main


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """(folder, resume) of every run that the command would start, in an empty current folder."""
    made = []

    def run_recipe(recipe, folder, resume=False):
        made.append((str(folder), resume))
        return {}

    monkeypatch.setattr(cdfast.train, "run_recipe", run_recipe)
    monkeypatch.setattr(cdfast.train, "report", lambda *args: None)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.chdir(tmp_path)
    return made


def start(folder):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: miniature\n")
    (folder / "kept").touch()


def test_resume_of_a_run_goes_on(calls, tmp_path, capsys):
    start(tmp_path / "mine")
    main(["--resume", "--output-dir", "mine"])
    assert calls == [("mine", True)]
    assert "afresh" not in capsys.readouterr().out


@pytest.mark.parametrize("exists", [False, True], ids=["no folder", "empty folder"])
def test_resume_where_no_run_is_yet_starts_afresh(calls, tmp_path, capsys, exists):
    if exists:
        (tmp_path / "mine").mkdir()
    main(["--resume", "--output-dir", "mine"])
    assert calls == [("mine", True)]
    assert "--resume: no run in mine yet: starting afresh" in capsys.readouterr().out


def test_resume_without_a_folder_and_without_a_run_starts_afresh(calls, capsys):
    main(["--resume"])
    assert calls == [("runs/miniature", True)]
    assert "no run of 'miniature' in runs/ yet: starting afresh" in capsys.readouterr().out


def test_a_restart_by_torchrun_resumes_and_deletes_nothing(calls, tmp_path, monkeypatch):
    start(tmp_path / "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    main(["--overwrite", "--output-dir", "mine"])
    assert calls == [("mine", True)]
    assert (tmp_path / "mine" / "kept").exists()


def test_the_first_start_by_torchrun_does_what_it_is_told(calls, tmp_path, monkeypatch):
    start(tmp_path / "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    main(["--overwrite", "--output-dir", "mine"])
    assert calls == [("mine", False)]
    assert not (tmp_path / "mine").exists()


def test_a_failed_checkpoint_is_one_line_and_an_exit_code(calls, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise CheckpointError("runs/x: cannot be written: No space left on device.")

    monkeypatch.setattr(cdfast.train, "run_recipe", fail)
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: runs/x: cannot be written: No space left on device.\n"
    )


@pytest.mark.parametrize(
    "options, again",
    [
        ({}, False),
        ({"evaluate_seed": 5}, True),
        ({"evaluate_split": "validation"}, True),
        ({"eval_samples": 3}, False),
    ],
    ids=["same", "other seed", "other split", "no option of the questions"],
)
def test_resume_evaluates_a_finished_run_on_other_scenes(tmp_path, monkeypatch, options, again):
    """Nothing is trained: the stages are done. Results of before these options are of seed 0."""
    recipe = load_recipe("miniature")
    values = to_dict(recipe)
    del values["evaluate_split"], values["evaluate_seed"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "results.json").write_text(json.dumps({"recipe": values, "measured": "before"}))
    (tmp_path / "student-init").mkdir()
    (tmp_path / "student-init" / "config.json").touch()
    for name in ("load_processor", "check_stages", "probe_samples", "trained_scenes"):
        monkeypatch.setattr(cdfast.train, name, lambda *args: None)
    monkeypatch.setattr(cdfast.train, "run_stage", lambda run, n, resume: {"matches": None})
    monkeypatch.setattr(cdfast.train, "measure", lambda *args: {"measured": "now"})
    changed = override(recipe, options)
    found = cdfast.train.run_recipe(changed, tmp_path, resume=True)
    assert found["measured"] == ("now" if again else "before")
    assert json.loads((tmp_path / "results.json").read_text())["measured"] == found["measured"]


def test_evaluation_asks_about_the_scenes_of_the_recipe(monkeypatch):
    """And about none that was trained on."""
    asked = []
    monkeypatch.setattr(
        "cdfast.evaluate.evaluate", lambda model, processor, questions, **_: asked.append(questions)
    )
    options = {"evaluate_split": "validation", "evaluate_seed": 3}
    few = {"evaluate_per_kind": 2, "evaluate_vqa_per_kind": 2}
    recipe = override(load_recipe("miniature"), {**options, **few})
    found = measure_accuracy(recipe, None, None, None, set())
    assert (found["split"], found["seed"]) == ("validation", 3)
    sources = [question.source for question in asked[0]]
    assert sources == [q.source for q in miniature_suite("validation", 2, 2, 3)]
    with pytest.raises(ValueError, match="evaluation scenes are training scenes"):
        measure_accuracy(recipe, None, None, None, {sources[0]})


def test_scenes_of_the_training_split_are_refused():
    with pytest.raises(ConfigError, match="evaluate_split: 'train' is unknown"):
        override(load_recipe("miniature"), {"evaluate_split": "train"})
