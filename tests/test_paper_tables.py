"""The paper's tables in miniature: arms and keys, counted compute, tables and plots, the command.

Records here are made up in temporary folders; those of real runs are in benchmarks/results.
"""

import shutil
from dataclasses import dataclass, field, fields, replace

import pytest

from benchmarks import (
    history,
    page,
    paper_compute,
    paper_plot,
    paper_report,
    paper_resolve,
    paper_runs,
    paper_tables,
    readme,
)
from benchmarks.paper_arms import ARMS, CURVE_STEPS, EQUAL_COMPUTE, ROW_LABELS, TABLES, Arm
from benchmarks.paper_records import append, read
from benchmarks.paper_resolve import Absent, key_of, resolve
from cdfast.command_line import parse_command_line
from cdfast.config import ConfigError, Recipe, load_recipe, override, recipe_files
from cdfast.matching import layers_in_range, match_group, match_simple
from cdfast.synthetic import SceneDataset
from tests.paper_samples import record, resolved

PRESENT = ("compodistill", "kd", "vat", "taf", "mse", "mse-weighed", "kl", "early", "later", "all")
PRESENT += ("simple", "adaptive", "kd-long", "compodistill-long")


@pytest.fixture(scope="module")
def present():
    return {name: resolve(name) for name in PRESENT}


def test_tables_are_made_of_arms():
    for name, table in TABLES.items():
        assert set(table.arms) <= set(ARMS), name
        assert table.reference in table.arms
        assert not table.teacher_of or table.teacher_of in table.arms
        assert {arm for pair in table.also for arm in pair} <= set(table.arms), name
    assert set(ARMS) == {arm for table in TABLES.values() for arm in table.arms}
    assert all(arm in TABLES[table].arms for table, arm in ROW_LABELS)
    assert [t.letter for t in TABLES.values()] == ["a", "b", "c", "d", "e", "f", "g1", "g2"]


def test_compodistill_is_one_run_of_four_tables(present):
    shared = [name for name, table in TABLES.items() if "compodistill" in table.arms]
    assert shared == ["main", "vat-taf", "objective", "layers"]
    assert len({arm.key for arm in present.values()}) == len(present)


def test_the_table_of_matchings_compares_different_matches():
    """Over the intermediate layers of these two models group matching is simple."""
    layers = [layers_in_range(depth, ARMS["all"].options["layers"]) for depth in (4, 6)]
    assert match_group(*layers) != match_simple(*layers)
    assert {ARMS[name].options["layers"] for name in TABLES["matching"].arms} == {"all"}


@pytest.mark.parametrize("name", PRESENT)
def test_a_child_is_given_what_the_key_is_of(name, present, tmp_path):
    """Options, or a recipe file where stages have other steps: what a user would type."""
    run = paper_runs.Planned(present[name], 3, 1.0)
    words = paper_runs.train_command(run, tmp_path)
    recipe, flags = parse_command_line(words[words.index("cdfast.train") + 1 :])
    # Checkpoints are the runner's, no part of what an arm is.
    kept = {k: v for k, v in recipe.arguments.items() if not k.startswith("save_")}
    kept.pop("disable_tqdm")
    stages = [
        replace(stage, arguments={**stage.arguments, "save_strategy": "no"})
        for stage in recipe.stages
    ]
    assert key_of(replace(recipe, arguments=kept, stages=stages)) == present[name].key
    assert recipe.seed == 3
    assert (recipe.evaluate_split, recipe.evaluate_seed) == ("test", 20261124)
    assert flags.resume


