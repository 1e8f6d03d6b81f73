"""The analysis in the report: figures, tables and sentences, on numbers made up here."""

import copy
import re

import numpy as np
import pytest

from cdfast.analysis.numbers import against_zero
from cdfast.analysis.report import UNAVAILABLE, analysis_section
from cdfast.analysis.run import Settings
from cdfast.analysis.summary import summarise
from cdfast.report import write_report
from tests.cdfast.test_report import Page, five_runs, run, written

KINDS = {"CR": ("swap_obj", "add_att"), "VQA": ("count", "shape")}


def analysis(level, seed, relation=0.0, effect=0.0):
    """What analysis.json holds: similarity about `level`, answers that follow it by `relation`."""
    rng = np.random.default_rng(seed)
    cases = []
    for group, kinds in KINDS.items():
        for kind in kinds:
            for unit in range(12):
                similar = float(np.clip(level + 0.1 * rng.normal(), 0, 1))
                probability = float(np.clip(0.5 + relation * (similar - level) * 4, 0.01, 0.99))
                probability = float(np.clip(probability + 0.02 * rng.normal(), 0.01, 0.99))
                answer = {"probability": probability, "right": bool(rng.random() < level)}
                swapped = {"probability": probability, "right": answer["right"] and effect == 0}
                cases.append(
                    {
                        "kind": kind,
                        "group": group,
                        "unit": f"{kind} {unit}",
                        "matched": similar,
                        "answers": {"teacher": answer, "student": answer},
                        "substitution": {"0.5": answer, "1": swapped},
                        "attention": {
                            m: {"visual": [similar, 0.2, 0.3], "text": [1 - similar, 0.8, 0.7]}
                            for m in ("teacher", "student")
                        },
                        "similarity": {"student": {"visual": [similar, 0.4], "text": [0.5, 0.6]}},
                    }
                )
    windows = {"matched": {"1": [1, 2]}, "substituted": {"1": [1, 2]}}
    layerwise = {"student": {"0": [0, 1], "1": [1, 2]}}
    return {
        "models": {"teacher": "t", "student": "s"},
        "questions": "Questions: made up.",
        "settings": {**Settings().as_json(), **windows, "layerwise": layerwise},
        "ran_on": {},
        "interrupted": False,
        **summarise(cases, 4, 0, 60),
    }


def analyses():
    return {
        "miniature": analysis(0.8, 0, relation=1.0, effect=-1),
        "sft": analysis(0.3, 1),
        "kd": analysis(0.35, 2),
        "vat": analysis(0.85, 3, relation=1.0),
        "taf": {UNAVAILABLE: "no <good> reason."},
    }


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    results = five_runs()
    for result in results.values():
        del result["similarity"]  # ten heat maps of no interest here
    markup = write_report(folder, results, analyses()).read_text()
    return markup, Page(markup)


def test_analysis_comes_after_accuracy_and_before_losses(several):
    _, page = several
    titles = ["Comparison of runs", "Accuracy", "Attention analysis", "Training losses"]
    assert page.headings[1:5] == titles


def test_page_stays_whole(several):
    markup, page = several
    assert len(page.ids) == len(set(page.ids))
    targets = {*page.references, *re.findall(r"url\((#[^)]*)\)", markup)}
    assert targets <= {f"#{i}" for i in page.ids}
    assert page.tags.count("figure") == page.tags.count("svg") == len(page.labels)
    analysed = markup[
        markup.index('id="attention-analysis"') : markup.index('id="training-losses"')
    ]
    # Accuracy, groups, substitution, attention, similarity.
    assert analysed.count("<svg") == 5
    assert "script" not in page.tags
    plain = re.sub(r'xmlns(:\w+)?="[^"]*"', "", markup)
    assert not re.search(r"https?:|//\w|@import", plain)


def test_similarity_stands_beside_the_accuracy_of_the_evaluation(several):
    _, page = several
    rows = page.table("Similarity of matched layers and accuracy")
    assert list(rows) == ["run", "miniature", "sft", "kd", "vat"]
    results = five_runs()
    for name, content in analyses().items():
        if UNAVAILABLE in content:
            continue
        averages = results[name]["evaluation"]["models"]["student"]["averages"]
        want = []
        for group in KINDS:
            want += [f"{content['groups'][group]['similarity']:.3f}", f"{averages[group]:.3f}"]
        assert rows[name] == want


