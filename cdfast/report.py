"""The report of a run: one page that opens offline, and a table in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cdfast.analysis.explorer_page import SCRIPT
from cdfast.analysis.report import Analyses, analysis_section, explorer_part
from cdfast.curves import evaluation_section
from cdfast.page import MISSING, details, figure, fixed, general, listed, option, page, table, text
from cdfast.terms import OWN, TERMS

REPORT_FILE = "report.html"
STUDENT, TEACHER = "student", "teacher"
BEFORE_AFTER = ("before", "after")
# Longer logs are thinned in the page; results.json has every entry.
LOG_ROWS = 400
# A narrower colour scale would make differences of no weight look large.
NARROWEST_SCALE = 0.2
# Recipe fields that say nothing about how two runs of a comparison differ.
_NOT_COMPARED = ("name", "description", "output_dir", "compare", "stages")
_ALIGNMENT_UNITS = {"mse": "mean squared difference", "kl": "nats per row"}
# Embedded teachers that were shown ground-truth boxes; a test compares them with their cards.
PRIVILEGED_TEACHERS = ("miniature", "miniature-photos")
CAVEAT = """The teacher of the embedded miniature was trained with privileged supervision of its
attention maps (ground-truth boxes of the objects), and students run few steps on toy scenes. The
numbers therefore show how fast a student learns under this setting; they are no general ranking of
methods. Beside them stand the controls: the student asked about shuffled images, a model trained
without images (text-only), and chance."""

# Parts of a step's time, as metrics.py writes them; naming them here keeps the trainer out.
PHASES = ("data", "teacher", "student", "optimizer", "other")

Run = Mapping[str, Any]
Results = Mapping[str, Run]


class Column(NamedTuple):
    """One model of the accuracy figure and tables."""

    heading: str
    report: Mapping[str, Any]
    # None: the teacher.
    run: int | None
    control: bool = False

    def of(self, kind: str, field: str) -> Any:
        return self.report.get("kinds", {}).get(kind, {}).get(field)

    def average(self, group: str, field: str = "averages") -> Any:
        return self.report.get(field, {}).get(group)


def write_report(
    folder: Path,
    results: Results,
    analyses: Analyses | None = None,
    explorer: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/report.html`, self-contained: no network; the explorer alone has a script.

    Args:
        folder: of the main run.
        results: run name -> contents of its results.json; the first is the main run, the others
            are the variants of --compare. Sections whose data a run lacks are left out.
        analyses: run name -> contents of its analysis.json, or {"unavailable": reason}.
        explorer: data of `cdfast.analysis.explorer`, or {"unavailable": reason}.

    Returns:
        The path of the page.
    """
    sections = {
        "Comparison of runs": _comparison(results) if len(results) > 1 else "",
        "Accuracy": _accuracy(results),
        "Attention analysis": analysis_section(analyses or {}, _evaluated(results)),
        "Attention explorer": explorer_part(explorer),
        "Training losses": _losses(results),
        "Evaluation during training": evaluation_section(
            {name: total_log(run, "evaluations") for name, run in results.items()},
            stage_starts(next(iter(results.values()))),
        ),
        "Attention similarity": _similarity(results),
        "Recipe and environment": "".join(_setup(name, run) for name, run in results.items()),
    }
    path = folder / REPORT_FILE
    title = f"{next(iter(results))}: distillation report"
    script = SCRIPT if explorer and explorer.get("samples") else ""
    path.write_text(page(title, _headline(results), sections, script), encoding="utf-8")
    return path


