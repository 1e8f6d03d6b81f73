"""Benchmarks of losses on logits and of a text-only step: what they check, compute and write."""

import argparse
import gc
import json
import os

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_logits,
    bench_text_step,
    logit_losses,
    logits_report,
    memory,
    text_runs,
    text_trainers,
)

CASE = logit_losses.Case(48, 96, 300, 16, 24, "fp32")
TINY = "--vocabulary 200 --width 64 --layers 1 --teacher-width 64 --teacher-layers 2"
TINY = [*TINY.split(), "--tokens", "20", "--answer", "7", "--rounds", "1", "--steps", "2"]


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """Measuring memory collects garbage, half a second each time with transformers loaded."""
    import cdfast.losses  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Losses on logits


def with_variants(monkeypatch, **changed):
    """The variants without the compiled one, which costs half a minute; some of them changed."""
    kept = ("dense", "dense, all rows", "chunked")
    found = {name: logit_losses.variants()[name] for name in kept}
    monkeypatch.setattr(bench_logits, "variants", lambda: found | changed)


def measured(monkeypatch, case=CASE, **changed):
    with_variants(monkeypatch, **changed)
    monkeypatch.setattr(bench_logits, "in_child", lambda run, *rest, threads: run(*rest))
    options = bench_logits.parse(["--device", "cpu", "--rounds", "3"])
    return bench_logits.measure(case, "cpu", bench_logits.Clock("cpu"), options)


def no_compiler(*tensors):
    raise RuntimeError("no C++ compiler was found\nand more")


def test_a_run_writes_all_files(tmp_path, monkeypatch):
    with_variants(monkeypatch, **{"torch.compile(dense)": no_compiler})
    monkeypatch.setattr(bench_logits, "cpu_cases", lambda quick: [CASE])
    bench_logits.main(["--device", "cpu", "--rounds", "3", "--output", str(tmp_path)])
    [path] = tmp_path.glob("logits_cpu_*.json")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert path.with_suffix(".png").stat().st_size > 5000
    found = json.loads(path.read_text())
    assert found["theme"] == "logits"
    assert found["command"].startswith("python -m benchmarks.bench_logits --device cpu")
    assert found["not_measured"] == []
    [case] = found["cases"]
    rows = case["variants"]
    assert rows.pop("torch.compile(dense)") == {"absent": "RuntimeError: no C++ compiler was found"}
    assert list(rows) == ["dense", "dense, all rows", "chunked"]
    for name, row in rows.items():
        assert row["rounds"] == 3
        assert row["ms"] > 0
        assert {"peak_bytes", "kept_bytes", "spread"} <= set(row)
        errors = case["checked"][name]["errors"]
        assert set(errors) == {*bench_logits.RESULT_NAMES, "d_hidden of kl alone"}
        assert max(errors.values()) < 1e-5
    ratio = rows["chunked"]["ms"] / rows["dense"]["ms"]
    assert case["ratios"]["time_over_dense"] == pytest.approx(ratio)
    assert found["headline"][f"chunked time over dense, {CASE.name}"]["value"] == ratio
    text = path.with_suffix(".md").read_text()
    assert "absent: RuntimeError: no C++ compiler" in text
    assert "nothing is saved by chunks" in text  # 48 rows are one


def off(which, factor):
    """A variant whose LM or KL is right in value but has a gradient that is off, or the reverse."""

    def value(x):
        return x + (factor - 1) * x.detach()

    def gradient(x):
        return x.detach() + factor * (x - x.detach())

    def run(*tensors):
        lm, kl = logit_losses.dense(*tensors)
        return {"lm": (value(lm), kl), "kl": (lm, value(kl)), "d_": (lm, gradient(kl))}[which]

    return run


@pytest.mark.parametrize(
    "which, factor", [("lm", 1.001), ("kl", 1.001), ("d_", 1.001), ("kl", float("nan"))]
)
def test_a_wrong_variant_is_not_timed(which, factor, monkeypatch):
    found = measured(monkeypatch, chunked=off(which, factor))
    row = found["variants"]["chunked"]
    assert set(row) == {"absent"}
    assert row["absent"].startswith(f"wrong at 48 rows x 300: {which}")
    assert found["ratios"]["time_over_dense"] is None
    assert found["variants"]["dense, all rows"]["ms"] > 0