def test_without_an_evaluation_accuracy_is_that_of_the_questions():
    content = {name: analyses()[name] for name in ("sft", "kd")}
    section = analysis_section(content, {"sft": {}})
    rows = Page(f"<main>{section}</main>").table("Similarity of matched layers and accuracy")
    for name in content:
        accuracy = content[name]["answers"]["CR"]["student"]["accuracy"]
        assert rows[name][1] == f"{accuracy:.3f}"
    assert "accuracy: of the questions analysed" in section


def test_every_number_of_the_figures_is_in_a_table(several):
    _, page = several
    done = {n: c for n, c in analyses().items() if UNAVAILABLE not in c}
    groups = page.tables["Groups by similarity"][1:]
    assert len(groups) == len(done) * len(KINDS) * 4
    swapped = page.tables["Substituted attention"][1:]
    assert len(swapped) == len(done) * len(KINDS) * 3
    cell = done["miniature"]["substitution"]["CR"]["1"]
    [row] = [r for r in swapped if r[:3] == ["miniature", "CR", "1"]]
    low, high = cell["accuracy_change_ci95"]
    numbers = [f"{cell['accuracy']:.3f}", f"{cell['accuracy_change']:.3f}"]
    assert row[3:6] == [*numbers, f"[{low:.3f}, {high:.3f}]"]
    layers = page.tables["Attention of the answer token by layer"][1:]
    # The teacher once, the student of every run; visual and text keys of every group.
    assert len(layers) == (1 + len(done)) * 2 * len(KINDS)


def test_sentences_follow_from_the_numbers(several):
    markup, _ = several
    content = analyses()
    for name in ("miniature", "vat"):
        assert content[name]["groups"]["CR"]["pearson_ci95"][0] > 0
    assert re.search(r"CR: r = 0\.\d\d \[0\.\d\d, \d\.\d\d\] in miniature", markup)
    above = re.search(r"CR: r = [^.]*(?:\.\d[^.]*)*; interval above 0: ([^;.]*)", markup)
    assert set(above[1].split(", ")) >= {"miniature", "vat"}
    assert "CR, weight 1: interval below 0: miniature; includes 0: sft, kd, vat" in markup
    assert "Attention was not analysed in taf: no &lt;good&gt; reason." in markup


def test_intervals_against_zero():
    intervals = {"a": [0.1, 0.2], "b": [-0.2, 0.1], "c": [-0.3, -0.1], "d": None, "e": [0, 1]}
    want = "interval above 0: a; below 0: c; includes 0: b, e; not known: d"
    assert against_zero(intervals, named=True) == want
    assert against_zero({"a": [0.1, 0.2]}, named=False) == "interval above 0"


def test_one_run_has_the_four_figures_of_the_command():
    page = Page(f"<main>{analysis_section({'miniature': analysis(0.8, 0)})}</main>")
    assert page.tags.count("svg") == 4
    assert "all" in page.table("By group and kind")
    without = copy.deepcopy(analysis(0.8, 0))
    without["substitution"] = {scope: {} for scope in without["substitution"]}
    without["settings"]["substituted"] = {}
    page = Page(f"<main>{analysis_section({'miniature': without})}</main>")
    assert page.tags.count("svg") == 3


def test_a_run_of_the_teachers_name_keeps_its_line():
    section = analysis_section({"a": analysis(0.8, 0), "teacher": analysis(0.3, 1)})
    rows = Page(f"<main>{section}</main>").tables["Attention of the answer token by layer"]
    assert {row[0] for row in rows[1:]} == {"teacher", "a", "run teacher"}


def test_a_missing_analysis_or_explorer_says_why(tmp_path):
    reasons = {"miniature": {UNAVAILABLE: "there is no teacher."}}
    markup = write_report(
        tmp_path, {"miniature": run()}, reasons, {UNAVAILABLE: "ValueError: <x>"}
    ).read_text()
    assert "Attention was not analysed: there is no teacher." in markup
    assert "There is no explorer: ValueError: &lt;x&gt;" in markup
    assert "<script" not in markup
    bare, _ = written(tmp_path, {"miniature": run()})
    assert "Attention analysis" not in bare
