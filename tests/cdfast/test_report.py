"""The report page and the terminal summary, on results made up here."""

import ast
import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cdfast import page as page_module
from cdfast import report as report_module
from cdfast.report import (
    differences,
    matched_mean,
    print_summary,
    total_log,
    write_report,
)

KINDS = {
    "CR": (
        "swap_att",
        "swap_obj",
        "replace_rel",
        "replace_att",
        "replace_obj",
        "add_att",
        "add_obj",
    ),
    "VQA": ("exist", "colour", "count", "shape"),
}
CHANCE = {"exist": 0.5, "colour": 1 / 6, "count": 0.25, "shape": 0.2}
SECTIONS = {
    "accuracy": "Accuracy",
    "training-losses": "Training losses",
    "attention-similarity": "Attention similarity",
    "recipe-and-environment": "Recipe and environment",
}
VOID = {"meta", "br", "hr", "img", "link", "input"}


def report(level):
    """An evaluation report whose accuracies lie `level` of the way from chance to 1."""
    kinds = {}
    for group, names in KINDS.items():
        for index, name in enumerate(names):
            chance = CHANCE.get(name, 0.5)
            accuracy = chance + (0.97 - 0.02 * index - chance) * level
            kinds[name] = {
                "accuracy": accuracy,
                "both_orders": accuracy**2,
                "greedy": accuracy - 0.0123,
                "chance": chance,
                "n": 600 if group == "CR" else 150,
                "ci95": [accuracy - 0.04, min(1.0, accuracy + 0.035)],
                "group": group,
            }

    def averages(field):
        return {g: sum(kinds[k][field] for k in names) / len(names) for g, names in KINDS.items()}

    return {
        "kinds": kinds,
        "averages": averages("accuracy"),
        "averages_greedy": averages("greedy"),
        "averages_chance": averages("chance"),
        "shuffled_images": False,
        "seconds": 6.54,
    }


def similarity(level):
    def part(level):
        grid = [
            [round(level * (1 - 0.09 * abs(s * 1.5 - t)), 4) for t in range(6)] for s in range(4)
        ]
        return {
            "layers": grid,
            "matched": {"1": grid[1][1] + 0.0301, "2": grid[2][3] + 0.0202},
        }

    return {
        "rows": "text",
        "samples": 32,
        "before": part(0.41),
        "after": part(level),
        "matches": {"1": [1, 2], "2": [2, 3]},
    }


def stage(name, steps, start, speed, aligned):
    log = []
    for step in range(10, steps + 1, 10):
        decay = math.exp(-speed * step / 200)
        wave = 1 + 0.05 * math.sin(step)
        entry = {"loss": 0.0, "grad_norm": 0.8 * wave, "learning_rate": 2e-3}
        entry["loss_lm"] = start * (0.1 + 0.9 * decay) * wave
        entry["loss_kl"] = start * (0.07 + 0.9 * decay) * wave
        if aligned:
            entry["loss_alignment"] = 0.37 * (0.2 + 0.8 * decay) * wave
        entry["loss"] = sum(v for k, v in entry.items() if k.startswith("loss_"))
        log.append({**entry, "epoch": step / steps, "step": step})
    return {
        "stage": name,
        "steps": steps,
        "seconds": steps * 0.61,
        "samples_per_second": 26.3,
        "tokens_per_second": 3412.7,
        "mfu": 0.1234,
        "mfu_of": "measured matmul",
        "peak_memory_bytes": 3 * 2**29,
        "time_data": 0.011,
        "time_teacher": 0.222,
        "time_student": 0.633,
        "time_optimizer": 0.124,
        "time_other": 0.01,
        "matches": {"1": [1, 2], "2": [2, 3]} if aligned else None,
        "skipped": {},
        "log": log,
    }


