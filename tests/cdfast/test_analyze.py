"""The analysis as a command, and how the numbers of cases become those of a table."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cdfast import analyze
from cdfast.analysis import run as analysis_run
from cdfast.analysis.summary import (
    bootstrap,
    bootstrap_mean,
    pearson,
    ranks,
    similarity_groups,
    spearman,
    substitution_effect,
    summarise,
)
from cdfast.evaluate import evaluate
from cdfast.miniature.suites import miniature_suite
from cdfast.models import load_model
from cdfast.synthetic import build_miniature_model, make_processor, miniature_configs, teacher_path
from tests.cdfast.test_report import Page
from tests.cdfast.tiny_families import FAMILIES, llava, photo

# -- statistics ------------------------------------------------------------------------------------


def test_correlations_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    y = x + rng.normal(size=50)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman(x, np.exp(3 * x)) == pytest.approx(1)
    assert pearson(x, np.exp(3 * x)) < 0.9
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    assert math.isnan(pearson(x, np.ones(50)))


def test_bootstrap_is_seeded_and_covers():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        values = rng.normal(size=60)
        units = [str(i) for i in range(60)]
        low, high = bootstrap(lambda c, v=values: v[c].mean(), units, trial, 400)
        covered += low <= 0 <= high
    assert 50 <= covered <= 60
    again = [bootstrap(lambda c: values[c].mean(), units, seed, 200) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]


def test_bootstrap_of_a_mean_is_that_of_any_statistic():
    rng = np.random.default_rng(5)
    values, units = rng.normal(size=90), [str(i // 3 + (i > 80)) for i in range(90)]
    of_any = bootstrap(lambda c: values[c].mean(), units, 1, 3000)
    of_mean = bootstrap_mean(values, units, 2, 3000)
    assert of_mean == pytest.approx(of_any, abs=0.03)
    assert bootstrap_mean(values, units, 2, 3000) == of_mean
    assert bootstrap_mean(values[:2], ["a", "b"], 0) is None


def test_bootstrap_draws_units_not_cases():
    """Ten observations, each written ten times, are ten observations."""
    values = np.repeat(np.random.default_rng(2).normal(size=10), 10)
    together = [str(i // 10) for i in range(100)]
    alone = [str(i) for i in range(100)]
    wide, narrow = (
        np.diff(bootstrap(lambda c: values[c].mean(), units, 0, 500))[0]
        for units in (together, alone)
    )
    assert wide > 2 * narrow
    assert bootstrap(lambda c: 0.0, ["a", "a", "b"], 0) is None


def case(similarity, probability, right, swapped, unit, kind="swap_obj"):
    answers = {"student": {"probability": probability, "right": right}}
    return {
        "kind": kind,
        "group": "CR",
        "unit": unit,
        "matched": similarity,
        "answers": answers,
        "substitution": {"0.5": {"probability": swapped, "right": swapped > 0.5}},
        "attention": {"student": {"visual": [similarity, 0.5], "text": [0.1, 0.2]}},
        "similarity": {"student": {"visual": [similarity], "text": [1.0]}},
    }


CASES = [
    case(0.9, 0.8, True, 0.9, "a"),
    case(0.1, 0.2, False, 0.6, "b"),
    case(0.5, 0.6, True, 0.4, "c"),
    case(0.4, 0.1, False, 0.2, "d", "add_obj"),
    case(0.7, 0.9, True, 0.7, "e", "add_obj"),
]


def test_groups_by_similarity():
    found = similarity_groups(CASES, 2, seed=0, resamples=100)
    low, high = found["groups"]
    assert (low["n"], high["n"]) == (3, 2)
    assert low["similarity"] == pytest.approx((0.1 + 0.4 + 0.5) / 3)
    assert low["probability"] == pytest.approx((0.2 + 0.1 + 0.6) / 3)
    assert low["accuracy"] == pytest.approx(1 / 3)
    assert high["similarity"] == pytest.approx(0.8)
    x = [c["matched"] for c in CASES]
    y = [c["answers"]["student"]["probability"] for c in CASES]
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    low, high = found["pearson_ci95"]
    assert low <= found["pearson"] <= high
    assert len(similarity_groups(CASES[:1], 3, seed=0)["groups"]) == 1


def test_effect_of_the_substitution_is_paired():
    found = substitution_effect(CASES, seed=0, resamples=100)
    assert found["0"]["accuracy"] == pytest.approx(0.6)
    assert found["0.5"]["accuracy"] == pytest.approx(0.6)
    assert found["0.5"]["accuracy_change"] == pytest.approx(0)
    assert found["0.5"]["probability_change"] == pytest.approx((2.8 - 2.6) / 5)
    low, high = found["0.5"]["probability_change_ci95"]
    assert low < 0.04 < high
    assert substitution_effect([{**CASES[0], "substitution": {}}], seed=0) == {}


def test_summary_has_every_scope():
    found = summarise(CASES, 2, seed=0, resamples=50)
    assert found["cases"] == {"all": 5, "CR": 5, "swap_obj": 3, "add_obj": 2}
    assert found["answer_attention"]["add_obj"]["student"]["visual"] == pytest.approx([0.55, 0.5])
    assert found["similarity"]["swap_obj"]["student"]["visual"] == pytest.approx([0.5])
    assert found["scopes"] == {"groups": ["CR"], "kinds": ["swap_obj", "add_obj"]}
    json.dumps(found, allow_nan=False)


# -- the command -----------------------------------------------------------------------------------

SMALL = ["--per-kind", "3", "--vqa-per-kind", "4", "--batch-size", "8", "--resamples", "40"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    build_miniature_model(miniature_configs()[0], seed=3).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def done(untrained, tmp_path_factory):
    """The teacher as its own student, and an untrained model as the baseline."""
    folder = tmp_path_factory.mktemp("analysis")
    words = ["--overlay-words", "fits", "nothing"]
    arguments = ["miniature", "miniature", "--baseline", untrained, "--output-dir", str(folder)]
    assert analyze.main([*arguments, *SMALL, *words, "--overlays", "2"]) == 0
    return folder, json.loads((folder / "analysis.json").read_text())


def test_files_of_the_command(done):
    folder, content = done
    cases = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    assert len(cases) == content["cases"]["all"] == 7 * 3 * 2 + 4 * 4
    assert content["figures"] == [
        "attention.png",
        "similarity.png",
        "groups.png",
        "substitution.png",
    ]
    assert [entry["words"] for entry in content["overlays"]] == [["fits"], ["fits"]]
    for name in (*content["figures"], *(entry["file"] for entry in content["overlays"])):
        with Image.open(folder / name) as figure:
            assert figure.format == "PNG"
            assert min(figure.size) > 300
    assert set(content["ran_on"]) == {
        *("answer_attention", "similarity", "groups", "substitution", "overlays")
    }
    assert not content["interrupted"]


def test_page_of_the_command(done):
    """Self-contained, and analysis.json stays free of the explorer's bulk."""
    folder, content = done
    markup = (folder / "report.html").read_text()
    page = Page(markup)
    assert page.headings[:3] == ["Attention analysis", "Attention analysis", "Attention explorer"]
    assert page.tags.count("svg") == 4
    explorer = json.loads((folder / "explorer.json").read_text())
    assert [model["name"] for model in explorer["models"]] == ["teacher", "student", "baseline"]
    assert [sample["kind"] for sample in explorer["samples"]] == content["scopes"]["kinds"][:8]
    assert 'id="explorer-data"' in markup
    assert "explorer" not in content
    rows = page.table("By group and kind")
    assert rows["questions"][:4] == ["n", "teacher", "student", "baseline"]
    for scope, models in content["answers"].items():
        accuracy = [f"{models[m]['accuracy']:.3f}" for m in ("teacher", "student", "baseline")]
        assert rows[scope][1:4] == accuracy


