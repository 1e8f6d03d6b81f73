"""Runs of the paper's tables: resumed, stopped, failed; their records; statistics over seeds."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from benchmarks import paper_records, paper_runs
from benchmarks.paper_runs import Busy, locked, make_runs, plan
from benchmarks.paper_statistics import paired, student_t_quantile, student_t_within, summary
from tests.paper_samples import child, planned, record, resolved

BURN = "end = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"


@pytest.mark.parametrize(
    "freedom, confidence, expected",
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.30265),
        (4, 0.95, 2.77645),
        (5, 0.95, 2.57058),
        (9, 0.95, 2.26216),
        (30, 0.95, 2.04227),
        (1, 0.99, 63.6567),
        (3, 0.99, 5.84091),
        (10, 0.9, 1.81246),
    ],
)
def test_quantiles_of_students_t_are_those_of_the_tables(freedom, confidence, expected):
    assert student_t_quantile(freedom, confidence) == pytest.approx(expected, rel=2e-6)


def test_students_t_is_cauchys_with_one_degree_of_freedom_and_normal_with_many():
    assert student_t_within(1.0, 1) == pytest.approx(0.5)
    assert student_t_within(1.959963984540054, 100_000) == pytest.approx(0.95, abs=1e-5)
    with pytest.raises(ValueError, match="freedom >= 1"):
        student_t_within(1.0, 0)


def test_summary_by_hand():
    found = summary([0.1, 0.3, 0.2])
    assert found["mean"] == pytest.approx(0.2)
    assert found["sd"] == pytest.approx(0.1)
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert [found["low"], found["high"]] == pytest.approx([0.2 - half, 0.2 + half], rel=1e-5)
    assert summary([0.4]) == {"n": 1, "mean": 0.4, "sd": None, "low": None, "high": None}
    assert summary([])["mean"] is None


def test_differences_are_paired_by_seed():
    """Seeds differ by much and the difference is the same: an unpaired interval would hold 0."""
    reference = {0: 0.2, 1: 0.5, 2: 0.8, 4: 0.9}
    values = {2: 0.91, 0: 0.30, 1: 0.61, 3: 0.1}
    found = paired(values, reference)
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(0.32 / 3)
    assert found["low"] > 0.09


def test_records_are_read_as_written_and_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "miniature" / "runs.jsonl"
    paper_records.append(path, record("sft", "a", 0, 0.5))
    with path.open("a") as file:
        file.write('{"arm": "sft", "key": "a", "se')  # as a kill leaves it
    assert list(paper_records.read(path)) == [("a", 0)]
    paper_records.append(path, record("sft", "a", 1, 0.6))
    assert list(paper_records.read(path)) == [("a", 0), ("a", 1)]
    assert path.read_text().count("\n") == 2


def test_a_last_line_without_an_end_is_a_record(tmp_path):
    """As an editor may leave it: it is read, and the next one stands behind it."""
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(record("sft", "a", 0, 0.5)))
    assert list(paper_records.read(path)) == [("a", 0)]
    paper_records.append(path, record("sft", "a", 1, 0.6))
    assert list(paper_records.read(path)) == [("a", 0), ("a", 1)]


def test_commands_that_record_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "runs.jsonl"

    def appended(first):
        for seed in range(first, first + 20):
            paper_records.append(path, record("sft", "a", seed, 0.5))

    threads = [threading.Thread(target=appended, args=(first,)) for first in (0, 20, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paper_records.read(path)) == 60


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", '{"arm": "sft"}', "[]"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(record("sft", "a", 0, 0.5)) + f"\n{line}\n")
    with pytest.raises(paper_records.BrokenRecords, match=r"runs.jsonl, line 2: .*Remove the line"):
        paper_records.read(path)


def test_two_records_of_a_run_are_one_where_they_agree_and_an_error_where_not(tmp_path):
    """Two commands with work folders of their own may make the same run."""
    path = tmp_path / "runs.jsonl"
    for seconds in (10.0, 20.0):
        paper_records.append(path, record("sft", "a", 0, 0.5, cpu_seconds=seconds))
    [found] = paper_records.read(path).values()
    assert found["cpu_seconds"] == 10.0
    paper_records.append(path, record("sft", "a", 0, 0.6))
    with pytest.raises(
        paper_records.BrokenRecords, match="line 3: expected one record of sft seed 0"
    ):
        paper_records.read(path)


def test_stale_records_are_those_that_no_arm_has_the_key_of():
    records = {(r["key"], 0): r for r in (record("sft", "old", 0, 0.5), record("sft", "new", 0, 1))}
    assert [r["key"] for r in paper_records.stale(records, ["new", "other"])] == ["old"]


def test_curves_count_steps_from_the_start_of_the_run():
    stages = [
        {"steps": 20},
        {"steps": 30, "evaluations": [{"step": 10, "eval_CR": 0.5, "eval_similarity/mean": 0.1}]},
        {"steps": 5, "evaluations": [{"step": 5, "eval_CR": 0.7, "eval_VQA": 0.9}]},
    ]
    assert paper_records.curve(stages) == [
        {"step": 30, "CR": 0.5, "similarity": 0.1},
        {"step": 55, "CR": 0.7, "VQA": 0.9},
    ]


def test_one_seed_of_all_arms_comes_before_the_next_and_recorded_runs_are_left_out():
    arms = [resolved("a", "ka"), resolved("b", "kb"), resolved("shared", "ka")]
    records = {("kb", 0): record("b", "kb", 0, 0.5)}
    found = plan(arms, 2, records)
    assert [(p.resolved.name, p.seed) for p in found] == [("a", 0), ("a", 1), ("b", 1)]


def test_expected_time_is_of_the_same_runs_then_of_others_by_steps_then_a_constant():
    arm = resolved(key="k", steps=100)
    others = {("o", 0): record("o", "o", 0, 0.5, steps=[50], seconds=25.0)}
    assert paper_runs.expected_seconds(arm, {}) == 100 * paper_runs.SECONDS_PER_STEP
    assert paper_runs.expected_seconds(arm, others) == pytest.approx(50)
    same = {("k", s): record("a", "k", s, 0.5, seconds=40.0 + s) for s in range(2)}
    assert paper_runs.expected_seconds(arm, others | same) == pytest.approx(40.5)


def test_finished_runs_are_recorded_with_the_cpu_seconds_of_all_their_processes(tmp_path, capsys):
    """A grandchild's seconds too; and nothing but the log is left of them."""
    grandchild = f"subprocess.run([sys.executable, '-c', {'import time' + chr(10) + BURN!r}])\n"
    runs = [planned(seed=0), planned(seed=1)]
    path = tmp_path / "runs.jsonl"
    outcome = make_runs(
        runs, tmp_path / "work", path, jobs=2, command=child(BURN + grandchild + "finish()")
    )
    records = paper_records.read(path)
    assert set(records) == {("key-compodistill", 0), ("key-compodistill", 1)}
    assert outcome.made == 2
    assert not outcome.failed
    for found in records.values():
        assert 0.4 <= found["cpu_seconds"] < 5
        assert found["interrupted"] == 0
        assert found["commit"] == paper_records.commit()
        assert found["student"]["averages"]["CR"] == 0.75
        assert found["curve"] == [{"step": 7, "CR": 0.5}]
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["lock", "logs"]
    assert "compodistill seed 1: CR 0.750, VQA 0.600" in capsys.readouterr().out