def test_a_variant_that_is_wrong_at_full_size_only_is_not_timed(monkeypatch):
    def wrong(*tensors):
        large = len(tensors[1]) > bench_logits.SMALL["vocabulary"]
        return (off("d_", 1.01) if large else logit_losses.chunked)(*tensors)

    case = logit_losses.Case(48, 96, 3000, 16, 24, "fp32")
    row = measured(monkeypatch, case, chunked=wrong)["variants"]["chunked"]
    assert row["absent"].startswith("wrong at full size: d_")


def test_a_variant_without_memory_is_named(monkeypatch):
    def greedy(*tensors):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    found = measured(monkeypatch, **{"dense, all rows": greedy})
    assert found["variants"]["dense, all rows"] == {"absent": "out of memory"}
    assert found["ratios"]["time_over_dense"] > 0


def test_losses_are_those_of_the_formula():
    problem = logit_losses.Problem(CASE, "cpu")
    hidden, weight, t_hidden, t_weight, rows, labels = problem.exact()
    assert rows.sum() == CASE.rows
    student = (hidden[rows] @ weight.T).softmax(-1)
    teacher = (t_hidden[rows] @ t_weight.T).softmax(-1)
    lm = -sum(student[i, label].log() for i, label in enumerate(labels))
    kl = (teacher * (teacher / student).log()).sum()
    got = logit_losses.dense(*problem.exact())
    torch.testing.assert_close(got, (lm, kl))
    assert kl > 1


def test_no_case_begins_after_the_budget(tmp_path):
    bench_logits.main(["--device", "cpu", "--budget-minutes", "0", "--output", str(tmp_path)])
    [path] = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["cases"] == []
    assert found["not_measured"] == [case.name for case in logit_losses.cpu_cases(False)]


def test_the_text_says_where_chunked_is_slower_larger_or_less_exact():
    def case(time, peak, kl_error):
        checked = {
            name: {"errors": {"d_hidden of kl alone": error}}
            for name, error in (("dense", 1e-3), ("chunked", kl_error))
        }
        ratios = {"time_over_dense": time, "peak_over_dense": peak}
        sizes = {"rows": 4096, "rows_at_once": 1024, "dtype": "bf16"}
        return {**sizes, "ratios": ratios, "checked": checked}

    worse = logits_report.sentence(case(1.5, 1.2, 5e-3))
    assert "1.50x (**slower**)" in worse
    assert "1.20x (**more**)" in worse
    assert "5.0 times as much" in worse
    better = logits_report.sentence(case(0.5, 0.2, 1e-3))
    assert "0.50x (faster)" in better
    assert "0.20x (less)" in better
    assert "1024 rows at once" in better
    assert "KL alone" not in better
    assert "1.02x (no difference)" in logits_report.sentence(case(1.02, None, 1e-3))


def test_caches_are_left_alone(monkeypatch):
    first, second = bench_logits.CACHES
    monkeypatch.setenv(first, "chosen")
    monkeypatch.delenv(second, raising=False)
    with bench_logits.caches_of_their_own():
        assert os.environ[first] == "chosen"
        folder = os.environ[second]
        os.makedirs(folder)
    assert os.environ[first] == "chosen"
    assert second not in os.environ
    assert not os.path.exists(os.path.dirname(folder))


def test_kept_and_peak_bytes_on_a_cpu():
    mib = 2**20

    def forward():
        kept = torch.ones(64 * mib, dtype=torch.uint8)
        torch.ones(32 * mib, dtype=torch.uint8)
        return kept

    assert memory.kept_bytes(forward, "cpu") == pytest.approx(64 * mib, rel=0.1)
    peak = memory.watch_peak("cpu")
    forward()
    assert peak() == pytest.approx(96 * mib, rel=0.1)


# The text-only step


@pytest.mark.slow
def test_trainers_take_the_step_that_is_written_out(tmp_path, monkeypatch):
    """All three, in processes of their own, which leave nothing in the home of the user."""
    pytest.importorskip("trl")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    found = bench_text_step.check(bench_text_step.parse(["--device", "cpu", *TINY]))
    assert list(found) == [*text_trainers.TRAINERS, "plain step"]
    plain = found.pop("plain step")["losses"]
    assert plain[0] != plain[1]
    for row in found.values():
        assert "absent" not in row
        assert row["losses"] == pytest.approx(plain, rel=1e-4)
        assert row["differences"]["gradients"] < 1e-4
    written = [p for p in home.rglob("*") if p.is_file()]
    assert written == []


