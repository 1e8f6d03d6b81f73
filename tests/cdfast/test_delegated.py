"""Tasks of lmms-eval: with a stand-in for it, and with the package itself where it is installed."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast.evaluate import main
from cdfast.evaluation import delegated, evaluate_tasks
from cdfast.evaluation.delegated import DELEGATED, Delegated, answering, measured_of, run_delegated
from cdfast.evaluation.run import ResultsError
from cdfast.evaluation.tasks import AVERAGES, TASKS
from cdfast.miniature.suites import miniature_suite
from cdfast.synthetic import teacher_path
from tests.cdfast.test_evaluation_tasks import FILES

DOCUMENTS = 6


@pytest.fixture(scope="module")
def teacher():
    model = AutoModelForImageTextToText.from_pretrained(teacher_path()).eval()
    return model, AutoProcessor.from_pretrained(teacher_path())


def documents():
    asked = [q for q in miniature_suite(per_kind=1, vqa_per_kind=2) if q.group == "VQA"]
    return [
        {"image": q.image, "text": q.messages[0]["content"][1]["text"], "answer": q.answer}
        for q in asked[:DOCUMENTS]
    ]


class Stand:
    """What cdfast uses of lmms-eval: the base class, and an evaluation of the documents above."""

    def __init__(self, change=lambda results: results, options=None):
        self.change, self.calls = change, []
        self.options = options or {"max_new_tokens": 4}
        self.api = SimpleNamespace(model=SimpleNamespace(lmms=type("lmms", (), {"task_dict": {}})))
        self.evaluator = SimpleNamespace(simple_evaluate=self.evaluate)

    def evaluate(self, model, tasks, limit, batch_size, log_samples):
        [task] = tasks
        self.calls.append(task)
        docs = documents()[:limit]
        model.task_dict = {task: {"test": docs}}
        requests = [
            SimpleNamespace(
                args=(d["text"], dict(self.options), lambda d: [d["image"]], n, task, "test")
            )
            for n, d in enumerate(docs)
        ]
        right = np.array([r == d["answer"] for r, d in zip(model.generate_until(requests), docs)])
        wanted = next(d for d in DELEGATED.values() if d.task == task)
        share = np.float64(right.mean() * wanted.most / len(wanted.metrics))
        scores = {"alias": task, **dict.fromkeys(wanted.metrics, share)}
        scores |= {metric.replace(",", "_stderr,"): "N/A" for metric in wanted.metrics}
        if task == "gqa":
            scores["exact_match_stderr,none"] = 0.05
        return self.change({"results": {task: scores}, "samples": {task: docs}})


@pytest.fixture
def stand(monkeypatch):
    made = Stand()
    for module in (delegated, evaluate_tasks):
        monkeypatch.setattr(module, "load_lmms_eval", lambda: made)
    return made


def test_model_answers_in_order_and_in_batches(teacher):
    found = Stand().evaluate(answering(Stand().api.model.lmms)(*teacher, 2), ["gqa"], None, 2, True)
    assert found["results"]["gqa"]["exact_match,none"] >= 5 / 6


def test_replies_end_at_until():
    assert delegated._cut("red ASSISTANT: blue", ["ASSISTANT:"]) == "red"
    assert delegated._cut("red", None) == delegated._cut("red", "x") == "red"


def test_several_images_are_refused(teacher):
    [first, *_] = documents()
    request = SimpleNamespace(args=("a", {}, lambda d: [d["image"]] * 2, 0, "t", "test"))
    with pytest.raises(ValueError, match=r"t, test, document 0: expected at most one image, got 2"):
        delegated.answer([request], {"t": {"test": [first]}}, *teacher, 1)


def test_command_averages_the_tasks_of_the_paper(stand, tmp_path, capsys):
    options = [str(teacher_path()), "--tasks", "vqa", "pope", "--output-dir", str(tmp_path)]
    assert main([*options, "--limit", "4"]) == 0
    assert stand.calls == [DELEGATED[name].task for name in (*AVERAGES["VQA"], "pope")]
    [entry] = json.loads((tmp_path / "evaluation.json").read_text())["models"].values()
    values = {n: t["generation"]["metrics"]["score"]["value"] for n, t in entry["tasks"].items()}
    assert all(0.7 < value <= 1 for value in values.values())
    assert entry["averages"]["generation"]["VQA"]["of"] == 5
    mean = sum(values[name] for name in AVERAGES["VQA"]) / 5
    assert entry["averages"]["generation"]["VQA"]["value"] == pytest.approx(mean)
    assert entry["tasks"]["gqa"]["generation"]["metrics"]["score"]["ci95"][0] < values["gqa"]
    assert entry["tasks"]["mme"]["generation"]["metrics"]["score"]["ci95"] is None
    assert "VizWiz" in capsys.readouterr().out
    # Finished tasks are not asked again.
    stand.calls.clear()
    assert main([*options, "--limit", "4"]) == 0
    assert stand.calls == []
    with pytest.raises(SystemExit):
        main([*options, "--limit", "2"])
    assert "limit: 4 there, 2 now" in capsys.readouterr().err


GOOD = {"results": {"gqa": {"exact_match,none": 0.5}}, "samples": {"gqa": [{}]}}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "expected a result, got None"),
        ({"results": {}}, "expected a result"),
        ({**GOOD, "samples": {"gqa": []}}, "documents that were answered, got none"),
        ({**GOOD, "results": {"gqa": {"alias": "gqa"}}}, "a number for exact_match,none, got None"),
        ({**GOOD, "results": {"gqa": {"exact_match,none": "N/A"}}}, "got 'N/A'"),
        ({**GOOD, "results": {"gqa": {"exact_match,none": float("nan")}}}, "got nan"),
        ({**GOOD, "results": {"gqa": {"exact_match,none": 37.0}}}, "from 0 to 1, got 37"),
    ],
)
def test_silent_failures_are_errors(found, message):
    assert measured_of(DELEGATED["gqa"], GOOD)["metrics"]["score"]["value"] == 0.5
    with pytest.raises(ValueError, match="lmms-eval, gqa: ") as refused:
        measured_of(DELEGATED["gqa"], found)
    assert message in str(refused.value)


def test_failed_evaluation_leaves_no_result(teacher, tmp_path, monkeypatch):
    def fail(results):
        raise ConnectionError("no data set")

    monkeypatch.setattr(delegated, "load_lmms_eval", lambda: Stand(fail))
    path = tmp_path / "gqa.json"
    with pytest.raises(ValueError, match="lmms-eval, gqa: ConnectionError: no data set"):
        run_delegated("gqa", *teacher, path, {}, batch_size=2, limit=None)
    assert not path.exists()
    path.write_text("{}")
    with pytest.raises(ResultsError, match="Delete the file"):
        run_delegated("gqa", *teacher, path, {}, batch_size=2, limit=None)


def test_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    options = [str(teacher_path()), "--tasks", "gqa", "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*options, "--scoring", "likelihood"])
    assert "--scoring: expected both or generation for gqa" in capsys.readouterr().err

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(delegated.importlib, "import_module", absent)
    with pytest.raises(SystemExit):
        main(options)
    assert "pip install 'cdfast[eval]'" in capsys.readouterr().err


def test_every_delegated_task_has_its_counterpart():
    assert {name for name, task in TASKS.items() if task.family == "delegated"} == set(DELEGATED)


TOY = """task: toy
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function toy_functions.visual
doc_to_text: "which fits A {{{{caption}}}} B {{{{negative_caption}}}} ?"
doc_to_target: "A"
generation_kwargs:
  max_new_tokens: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval not installed")