def test_a_model_is_like_itself(done):
    _, content = done
    for scope in content["cases"]:
        for kind in ("visual", "text"):
            np.testing.assert_allclose(content["similarity"][scope]["student"][kind], 1, atol=1e-5)
            assert max(content["similarity"][scope]["baseline"][kind]) < 0.99
        attention = content["answer_attention"][scope]
        assert attention["student"] == attention["teacher"] != attention["baseline"]
    # Similarity is 1 for every case, up to rounding.
    assert content["settings"]["matched"] == {"2": [2], "3": [3]}


def test_accuracy_is_that_of_the_evaluation(done, untrained):
    _, content = done
    questions = miniature_suite("test", 3, 4)
    for name, source in (("teacher", teacher_path()), ("baseline", untrained)):
        report = evaluate(
            load_model(source, "float32"), make_processor(), questions, progress=False
        )
        for kind, numbers in report["kinds"].items():
            assert content["answers"][kind][name]["accuracy"] == pytest.approx(numbers["accuracy"])


def test_the_same_command_gives_the_same_numbers(untrained, tmp_path):
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        options = ["--limit", "2", "--output-dir", str(folder), "--overlays", "0"]
        assert analyze.main(["miniature", untrained, *SMALL, *options]) == 0
        content = json.loads((folder / "analysis.json").read_text())
        contents.append({k: v for k, v in content.items() if k != "seconds"})
    assert contents[0] == contents[1]
    assert contents[0]["cases"]["all"] == 11 * 2
    assert set(contents[0]["models"]) == {"teacher", "student"}