def fake_child(changed=None, failing=()):
    """In place of `in_child`: what runs would give, without running them."""
    rng = np.random.default_rng(0)
    arrays = {"head.weight": rng.normal(size=50)}
    plain = {"losses": [2.0, 1.5], "gradients": arrays, "updates": arrays}
    ran = []

    def in_child(function, *rest, threads):
        if function is text_runs.plain_run:
            return plain
        name, options = rest
        ran.append(name)
        if name in failing:
            raise RuntimeError("no such thing")
        ours = name == text_trainers.OURS
        seconds = [1.0 if ours else 2.0] * options.steps
        found = {**plain, "seconds": seconds, "peak_bytes": 3 * 2**20 if ours else 2**20}
        return {**found, **changed} if changed and name == text_trainers.GIVEN else found

    return in_child, ran


def text_step(tmp_path, monkeypatch, child):
    monkeypatch.setattr(bench_text_step, "in_child", child)
    code = bench_text_step.main(["--device", "cpu", *TINY, "--output", str(tmp_path)])
    [path] = tmp_path.glob("text_step_cpu_*.json")
    assert path.with_suffix(".png").exists()
    return code, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_a_text_step_writes_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_text_step, "absent", lambda name: None)
    code, found, text = text_step(tmp_path, monkeypatch, fake_child()[0])
    assert code == 0
    assert found["theme"] == "text_step"
    assert found["sizes"]["answer"] == 7
    assert list(found["rows"]) == list(text_trainers.TRAINERS)
    row = found["rows"][text_trainers.GIVEN]
    assert row["seconds"] == 2
    assert row["tokens_per_second"] == 2 * 20 / 2
    assert row["cdfast_seconds_over"] == 0.5
    assert row["cdfast_peak_over"] == 3
    name = f"cdfast time of a step over {text_trainers.GIVEN}"
    assert found["headline"][name] == {"value": 0.5, "unit": "x", "better": "less"}
    assert f"0.50x (faster) the time of {text_trainers.GIVEN} and 3.00x (**more**)" in text


WRONG = {
    "losses": {"losses": [2.0, 1.501]},
    "nan": {"losses": [float("nan"), 1.5]},
    "gradients": {"gradients": {"head.weight": np.ones(50)}},
    "updates": {"updates": {"head.weight": np.zeros(50)}},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_trainer_that_differs_is_not_timed(what, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_text_step, "absent", lambda name: None)
    child, ran = fake_child(WRONG[what])
    code, found, text = text_step(tmp_path, monkeypatch, child)
    assert code == 1
    name = "losses" if what == "nan" else what
    reason = found["rows"][text_trainers.GIVEN]["absent"]
    assert reason.startswith(f"differs from the plain step: {name} by ")
    assert ran.count(text_trainers.GIVEN) == 1  # the check
    assert ran.count(text_trainers.CHUNKED) == 2
    assert reason in text


def test_an_absent_peer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_trainers.importlib.util, "find_spec", lambda name: None)
    child, ran = fake_child()
    code, found, text = text_step(tmp_path, monkeypatch, child)
    assert code == 0
    assert set(ran) == {text_trainers.OURS}
    for name in (text_trainers.GIVEN, text_trainers.CHUNKED):
        assert found["rows"][name] == {"absent": "trl is not installed"}
    assert found["rows"][text_trainers.OURS]["seconds"] == 1
    assert "absent: trl is not installed" in text


def test_a_peer_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_text_step, "absent", lambda name: None)
    child, _ = fake_child(failing=[text_trainers.CHUNKED])
    _, found, _ = text_step(tmp_path, monkeypatch, child)
    assert found["rows"][text_trainers.CHUNKED] == {"absent": "RuntimeError: no such thing"}
    assert found["rows"][text_trainers.GIVEN]["seconds"] == 2


def test_an_answer_without_a_prompt_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_text_step.parse(["--device", "cpu", "--tokens", "8", "--answer", "8"])
    assert "--answer: expected 1 to 7 of 8 tokens" in capsys.readouterr().err


def test_samples_of_a_batch_do_not_depend_on_the_number_of_steps():
    options = argparse.Namespace(batch=2, tokens=10, answer=4, vocabulary=50)
    few, many = text_trainers.samples(options, 2), text_trainers.samples(options, 5)
    assert many[:4] == few
    batch = text_trainers.collate(few[:2])
    assert (batch["labels"] != -100).sum() == 8
    assert batch["labels"][0, 6:].tolist() == few[0]["answer"]