def test_a_failed_run_is_named_with_its_last_lines_and_the_others_go_on(tmp_path, capsys):
    body = "print('step 3')\nif 'seed1' in str(folder): sys.exit('out of luck')\nfinish()"
    runs = [planned(seed=seed) for seed in range(3)]
    path = tmp_path / "runs.jsonl"
    outcome = make_runs(runs, tmp_path / "work", path, jobs=1, command=child(body))
    assert [seed for _, seed in paper_records.read(path)] == [0, 2]
    assert list(outcome.failed) == ["compodistill seed 1"]
    printed = capsys.readouterr().out
    for words in ("compodistill seed 1", "exit status 1", "| step 3", "| out of luck"):
        assert words in printed


def test_a_run_without_results_is_a_failed_one(tmp_path):
    outcome = make_runs(
        [planned()], tmp_path / "work", tmp_path / "r.jsonl", jobs=1, command=child("")
    )
    assert "results.json" in outcome.failed["compodistill seed 0"]


@pytest.mark.parametrize("results", ["[]", '{"evaluation": 1, "environment": 2}'])
def test_results_of_another_shape_are_of_a_failed_run_and_the_others_go_on(tmp_path, results):
    body = f"if 'seed0' in str(folder): (folder / 'results.json').write_text({results!r})\n"
    runs, path = [planned(seed=seed) for seed in range(2)], tmp_path / "runs.jsonl"
    command = child(body + "else: finish()")
    outcome = make_runs(runs, tmp_path / "work", path, jobs=1, command=command)
    assert [seed for _, seed in paper_records.read(path)] == [1]
    assert list(outcome.failed) == ["compodistill seed 0"]


WAIT = "if not (folder / 'half').exists():\n (folder / 'half').touch(); time.sleep(60)\nfinish()"


def when_there(path, act):
    """Call `act` once the file is there."""

    def wait():
        while not path.exists():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()


