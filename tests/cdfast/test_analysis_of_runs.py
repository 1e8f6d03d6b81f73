"""The analysis after training: who is analysed, on what, what is kept, and what cannot be done."""

import json
from types import SimpleNamespace

import pytest

from cdfast.analysis import of_runs as analysis_of_runs
from cdfast.analysis import run as analysis_run
from cdfast.analysis.of_runs import TrainedRun, analyze_runs, baseline_of, unavailable
from cdfast.config import ConfigError, Recipe, StageRecipe, load_recipe, override
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.command import arguments
from tests.cdfast.tiny_families import llava, photo


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Teacher and two students in folders, and six records with images."""
    folder = tmp_path_factory.mktemp("saved")
    for name, seed, layers in (("teacher", 1, 4), ("main", 0, 3), ("plain", 2, 3)):
        model, processor = llava(seed=seed, layers=layers)
        place = folder / name if name == "teacher" else folder / name / "model"
        model.save_pretrained(place)
        processor.save_pretrained(place)
    records = []
    for n in range(6):
        photo(48, 40 + n, n).save(folder / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "yes"}]
        records.append({"image": f"{n}.png", "conversations": turns})
    (folder / "mine.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def runs(saved, tmp_path):
    """A run that aligned, and its variant without the teacher's losses; folders of this test."""
    made = {}
    for name, weight in (("main", 1.0), ("plain", 0.0)):
        stage = StageRecipe(stage="dft", kl_weight=weight, alignment_weight=weight)
        recipe = Recipe(
            name=name,
            teacher=str(saved / "teacher"),
            student=str(saved / name / "model"),
            eval_data=[str(saved / "mine.json")],
            analyze_questions=4,
            stages=[stage],
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(saved / name / "model")
        results = {"stages": [{"matches": {"1": [1, 2]} if weight else None}]}
        made[name] = TrainedRun(recipe, tmp_path / name, results)
    return made


def test_all_runs_are_asked_the_same_and_kept(runs, monkeypatch, capsys):
    analyses, explorer = analyze_runs(runs)
    assert baseline_of(runs) == "plain"
    assert [m["name"] for m in explorer["models"]] == [
        "teacher",
        "student (main)",
        "baseline (plain)",
    ]
    for name, run in runs.items():
        content = json.loads((run.analysis / "analysis.json").read_text())
        assert content == analyses[name]
        assert content["cases"] == {"all": 4, "mine": 4}
        # A variant that aligned nothing is compared in the layers that it would have aligned.
        assert content["settings"]["matched"] == {"1": [1, 2]}
        assert content["settings"]["substituted"] == {"1": [1, 2]}
        assert "first 4 records" in content["questions"]
        assert len((run.analysis / "cases.jsonl").read_text().splitlines()) == 4
    assert analyses["main"]["answers"] != analyses["plain"]["answers"]

    def never(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(analysis_run, "measure", never)
    monkeypatch.setattr(analysis_of_runs, "explorer_data", never)
    assert analyze_runs(runs) == (analyses, explorer)
    # Other questions are another analysis.
    main_run = runs["main"]
    changed = main_run._replace(recipe=override(main_run.recipe, {"analyze_questions": 3}))
    again, _ = analyze_runs({"main": changed})
    assert again["main"]["unavailable"] == "AssertionError: measured again"
    assert "attention analysis, main: not done: AssertionError" in capsys.readouterr().out


def test_a_run_that_cannot_be_analysed_leaves_the_others(runs, saved):
    broken = runs["plain"]._replace(folder=saved / "nowhere")
    analyses, explorer = analyze_runs({"main": runs["main"], "plain": broken})
    assert "cases" in analyses["main"]
    assert "nowhere" in analyses["plain"]["unavailable"]
    assert "nowhere" in explorer["unavailable"]


def test_an_interrupted_analysis_is_not_taken_for_a_finished_one(runs, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    one = {"main": runs["main"]}
    with monkeypatch.context() as patch:
        patch.setattr(analysis_run, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            analyze_runs(one)
    assert not (one["main"].analysis / "analysis.json").exists()
    analyses, _ = analyze_runs(one)
    assert analyses["main"]["cases"]["all"] == 4


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"analyze_questions": 0}, "switched off"),
        ({"evaluate": "none"}, "no questions to ask: give --evaluate miniature, or --eval-data"),
        ({"teacher": "none", "taf": False}, "no teacher"),
        ({}, None),
    ],
    ids=["off", "no questions", "no teacher", "default"],
)
def test_reasons(options, reason):
    recipe = override(load_recipe("miniature"), options)
    found = unavailable(recipe, recipe)
    assert (found is None) if reason is None else (reason in found)


def test_questions_need_a_source():
    with pytest.raises(ConfigError, match="analyze_questions: expected none"):
        Recipe(analyze_questions=5)


def test_baseline_is_the_first_variant_without_teacher_losses():
    recipe = load_recipe("miniature")
    variants = {
        name: SimpleNamespace(recipe=override(recipe, options))
        for name, options in {"main": {}, **recipe.compare}.items()
    }
    assert baseline_of(variants) == "sft"
    assert baseline_of({"main": variants["sft"], "kd": variants["kd"]}) is None


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_report_of_a_run_has_its_analysis(paths, tmp_path, monkeypatch, capsys):
    given = arguments(paths, tmp_path / "run", **{"eval-data": paths.data, "workers": 0})
    main(given)
    page = tmp_path / "run" / "report.html"
    first = page.read_text()
    assert "Attention analysis" in first
    assert 'id="explorer-data"' in first
    content = json.loads((tmp_path / "run" / "analysis" / "analysis.json").read_text())
    assert content["cases"]["all"] == 8  # all records but the one without an image
    # What is done is not done again, and a deleted page is written again.
    monkeypatch.setattr(analysis_run, "measure", None)
    page.unlink()
    main([*given, "--resume"])
    assert page.read_text() == first


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_an_analysis_that_fails_leaves_results_and_report(paths, tmp_path, capsys):
    """No record of the held-out file has an image."""
    turns = photo_setup.conversation(photo_setup.TEXT_ONLY)
    held_out = photo_setup.write_records(tmp_path / "text.json", [{"conversations": turns}])
    main(arguments(paths, tmp_path / "run", **{"eval-data": held_out, "workers": 0}))
    said = capsys.readouterr().out
    assert "attention analysis, compodistill: not done: DataError" in said
    assert (tmp_path / "run" / "results.json").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Attention was not analysed: DataError" in page
    assert "Training losses" in page
