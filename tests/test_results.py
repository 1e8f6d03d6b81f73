"""Result files over the months: what is compared, pages and tables made of them, the terminal."""

import builtins
import html.parser
import json
import sys

import pytest
import torch

from benchmarks import bench_train_step, history, page, preset_step, readme, terminal
from benchmarks.bench_train_step import VARIANTS
from benchmarks.result_files import headline

H100 = "NVIDIA H100 80GB HBM3"
RATIO = "student over plain"


def write(folder, theme, device, date, values, torch="2.13.0", **fields):
    """A result file as the benchmarks write them; `fields` go into the environment."""
    environment = {
        "device": device,
        "python": "3.11.7",
        "versions": {"torch": torch, "flash-attn": None},
        "threads": 2,
        "processor": "Xeon",
    }
    report = {
        "theme": theme,
        "command": fields.pop("command", f"python -m benchmarks.{theme}"),
        "date": date,
        "environment": environment | fields,
        "headline": {name: headline(v, "x", "less") for name, v in values.items()},
    }
    path = folder / f"{theme}_{device.replace(' ', '-').lower()}_{date[:7].replace('-', '')}.json"
    path.write_text(json.dumps(report))
    return path


@pytest.fixture
def two_months(tmp_path):
    """Two devices, two months each; the processor of the CPU changed between them."""
    write(tmp_path, "kernels", H100, "2026-10-02", {RATIO: 1.25, "memory": None}, "2.12.0")
    write(tmp_path, "kernels", H100, "2026-11-22", {RATIO: 1.20, "memory": 0.04})
    write(tmp_path, "kernels", "cpu", "2026-10-02", {RATIO: 7.0}, processor="EPYC")
    write(tmp_path, "kernels", "cpu", "2026-11-22", {RATIO: 9.0})
    return tmp_path