def test_what_changes_a_number_changes_the_key(monkeypatch, tmp_path):
    recipe = load_recipe("miniature")
    key = key_of(recipe)
    for options in ({"kl_weight": 0.5}, {"evaluate_seed": 9}, {"layers": "all"}, {"taf": False}):
        assert key_of(override(recipe, options)) != key
    for options in ({"seed": 9}, {"name": "x"}, {"workers": 2}, {"lora_r": 128}):
        assert key_of(override(recipe, options)) == key
    folder = shutil.copytree(paper_resolve.teacher_path(), tmp_path / "teacher")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with monkeypatch.context() as patch:
        patch.setattr(paper_resolve, "teacher_path", lambda name: folder)
        assert key_of(recipe) != key
    drawn = SceneDataset.__getitem__
    monkeypatch.setattr(SceneDataset, "__getitem__", lambda self, index: drawn(self, index + 1))
    assert key_of(recipe) != key


def test_other_questions_at_the_end_are_another_key(monkeypatch):
    recipe = load_recipe("miniature")
    key = key_of(recipe)
    asked = paper_resolve.miniature_suite

    def reworded(*arguments):
        first, *others = asked(*arguments)
        return [replace(first, choices=(*first.choices, "none")), *others]

    paper_resolve._questions_hash.cache_clear()
    monkeypatch.setattr(paper_resolve, "miniature_suite", reworded)
    assert key_of(recipe) != key
    paper_resolve._questions_hash.cache_clear()


def test_an_option_that_a_later_version_adds_changes_no_key():
    @dataclass
    class Later(Recipe):
        new_option: int = field(default=0, metadata={"limits": {}})

    recipe = load_recipe("miniature")
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    assert key_of(Later(**values)) == key_of(recipe)
    assert key_of(Later(**values, new_option=1)) != key_of(recipe)


def test_long_runs_have_steps_of_their_own_and_are_measured_on_the_way(present):
    short, long = present["compodistill"].recipe, present["compodistill-long"].recipe
    assert tuple(s.max_steps for s in long.stages) == CURVE_STEPS
    assert [s.turns_mix for s in long.stages] == [s.turns_mix for s in short.stages]
    # The note and the plot say that captions begin with the third stage.
    for recipe in (long, load_recipe(ARMS["sft-long"].recipe)):
        assert [sum(s.turns_mix[4:]) > 0 for s in recipe.stages] == [False, False, True, True]
    assert present["compodistill-long"].factor is None
    every = long.arguments["eval_steps"]
    assert all(
        stage.max_steps % every == 0 for stage in long.stages
    )  # the ends, the last above all
    assert sum(s.max_steps for s in long.stages) / every >= 20
    assert "eval_steps" not in short.arguments


def test_equal_compute_is_counted(monkeypatch):
    """Teacher's forward included; operations go with steps, and the recipe has that many."""
    monkeypatch.setattr(paper_compute, "COUNTED_BATCHES", 1)
    paper_resolve._compute.cache_clear()
    lm = {"taf": False, "kl_weight": 0, "alignment_weight": 0}
    arm = Arm("SFT", "miniature", lm, steps=EQUAL_COMPUTE, compute_of="compodistill")
    monkeypatch.setitem(paper_resolve.ARMS, "sft-equal-compute", arm)
    found = resolve("sft-equal-compute")
    alone = paper_compute.recipe_flops(override(load_recipe("miniature"), lm))
    distilled = paper_compute.recipe_flops(load_recipe("miniature"))
    # A 6-layer teacher's forward beside forward and backward of 4 layers: 1 + 6 / (3 x 4).
    assert found.factor == pytest.approx(distilled / alone)
    assert 1.3 < found.factor < 1.7
    assert paper_compute.recipe_flops(found.recipe) == pytest.approx(distilled, rel=0.02)
    paper_resolve._compute.cache_clear()


@pytest.mark.parametrize(
    "arm, named",
    [
        (Arm("x", "miniature-none"), "'miniature-none' is not in this package"),
        (Arm("x", "miniature", {"teacher": "no-teacher"}), "'no-teacher' is not in this package"),
        (Arm("x", "miniature", {"no_option": 1}), "'no_option' is unknown"),
    ],
    ids=["recipe", "teacher", "option"],
)
def test_an_arm_that_this_package_has_not_is_named(monkeypatch, arm, named):
    monkeypatch.setitem(paper_resolve.ARMS, "x", arm)
    with pytest.raises(Absent, match=named) as caught:
        resolve("x")
    assert "Known:" not in str(caught.value)