def test_own_data_and_chosen_layers(tmp_path):
    for name, seed, layers in (("teacher", 1, 4), ("student", 0, 3)):
        model, processor = llava(seed=seed, layers=layers)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    records = []
    for n in range(4):
        photo(40 + 10 * n, 48, n).save(tmp_path / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "it"}]
        records.append({"id": str(n), "image": f"{n}.png", "conversations": turns})
    (tmp_path / "mine.json").write_text(json.dumps(records))
    options = ["--data", str(tmp_path / "mine.json"), "--rows", "text", "--answer-tokens", "all"]
    options += ["--substitute-layers", "0", "2", "--substitute-weights", "0.25"]
    options += ["--resamples", "20", "--overlays", "1", "--output-dir", str(tmp_path / "out")]
    arguments = [str(tmp_path / "teacher"), str(tmp_path / "student")]
    assert analyze.main([*arguments, *options]) == 0
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert content["cases"] == {"all": 4, "mine": 4}
    assert content["settings"]["substituted"] == {"0": [0, 1], "2": [2, 3]}
    assert set(content["substitution"]["all"]) == {"0", "0.25"}
    assert (tmp_path / "out" / content["overlays"][0]["file"]).exists()


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "smolvlm"])
def test_page_of_each_family(family, tmp_path, monkeypatch):
    """Mechanics only: random weights, the file's questions, a baseline, an explorer."""
    model, processor = FAMILIES[family]()
    for name in ("teacher", "student", "baseline"):
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    made = SimpleNamespace(from_pretrained=lambda source: processor)
    monkeypatch.setattr(analyze, "AutoProcessor", made)
    records = []
    for n in range(4):
        photo(64, 48, n).save(tmp_path / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "yes"}]
        records.append({"image": f"{n}.png", "conversations": turns})
    (tmp_path / "mine.json").write_text(json.dumps(records))
    options = ["--data", tmp_path / "mine.json", "--baseline", tmp_path / "baseline"]
    options += ["--resamples", "20", "--overlays", "0", "--output-dir", tmp_path / "out"]
    arguments = [tmp_path / "teacher", tmp_path / "student", *options]
    assert analyze.main([str(argument) for argument in arguments]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.tags.count("svg") == 4
    explorer = json.loads((tmp_path / "out" / "explorer.json").read_text())
    assert [model["name"] for model in explorer["models"]] == ["teacher", "student", "baseline"]
    assert explorer["samples"][0]["images"][0]["planes"]


def test_an_interrupted_analysis_keeps_what_is_done(untrained, tmp_path, monkeypatch):
    measure, calls = analysis_run.measure, []

    def twice(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(analysis_run, "measure", twice)
    options = ["--output-dir", str(tmp_path), "--overlays", "0"]
    assert analyze.main(["miniature", untrained, *SMALL, *options]) == 130
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert content["interrupted"]
    assert content["cases"]["all"] == 16


@pytest.mark.parametrize(
    "options, message",
    [
        (["--substitute-layers", "9"], "layers: expected numbers from 0 to 5"),
        (["--substitute-layers", "middle"], "layers: expected numbers from 0 to 5"),
        (["--substitute-weights", "0"], "expected a number above 0, at most 1; got '0'"),
        (["--data", "missing.json"], "missing.json"),
        (["--baseline", "missing-model"], "model 'missing-model'"),
        (["--limit", "0"], "expected a whole number, at least 1"),
    ],
    ids=["layer", "range", "weight", "data", "model", "limit"],
)
def test_bad_options_end_with_one_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        analyze.main(["miniature", "miniature", "--output-dir", str(tmp_path), *SMALL, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "analysis.json").exists()


def test_a_model_that_is_not_finite_is_named(tmp_path, capsys):
    model = build_miniature_model(miniature_configs()[0], seed=3)
    model.lm_head.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        analyze.main(["miniature", str(tmp_path), *SMALL, "--output-dir", str(tmp_path / "out")])
    assert "student: expected a finite probability" in capsys.readouterr().err


def test_models_of_other_tokens_are_refused(tmp_path, capsys):
    model, processor = llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        analyze.main(["miniature", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    assert "expected one id in all models" in capsys.readouterr().err