def test_lmms_eval_itself_with_a_task_of_ours(teacher, tmp_path, monkeypatch):
    """Real lmms-eval, offline: a task file of ours over the BiVLC test file."""
    package = delegated.load_lmms_eval()
    from lmms_eval.tasks import TaskManager

    file = FILES / "bivlc" / "data" / "test-00000-of-00001.parquet"
    (tmp_path / "toy.yaml").write_text(TOY.format(file=file))
    function = 'def visual(doc):\n    return [doc["image"].convert("RGB")]\n'
    (tmp_path / "toy_functions.py").write_text(function)
    manager = TaskManager("INFO", include_path=str(tmp_path), model_name="cdfast")
    original = package.evaluator.simple_evaluate
    monkeypatch.setattr(
        package.evaluator,
        "simple_evaluate",
        lambda **options: original(task_manager=manager, **options),
    )
    monkeypatch.setitem(DELEGATED, "toy", Delegated("toy", ("exact_match,none",)))
    path = tmp_path / "toy.json"
    measured = run_delegated("toy", *teacher, path, {}, batch_size=2, limit=None)
    assert measured["n"] == 4
    assert measured["metrics"]["score"]["value"] == 1
    assert json.loads(path.read_text())["measured"] == measured
    # A task that there is not is an error, not an empty result.
    monkeypatch.setitem(DELEGATED, "toy", Delegated("toy2", ("exact_match,none",)))
    with pytest.raises(ValueError, match="lmms-eval, toy2"):
        run_delegated("toy", *teacher, tmp_path / "b.json", {}, batch_size=2, limit=None)


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval not installed")
def test_lmms_eval_finds_the_model_by_its_name(tmp_path):
    """Through the entry point, with a checkpoint by name and the command's own arguments."""
    package = delegated.load_lmms_eval()
    from lmms_eval.tasks import TaskManager

    file = FILES / "bivlc" / "data" / "test-00000-of-00001.parquet"
    (tmp_path / "toy.yaml").write_text(TOY.format(file=file))
    function = 'def visual(doc):\n    return [doc["image"].convert("RGB")]\n'
    (tmp_path / "toy_functions.py").write_text(function)
    found = package.evaluator.simple_evaluate(
        model="cdfast",
        model_args=f"pretrained={teacher_path()},dtype=float32",
        tasks=["toy"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager("INFO", include_path=str(tmp_path), model_name="cdfast"),
    )
    assert found["results"]["toy"]["exact_match,none"] == 1
