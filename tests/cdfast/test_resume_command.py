"""--resume and restarts by torchrun: where the command goes on, without training anything."""

import pytest

import cdfast.train
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
    monkeypatch.setattr(cdfast.train, "write_report", lambda *args: None)
    monkeypatch.setattr(cdfast.train, "print_summary", lambda *args: None)
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