def test_a_recipe_of_another_version_is_named_without_the_folder_of_this_checkout(monkeypatch):
    def broken(source):
        raise ConfigError(f"{recipe_files()[source]}: recipe: 'x' is unknown. Known: a, b.")

    monkeypatch.setattr(paper_resolve, "load_recipe", broken)
    with pytest.raises(Absent) as caught:
        resolve("compodistill")
    assert str(caught.value) == "recipes/miniature.yaml: recipe: 'x' is unknown."


# -- tables from made-up records ---------------------------------------------------------------


@pytest.fixture
def arms():
    """Arms that need no recipe; one is absent."""
    found = {name: resolved(name, f"key-{name}") for name in ARMS}
    return {**found, "llava-mod": "recipe: 'miniature-llava-mod' is not in this package."}


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "miniature" / "runs.jsonl"
    for seed in range(3):
        append(path, record("compodistill", "key-compodistill", seed, 0.9 + seed / 100))
        append(path, record("taf", "key-taf", seed, 0.5 + seed / 100, 0.4))
    append(path, record("sft", "key-sft", 0, 0.5, cpu_seconds=None, interrupted=2))
    append(path, record("kl", "key-of-before", 0, 0.1))
    for arm, ends in (("sft-long", (0.5, 0.95)), ("kd-long", (0.6, 0.8))):
        for seed in range(2):
            curve = [{"step": 10, "CR": ends[0]}, {"step": 20, "CR": ends[1] + seed / 100}]
            append(path, record(arm, f"key-{arm}", seed, ends[1], curve=curve))
    return path


@pytest.fixture
def report(records, arms):
    return paper_report.build(read(records), arms, seeds=5)


def rows(report, name):
    """Label -> row of the Markdown table."""
    text = paper_report.markdown({**report, "tables": {name: report["tables"][name]}})
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in cells[2:]}


def test_rows_have_mean_spread_and_paired_difference(report):
    found = rows(report, "objective")
    assert found["none"][:4] == ["3 of 5", "0.510 ± 0.010", "-", "0.400 ± 0.000"]
    # Equal differences for all seeds: an interval without width.
    cosine = ["3 of 5", "0.910 ± 0.010", "+0.400 [+0.400, +0.400] (n = 3)", "0.500 ± 0.000"]
    assert found["cosine"][:4] == cosine
    assert found["cosine"][5:] == ["0.85 ± 0.00", "520", "91 ± 1"]


def test_chance_has_a_row_that_is_the_mean_of_its_kinds(records, arms):
    runs = read(records)
    for run in runs.values():
        run["student"]["kinds"]["add_obj"]["chance"] = 0.3
        run["student"]["kinds"]["colour"]["chance"] = 0.25
    found = paper_report.build(runs, arms, seeds=5)
    assert rows(found, "objective")["chance"] == ["-", "0.400", "-", "0.250", *["-"] * 4]
    assert "chance" not in rows(found, "photos")  # no run, so no questions


def test_differences_that_the_reference_hides_stand_below_the_rows(records, arms):
    runs = read(records)
    for seed in range(2):
        runs["key-kl", seed] = record("kl", "key-kl", seed, 0.95 + seed / 100, 0.6)
    report = paper_report.build(runs, arms, seeds=5)
    text = paper_report.markdown({**report, "tables": {"c": report["tables"]["objective"]}})
    assert (
        "- KL against cosine: CR +0.050 [+0.050, +0.050] (n = 2), "
        "VQA +0.100 [+0.100, +0.100] (n = 2)\n" in text
    )
    assert "MSE, weight 4000 against" not in text  # not run