class Cells(html.parser.HTMLParser):
    """Sections -> rows of cells (the text of an SVG is its label), and all tags."""

    def __init__(self, content):
        super().__init__()
        self.sections, self.tags, self.words, self.open = {}, [], [], None
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.rows = self.sections.setdefault(attributes["aria-labelledby"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = tag
        elif tag == "svg":
            self.rows[-1][-1] += attributes["aria-label"]
            self.open = None

    def handle_endtag(self, tag):
        if tag == self.open:
            self.open = None

    def handle_data(self, data):
        self.words.append(data)
        if self.open:
            self.rows[-1][-1] += data


def parsed(folder):
    assert page.main(["--results", str(folder)]) == 0
    content = (folder / "index.html").read_text()
    return Cells(content), content


def test_committed_tables_and_pages_are_those_of_the_results():
    assert readme.main(["--check"]) == 0
    assert page.main(["--check"]) == 0
    assert "CompoDistill: KD + VAT + TAF" in readme.README.read_text()


def test_a_stale_page_fails_the_check_and_is_not_written(two_months, capsys):
    check = ["--results", str(two_months), "--check"]
    assert page.main(check) == 1
    assert not (two_months / "index.html").exists()
    assert page.main(check[:2]) == 0
    assert page.main(check) == 0
    before = (two_months / "index.html").read_text()
    write(two_months, "kernels", H100, "2026-12-01", {RATIO: 1.19})
    capsys.readouterr()
    assert page.main(check) == 1
    said = capsys.readouterr().err
    for name in ("index.html", "README.md"):
        assert f"{two_months / name} is not what the result files say: run python -m" in said
    assert (two_months / "index.html").read_text() == before


def test_a_stale_readme_fails_the_check(tmp_path, monkeypatch):
    stale = tmp_path / "README.md"
    stale.write_text(readme.README.read_text().replace("| teacher | 0.9", "| teacher | 0.8"))
    monkeypatch.setattr(readme, "README", stale)
    with pytest.raises(SystemExit, match=r"run python -m benchmarks\.readme"):
        readme.main(["--check"])
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    stale.write_text(stale.read_text().replace("<!-- /kernels -->", ""))
    with pytest.raises(SystemExit, match="expected <!-- kernels -->"):
        readme.main(["--check"])


def test_a_trend_is_of_one_device_and_a_change_of_one_machine(two_months):
    found, _ = parsed(two_months)
    gpu, cpu = found.sections["results-0"], found.sections["results-1"]
    assert gpu[0] == ["what", "2026-11-22", "unit", "change", "trend", "2026-10-02"]
    trend = f"{RATIO}: 2026-10-02 1.25; 2026-11-22 1.2"
    assert gpu[1] == [RATIO, "1.2", "x, less is better", "-4.0%, better", trend, "1.25"]
    one = ["not measured in both", "one value on this machine", "not measured"]
    assert gpu[2] == ["memory", "0.04", "x, less is better", *one]
    other = ["not the same machine", "one value on this machine", "7"]
    assert cpu[1] == [RATIO, "9", "x, less is better", *other]
    said = " ".join(found.words)
    assert "torch: 2.12.0, then 2.13.0" in said
    assert "processor: EPYC, then Xeon" in said
    assert len([tag for tag, _ in found.tags if tag == "svg"]) == 1


def test_a_trend_begins_anew_with_another_machine(tmp_path):
    for month, processor in enumerate(["A", "B", "B"], 1):
        write(tmp_path, "step", "cpu", f"2026-0{month}-01", {RATIO: month}, processor=processor)
    found, _ = parsed(tmp_path)
    [_, row] = found.sections["results-0"]
    assert row[4] == f"{RATIO}: 2026-02-01 2; 2026-03-01 3"
    assert row[3] == "+50.0%, worse"
    assert row[5:] == ["2", "1"]


@pytest.mark.parametrize(
    "old, new, better, expected",
    [
        (2.0, 1.0, "less", "-50.0%, better"),
        (2.0, 1.0, "more", "-50.0%, worse"),
        (-2.0, -1.0, "more", "+50.0%, better"),
        (1.0, 1.0, "more", "none"),
        (0.0, 3.0, "less", "from 0 to 3"),
        (None, 3.0, "less", "not measured in both"),
    ],
)
def test_change(tmp_path, old, new, better, expected):
    results = []
    for value in (old, new):
        path = write(tmp_path, "step", "cpu", "2026-01-01", {})
        report = json.loads(path.read_text())
        report["headline"]["n"] = headline(value, "x", better)
        results.append(history.Result(path, report))
    assert history.change(*results, "n") == expected
    assert history.differences(*results) == []


def test_the_page_is_offline_and_readable_aloud(two_months):
    (two_months / "kernels_cpu_202611.md").write_text("# Tables")
    found, content = parsed(two_months)
    names = [tag for tag, _ in found.tags]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert "http" not in content.replace("http-equiv", "")
    assert names.count("h1") == 1
    assert names.count("caption") == names.count("table") == 2
    assert all(a.get("scope") in ("col", "row") for tag, a in found.tags if tag == "th")
    assert all(a["role"] == "img" and a["aria-label"] for tag, a in found.tags if tag == "svg")
    ids = {a["id"] for _, a in found.tags if "id" in a}
    for tag, attributes in found.tags:
        if tag == "a":
            target = attributes["href"]
            assert target[1:] in ids if target[0] == "#" else (two_months / target).exists()
    assert '<a href="kernels_cpu_202611.md">' in content
    assert "prefers-color-scheme: dark" in content
    assert "<code>python -m benchmarks.kernels</code>" in content


def test_text_of_a_file_is_only_text(tmp_path):
    evil = '"><script>alert(1)</script>'
    path = write(tmp_path, "step", "cpu", "2026-01-01", {evil: 1.0}, evil, command=evil)
    report = json.loads(path.read_text())
    report |= {"theme": evil, "environment": report["environment"] | {"processor": evil}}
    path.write_text(json.dumps(report))
    found, content = parsed(tmp_path)
    assert "script" not in [tag for tag, _ in found.tags]
    assert content.count("&lt;script&gt;") >= 5
    said = (tmp_path / "README.md").read_text()
    command = f"`{evil}`"
    assert command in said  # code: nothing in it is markup
    assert "<script>" not in said.replace(command, "")


def test_cells_of_the_folders_readme_hold_together(tmp_path):
    write(tmp_path, "step", "cpu", "2026-01-01", {"a | b": 1.0, "c\nd": None})
    parsed(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| a \\| b | 1 | x | less |" in text
    assert "| c d | not measured | x | less |" in text


@pytest.mark.parametrize(
    "content, named",
    [
        ('{"theme": ', "expected JSON"),
        ('{"headline": {}}', "theme: expected"),
        ({"date": "today"}, "date: expected YYYY-MM-DD"),
        ({"environment": {}}, "environment.device"),
        ({"headline": {"n": {"value": "1", "unit": "x", "better": "less"}}}, "headline['n'].value"),
        ({"headline": {"n": {"value": float("nan"), "unit": "x", "better": "less"}}}, "finite"),
        ({"headline": {"n": {"value": 1, "unit": "x", "better": "higher"}}}, "'n'].better"),
    ],
)
def test_a_broken_file_is_named(tmp_path, capsys, content, named):
    path = write(tmp_path, "step", "cpu", "2026-01-01", {})
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    assert page.main(["--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("step_cpu_202601.json: ")
    assert named in said
    assert "emove the file" in said
    assert not (tmp_path / "index.html").exists()


def test_files_without_a_headline_are_listed_as_left_out(tmp_path):
    (tmp_path / "kernels_resources.json").write_text("[]")
    (tmp_path / "old.json").write_text('{"rows": []}')
    found, _ = parsed(tmp_path)
    said = " ".join(found.words)
    assert "No results yet." in said
    for name in ("kernels_resources.json", "old.json"):
        assert f"{name}: has no `headline`, is not shown" in said
        assert name in (tmp_path / "README.md").read_text()


# The README's tables


def kernels_report(path):
    """The fields of bench_kernels that the table is made from."""
    ratios = {
        "student_over_plain": 1.234,
        "fastest_peer": "sdpa_flash",
        "plain_speed_over_fastest_peer": 0.9,
        "eager_over_student": 8.0,
        "extra_memory_over_eagers_extra": None,
    }
    shape = {"heads": 16, "kv_heads": 16, "head_dim": 128, "dtype": "bf16", "layout": "causal"}
    cases = [
        {**shape, "name": "1x4096", "ratios": ratios},
        {**shape, "name": "1x8192", "failed": "out of memory"},
        {**shape, "head_dim": 64, "name": "d 64", "ratios": ratios},
        {**shape, "layout": "packed", "name": "packed", "ratios": ratios},
    ]
    report = json.loads(path.read_text()) | {"cases": cases, "not_measured": ["1x16384"]}
    path.write_text(json.dumps(report))


def test_the_readme_has_the_newest_kernels_of_every_device(tmp_path):
    assert readme.block("kernels", []).startswith("Not measured yet: no results of `python -m")
    for device, date in ((H100, "2026-10-02"), (H100, "2026-11-22"), ("cpu", "2026-11-01")):
        kernels_report(write(tmp_path, "kernels", device, date, {}))
    results, _ = history.load(tmp_path)
    text = readme.block("kernels", results)
    assert "2026-10-02" not in text
    assert text.index(f"{H100}, torch 2.13.0, 2026-11-22. `python -m") < text.index("CPU (Xeon)")
    assert text.count("| 1x4096 | 1.23 | 8.00 | not measured | 0.90 (`sdpa_flash`) |") == 2
    assert "d 64 |" not in text
    assert "4 other cases: [benchmarks/results](benchmarks/results/kernels_cpu_202611.md)" in text


def test_kernels_of_a_run_without_cases(tmp_path):
    path = write(tmp_path, "kernels", "cpu", "2026-11-01", {})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cases": [], "not_measured": []}))
    assert "No case was measured." in readme.block("kernels", history.load(tmp_path)[0])


def compared_run(accuracy):
    kinds = {
        "swap": {"group": "CR", "accuracy": accuracy},
        "count": {"group": "VQA", "accuracy": 1.0},
    }
    averages = {"CR": accuracy, "VQA": 1.0}
    student = {"averages": averages, "averages_chance": {"CR": 0.5, "VQA": 0.4}, "kinds": kinds}
    blind = {"averages": {"CR": 0.5, "VQA": 0.4}, "kinds": kinds}
    models = {"student": student, "student, shuffled images": blind, "teacher": student}
    return {
        "evaluation": {"models": models, "text_only": {"swap": 0.5, "count": 0.3}},
        "similarity": {
            "before": {"matched": {"1": 0.5}},
            "after": {"matched": {"1": 0.9, "2": 0.7}},
        },
        "seconds": 100.0,
        "recipe": {"seed": 3},
        "environment": {
            "device": "cpu",
            "python": "3.11.7",
            "threads": 1,
            "versions": {"torch": "2.13.0"},
            "command": "python -m cdfast.train --output-dir elsewhere",
        },
    }


def test_a_comparison_is_taken_with_a_headline(tmp_path):
    runs = {name: compared_run(0.6 + i / 10) for i, name in enumerate(readme.LABELS)}
    (tmp_path / "compare.json").write_text(json.dumps(runs))
    path = readme.take_run(tmp_path, tmp_path / "results")
    [result], left_out = history.load(tmp_path / "results")
    assert (result.path, left_out) == (path, [])
    assert path.name == f"miniature_cpu_{result.date[:7].replace('-', '')}.json"
    assert result.value("CompoDistill, CR") == 0.6
    similarity = "CompoDistill, attention similarity to the teacher"
    assert result.value(similarity) == pytest.approx(0.8)
    text = readme.block("miniature", [result])
    assert "| CompoDistill: KD + VAT + TAF | 0.600 | 1.000 | 0.50 -> 0.90, 0.70 | 100 |" in text
    assert "seed 3, CPU, threads: 1, torch 2.13.0:" in text
    assert "elsewhere" not in path.read_text()


# The training step


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """bench_train_step with processes that answer at once: `steps(losses)` runs it."""

    def main(*extra, **losses):
        seconds = {"kd": 1.0, "dft": 1.1, "eager": 3.0}
        calls = []

        def measure(variant, arguments):
            calls.append(variant)
            size = {"kd": 100, "dft": 110, "eager": 300}[variant]
            found = losses.get(variant, [2.0, 1.0, 0.5])
            row = {"variant": variant, "losses": found, "seconds": seconds[variant] * len(calls)}
            return row | {"peak_bytes": 2 * size, "peak_bytes_of_step": size}

        monkeypatch.setattr(bench_train_step, "measure", measure)
        monkeypatch.setattr(bench_train_step, "ran_on", lambda options: "cpu")
        arguments = ["--rounds", "2", "--threads", "1", "--output", str(tmp_path), *extra]
        monkeypatch.setattr(sys, "argv", ["bench_train_step", *arguments])
        bench_train_step.main()
        return calls

    return main


def test_the_steps_results_have_the_common_head(steps, tmp_path):
    assert steps() == ["kd", "dft", "eager"] * 2
    [result], _ = history.load(tmp_path)
    assert (result.theme, result.device, result.report["rounds_done"]) == ("train_step", "cpu", 2)
    assert result.environment["threads"] == 1
    assert result.value("memory of the step, eager over kd") == 3
    # Ratios in each round: 1.1 * 2 and 1.1 * 5 / 4.
    assert result.value("time, dft over kd") == pytest.approx((2.2 + 1.375) / 2)
    assert [path.suffix for path in result.beside()] == [".md", ".png", ".json"]
    assert "| dft | " in result.path.with_suffix(".md").read_text()
    assert "+ alignment, cdfast `cpu`" in readme.block("results", [result])


def test_one_round_is_run_whatever_the_budget(steps, tmp_path):
    assert steps("--budget-minutes", "0") == ["kd", "dft", "eager"]
    [result], _ = history.load(tmp_path)
    assert result.report["rounds_done"] == 1


def test_other_losses_end_the_run_before_anything_is_written(steps, tmp_path):
    with pytest.raises(SystemExit, match="losses differ: dft"):
        steps(dft=[2.0, 1.0, 0.6])
    assert list(tmp_path.iterdir()) == []


def test_the_presets_headline_is_what_is_aimed_at():
    found = preset_step.headlines(preset_step.measured_goals({"steps": {}}))
    assert list(found) == list(preset_step.GOALS)
    assert [entry["better"] for entry in found.values()] == ["less", "more", "more", "more"]
    assert {entry["value"] for entry in found.values()} == {None}


TINY = ["--width", "64", "--heads", "2", "--tokens", "140", "--visual-tokens", "49"]
TINY += ["--vocabulary", "128", "--steps", "2", "--threads", "1"]


def test_a_step_runs_in_a_process_of_its_own():
    row = bench_train_step.measure("kd", TINY)
    assert row["variant"] == "kd"
    assert row["seconds"] > 0
    assert row["peak_bytes"] > row["peak_bytes_of_step"] >= 0
    assert len(row["losses"]) == 2


def test_the_fused_step_has_the_losses_of_the_eager_one(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    rows = {v: bench_train_step.run_variant(v, bench_train_step.parse(TINY)) for v in VARIANTS}
    bench_train_step.check_losses(rows)
    assert rows["eager"]["losses"][2] > 1e-6


# In the terminal

SERIES = {"eager": [(256, 3.1), (1024, 40.0)], "cdfast student": [(256, 2.5), (1024, 11.0)]}


def drawn(capsys, *arguments, **options):
    terminal.plot(*arguments, **options)
    return capsys.readouterr().out


def test_piped_output_is_plain_and_80_columns_wide(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    terminal.show("Times [ms]", ["variant", "1024"], [["student é", 3.5], ["x" * 100, None]])
    text = capsys.readouterr().out + drawn(capsys, SERIES, "tokens", "ms")
    assert text.isascii()
    assert "\033" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "Times [ms]" in text
    assert "not measured" in text
    lines = text.splitlines()
    assert lines[-1] == "  o eager   x cdfast student"
    points = [line for line in lines if line.rstrip().endswith("o|")]
    assert len(points) == 1  # the last point of eager, at the right edge and above the other
    assert lines.index(points[0]) < next(
        i for i, line in enumerate(lines) if line.rstrip().endswith("x|")
    )


def test_a_table_too_wide_is_turned_and_no_word_is_broken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    columns = ["tokens", *(f"{name}, with alignment" for name in "abcdef")]
    terminal.show("Times", columns, [[512, *"123456"], [1024, *"123456"]])
    found = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in line] for line in found]
    assert cells[0] == ["tokens", "512", "1024"]
    assert cells[-1] == ["f, with alignment", "6", "6"]
    terminal.show("Times", columns[:3], [[512, 1, 2]])
    assert "with alignment" in capsys.readouterr().out.splitlines()[2]


def test_a_terminal_has_colour_unless_refused(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_plain", lambda: False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = drawn(capsys, SERIES, "tokens", "ms", width=60, height=12)
    assert "\033[38" in coloured
    assert "┌" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in drawn(capsys, SERIES, "tokens", "ms", width=60, height=12)


def test_what_cannot_be_drawn_is_named(capsys):
    nan = float("nan")
    text = drawn(capsys, {"absent": [], "off": [(1, nan), (0, 3), (2, None)], **SERIES}, "n", "ms")
    assert text.startswith("absent: not measured\noff: not measured\n")
    assert "o eager" in text
    assert drawn(capsys, {"a": [(1, -1)]}, "n", "ms").endswith("ms over n: nothing to plot\n")
    assert "o a" in drawn(capsys, {"a": [(1, -1), (2, 5)]}, "n", "ms", log=False)
    assert "o a" in drawn(capsys, {"a": [(4, 4)]}, "n", "ms")


@pytest.mark.parametrize("values", [[2, 40], [3.1, 3.2], [1e-9, 1e9], [5], [1, 1e5]])
@pytest.mark.parametrize("log", [True, False])
def test_ticks_are_few_and_inside(values, log):
    found = terminal.ticks(values, log)
    assert len(values) <= len(found) <= terminal.MOST_TICKS
    assert found == sorted(set(found))
    assert all(min(values) <= tick <= max(values) for tick in found)


@pytest.mark.parametrize("package", ["rich", "plotext"])
def test_a_missing_package_costs_one_line(package, capsys, monkeypatch):
    imported = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    if package == "rich":
        terminal.show("Times", ["variant"], [["a"]])
    else:
        terminal.plot(SERIES, "tokens", "ms")
    [line] = capsys.readouterr().out.splitlines()
    assert package in line
    assert "pip install 'cdfast[bench]'" in line
