"""The kernel benchmarks' code, at tiny sizes on a CPU: what they check, compute and write."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks_main
from benchmarks import (
    bench_kernels,
    bench_layout,
    bench_train_step,
    cases,
    gpu_session,
    measure,
    memory,
    preset_step,
    result_files,
    steps,
    tune_kernels,
    variants,
)
from benchmarks.eager import eager
from benchmarks.steps import Step

ROOT = Path(__file__).parents[1]
CASE = cases.Case(40, 25, 1, 4, 2, 32, "fp32")


def run(*arguments, **environment):
    # pytest-xdist tells its processes so, and pytest-benchmark measures nothing in them.
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def small_sizes(monkeypatch):
    found = [CASE, dataclasses.replace(CASE, tokens=70, layout="packed", batch=2)]
    monkeypatch.setattr(bench_kernels, "cpu_cases", lambda quick: found)
    return found


def test_a_run_on_a_cpu(tmp_path, small_sizes):
    bench_kernels.main(["--quick", "--device", "cpu", "--rounds", "3", "--output", str(tmp_path)])
    [path] = tmp_path.glob("kernels_cpu_*.json")
    found = json.loads(path.read_text())
    assert path.with_suffix(".md").exists()
    assert path.with_suffix(".png").stat().st_size > 5000
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["ceilings"]["matmul_tflops"] > 0
    assert found["not_measured"] == []
    assert len(found["cases"]) == 2
    for case in found["cases"]:
        variants, ratios = case["variants"], case["ratios"]
        for row in variants.values():
            assert ("ms" in row and row["rounds"] == 3) or row["absent"]
        ours = case["backend"]
        plain, student = (variants[f"{name}[{ours}]"]["ms"] for name in ("plain", "student"))
        assert ratios["student_over_plain"] == pytest.approx(student / plain)
        assert ratios["eager_over_student"] == pytest.approx(variants["eager"]["ms"] / student)
        peer = ratios["fastest_peer"]
        assert (peer is None) == (case["layout"] == "packed")
        if peer:
            assert ratios["plain_speed_over_fastest_peer"] == pytest.approx(
                variants[peer]["ms"] / plain
            )
        target = variants[f"target[{ours}]"]["ms"] / variants[f"plain[{ours}] forward"]["ms"]
        assert ratios["target_over_plain_forward"] == pytest.approx(target)
        student = variants[f"student[{ours}]"]
        assert student["peak_bytes"] >= 0
        tokens = 70 + 35 if case["layout"] == "packed" else 40
        assert student["saved_bytes"] >= 4 * tokens * (4 + 2 + 2) * 32  # q, k, v
        assert case["checked"]["eager"] == "ok"
    text = path.with_suffix(".md").read_text()
    assert "not measured" in text
    for name in ("flash_attn", "xformers", "triton"):
        assert name in text


def test_no_case_begins_after_the_budget(tmp_path, small_sizes, monkeypatch):
    ceiling = {"matmul_tflops": 1.0, "copy_gb_per_s": 1.0}
    monkeypatch.setattr(bench_kernels, "ceilings", lambda clock, dtype: ceiling)
    arguments = ["--quick", "--device", "cpu", "--budget-minutes", "0", "--output", str(tmp_path)]
    bench_kernels.main(arguments)
    [path] = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["cases"] == []
    assert len(found["not_measured"]) == 2


def measured(monkeypatch, **changed):
    found = variants.variants
    monkeypatch.setattr(variants, "variants", lambda p, compiled=False: found(p) | changed)
    monkeypatch.setattr(bench_kernels, "peaks_of", lambda *given: {})
    options = bench_kernels.parse(["--device", "cpu", "--rounds", "3"])
    ceiling = {"matmul_tflops": 1.0}
    return bench_kernels.measure(CASE, "cpu", measure.Clock("cpu"), options, ceiling)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_variant_is_not_timed(factor, monkeypatch):
    def wrong(problem, leaves):
        out, loss = eager(*leaves, problem.eager)
        return factor * out, loss

    ours = variants.own_backend()
    found = measured(monkeypatch, **{f"student[{ours}]": wrong})
    row = found["variants"][f"student[{ours}]"]
    assert row["absent"].startswith("wrong at 40 tokens: ")
    assert found["ratios"]["student_over_plain"] is None
    assert found["ratios"]["plain_speed_over_fastest_peer"] is not None


def test_a_variant_without_memory_is_named(monkeypatch):
    def greedy(problem, leaves):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    found = measured(monkeypatch, sdpa_flash=greedy)
    assert found["variants"]["sdpa_flash"] == {"absent": "out of memory"}
    assert found["ratios"]["student_over_plain"] is not None


def test_the_extra_memory_is_a_share_of_eagers():
    def row(peak):
        return {"ms": 1.0, "peak_bytes": peak}

    rows = {"plain[triton]": row(100), "student[triton]": row(110), "eager": row(600)}
    found = bench_kernels.ratios(rows, "triton")
    assert found["extra_memory_over_eagers_extra"] == pytest.approx(10 / 500)
    assert found["eager_over_student"] == 1


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as its definition, on a CPU, and eager as it is."""
    module = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_validate_device", lambda *given: None)
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("objective", cases.OBJECTIVES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_all_variants_agree(layout, objective, uncompiled):
    """Ours, the modular form, FlexAttention with its LSE, and eager, with their gradients."""
    case = cases.Case(150, 100, 3, 4, 2, 32, "fp32", layout, objective)
    ours = variants.own_backend()
    checks = variants.check_small(case, "cpu", ours)
    assert {name: reason for name, reason in checks.items() if reason and "wrong" in reason} == {}
    problem = cases.Problem(case, "cpu", ours)
    runs, rows = variants.usable_runs(problem, checks, compiled=True)
    expected = {f"plain[{ours}]", f"student[{ours}]", f"modular[flex+{ours}]"}
    expected |= {"flex", "eager", "eager, compiled", f"modular[sdpa+{ours}]", "student[reference]"}
    assert expected <= set(runs)
    assert ("sdpa_flash" in runs) == (layout == "causal")
    assert {name for name, row in rows.items() if "wrong" in row["absent"]} == set()


@pytest.mark.parametrize("which", range(5), ids=("out", "loss", "dq", "dk", "dv"))
def test_a_difference_at_full_size_is_found(which, uncompiled):
    problem = cases.Problem(CASE, "cpu", variants.own_backend())
    problem.prepare_eager()
    want = variants.whole(problem, variants.variants(problem)["eager"])
    got = [x.detach().clone() for x in want]
    assert variants.difference(problem, tuple(got), want) is None
    got[which] = 1.001 * got[which]
    name = ("out", "loss", "dq", "dk", "dv")[which]
    assert f"wrong at full size: {name} is off" in variants.difference(problem, tuple(got), want)


def test_maps_that_would_not_fit_are_not_tried(monkeypatch):
    monkeypatch.setattr(variants, "available_bytes", lambda device: 1000)
    problem = cases.Problem(CASE, "cpu", variants.own_backend())
    runs, rows = variants.usable_runs(problem, {})
    assert problem.eager is None
    for name in ("eager", "student[reference]"):
        assert name not in runs
        assert "GiB are free" in rows[name]["absent"]


def test_every_case_has_visual_tokens_that_fit():
    for listed in (cases.gpu_cases, cases.cpu_cases):
        for quick in (True, False):
            found = listed(quick)
            assert len({case.name for case in found}) == len(found)
            assert all(1 < case.visual <= case.tokens - 1 for case in found)
            assert all(case.heads % case.kv_heads == 0 for case in found)
    sizes = {case.tokens for case in cases.gpu_cases(False)}
    assert sizes >= {1024, 2048, 4096, 8192, 16384}


def test_the_microbenchmarks_run_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    target = tmp_path / "found.json"
    run(
        *("-m", "pytest", "benchmarks/test_kernels.py", "-q", "-p", "no:cacheprovider"),
        *("-k", "N512 and (student-both or map)", f"--benchmark-json={target}"),
    )
    rows = {row["name"]: row for row in json.loads(target.read_text())["benchmarks"]}
    assert set(rows) == {"test_attention[N512-student-both]", "test_map[N512]"}
    for row in rows.values():
        assert row["stats"]["rounds"] >= 5
        assert row["extra_info"]["over_baseline"] > 0
        assert row["extra_info"]["baseline"].startswith("plain[")
    assert rows["test_attention[N512-student-both]"]["extra_info"]["saved_bytes"] > 2**20


# Memory


def test_peak_of_a_process_of_its_own():
    peaks = memory.in_child(peaks_of_sizes, [2**25, 2**20, 2**25])
    for peak, size in zip(peaks, (2**25, 2**20, 2**25)):
        # What was freed before hides nothing.
        assert size <= peak + 2**16 <= size + 2**19


def peaks_of_sizes(sizes):
    peaks = []
    for size in (2**16, *sizes):
        peaks.append(memory.peak_bytes(lambda s=size: torch.ones(s, dtype=torch.int8), "cpu"))
    return peaks[1:]


def test_a_limit_is_an_error_in_the_child_only():
    with pytest.raises(RuntimeError, match="allocate memory") as error:
        memory.in_child(ones, 2**31, limit=2**30)
    assert memory.out_of_memory(error.value)
    assert memory.in_child(ones, 2**20, limit=2**30) == 2**20
    assert not memory.out_of_memory(RuntimeError("shapes do not match"))


def ones(size):
    return int(torch.ones(size, dtype=torch.int8).sum(dtype=torch.int64))


def test_saved_bytes_count_each_storage_once():
    x = torch.randn(100, 100, requires_grad=True)
    assert memory.saved_bytes(lambda: (x * x).exp()) == 2 * x.nbytes  # x, and what exp returns
    assert memory.saved_bytes(lambda: x + x) == 0


# Result files


def test_a_result_says_what_was_run_but_not_where_it_went():
    report = result_files.start("kernels", "cpu", "benchmarks.x", ["--a", "1", "--output", "/y"])
    assert report["command"] == "python -m benchmarks.x --a 1"
    assert report["theme"] == "kernels"
    assert "/y" not in json.dumps(report)
    with pytest.raises(ValueError, match='expected "less" or "more"'):
        result_files.headline(1.0, "x", "fast")


@pytest.mark.parametrize("load, busy", [(0.3, False), (1.9, True), (None, False)])
def test_the_load_of_the_machine_is_told(load, busy):
    report = result_files.start("kernels", "cpu", "benchmarks.x", [])
    report["environment"] |= {"load": load, "cores": 2}
    assert result_files.is_busy(report["environment"]) == busy
    assert (f"at the start: {load} on 2 cores" in result_files.described(report)) == bool(load)


def test_layouts_of_both_schedulers_are_the_same(tmp_path):
    bench_layout.main(["--rounds", "3", "--output", str(tmp_path)])
    [path] = tmp_path.glob("layout_cpu_*.json")
    found = json.loads(path.read_text())
    assert len(found["rows"]) == 7
    for row in found["rows"]:
        assert row["python"] > 0
        assert row["cpp"] is None or row["python_over_cpp"] == row["python"] / row["cpp"]
    assert "from_packed" in path.with_suffix(".md").read_text()


# Launch settings


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("spec", tune_kernels.SPECS, ids=str)
def test_candidates(spec, arch):
    from cdfast_kernels.launch import KERNELS, settings_for
    from cdfast_kernels.layout import MAP_TILE

    for kernel in KERNELS:
        found = tune_kernels.candidates(kernel, spec, arch)
        present = settings_for(kernel, arch, spec.head_dim, spec.element_size)
        assert found[0] == present
        assert 4 <= len(set(found)) == len(found) <= 40
        for settings in found:
            assert MAP_TILE % settings.BLOCK_N == 0
            assert settings.num_warps in (4, 8)
        flipped = tune_kernels.variations(kernel, present)
        assert [s.acc_init for s in flipped] == [not present.acc_init] * (kernel in ("dq", "dkdv"))


def test_the_best_settings_are_the_fastest_usable_ones():
    def row(ms, left_out=None, spread=0.01):
        return {"settings": [64, 64, 4, 2, True], "ms": ms, "spread": spread, "left_out": left_out}

    present, faster, spilling = row(1.0), row(0.8), row(0.5, "spills 8")
    assert tune_kernels.best_of([present, faster, spilling]) is faster
    # Inside the noise the table stays as it is.
    assert tune_kernels.best_of([present, row(0.995)]) is present
    assert tune_kernels.best_of([present, row(0.9, spread=0.2)]) is present
    assert tune_kernels.best_of([row(1.0, "spills 8"), faster]) is faster
    assert tune_kernels.best_of([row(None, "wrong")]) is None


def test_the_row_is_that_of_the_launch_table():
    from cdfast_kernels.launch import KERNELS, Settings, settings_for

    spec = tune_kernels.Spec(96, "bf16")
    best = {"dq": [32, 64, 8, 3, False]}
    text = tune_kernels.table_row(90, spec, best, KERNELS)
    [(key, row)] = eval("{" + text + "}", {"Settings": Settings}).items()
    assert key == (90, 128, 2)
    assert row[KERNELS.index("dq")] == Settings(32, 64, 8, 3, False)
    others = [k for k in KERNELS if k != "dq"]
    assert all(row[KERNELS.index(k)] == settings_for(k, 90, 96, 2) for k in others)


def crash_or_not(spec, kernel, settings):
    if settings == "crashes":
        os._exit(1)
    return None if settings == "compiles" else "out of shared memory"


def test_a_crash_of_the_compiler_costs_one_kernel(monkeypatch):
    monkeypatch.setattr(tune_kernels, "compile_one", crash_or_not)
    compiler = tune_kernels.Compiler(1)
    deadline = time.monotonic() + 100
    try:
        found = compiler.ahead(None, "fwd", ["compiles", "too large"], deadline)
        assert found == [None, "out of shared memory"]
        [crashed] = compiler.ahead(None, "dq", ["crashes"], deadline)
        assert crashed.startswith("the compiler crashed")
        assert compiler.ahead(None, "dkdv", ["compiles"], deadline) == [None]
    finally:
        compiler.close()


def test_tuning_in_the_interpreter(tmp_path):
    """The whole way of a candidate, two of them per kernel; the times mean nothing."""
    arguments = ["--device", "cpu", "--limit", 2, "--rounds", 3, "--head-size", 32]
    arguments += ["--dtype", "fp32", "--kernel", "fwd", "dkdv", "--output", tmp_path]
    arguments += ["--table", tmp_path / "table.json"]
    # The conftest makes the interpreter faster, and fit for any version.
    code = "import tests.kernels.conftest; from benchmarks.tune_kernels import main; main()"
    run("-c", code, *arguments, TRITON_INTERPRET="1")
    [path] = tmp_path.glob("launch_cpu_*.json")
    [row] = json.loads(path.read_text())["rows"]
    assert list(row["kernels"]) == ["fwd", "dkdv"]
    for kernel, tried in row["kernels"].items():
        assert len(tried) == 2 + (kernel == "dkdv")
        assert all(r["left_out"] is None and r["ms"] > 0 for r in tried)
        assert len({tuple(r["settings"]) for r in tried}) == len(tried)
    assert "Settings(" in row["table"]
    # As the launch table reads it, which checks it.
    from cdfast_kernels.launch import _measured

    table = _measured(str(tmp_path / "table.json"))
    assert {key: list(value) for key, value in table.items()} == {
        (0, 32, 4, kernel): row["best"][kernel] for kernel in ("fwd", "dkdv")
    }


# One session


def test_session_steps_fit_into_their_limits():
    steps = gpu_session.steps(Path("out"))
    assert sum(step.minutes for step in steps if step.by_default) <= 25
    assert max(step.minutes for step in steps) < 10
    assert set(gpu_session.parse([]).only) == {step.name for step in steps if step.by_default}
    assert gpu_session.parse(["--only", "train_step"]).only == ["train_step"]
    assert [step.name for step in steps][:2] == ["suite", "gpu_tests"]


@pytest.mark.parametrize("name, minutes", [("cpu", 40), ("gpu", 10)])
def test_the_sets_fit_into_their_time(name, minutes, capsys):
    steps = benchmarks_main.parse([name]).steps
    assert sum(step.minutes for step in steps) <= minutes
    assert max(step.minutes for step in steps) <= 10
    assert benchmarks_main.main([name, "--dry-run", "--only", "scaling"]) == 0
    assert "benchmarks.bench_scaling" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmarks_main.parse([name, "--only", "nothing"])
    assert "got 'nothing'" in capsys.readouterr().err


def test_the_gpu_set_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA device"):
        benchmarks_main.main(["gpu"])


def test_ctrl_c_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    code = "print('begun', flush=True); import time; time.sleep(60)"
    begun = []

    def interrupt(process, path, until):
        while "begun" not in path.read_text():
            time.sleep(0.05)
        begun.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "follow", interrupt)
    found = [Step(name, [sys.executable, "-c", code], 1.0) for name in ("first", "second")]
    assert steps.run_all(found, tmp_path) == steps.INTERRUPTED
    assert "stopped in first" in capsys.readouterr().out
    assert "begun" in (tmp_path / "logs" / "first.log").read_text()
    [process] = begun  # the second did not begin
    assert process.poll() is not None