def test_rows_have_their_commits(report):
    commits = {row["label"]: row["commits"] for row in report["tables"]["objective"]["rows"]}
    assert commits["cosine"] == ["abc"]
    assert commits["MSE"] == []


def test_missing_cells_are_said_to_be_missing(report):
    found = rows(report, "objective")
    assert found["MSE"] == ["not run", *["-"] * 7]
    assert found["KL"][0] == "not run"  # its record is of another version
    main = rows(report, "main")
    assert main["LLaVA-MoD dense"][0] == "absent"
    assert main["teacher (one model)"][1] == "0.990"
    # One seed has no spread, and no CPU seconds where it was interrupted.
    assert main["SFT"] == ["1 of 5", "0.500", "-", "0.500", "-", "0.85", "520", "-"]
    assert main["CompoDistill, paper"][2] == "+0.400 (n = 1)"
    text = paper_report.markdown(report)
    assert "- kl (key-of-before)" in text
    assert "- llava-mod: recipe: 'miniature-llava-mod' is not in this package." in text


def test_similarity_to_another_teacher_is_not_shown(records, arms):
    runs = read(records)
    for seed in range(2):
        key = "key-compodistill-unprivileged"
        runs[key, seed] = record(
            "compodistill-unprivileged", key, seed, 0.8, teacher_name="miniature-unprivileged"
        )
    found = rows(paper_report.build(runs, arms, seeds=5), "unprivileged")
    assert found["SFT"][5] == "-"
    assert found["CompoDistill, paper"][5] == "0.85 ± 0.00"


def test_a_head_start_is_told_from_a_better_end(report):
    found = rows(report, "steps")
    assert found["SFT"][6] == "20 [20, 20]"
    assert found["KD"][6] == "never [never, never]"
    assert found["CompoDistill, paper"][6] == "-"  # not run
    [_, end] = report["tables"]["steps"]["curves"]["sft-long"]
    assert end["CR"]["mean"] == pytest.approx(0.955)
    assert end["CR"]["by_seed"] == {"0": 0.95, "1": 0.96}
    assert end["VQA"]["mean"] is None


@pytest.mark.parametrize(
    ("steps", "cell"),
    [
        ({}, "-"),
        ({"0": 700}, "700 [700, 700]"),
        ({"0": 2600, "1": None, "2": 2300, "3": 3500, "4": 2400}, "2600 [2300, never]"),
        ({"0": None, "1": 700, "2": None}, "never [700, never]"),
        ({"0": 900, "1": 700}, "900 [700, 900]"),
    ],
)
def test_a_seed_that_never_gets_there_is_the_last_to_get_there(steps, cell):
    assert paper_report.reached_cell(steps) == cell


def test_caption_says_what_the_intervals_cover(report):
    text = paper_report.described(report)
    # 2 kinds of 100 pairs; 1 kind of 100 questions.
    assert report["evaluation"]["observations"] == {"CR": 200, "VQA": 100}
    assert "±6.9 points in CR and ±9.6 points in VQA, for a difference up to twice that" in text
    assert "seed 20261124, drawn for these tables alone" in text
    assert "commits abc" in text
    assert "privileged supervision" in text


def test_every_machine_and_version_is_named(records, arms):
    other = record("vat", "key-vat", 0, 0.5)
    other["environment"] = {**other["environment"], "versions": {"torch": "2.11.0"}}
    append(records, other)
    text = paper_report.described(paper_report.build(read(records), arms, seeds=5))
    assert "Xeon, 1 thread per run, torch 2.11.0; Xeon, 1 thread per run, torch 2.13.0" in text


def test_a_plot_says_what_is_missing_of_a_row(report):
    labels = [paper_plot.row_label(row, 3) for row in report["tables"]["objective"]["rows"]]
    assert labels[0] == "none"
    assert "MSE: not run" in labels
    labels = [paper_plot.row_label(row, 5) for row in report["tables"]["objective"]["rows"]]
    assert labels[0] == "none: 3 of 5 seeds"