def run(name="miniature", level=0.7, similar=0.88, **options):
    weights = {"lm_weight": 1.0, "kl_weight": 1.0, "alignment_weight": 4.0}
    common = {"batch_size": 16, "gradient_accumulation_steps": 1, "learning_rate": 2e-3}
    return {
        "name": name,
        "recipe": {
            "name": name,
            "description": "Embedded default: CompoDistill on toy scenes",
            "teacher": "miniature",
            "student": "miniature",
            "taf": True,
            "preset": "paper",
            "objective": None,
            "stages": [
                {"stage": "dpt", "max_steps": 20, **common, **weights, "alignment_weight": 0.0},
                {"stage": "dft", "max_steps": 200, **common, **weights, "muon_learning_rate": 0.02},
                {"stage": "dft", "max_steps": 280, **common, **weights, "muon_learning_rate": 0.02},
            ],
            **options,
        },
        "environment": {
            "python": "3.11.7",
            "versions": {"cdfast": "0.1.0", "torch": "2.13.0", "triton": None},
            "device": "x86_64",
            "cores": 2,
            "threads": 2,
            "processes": 1,
            "command": "python -m cdfast.train miniature",
            "peak_memory_bytes": 1_234_567_890,
        },
        "stages": [
            stage("dpt", 20, 3.6, 0.5, False),
            stage("dft", 200, 3.0, 1 + level, "alignment_weight" not in options),
            stage("dft", 280, 1.1, 1 + level, "alignment_weight" not in options),
        ],
        "evaluation": {
            "suite": "miniature",
            "models": {
                "student": report(level),
                "student, shuffled images": report(0.03),
                "teacher": report(0.99),
            },
            "text_only": {k: CHANCE.get(k, 0.5) + 0.02 for names in KINDS.values() for k in names},
        },
        "similarity": similarity(similar),
        "seconds": 312.4,
    }


