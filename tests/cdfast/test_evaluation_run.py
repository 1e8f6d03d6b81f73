"""Evaluations that are interrupted, repeated, mixed up or fed damaged files; and the command."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast.evaluate import main
from cdfast.evaluation import run as evaluation_run
from cdfast.evaluation.files import LeftOut
from cdfast.evaluation.measures import measure, score
from cdfast.evaluation.run import ResultsError, results_file, run_task
from cdfast.evaluation.tasks import TASKS, load_items
from cdfast.images import DataError
from cdfast.synthetic import teacher_path
from tests.cdfast import photo_setup
from tests.cdfast.test_evaluation_tasks import FILES

HEADER = {"format": 1, "task": "winoground", "model": {"sha256": "0"}, "dtype": "float32"}
HEADER |= {"scoring": "both", "max_new_tokens": 3}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return photo_setup.make_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def loaded(checkpoints):
    model = AutoModelForImageTextToText.from_pretrained(checkpoints.teacher).eval()
    return model, AutoProcessor.from_pretrained(checkpoints.teacher)


def items_of(name="winoground", data=FILES):
    return load_items(TASKS[name], data, LeftOut())


def run(loaded, path, items=None, header=HEADER, left_out=None, batch_size=4):
    items = items_of() if items is None else items
    return run_task(*loaded, items, path, header, left_out or LeftOut(), batch_size=batch_size)


def test_lines_say_what_the_model_said(loaded, tmp_path):
    path = tmp_path / "new" / "winoground.jsonl"
    said = run(loaded, path)
    first, *lines = map(json.loads, path.read_text().splitlines())
    assert first == HEADER
    assert lines == list(said.values())
    for line in lines:
        assert set(line) == {"id", "asked", "answers", "log_likelihood", "tokens", "replies"}
        assert [len(row) for row in line["log_likelihood"]] == [2] * 8
        assert len(line["replies"]) == len(line["answers"]) == 8


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_interrupted_evaluation_goes_on(loaded, tmp_path, monkeypatch, cut):
    """Stopped behind the second window, with the last line cut short or not."""
    whole = run(loaded, tmp_path / "whole.jsonl")
    path = tmp_path / "cut.jsonl"
    original, calls = evaluation_run._ask, []

    def stops(*arguments):
        calls.append(arguments[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(evaluation_run, "_ask", stops)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, path)
    assert len(path.read_text().splitlines()) == 3
    path.write_bytes(path.read_bytes()[: -cut or None])
    del calls[:2]
    monkeypatch.setattr(evaluation_run, "_ask", lambda *a: calls.append(a[2]) or original(*a))
    assert run(loaded, path) == whole
    # Only what was missing is asked (the first entry is the window that was stopped).
    assert sum(map(len, calls[1:])) == (3 if cut else 2)
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_finished_evaluation_asks_nothing(loaded, tmp_path, monkeypatch):
    path = tmp_path / "done.jsonl"
    said = run(loaded, path)
    monkeypatch.setattr(evaluation_run, "_ask", None)
    assert run(loaded, path) == said


def test_larger_limit_goes_on_from_a_smaller_one(loaded, tmp_path):
    path = tmp_path / "r.jsonl"
    few = run(loaded, path, items_of()[:1])
    assert list(few) == ["0"]
    assert list(run(loaded, path)) == ["0", "1", "2", "3"]
    assert list(run(loaded, path, items_of()[:2])) == ["0", "1"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", {"sha256": "1"}),
        ("dtype", "bfloat16"),
        ("max_new_tokens", 4),
        ("scoring", "likelihood"),
        ("task", "bivlc"),
    ],
)
def test_results_of_another_model_or_option_are_refused(loaded, tmp_path, field, value):
    path = tmp_path / "r.jsonl"
    run(loaded, path, items_of()[:1])
    before = path.read_text()
    with pytest.raises(ResultsError, match=f"{field}: .* there, .* now"):
        run(loaded, path, header={**HEADER, field: value})
    assert path.read_text() == before


def test_changed_record_is_refused(loaded, tmp_path):
    path = tmp_path / "r.jsonl"
    run(loaded, path)
    data = tmp_path / "data"
    shutil.copytree(FILES / "winoground", data / "winoground")
    file = data / "winoground" / "examples.jsonl"
    file.write_text(file.read_text().replace("blue square", "red square", 1))
    with pytest.raises(ResultsError, match="record 1 has changed"):
        run(loaded, path, items_of(data=data))


def test_damaged_line_is_named(loaded, tmp_path):
    path = tmp_path / "r.jsonl"
    run(loaded, path)
    lines = path.read_text().splitlines()
    lines[2] = "{"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultsError, match=r"r\.jsonl, line 3: .*Delete the file"):
        run(loaded, path)


def test_damaged_image_is_named_or_left_out_alone(loaded, tmp_path):
    shutil.copytree(FILES / "winoground", tmp_path / "data" / "winoground")
    items = items_of(data=tmp_path / "data")
    image = tmp_path / "data" / "winoground" / "images" / "ex_2_img_1.png"
    # The header stays whole: found only when it is decoded.
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataError, match=r"examples\.jsonl, record 2.*ex_2_img_1"):
        run(loaded, tmp_path / "a.jsonl", items)
    left_out = LeftOut("skip")
    told = []
    said = run_task(
        *loaded,
        items,
        tmp_path / "b.jsonl",
        HEADER,
        left_out,
        batch_size=4,
        advance=told.append,
    )
    assert list(said) == ["0", "1", "3"]
    # Another model meets the same image.
    run(loaded, tmp_path / "c.jsonl", items, left_out=left_out)
    assert dict(left_out.counts) == {"image corrupt": 1}
    assert sum(told) == 32
    whole = run(loaded, tmp_path / "whole.jsonl")
    assert said == {name: whole[name] for name in said}


def test_media_tokens_in_a_question_are_refused(loaded, tmp_path):
    shutil.copytree(FILES / "reefknot", tmp_path / "data" / "reefknot")
    file = tmp_path / "data" / "reefknot" / "YESNO.jsonl"
    file.write_text(file.read_text().replace("Is it ", "<image> Is it ", 1))
    with pytest.raises(DataError, match=r"record 0.*media tokens"):
        run(loaded, tmp_path / "r.jsonl", items_of("reefknot", tmp_path / "data"))


def test_batch_size_changes_no_score(loaded, tmp_path):
    """The whole path, on images of a benchmark: 1 and 8 questions at a time."""
    for name in ("winoground", "rbench"):
        items = items_of(name)
        one, eight = (
            run(loaded, tmp_path / f"{name}{n}.jsonl", items, batch_size=n) for n in (1, 8)
        )
        for item in items:
            a, b = one[item.id], eight[item.id]
            assert a["replies"] == b["replies"]
            for x, y in zip(a["log_likelihood"], b["log_likelihood"]):
                assert x == pytest.approx(y, abs=1e-5)


def test_teacher_of_the_miniature_knows_the_test_files(tmp_path, monkeypatch):
    """The readers' labels are right: asked in its own words, a model that can see agrees."""
    from cdfast.evaluation import caption_tasks

    monkeypatch.setattr(caption_tasks, "CHOICE_PROMPT", "which fits A {} B {} ?")
    monkeypatch.setattr(caption_tasks, "MATCH_PROMPT", "true {} ?")
    teacher = AutoModelForImageTextToText.from_pretrained(teacher_path()).eval()
    processor = AutoProcessor.from_pretrained(teacher_path())
    for name, wanted in (("sugarcrepe", 0.85), ("sade", 0.85)):
        items = items_of(name)
        said = run((teacher, processor), tmp_path / f"{name}.jsonl", items)
        for mode in ("likelihood", "generation"):
            metrics = measure(score(TASKS[name], items, said, mode, False))["metrics"]
            assert metrics["accuracy"]["value"] >= wanted
    # It says yes and no in lower case.
    monkeypatch.setattr(caption_tasks, "YES_NO", ("yes", "no"))
    for name in ("winoground", "bivlc"):
        items = items_of(name)
        said = run((teacher, processor), tmp_path / f"{name}.jsonl", items)
        for line in said.values():
            line["answers"] = [a.capitalize() for a in line["answers"]]
        monkeypatch.setattr(caption_tasks, "YES_NO", ("Yes", "No"))
        asked = items_of(name)
        for mode in ("likelihood", "generation"):
            found = measure(score(TASKS[name], asked, said, mode, False))["metrics"]
            assert found["group"]["value"] >= 0.5
            assert found["choice"]["value"] >= 0.8
        monkeypatch.setattr(caption_tasks, "YES_NO", ("yes", "no"))


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(checkpoints, tmp_path_factory):
    """Two models on all tasks with files, and a record with a picture that is missing."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(FILES, folder / "data")
    with open(folder / "data" / "sade" / "sade.jsonl", "a") as file:
        record = {"image": "<b>.jpg", "caption": "a", "negative_caption": "b", "type": "swap_att"}
        file.write(json.dumps(record) + "\n")
    models = [str(checkpoints.teacher), str(checkpoints.llava_student)]
    options = ["--tasks", "cr", "relations", "--data", str(folder / "data"), "--device", "cpu"]
    options += ["--output-dir", str(folder / "out"), "--on-error", "skip", "--max-new-tokens", "2"]
    assert main([*models, *options, "--json", str(folder / "copy.json")]) == 0
    return folder, models, options


def test_command_writes_the_tables_of_all_models(evaluated):
    folder, models, _ = evaluated
    results = json.loads((folder / "out" / "evaluation.json").read_text())
    assert json.loads((folder / "copy.json").read_text()) == results
    assert list(results["models"]) == models
    tasks = ["sugarcrepe", "sade", "bivlc", "winoground", "rbench", "reefknot"]
    for entry in results["models"].values():
        assert list(entry["tasks"]) == tasks
        for task in entry["tasks"].values():
            for mode in ("likelihood", "generation"):
                for metric in task[mode]["metrics"].values():
                    low, high = metric["ci95"]
                    assert 0 <= low <= metric["value"] + 1e-9
                    assert metric["value"] <= high + 1e-9 <= 1 + 2e-9
        average = entry["averages"]["likelihood"]["CR"]
        four = [
            entry["tasks"][name]["likelihood"]["metrics"][TASKS[name].headline]["value"]
            for name in ("sugarcrepe", "sade", "bivlc", "winoground")
        ]
        assert average["value"] == pytest.approx(sum(four) / 4)
    comparison = results["comparisons"][models[1]]
    assert set(comparison) == set(tasks)
    for modes in comparison.values():
        assert all(0 < test["p"] <= 1 for test in modes.values())
    assert results["left_out"]["sade"]["counts"] == {"image missing": 1}


def test_markdown_and_page_have_the_same_numbers(evaluated):
    folder, models, _ = evaluated
    results = json.loads((folder / "out" / "evaluation.json").read_text())
    markdown = (folder / "out" / "evaluation.md").read_text()
    page = (folder / "out" / "evaluation.html").read_text()
    [first, *_] = [line for line in markdown.splitlines() if line.startswith("| model")]
    assert "CR avg" in first
    assert "Reefknot (F1)" in first
    value = results["models"][models[0]]["tasks"]["winoground"]["likelihood"]["metrics"]["text"]
    shown = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in (value["value"], *value["ci95"])))
    assert shown in markdown
    assert shown in page
    assert "exact McNemar" in markdown
    assert "unclear" in page
    widths = [
        {row.replace("\\|", "").count("|") for row in block.splitlines() if row.startswith("|")}
        for block in markdown.split("\n\n")
    ]
    assert all(len(counts) <= 1 for counts in widths)

    class Parser(HTMLParser):
        scripts = 0

        def handle_starttag(self, tag, attrs):
            self.scripts += tag == "script"

    parser = Parser()
    parser.feed(page)
    assert not parser.scripts
    assert not re.search(r'(src|href)="(?!#)', page)


def test_command_repeated_asks_nothing_and_prints_the_table(evaluated, monkeypatch, capsys):
    _, models, options = evaluated
    monkeypatch.setattr(evaluation_run, "_ask", None)
    assert main([*models, *options]) == 0
    captured = capsys.readouterr()
    for word in ("SugarCrepe", "Winoground", "avg", "chance", "exact McNemar", "evaluation.md"):
        assert word in captured.out
    assert captured.err.count("records:") == 12


def test_command_refuses_a_model_that_has_changed(evaluated, checkpoints, tmp_path, capsys):
    folder, models, options = evaluated
    shutil.copytree(folder / "out", tmp_path / "out")
    file = results_file(tmp_path / "out", models[0], "sugarcrepe")
    header, *lines = file.read_text().splitlines()
    changed = json.loads(header)
    changed["model"]["sha256"] = "0" * 64
    file.write_text("\n".join([json.dumps(changed), *lines]) + "\n")
    with pytest.raises(SystemExit) as stopped:
        main([*models, *options, "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "expected results of this model" in capsys.readouterr().err


def test_weights_are_part_of_a_models_identity(checkpoints, tmp_path):
    shutil.copytree(checkpoints.teacher, tmp_path / "model")
    before = evaluation_run.model_identity(str(tmp_path / "model"), None)
    assert before == evaluation_run.model_identity(str(checkpoints.teacher), None)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "model")
    assert evaluation_run.model_identity(str(tmp_path / "model"), None) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "popo"], "--tasks: expected some of sugarcrepe"),
        (["--tasks", "rbench"], "--data: expected the folder"),
        (["--tasks", "rbench", "--data", "nowhere"], "expected the file image-level_ids_1.json"),
        (["--tasks", "rbench", "--limit", "0"], "--limit: expected a whole number"),
        (["--tasks", "miniature", "--shuffle-images"], "--shuffle-images"),
    ],
)
def test_command_names_what_is_wrong(checkpoints, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(checkpoints.teacher), *options, "--output-dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_miniature_through_the_same_path(tmp_path):
    options = ["--tasks", "miniature", "--per-kind", "3", "--vqa-per-kind", "3"]
    options += ["--output-dir", str(tmp_path), "--scoring", "likelihood", "--limit", "2"]
    assert main([str(teacher_path()), *options]) == 0
    [entry] = json.loads((tmp_path / "evaluation.json").read_text())["models"].values()
    assert entry["tasks"]["miniature_cr"]["likelihood"]["n"] == 14
    assert set(entry["tasks"]["miniature_vqa"]) == {"likelihood"}
    assert entry["tasks"]["miniature_cr"]["likelihood"]["metrics"]["accuracy"]["value"] > 0.8
    assert entry["averages"] == {"likelihood": {}, "generation": {}}