def test_plotted_intervals_end_where_accuracies_do():
    values = {"n": 3, "mean": 0.95, "sd": 0.05, "low": 0.87, "high": 1.03}
    assert paper_plot._interval(values) == (0.87, 1.0)
    assert paper_plot._interval({**values, "low": -0.1, "high": 0.5}) == (0.0, 0.5)
    assert paper_plot._interval({**values, "n": 2}) == (0.95, 0.95)
    alone = {"n": 1, "mean": 0.95, "sd": None, "low": None, "high": None}
    assert paper_plot._interval(alone) == (0.95, 0.95)


def test_fewer_seeds_asked_for_take_none_from_the_tables(records, arms, monkeypatch, tmp_path):
    command(monkeypatch, records.parents[1], arms, "--report", "--seeds", "1")
    [page] = records.parents[1].glob("paper_tables_cpu_*.md")
    assert "seeds: 3," in page.read_text()


def command(monkeypatch, folder, arms, *options, plots=False):
    monkeypatch.setattr(paper_tables, "resolve_all", lambda quick: arms)
    if not plots:  # they take seconds
        for name in ("draw_rows", "draw_curves"):
            monkeypatch.setattr(paper_plot, name, lambda *arguments: False)
    where = ["--output", str(folder), "--work", str(folder / "work")]
    return paper_tables.main([*options, *where])


def test_the_report_is_made_of_the_records_alone_and_is_the_same_every_time(
    records, arms, monkeypatch, tmp_path, capsys
):
    names = [f"paper_tables_cpu_202611{end}" for end in (".json", ".md", ".png", "_curves.png")]
    made = []
    for _ in range(2):
        assert command(monkeypatch, tmp_path, arms, "--report", plots=True) == 1
        made.append([(tmp_path / name).read_bytes() for name in names])
        for name in names:
            (tmp_path / name).unlink()
    assert made[0] == made[1]
    assert "stale: kl seed 0 (key-of-before" in capsys.readouterr().err


def test_the_result_is_one_of_the_pages_over_the_months(records, arms, monkeypatch, tmp_path):
    command(monkeypatch, tmp_path, arms, "--report")
    [result] = history.load(tmp_path)[0]
    assert result.value("CompoDistill, CR") is None  # two seeds are missing
    command(monkeypatch, tmp_path, arms, "--report", "--seeds", "3")
    [result] = history.load(tmp_path)[0]
    assert result.value("CompoDistill, CR") == pytest.approx(0.91)
    assert result.value("SFT at equal compute, CR") is None
    assert [f.suffix for f in result.beside()] == [".md", ".json"]
    assert "paper_tables" in page.markdown([result], [])


def test_the_readme_has_the_tables_where_it_has_their_marker(records, arms, monkeypatch, tmp_path):
    command(monkeypatch, tmp_path, arms, "--report")
    results = history.load(tmp_path)[0]
    others = "".join(f"<!-- {m} -->\n<!-- /{m} -->\n" for m in readme.BLOCKS if m != "paper")
    assert "CompoDistill, paper" not in readme.rendered(others, results)
    text = readme.rendered(others + "<!-- paper -->\nreplaced\n<!-- /paper -->\n", results)
    assert "| cosine | 3 of 5 | 0.910 ± 0.010 | +0.400 [+0.400, +0.400] (n = 3) |" in text
    assert "(d) Aligned layers.** Differences are against intermediate." in text
    assert "(e) Layer matching: not run yet (`--tables matching`)." in text
    assert "(g2) Scenes of real picture content: not run yet (`--tables photos`)." in text
    assert "[Page with plots](benchmarks/results/paper_tables_cpu_202611.md)" in text
    assert "replaced" not in text
    with pytest.raises(SystemExit, match="<!-- paper -->"):
        readme.rendered(others + "<!-- /paper -->\n", results)