def five_runs():
    runs = {"miniature": run()}
    for name, level, similar, options in (
        ("sft", 0.3, 0.45, {"taf": False, "alignment_weight": 0}),
        ("kd", 0.42, 0.5, {"taf": False, "alignment_weight": 0}),
        ("vat", 0.6, 0.86, {"taf": False}),
        ("taf", 0.5, 0.55, {"alignment_weight": 0}),
    ):
        runs[name] = run(name, level, similar, **options)
        del runs[name]["evaluation"]["models"]["student, shuffled images"]
    return runs


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, headings, references and table cells."""

    def __init__(self, markup):
        super().__init__()
        self.open, self.ids, self.tags, self.references = [], [], [], []
        self.tables, self.headings, self.labels = {}, [], []
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.references += [v for k, v in attrs if k in ("href", "xlink:href", "src")]
        if tag == "svg":
            assert attributes["role"] == "img"
            self.labels.append(attributes["aria-label"])
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if tag == "tr":
            self.row = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr":
            self.tables[self.caption].append(self.row)

    def handle_data(self, data):
        if not self.open:
            return
        if self.open[-1] == "caption":
            self.caption = data
            self.tables.setdefault(data, [])
        if self.open[-1] in ("th", "td"):
            self.row.append(data)
        if re.fullmatch("h[1-6]", self.open[-1]):
            self.headings.append(data)

    def table(self, start):
        """Row heading -> cells, of the first table whose caption begins so."""
        rows = next(rows for caption, rows in self.tables.items() if caption.startswith(start))
        return {row[0]: row[1:] for row in rows}


def written(folder, results):
    path = write_report(folder, results)
    assert path == folder / "report.html"
    markup = path.read_text(encoding="utf-8")
    return markup, Page(markup)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return written(tmp_path_factory.mktemp("single"), {"miniature": run()})


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return written(tmp_path_factory.mktemp("several"), five_runs())


@pytest.fixture(params=["single", "several"])
def either(request):
    return request.getfixturevalue(request.param)


def test_nothing_is_loaded_from_outside(either):
    markup, page = either
    plain = re.sub(r'xmlns(:\w+)?="[^"]*"', "", markup)
    assert not re.search(r"https?:|//\w|@import|<!ENTITY", plain)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)


def test_ids_are_unique_and_every_reference_has_its_target(either):
    markup, page = either
    assert len(page.ids) == len(set(page.ids))
    targets = {*page.references, *re.findall(r"url\((#[^)]*)\)", markup)}
    assert targets <= {f"#{i}" for i in page.ids}


def test_page_is_accessible(either):
    markup, page = either
    assert '<html lang="en">' in markup
    assert 'name="viewport"' in markup
    assert page.tags.count("main") == page.tags.count("h1") == 1
    assert page.tags.count("figure") == page.tags.count("svg") == len(page.labels)
    assert all(len(label) > 30 for label in page.labels)
    # Every figure has its numbers to unfold, and each run its recipe.
    assert page.tags.count("details") > page.tags.count("figure")


def test_single_run_has_all_sections_but_the_comparison(single):
    markup, page = single
    assert page.headings == ["miniature", *SECTIONS.values(), "miniature"]
    assert "privileged supervision" in markup
    assert page.tags.count("figure") == 4


def test_several_runs_are_compared(several):
    _, page = several
    assert page.headings[:3] == ["miniature", "Comparison of runs", "Accuracy"]
    assert page.headings[-5:] == ["miniature", "sft", "kd", "vat", "taf"]
    rows = page.table("All runs")
    assert rows["miniature"][0] == "main run"
    assert rows["vat"][0] == "taf: true → false"
    for name, result in five_runs().items():
        student = result["evaluation"]["models"]["student"]["averages"]
        change = [f"{matched_mean(result, part):.3f}" for part in ("before", "after")]
        numbers = [f"{student['CR']:.3f}", f"{student['VQA']:.3f}", *change, "312.4"]
        assert rows[name][1:] == numbers
    heading = page.table("Accuracy (")["kind"]
    assert heading[3:] == [
        "teacher",
        "miniature",
        "sft",
        "kd",
        "vat",
        "taf",
        "miniature, shuffled images",
    ]


def test_tables_hold_the_numbers_of_the_results(single):
    _, page = single
    result = run()
    models = result["evaluation"]["models"]
    rows = page.table("Accuracy (")
    assert rows["kind"][3:] == ["teacher", "student", "student, shuffled images"]
    for kind, row in rows.items():
        if kind in models["student"]["kinds"]:
            cell = models["student"]["kinds"][kind]
            low, high = cell["ci95"]
            assert row[0] == str(cell["n"])
            assert row[1] == f"{cell['chance']:.3f}"
            assert row[2] == f"{result['evaluation']['text_only'][kind]:.3f}"
            assert row[4] == f"{cell['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    for group in KINDS:
        averages = [models[m]["averages"][group] for m in ("teacher", "student")]
        assert rows[f"{group} average"][2:4] == [f"{v:.3f}" for v in averages]
    shares = [row for row in page.tables["Shares of questions"] if row[:2] == ["count", "student"]]
    cell = models["student"]["kinds"]["count"]
    assert shares[0][2] == f"{cell['accuracy']:.3f}"
    assert shares[0][4:] == [f"{cell['both_orders']:.3f}", f"{cell['greedy']:.3f}"]
    grid = result["similarity"]["after"]["layers"]
    table = page.table("after training")
    assert [table[str(i)] for i in range(4)] == [[f"{v:.3f}" for v in row] for row in grid]
    matched = page.tables["Similarity of matched layers"]
    after = result["similarity"]["after"]["matched"]["1"]
    assert matched[1][1:3] + matched[1][-1:] == ["1", "1, 2", f"{after:.3f}"]
    losses = page.tables["Losses"]
    assert len(losses) == 1 + 2 + 20 + 28
    entry = result["stages"][1]["log"][0]
    assert losses[3][:4] == ["miniature", "30", "2 dft", f"{entry['loss_lm']:.4g}"]
    assert page.table("Environment")["peak memory"] == ["1.15 GiB"]
    assert page.table("Stages")["2 dft"][:3] == ["200", "122.0", "16 × 1"]


@pytest.mark.parametrize(
    "key, missing",
    [
        ("evaluation", ["Accuracy"]),
        ("similarity", ["Attention similarity"]),
        ("stages", ["Training losses"]),
    ],
)
def test_sections_without_data_are_left_out(tmp_path, capsys, key, missing):
    result = run()
    del result[key]
    _, page = written(tmp_path, {"miniature": result})
    expected = [title for title in SECTIONS.values() if title not in missing]
    assert page.headings[1:-1] == expected
    print_summary({"miniature": result}, tmp_path)
    assert "312.4" in capsys.readouterr().out


def test_bare_results_still_make_a_page(tmp_path, capsys):
    result = {"name": "a", "recipe": {"teacher": "other"}, "environment": {}, "stages": []}
    markup, page = written(tmp_path, {"a": result})
    assert page.headings == ["a", "Recipe and environment", "a"]
    assert "privileged supervision" not in markup
    print_summary({"a": result, "b": result}, tmp_path)
    assert "results.json" in capsys.readouterr().out


def test_text_of_the_results_is_escaped(tmp_path, capsys):
    evil = "<script>alert('$x_{')</script>--><b>[red]&amp;\""
    result = run(evil, **{evil: evil}, description=evil)
    result["environment"].update(device=evil, command=evil, versions={evil: evil})
    result["stages"][1].update(stage=evil, skipped={evil: 2})
    for evaluated in result["evaluation"]["models"].values():
        evaluated["kinds"][evil] = {**evaluated["kinds"]["count"], "group": evil}
    result["evaluation"]["models"][evil] = report(0.5)
    result["similarity"]["rows"] = evil
    other = copy.deepcopy(result)
    other["recipe"]["stages"].append({"stage": evil})
    markup, page = written(tmp_path, {evil: result, "other" + evil: other})
    assert "<script" not in markup
    assert "<b>" not in markup
    assert page.headings[0] == evil
    print_summary({evil: result}, tmp_path)
    assert "[red]" in re.sub(r"\s", "", capsys.readouterr().out)


def test_missing_and_infinite_numbers_are_shown_as_a_dash(tmp_path, capsys):
    result = run()
    result["similarity"]["before"]["layers"][0][0] = math.nan
    result["similarity"]["after"]["layers"][1][1] = None
    result["similarity"]["after"]["matched"]["1"] = math.nan
    log = result["stages"][1]["log"]
    log[0]["loss_lm"], log[1]["loss_kl"], log[2]["loss_alignment"] = math.nan, math.inf, None
    cell = result["evaluation"]["models"]["student"]["kinds"]["count"]
    cell["accuracy"], cell["ci95"] = math.nan, [math.nan, math.nan]
    result["evaluation"]["models"]["student"]["averages"]["VQA"] = None
    result["stages"][0]["samples_per_second"] = None
    markup, page = written(tmp_path, {"miniature": result})
    assert page.table("before training")["0"][0] == "–"
    assert page.table("after training")["1"][1] == "–"
    assert page.table("Accuracy (")["VQA average"][3] == "–"
    # The mean is over the layers that have a number.
    assert matched_mean(result, "after") == result["similarity"]["after"]["matched"]["2"]
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", markup, flags=re.DOTALL).lower()
    print_summary({"miniature": result}, tmp_path)
    assert "nan" not in capsys.readouterr().out


def test_long_logs_are_thinned_and_say_so(tmp_path):
    result = run()
    result["stages"] = [stage("dft", 12_000, 3.0, 0.1, True)]
    _, page = written(tmp_path, {"miniature": result})
    assert len(page.tables["Losses, one entry in 3; all: results.json"]) == 401


def test_total_log_counts_steps_over_stages():
    steps = [entry["total_step"] for entry in total_log(run())]
    assert steps == [*range(10, 21, 10), *range(30, 221, 10), *range(230, 501, 10)]


def test_differences_name_options_and_stages():
    main = run()["recipe"]
    other = copy.deepcopy(run("kd", taf=False)["recipe"])
    for number in (1, 2):
        other["stages"][number]["alignment_weight"] = 0.0
    assert differences(main, other) == ["taf: true → false", "dft.alignment_weight: 4 → 0"]
    other["stages"] = [{"stage": "sft"}]
    assert differences(main, other) == ["taf: true → false", "stages: dpt, dft, dft → sft"]
    assert differences(main, main) == []


def test_report_is_the_same_each_time(tmp_path):
    first = write_report(tmp_path, {"miniature": run()}).read_bytes()
    assert write_report(tmp_path, {"miniature": run()}).read_bytes() == first


def test_summary_shows_models_similarity_time_and_paths(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run()
    print_summary({"miniature": result}, tmp_path)
    out = capsys.readouterr().out
    lines = {re.split(r"\s{2,}", line.strip())[0]: line for line in out.splitlines()}
    models = result["evaluation"]["models"]
    order = ["teacher", "student", "student, shuffled images"]
    for group in KINDS:
        numbers = [f"{models[m]['averages'][group]:.3f}" for m in order]
        assert re.findall(r"\d\.\d{3}", lines[f"{group} average"])[2:] == numbers
    for part in ("before", "after"):
        line = lines[f"matched, {part}"]
        assert re.findall(r"\d\.\d{3}", line) == [f"{matched_mean(result, part):.3f}"]
    assert "312.4" in lines["seconds"]
    for name in ("model", "results.json", "report.html"):
        assert str(tmp_path / name) in out


def test_throughput_is_in_the_page_and_on_a_line_of_the_summary(tmp_path, capsys):
    result = run()
    page = write_report(tmp_path, {"miniature": result}).read_text()
    table = page[page.index("Throughput over all processes") :]
    table = table[: table.index("</table>")]
    for number in ("3413", "26.3", "0.123", "1.50", "0.011", "0.222", "0.633", "0.124", "0.010"):
        assert f">{number}<" in table
    assert "measured matmul" in table
    print_summary({"miniature": result}, tmp_path)
    line = "speed    dft: 3,413 tokens/s, 26.3 samples/s, MFU 0.123 of measured matmul"
    assert line in capsys.readouterr().out
    for stage in result["stages"]:
        for name in [n for n in stage if n.startswith("time_") or n.endswith("_per_second")]:
            stage[name] = None
        stage["mfu"] = stage["peak_memory_bytes"] = None
        del stage["mfu_of"]
    assert "Throughput" not in write_report(tmp_path, {"miniature": result}).read_text()
    print_summary({"miniature": result}, tmp_path)
    assert "speed" not in capsys.readouterr().out


def test_summary_of_several_runs_has_a_column_per_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    results = five_runs()
    print_summary(results, tmp_path)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "CR average" in line)
    students = [r["evaluation"]["models"]["student"]["averages"]["CR"] for r in results.values()]
    assert re.findall(r"\d\.\d{3}", line)[3:8] == [f"{value:.3f}" for value in students]
    assert str(tmp_path / "compare" / "sft" / "model") in out
    # However narrow the terminal is, no number is lost.
    monkeypatch.setenv("COLUMNS", "40")
    print_summary(results, tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if "CR average" in line)
    assert len(re.findall(r"\d\.\d{3}", line)) == 9


@pytest.mark.parametrize("module", [report_module, page_module])
def test_matplotlib_is_imported_only_for_a_page(module):
    """Every training rank imports the report; only one writes it."""
    imports = [
        node
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not re.search("matplotlib|plots", " ".join(map(ast.unparse, imports)))


@pytest.mark.parametrize(
    ("teacher", "privileged"),
    [("miniature", True), ("miniature-photos", True), ("miniature-unprivileged", False)],
)
def test_caveat_stands_for_privileged_teachers_only(tmp_path, teacher, privileged):
    page = write_report(tmp_path, {"miniature": run(teacher=teacher)}).read_text()
    assert ("privileged supervision" in page) == privileged