def test_a_session_goes_on_after_failures_and_limits(tmp_path, monkeypatch):
    def python(name, code, minutes=1.0):
        return Step(name, [sys.executable, "-c", code], minutes)

    child = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    steps = [
        python("failing", "print('one'); raise SystemExit(3)"),
        python("slow", child, 0.02),
        python("last", "import cdfast_kernels; print('two')"),
    ]
    monkeypatch.setattr(gpu_session, "steps", lambda output: steps)
    archive = tmp_path / "all.tar.gz"
    begin = time.monotonic()
    code = gpu_session.main(["--output", str(tmp_path / "out"), "--archive", str(archive)])
    assert code != 0
    assert time.monotonic() - begin < 40
    report = json.loads((tmp_path / "out" / "logs" / "session.json").read_text())
    ended = [(s["name"], s["returncode"] == 0, s["stopped_at_limit"]) for s in report["steps"]]
    assert ended == [("failing", False, False), ("slow", False, True), ("last", True, False)]
    assert "two" in (tmp_path / "out" / "logs" / "last.log").read_text()
    with tarfile.open(archive) as tar:
        assert "out/logs/last.log" in tar.getnames()


# The DFT step at the sizes of a preset


def test_every_variant_of_the_preset_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    options = ["--preset", "tiny", "--rounds", "3", "--batch", "2", "--max-micro-batch"]
    options += ["--most", "3", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_train_step", *options])
    with pytest.raises(SystemExit) as ended:
        bench_train_step.main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    [path] = tmp_path.glob("train_step_tiny_cpu_*.json")
    found = json.loads(path.read_text())
    assert found["compared"]["agree"]
    assert found["compared"]["dft"][2] > 1e-6  # an alignment loss worth comparing
    assert found["compared"]["dft"] == pytest.approx(found["compared"]["eager"], rel=1e-4)
    for row in found["steps"].values():
        assert row["rounds"] == 3
        assert row["peak_bytes"] is None  # a CPU: not measured, and not made up
        assert row["tokens_per_second"] == pytest.approx(96 * row["samples_per_second"])
        assert 0 < row["mfu"] < 1
    assert {name: row["batch"] for name, row in found["largest"].items()} == dict.fromkeys(
        ("kd", "dft", "eager"), 3
    )
    steps = found["steps"]
    rates = [steps[name]["samples_per_second"] for name in ("dft", "eager")]
    measured = found["measured"]
    assert measured["samples/s, dft over eager, same batch"] == pytest.approx(rates[0] / rates[1])
    assert measured["largest micro-batch, dft over eager"] == 1
    text = path.with_suffix(".md").read_text()
    assert text in out
    assert "not measured" in text
    assert "goal: at the paper's sizes only" in text
    assert "at least 3" in text


def test_the_papers_preset_is_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        preset_step.parse(["--preset", "paper"])
    assert "--preset paper: expected a CUDA device" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_pair():
    return preset_step.Pair(preset_step.parse(["--preset", "tiny"]))


def test_eager_has_the_gradients_of_the_fused_way(tiny_pair):
    """Under gradient checkpointing too: else eager would be measured doing something else."""
    batch = tiny_pair.batch(2, 96)
    gradients = {}
    for variant in ("dft", "eager"):
        tiny_pair.use(variant)
        torch.manual_seed(0)  # LoRA's dropout
        losses = tiny_pair.losses(variant, batch)
        (losses[0] + losses[1] + 100 * losses[2]).backward()
        gradients[variant] = [p.grad.clone() for p in tiny_pair.trained if p.grad is not None]
        tiny_pair.free()
    assert len(gradients["dft"]) == len(gradients["eager"]) > 50
    for ours, theirs in zip(*gradients.values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_tower_runs_in_every_step(tiny_pair):
    tower, batch = tiny_pair.student.model.vision_tower, tiny_pair.batch(1, 96)
    before = tower.runs
    for variant in ("kd", "dft", "eager"):
        tiny_pair.step(variant, batch)
    assert tower.runs == before + 3  # once per step, for both models


@pytest.mark.parametrize(
    "limit, most, found",
    [
        (0, 64, 0),
        (1, 64, 1),
        (5, 64, 5),
        (8, 64, 8),
        (64, 64, 64),
        (99, 64, 64),
        (3, 3, 3),
        (7, 6, 6),
    ],
)
def test_largest_batch(limit, most, found):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert preset_step.largest(fits, most) == found
    assert max(tried) <= most
    assert len(tried) == len(set(tried)) <= 14


def test_a_variant_that_runs_out_of_memory_is_named(tiny_pair, monkeypatch):
    step = preset_step.Pair.step

    def greedy(self, variant, batch):
        if variant == "eager" and len(batch["labels"]) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return step(self, variant, batch)

    monkeypatch.setattr(preset_step.Pair, "step", greedy)
    options = preset_step.parse(
        ["--preset", "tiny", "--batch", "3", "--rounds", "3", "--most", "4"]
    )
    rows = preset_step.time_steps(tiny_pair, options, time.monotonic() + 60)
    assert rows["eager"] == {"absent": "out of memory"}
    assert rows["dft"]["seconds_over_kd"] > 0
    found = preset_step.largest_batch(tiny_pair, "eager", options, time.monotonic() + 60)
    assert (found["batch"], found["at_least"]) == (2, False)
    late = preset_step.largest_batch(tiny_pair, "kd", options, time.monotonic() - 1)
    assert late == {"batch": 0, "at_least": True}
    with pytest.raises(RuntimeError, match="shapes"):
        preset_step.attempt(tiny_pair, lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_differing_losses_stop_the_benchmark(tmp_path, monkeypatch):
    losses = preset_step.Pair.losses

    def wrong(self, variant, batch):
        found = losses(self, variant, batch)
        return [*found[:2], 1.01 * found[2]] if variant == "dft" else found

    monkeypatch.setattr(preset_step.Pair, "losses", wrong)
    assert preset_step.main(["--preset", "tiny", "--output", str(tmp_path)]) == 1
    [path] = tmp_path.glob("*.json")
    assert "steps" not in json.loads(path.read_text())
    assert "do not agree" in path.with_suffix(".md").read_text()