def test_the_list_has_missing_runs_and_names_absent_arms(
    records, arms, monkeypatch, tmp_path, capsys
):
    assert command(monkeypatch, tmp_path, arms, "--list", "--tables", "objective") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if "| " in line]
    missing = {line[1]: line[4] for line in cells}
    assert (missing["taf"], missing["compodistill"], missing["mse"]) == ("2", "2", "5")
    assert "hours of one core" in lines[-1]
    assert command(monkeypatch, tmp_path, arms, "--list", "--only", "llava-mod") == 1
    assert "absent: llava-mod: recipe: 'miniature-llava-mod'" in capsys.readouterr().err


def test_a_failed_run_makes_the_exit_status_and_the_tables_are_there(
    records, arms, monkeypatch, tmp_path, capsys
):
    def make_runs(planned, work, path, **options):
        return paper_runs.Outcome(failed={planned[0].label: "mse seed 0: exit status 1"})

    monkeypatch.setattr(paper_tables, "make_runs", make_runs)
    assert command(monkeypatch, tmp_path, arms, "--only", "mse") == 1
    assert "failed: mse seed 0: exit status 1" in capsys.readouterr().err
    assert (tmp_path / "paper_tables_cpu_202611.md").exists()


def test_quick_numbers_stay_out_of_the_results(capsys):
    with pytest.raises(SystemExit):
        paper_tables.parse(["--quick", "--output", str(paper_tables.RESULTS)])
    assert "its numbers say nothing" in capsys.readouterr().err
    options = paper_tables.parse(["--quick"])
    assert paper_tables.RESULTS not in (options.output, *options.output.parents)
    assert options.seeds == 2
    assert paper_tables.parse([]).seeds == 5


# -- real runs ---------------------------------------------------------------------------------


TINY = """\
{name: tiny, teacher: miniature, student: miniature, data: [miniature], evaluate: miniature,
turns: independent, arguments: {bf16: false}, stages: [{stage: dft, max_steps: 2}]}
"""


@pytest.mark.parametrize(
    "names, seeds",
    [
        pytest.param(["kd-long"], 1, marks=pytest.mark.slow),
        pytest.param(["compodistill", "kd-long"], 2, marks=pytest.mark.full),
    ],
    ids=["one run", "two arms, two seeds"],
)
def test_the_command_trains_and_writes_tables(monkeypatch, tmp_path, names, seeds, capsys):
    """Arms of one short stage, by child processes of cdfast.train."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    arms = {
        "compodistill": Arm("CompoDistill", str(recipe)),
        "kd-long": Arm("KD", str(recipe), {"alignment_weight": 0}, 2.0, curve=True),
    }
    for name, arm in arms.items():
        monkeypatch.setitem(ARMS, name, arm)
    options = ["--quick", "--only", *names, "--seeds", str(seeds), "--jobs", "2"]
    where = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert paper_tables.main([*options, *where]) == 0
    found = read(tmp_path / "out" / "miniature" / "runs.jsonl")
    assert sorted((r["arm"], r["seed"]) for r in found.values()) == [
        (name, seed) for name in names for seed in range(seeds)
    ]
    for run in found.values():
        assert run["scenes"] == {"suite": "miniature", "split": "test", "seed": 20261124}
        assert run["steps"] == [2]
        assert run["environment"]["threads"] == 1
        assert 1 < run["cpu_seconds"] < 200
        assert len(run["student"]["kinds"]) == 11
        if run["arm"] == "kd-long":
            assert [point["step"] for point in run["curve"]] == [2]
            assert set(run["curve"][0]) == {"step", "CR", "VQA", "similarity"}
    [page_of_tables] = (tmp_path / "out").glob("*.md")
    text = page_of_tables.read_text()
    assert "The numbers say nothing" in text
    assert f"| KD | {seeds} of {seeds} |" in text
    capsys.readouterr()
    assert paper_tables.main([*options, *where]) == 0  # all of it is recorded
    assert "0 runs to make" in capsys.readouterr().out