def print_summary(results: Results, folder: Path) -> None:
    """Print accuracy, attention similarity and time of the runs, and where the files are.

    Args:
        results: as for `write_report`.
        folder: of the main run; a variant's is `folder/compare/<name>`.
    """
    columns, runs = _columns(results), list(results.values())
    heading, rows = _accuracy_rows(results, intervals=False)
    below = {f"matched, {p}": [matched_mean(run, p) for run in runs] for p in BEFORE_AFTER}
    for label, values in {**below, "seconds": [run.get("seconds") for run in runs]}.items():
        digits = 1 if label == "seconds" else 3
        cells = [
            "" if c.run is None or c.control else fixed(values[c.run], digits) for c in columns
        ]
        rows.append([label, "", "", "", *cells])
    # Columns without a number, such as chance where nothing was evaluated, are left out.
    used = [i for i, h in enumerate(heading) if h != "n" and any(_known(row[i]) for row in rows)]
    printed = Table(
        caption="accuracy: share answered right; matched: attention similarity, matched layers",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    widths = []
    for i in used:
        # Headings are broken between words, numbers never.
        words = heading[i].replace("-", " ").replace(",", "").split()
        widths.append(max(map(len, [*words, *(row[i] for row in rows)])))
        align: Literal["right", "left"] = "right" if i else "left"
        printed.add_column(escape(" ".join(words)), justify=align, width=widths[-1])
    for row in rows:
        if any(map(_known, row[1:])):
            average = row[0].endswith(" average")
            style = "bold" if average else None
            printed.add_row(*(escape(row[i]) for i in used), style=style, end_section=average)
    console = Console()
    console.width = max(console.width, sum(widths) + len(widths))
    console.print(printed)
    # Not by rich: a path is no markup, and stays on one line.
    for index, name in enumerate(results):
        place = folder / "compare" / name if index else folder
        label = f"{name}: " if len(results) > 1 else ""
        print(f"{label}model    {place / 'model'}")
        print(f"{label}results  {place / 'results.json'}")
        if speed := _speed(runs[index].get("stages", [])):
            print(f"{label}speed    {speed}")
    print(f"report   {folder / REPORT_FILE}")


def _speed(stages: list[dict[str, Any]]) -> str:
    """Throughput of the stage that took longest, on a line; "" if none was measured."""
    known = [stage for stage in stages if stage.get("tokens_per_second")]
    if not known:
        return ""
    longest = max(known, key=lambda stage: stage.get("seconds") or 0)
    line = f"{longest['stage']}: {longest['tokens_per_second']:,.0f} tokens/s, "
    line += f"{longest['samples_per_second']:.1f} samples/s"
    mfu = longest.get("mfu")
    return line if mfu is None else f"{line}, MFU {mfu:.3f} of {longest['mfu_of']}"


# -- sections of the page ------------------------------------------------------------------------


def _headline(results: Results) -> str:
    name, run = next(iter(results.items()))
    recipe = run.get("recipe", {})
    stages = listed(f"{s.get('stage')} ({s.get('steps')} steps)" for s in run.get("stages", []))
    what = f"Student {recipe.get('student')}, teacher {recipe.get('teacher')}; stages: {stages}."
    parts = [f"<h1>{text(name)}</h1>"]
    parts += [f"<p>{text(line)}</p>" for line in (recipe.get("description"), what) if line]
    parts.append(f'<p class="outcome">{text(_outcome(run))}</p>')
    if any(r.get("recipe", {}).get("teacher") in PRIVILEGED_TEACHERS for r in results.values()):
        parts.append(f'<aside class="caveat" aria-label="Caveat"><p>{CAVEAT}</p></aside>')
    return "".join(parts)


def _outcome(run: Run) -> str:
    models = run.get("evaluation", {}).get("models", {})
    student = models.get(STUDENT, {})
    parts = []
    for group, value in student.get("averages", {}).items():
        beside = f"chance {fixed(student.get('averages_chance', {}).get(group))}"
        if TEACHER in models:
            beside += f", teacher {fixed(models[TEACHER]['averages'].get(group))}"
        parts.append(f"{group} {fixed(value)} ({beside})")
    if run.get("similarity"):
        parts.append(f"matched attention similarity {_matched_change(run)}")
    return "; ".join([*parts, f"{fixed(run.get('seconds'), 1)} s in all"]) + "."


def _comparison(results: Results) -> str:
    main = next(iter(results.values()))
    groups = list(_groups(results))
    rows = []
    for name, run, column in zip(results, results.values(), _students(results)):
        changes = "; ".join(differences(main.get("recipe", {}), run.get("recipe", {})))
        averages = [fixed(column.average(group)) for group in groups]
        matched = [fixed(matched_mean(run, part)) for part in BEFORE_AFTER]
        what = "main run" if run is main else changes or "nothing"
        rows.append([name, what, *averages, *matched, fixed(run.get("seconds"), 1)])
    heading = ["run", "differs from the main run in", *groups]
    heading += [*(f"matched similarity {part}" for part in BEFORE_AFTER), "time (s)"]
    averages_are = f" {' and '.join(groups)}: the student's accuracy." if groups else ""
    return table(f"All runs.{averages_are}", heading, rows, left=(1,))


def _accuracy(results: Results) -> str:
    columns = [column for column in _columns(results) if column.report]
    groups, text_only = _groups(results), _text_only(results)
    if not groups:
        return ""
    from cdfast.plots import accuracy_figure

    label = "Accuracy per question kind with 95% intervals. Averages: " + "; ".join(
        f"{c.heading}: " + ", ".join(f"{group} {fixed(c.average(group))}" for group in groups)
        for c in columns
    )
    # With many columns the intervals would not fit the page.
    heading, rows = _accuracy_rows(results, intervals=len(results) == 1)
    shares = [
        [kind, column.heading, fixed(column.of(kind, "accuracy")), _interval(column, kind)]
        + [fixed(column.of(kind, field)) for field in ("both_orders", "greedy")]
        for kinds in groups.values()
        for kind in kinds
        for column in columns
    ]
    fields = ["kind", "model", "accuracy", "95% interval", "right in both orders", "right greedily"]
    return figure(
        accuracy_figure("accuracy", groups, columns, text_only, label),
        "Accuracy: share of questions whose most likely choice is right. Whiskers: 95% "
        "intervals. Diamonds: a model trained without images.",
        table("Shares of questions", fields, shares, left=(1,)),
    ) + table("Accuracy (share answered right)", heading, rows)


def _losses(results: Results) -> str:
    from cdfast.plots import LOSSES, loss_figure, number

    logs = {name: log for name, run in results.items() if (log := total_log(run))}
    if not any(
        math.isfinite(number(e.get(k))) for log in logs.values() for e in log for k in LOSSES
    ):
        return ""
    main = next(iter(results.values()))
    logged = {field for log in logs.values() for entry in log for field in entry}
    logged |= {f"loss_{name}" for name in OWN}
    shown = {name: label for name, label in LOSSES.items() if name in logged}
    fields = [*shown, "loss", "learning_rate", "grad_norm"]
    every = max(math.ceil(len(log) / LOG_ROWS) for log in logs.values())
    rows = [
        [name, str(e["total_step"]), e["stage"], *(general(e.get(field)) for field in fields)]
        for name, log in logs.items()
        for e in log[::every]
    ]
    heading = ["run", "step", "stage", *shown.values(), "weighted sum", "learning rate"]
    caption = f"Losses, one entry in {every}; all: results.json" if every > 1 else "Losses"
    last = "; ".join(
        f"{name}: " + ", ".join(f"{shown[k]} {general(log[-1].get(k))}" for k in shown)
        for name, log in logs.items()
    )
    return figure(
        loss_figure(
            "losses",
            logs,
            stage_starts(main),
            _loss_units(main.get("recipe", {})),
            f"Training losses. At the end {last}",
        ),
        "Each loss before its weight, mean over the steps since the entry before. Dotted lines: a "
        f"stage {'of the main run ' if len(results) > 1 else ''}begins.",
        table(caption, [*heading, "gradient norm"], rows),
    )


def _loss_units(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Log entry of each loss -> what it is measured in."""
    alignment = _ALIGNMENT_UNITS.get(recipe.get("objective") or "", "1 − cosine")
    if (recipe.get("layer_reduction") or recipe.get("preset")) in ("sum", "official"):
        alignment += ", sum over layers"
    mse = recipe.get("hidden_objective") == "mse"
    own = {"alignment": alignment, "hidden": "mean squared error" if mse else "1 − cosine"}
    return {term.logged: term.unit or own[term.name] for term in TERMS}


def _similarity(results: Results) -> str:
    runs = {name: run["similarity"] for name, run in results.items() if run.get("similarity")}
    matched = {n: s for n, s in runs.items() if s.get("after", {}).get("matched")}
    grids = {n: s for n, s in runs.items() if s.get("after", {}).get("layers")}
    if not (matched or grids):
        return ""
    from cdfast.plots import matched_figure, number, similarity_figure

    first = next(iter(runs.values()))
    parts = [
        "<p>Mean cosine of student and teacher attention over the visual tokens, on "
        f"{text(first.get('rows', 'all'))} rows of {text(first.get('samples', '?'))} samples. "
        "A matched student layer is compared with the mean map of its teacher layers.</p>"
    ]
    if matched:
        rows = [
            [name, layer, listed(s.get("matches", {}).get(layer))]
            + [fixed(s.get(part, {}).get("matched", {}).get(layer)) for part in BEFORE_AFTER]
            for name, s in matched.items()
            for layer in s["after"]["matched"]
        ]
        heading = ["run", "student layer", "teacher layers", *BEFORE_AFTER]
        means = "; ".join(f"{name} {_matched_change(results[name])}" for name in matched)
        label = f"Similarity of matched layers before and after training, mean: {means}"
        numbers = table("Similarity of matched layers", heading, rows)
        caption = "Matched layers. Bars: after training; diamonds: before."
        parts.append(figure(matched_figure("matched", matched, label), caption, numbers))
    cells = [
        number(value)
        for s in grids.values()
        for part in BEFORE_AFTER
        for row in s.get(part, {}).get("layers", [])
        for value in row
    ]
    finite = [value for value in cells if math.isfinite(value)] or [0.0, 1.0]
    for index, (name, s) in enumerate(grids.items()):
        numbers = "".join(
            table(
                f"{part} training: student layers down, teacher layers across",
                ["student", *map(str, range(len(s[part]["layers"][0])))],
                [[str(i), *map(fixed, row)] for i, row in enumerate(s[part]["layers"])],
            )
            for part in BEFORE_AFTER
            if s.get(part, {}).get("layers")
        )
        label = f"{name}: similarity of every student and teacher layer before and after training"
        title = "Similarity of student and teacher attention" + f": {name}" * (len(results) > 1)
        limits = (min(*finite, max(finite) - NARROWEST_SCALE), max(finite))
        svg = similarity_figure(f"similarity{index}", s, limits, title, label)
        parts.append(figure(svg, f"{name}: every student layer with every teacher layer.", numbers))
    return "".join(parts)


def _setup(name: str, run: Run) -> str:
    recipe, environment = run.get("recipe", {}), run.get("environment", {})
    stages, settings = run.get("stages", []), recipe.get("stages", [])
    settings = [*settings, *({} for _ in stages)]
    weighted = [t for t in TERMS if t.name in OWN or any(s.get(t.weight) for s in settings)]
    rows = [
        [
            f"{index + 1} {stage.get('stage')}",
            str(stage.get("steps", MISSING)),
            fixed(stage.get("seconds"), 1),
            f"{s.get('batch_size', MISSING)} × {s.get('gradient_accumulation_steps', MISSING)}",
            *(general(s.get(f"{prefix}learning_rate")) for prefix in ("", "muon_")),
            *(general(s.get(term.weight)) for term in weighted),
            "; ".join(f"{k} ← {listed(v)}" for k, v in (stage.get("matches") or {}).items()),
            listed(f"{k}: {v}" for k, v in (stage.get("skipped") or {}).items()),
        ]
        for index, (stage, s) in enumerate(zip(stages, settings))
    ]
    heading = ["stage", "steps", "time (s)", "batch × accumulation", "learning rate"]
    heading += [
        "Muon rate",
        *(f"{term.label} weight" for term in weighted),
        "student ← teacher layers",
        "skipped records",
    ]
    peak = environment.get("peak_memory_bytes")
    facts = {key: environment.get(key) for key in ("command", "device", "processes", "threads")}
    facts["threads per process"] = facts.pop("threads")
    facts |= {"cores": environment.get("cores"), "time in all": f"{fixed(run.get('seconds'), 1)} s"}
    facts["peak memory"] = f"{peak / 2**30:.2f} GiB" if peak else None
    models = run.get("evaluation", {}).get("models", {})
    facts |= {f"evaluation of {m}": f"{fixed(r.get('seconds'), 1)} s" for m, r in models.items()}
    facts |= {"python": environment.get("python"), **environment.get("versions", {})}
    known = [[key, str(value)] for key, value in facts.items() if value is not None]
    return (
        f"<h3>{text(name)}</h3>"
        + (table("Stages", heading, rows, left=(6 + len(weighted),)) if rows else "")
        + _throughput(stages)
        + table("Environment", ["what", "value"], known, left=(1,))
        + details("Resolved recipe", f"<pre>{text(json.dumps(recipe, indent=1))}</pre>")
    )


def _throughput(stages: list[dict[str, Any]]) -> str:
    """Tokens and samples per second, MFU, peak memory and shares of the time of each stage."""
    rows = []
    for index, stage in enumerate(stages, 1):
        peak = stage.get("peak_memory_bytes")
        shares = [fixed(stage.get(f"time_{phase}")) for phase in PHASES]
        cells = [
            fixed(stage.get("tokens_per_second"), 0),
            fixed(stage.get("samples_per_second"), 1),
            fixed(stage.get("mfu")),
            stage.get("mfu_of") or MISSING,
            f"{peak / 2**30:.2f}" if peak else MISSING,
            fixed(stage.get("evaluation_seconds"), 1),
        ]
        if any(map(_known, [*cells, *shares])):
            rows.append([f"{index} {stage.get('stage')}", *cells, *shares])
    heading = ["stage", "tokens/s", "samples/s", "MFU", "of", "peak memory (GiB)"]
    heading.append("evaluation (s), in no rate")
    caption = "Throughput over all processes, and shares of the time of a step"
    return table(caption, [*heading, *PHASES], rows, left=(4,)) if rows else ""


# -- what the sections show ------------------------------------------------------------------------


def _students(results: Results) -> list[Column]:
    """The student of each run, with an empty report where it was not evaluated."""
    return [
        Column(
            name if len(results) > 1 else STUDENT,
            run.get("evaluation", {}).get("models", {}).get(STUDENT, {}),
            index,
        )
        for index, (name, run) in enumerate(results.items())
    ]


def _evaluated(results: Results) -> dict[str, dict[str, float]]:
    """run -> group -> accuracy of its student; what was not evaluated is missing."""
    return {
        name: dict(student.report.get("averages", {}))
        for name, student in zip(results, _students(results))
    }


def _columns(results: Results) -> list[Column]:
    """The teacher, the student of each run, and the controls of the main run."""
    models = [run.get("evaluation", {}).get("models", {}) for run in results.values()]
    teachers = [Column(TEACHER, m[TEACHER], None) for m in models if TEACHER in m]
    students = _students(results)
    controls = [
        Column(name.replace(STUDENT, students[0].heading, 1), report, 0, control=True)
        for name, report in models[0].items()
        if name not in (STUDENT, TEACHER)
    ]
    return [*teachers[:1], *students, *controls]


def _groups(results: Results) -> dict[str, list[str]]:
    """Group -> its question kinds, over all models."""
    groups: dict[str, dict[str, None]] = {}
    for column in _columns(results):
        for kind, cell in column.report.get("kinds", {}).items():
            groups.setdefault(cell["group"], {})[kind] = None
    return {group: list(kinds) for group, kinds in groups.items()}


def _text_only(results: Results) -> dict[str, float]:
    """Accuracy without images by kind, and "<group> average" where all its kinds are known."""
    known = dict(next(iter(results.values())).get("evaluation", {}).get("text_only") or {})
    for group, kinds in _groups(results).items():
        if all(kind in known for kind in kinds):
            known[f"{group} average"] = sum(known[kind] for kind in kinds) / len(kinds)
    return known


def _accuracy_rows(results: Results, intervals: bool) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: kinds and group averages down, models across."""
    columns, text_only = _columns(results), _text_only(results)
    first = next((column for column in columns if column.report), columns[0])
    rows = []
    for group, kinds in _groups(results).items():
        for kind in kinds:
            cells = [fixed(column.of(kind, "accuracy")) for column in columns]
            for i, column in enumerate(columns):
                if intervals and column.of(kind, "ci95"):
                    cells[i] += f" {_interval(column, kind)}"
            number = str(first.of(kind, "n") or MISSING)
            beside = [number, fixed(first.of(kind, "chance")), fixed(text_only.get(kind))]
            rows.append([kind, *beside, *cells])
        average = f"{group} average"
        beside = ["", fixed(first.average(group, "averages_chance")), fixed(text_only.get(average))]
        rows.append([average, *beside, *(fixed(column.average(group)) for column in columns)])
    return ["kind", "n", "chance", "text-only", *(c.heading for c in columns)], rows


def _interval(column: Column, kind: str) -> str:
    bounds = column.of(kind, "ci95")
    return f"[{listed(map(fixed, bounds))}]" if bounds else MISSING


def _known(cell: str) -> bool:
    return cell not in ("", MISSING)


def matched_mean(run: Run, part: str) -> float | None:
    """Mean similarity over the matched layers, "before" or "after"; None if there is none."""
    values = (run.get("similarity") or {}).get(part, {}).get("matched", {}).values()
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _matched_change(run: Run) -> str:
    return " → ".join(fixed(matched_mean(run, part)) for part in BEFORE_AFTER)


def stage_starts(run: Run) -> list[tuple[int, str]]:
    """(first step, label) of the stages of a run, counted through."""
    starts, steps = [], 0
    for index, stage in enumerate(run.get("stages", []), 1):
        starts.append((steps, f"{index} {stage.get('stage')}"))
        steps += stage.get("steps") or 0
    return starts


def total_log(run: Run, kind: str = "log") -> list[dict[str, Any]]:
    """The entries of all stages, with their `stage` and a `total_step` that counts through.

    Args:
        kind: "log", or "evaluations" during training.
    """
    entries, before = [], 0
    for index, stage in enumerate(run.get("stages", []), 1):
        label = f"{index} {stage.get('stage')}"
        for entry in stage.get(kind, []):
            entries.append({**entry, "total_step": before + entry["step"], "stage": label})
        before += stage.get("steps") or 0
    return entries


def differences(main: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What a variant's recipe changes, as "option: main → variant"."""

    def changed(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
        names = [n for n in {**a, **b} if n not in _NOT_COMPARED and a.get(n) != b.get(n)]
        return [f"{prefix}{n}: {option(a.get(n))} → {option(b.get(n))}" for n in names]

    ours, theirs = main.get("stages", []), other.get("stages", [])
    kinds = [listed(stage["stage"] for stage in stages) for stages in (ours, theirs)]
    found = changed(main, other)
    if kinds[0] != kinds[1]:
        return [*found, f"stages: {kinds[0]} → {kinds[1]}"]
    for a, b in zip(ours, theirs):
        found += changed(a, b, f"{a['stage']}.")
    return list(dict.fromkeys(found))