def test_runs_hold_the_lock_of_the_command_that_started_them(tmp_path):
    """So that they are not started again while they outlive it."""
    body = (
        "lock = os.stat(folder.parent / 'lock').st_ino\n"
        "def inode(descriptor):\n"
        "    try: return os.fstat(descriptor).st_ino\n"
        "    except OSError: return None\n"
        "if any(inode(i) == lock for i in range(3, 256)): finish()"
    )
    work, path = tmp_path / "work", tmp_path / "runs.jsonl"
    assert not make_runs([planned()], work, path, jobs=1, command=child(body)).failed


@pytest.mark.parametrize(
    "how",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
    ids=["Ctrl-C", "SIGTERM", "terminal closed"],
)
def test_a_stopped_command_goes_on_where_it_was(tmp_path, how):
    run, work, path = planned(), tmp_path / "work", tmp_path / "runs.jsonl"
    when_there(work / run.slug / "half", lambda: os.kill(os.getpid(), how))
    outcome = make_runs([run, planned(seed=1)], work, path, jobs=1, command=child(WAIT))
    assert outcome.interrupted
    assert {p.seed for p in outcome.left} == {0, 1}
    assert not paper_records.read(path)
    with locked(work):  # no child is left
        pass
    outcome = make_runs([run], work, path, jobs=1, command=child(WAIT))
    [found] = paper_records.read(path).values()
    assert outcome.made == 1
    assert found["interrupted"] == 1
    assert found["cpu_seconds"] is None  # only a part of them is known


def test_a_run_that_two_commits_have_made_has_both(tmp_path, monkeypatch):
    run, work, path = planned(), tmp_path / "work", tmp_path / "runs.jsonl"
    for name in ("abc", "abc", "def"):
        monkeypatch.setattr(paper_runs, "commit", lambda name=name: name)
        body = "finish()" if name == "def" else "sys.exit(1)"
        make_runs([run], work, path, jobs=1, command=child(body))
    [found] = paper_records.read(path).values()
    assert found["commit"] == "abc then def"
    assert found["interrupted"] == 2


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with paper_runs._terminate_as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_kept_run_whose_record_is_removed_is_made_again(tmp_path):
    """And its models of before give way to the new ones."""
    run, work, path = planned(), tmp_path / "work", tmp_path / "runs.jsonl"
    body = "assert not (folder / 'results.json').exists()\nfinish()"
    for _ in range(2):
        outcome = make_runs([run], work, path, jobs=1, keep=True, command=child(body))
        assert outcome.made == 1
        assert (work / "kept" / run.slug / "results.json").is_file()
        path.unlink()


def test_nothing_is_started_that_would_not_end_in_time(tmp_path):
    long, short = planned("long", seconds=120.0), planned("short", seconds=1.0)
    path = tmp_path / "runs.jsonl"
    outcome = make_runs(
        [long, short], tmp_path / "work", path, jobs=1, minutes=1.0, command=child("finish()")
    )
    assert [key for key, _ in paper_records.read(path)] == ["key-short"]
    assert outcome.left == [long]
    assert not outcome.interrupted


def test_a_run_that_takes_too_long_is_stopped_and_left(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_runs, "OVERTIME", 0.2)
    run = planned(seconds=0.0)
    work = tmp_path / "work"
    outcome = make_runs(
        [run], work, tmp_path / "r.jsonl", jobs=1, minutes=0.005, command=child("time.sleep(60)")
    )
    assert outcome.left == [run]
    with locked(work):
        pass


def test_a_run_that_hangs_is_stopped_and_named_and_the_others_go_on(tmp_path, monkeypatch):
    """One that hangs is not one that is slow: what it was expected to take tells them apart."""
    monkeypatch.setattr(paper_runs, "HANGS_NOT_BEFORE", 0.5)
    slow, hangs, short = (
        planned(seed=0, seconds=60.0),
        planned(seed=1, seconds=0.01),
        planned(seed=2, seconds=5.0),
    )
    code = f"time.sleep(60 if folder.name == {hangs.slug!r} else 2)\nfinish()"
    path = tmp_path / "runs.jsonl"
    start = time.monotonic()
    outcome = make_runs([slow, hangs, short], tmp_path / "work", path, jobs=3, command=child(code))
    assert time.monotonic() - start < 30
    assert sorted(seed for _, seed in paper_records.read(path)) == [0, 2]
    assert list(outcome.failed) == [hangs.label]
    assert "stopped after" in outcome.failed[hangs.label]
    assert (tmp_path / "work" / hangs.slug).exists()
    assert not outcome.left


def test_a_second_command_is_refused_also_while_runs_outlive_the_first(tmp_path):
    with locked(tmp_path) as descriptor:
        left = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(descriptor,)
        )
    try:
        with pytest.raises(Busy, match="give another --work"), locked(tmp_path):
            pass
    finally:
        left.kill()
        left.wait()
    with locked(tmp_path):
        pass
