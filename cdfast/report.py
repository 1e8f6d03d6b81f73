"""The report of a run: one page that opens offline, and a table in the terminal."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

REPORT_FILE = "report.html"
STUDENT, TEACHER = "student", "teacher"
MISSING = "–"
# Longer logs are thinned in the page; results.json has every entry.
LOG_ROWS = 400
# Recipe fields in which two runs of a comparison always differ.
_NOT_COMPARED = ("name", "description", "output_dir", "compare", "stages")
_ALIGNMENT_UNITS = {"mse": "mean squared difference", "kl": "nats per row"}
_CAVEAT = """The teacher of the embedded miniature was trained with privileged supervision of its
attention maps (ground-truth boxes of the objects), and students run few steps on toy scenes. The
numbers therefore show how fast a student learns under this setting; they are no general ranking of
methods. Beside them stand the controls: the student asked about shuffled images, a model trained
without images (text-only), and chance."""
_CSS = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fafafa; --line: #cfcfcf;
  --soft: #efefef; --link: #0b57a4; --caveat: #fff4d6; --edge: #b07a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --page: #16181b; --line: #44484e;
  --soft: #23262b; --link: #8ec5ff; --caveat: #352b10; --edge: #e0ad3c; } }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 0 auto; max-width: 64rem; padding: 1rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; }
a { color: var(--link); } nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  list-style: none; padding: 0; }
.outcome { font-size: 1.15rem; font-weight: 600; }
.caveat { background: var(--caveat); border-left: .3rem solid var(--edge); padding: .75rem 1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; font-weight: 600; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: right;
  vertical-align: top; }
th:first-child, td.text { text-align: left; } thead th { background: var(--soft); }
tr.average > * { font-weight: 600; }
figure { margin: 1rem 0; } .card { background: #fff; border: 1px solid var(--line);
  border-radius: .4rem; padding: .5rem; overflow-x: auto; }
.card svg { display: block; width: 100%; min-width: 36rem; height: auto; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .9rem; margin-top: .4rem; }
summary { cursor: pointer; padding: .25rem 0; }
:focus-visible { outline: .15rem solid var(--link); outline-offset: .1rem; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; font-size: .85rem; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

Results = Mapping[str, Mapping[str, Any]]


class Raw(str):
    """Text that is HTML already; everything else is escaped on its way into the page."""


def write_report(folder: Path, results: Results) -> Path:
    """Write `folder/report.html`, self-contained: no script, no network, figures inside.

    Args:
        folder: of the main run.
        results: run name -> contents of its results.json; the first is the main run, the others
            are the variants of --compare. Sections whose data a run lacks are left out.

    Returns:
        The path of the page.
    """
    sections = {
        "Comparison of runs": _comparison(results) if len(results) > 1 else "",
        "Accuracy": _accuracy(results),
        "Training losses": _losses(results),
        "Attention similarity": _similarity(results),
        "Recipe and environment": "".join(_setup(name, run) for name, run in results.items()),
    }
    present = {title: text for title, text in sections.items() if text}
    ids = {title: title.lower().replace(" ", "-") for title in present}
    links = "".join(f'<li><a href="#{ids[t]}">{t}</a></li>' for t in present)
    body = [
        f'<header>{_headline(results)}<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
        *(
            f'<section aria-labelledby="{ids[title]}"><h2 id="{ids[title]}">{title}</h2>'
            f"{text}</section>"
            for title, text in present.items()
        ),
    ]
    title = _text(f"{next(iter(results))}: distillation report")
    path = folder / REPORT_FILE
    path.write_text(_PAGE.format(title=title, css=_CSS, body="\n".join(body)), encoding="utf-8")
    return path


def print_summary(results: Results, folder: Path) -> None:
    """Print accuracy, attention similarity and time of the runs, and where the files are.

    Args:
        results: as for `write_report`.
        folder: of the main run; a variant's is `folder/compare/<name>`.
    """
    heading, rows = _accuracy_rows(results)
    names = list(results)
    width = max(len(heading), 1 + len(names))
    table = Table(title=escape(", ".join(names)), caption="accuracy: share answered right")
    for index, text in enumerate(heading or [Raw("measure"), *names]):
        table.add_column(escape(text), justify="right" if index else "left", overflow="fold")
    for row in rows:
        average = row[0].endswith(" average")
        cells = [escape(cell.partition(" [")[0]) for cell in row]
        table.add_row(*cells, style="bold" if average else None, end_section=average)
    # Below the accuracies each run has its student's column.
    at = [heading.index(_student_heading(results, n)) for n in names if rows] or [
        index + 1 for index in range(len(names))
    ]
    below: dict[str, list[str]] = {
        "matched similarity before": [_fixed(matched_mean(results[n], "before")) for n in names],
        "matched similarity after": [_fixed(matched_mean(results[n], "after")) for n in names],
        "seconds": [_fixed(results[n].get("seconds"), 1) for n in names],
    }
    for label, values in below.items():
        cells = [""] * (width - 1)
        for position, value in zip(at, values):
            cells[position - 1] = value
        if any(value != MISSING for value in values):
            table.add_row(label, *cells)
    console = Console()
    console.print(table)
    for name in names:
        place = folder if name == names[0] else folder / "compare" / name
        label = "" if len(names) == 1 else f"{name}: "
        # Plain print: a path is neither markup nor to be broken over lines.
        print(f"{label}model    {place / 'model'}")
        print(f"{label}results  {place / 'results.json'}")
    print(f"report   {folder / REPORT_FILE}")


# -- parts of the page -------------------------------------------------------------------------------


def _headline(results: Results) -> str:
    name, run = next(iter(results.items()))
    recipe = run.get("recipe", {})
    stages = ", ".join(f"{s.get('stage')} ({s.get('steps')} steps)" for s in run.get("stages", []))
    parts = [f"<h1>{_text(name)}</h1>"]
    if recipe.get("description"):
        parts.append(f"<p>{_text(recipe['description'])}</p>")
    if recipe.get("student"):
        what = f"Student {recipe['student']}, teacher {recipe.get('teacher') or 'none'}"
        parts.append(f"<p>{_text(what)}; stages: {_text(stages)}.</p>")
    parts.append(f'<p class="outcome">{_text(_outcome(run))}</p>')
    if any(r.get("recipe", {}).get("teacher") == "miniature" for r in results.values()):
        parts.append(f'<aside class="caveat" aria-label="Caveat"><p>{_text(_CAVEAT)}</p></aside>')
    return "".join(parts)


def _outcome(run: Mapping[str, Any]) -> str:
    models = run.get("evaluation", {}).get("models", {})
    parts = []
    for group, value in models.get(STUDENT, {}).get("averages", {}).items():
        chance = models[STUDENT].get("averages_chance", {}).get(group)
        beside = f"chance {_fixed(chance)}"
        if TEACHER in models:
            beside += f", teacher {_fixed(models[TEACHER]['averages'].get(group))}"
        parts.append(f"{group} {_fixed(value)} ({beside})")
    if "similarity" in run:
        before, after = (_fixed(matched_mean(run, part)) for part in ("before", "after"))
        parts.append(f"matched attention similarity {before} → {after}")
    return "; ".join([*parts, f"{_fixed(run.get('seconds'), 1)} s in all"]) + "."


def _comparison(results: Results) -> str:
    main = next(iter(results.values()))
    groups = list(_groups(results))
    rows = []
    for name, run in results.items():
        averages = run.get("evaluation", {}).get("models", {}).get(STUDENT, {}).get("averages", {})
        changes = "; ".join(differences(main.get("recipe", {}), run.get("recipe", {})))
        rows.append(
            [
                name,
                "main run" if run is main else changes or "nothing",
                *(_fixed(averages.get(group)) for group in groups),
                _fixed(matched_mean(run, "before")),
                _fixed(matched_mean(run, "after")),
                _fixed(run.get("seconds"), 1),
            ]
        )
    similarity = ["matched similarity before", "matched similarity after"]
    heading = ["run", "differs from the main run in", *groups, *similarity, "time (s)"]
    return _table("Accuracy (share answered right) is the students'", heading, rows, text=(1,))


def _accuracy(results: Results) -> str:
    heading, rows = _accuracy_rows(results)
    if not rows:
        return ""
    from cdfast.plots import accuracy_figure

    columns, groups = accuracy_columns(results), _groups(results)
    description = "Accuracy per question kind with 95% intervals. " + "; ".join(
        f"{heading}: " + ", ".join(f"{g} {_fixed(v)}" for g, v in r.get("averages", {}).items())
        for heading, r, _, _ in columns
    )
    text_only = _text_only(results)
    figure = accuracy_figure("accuracy", groups, columns, text_only, description)
    more = [
        [kind, *(_fixed(r["kinds"].get(kind, {}).get(f)) for _, r, _, _ in columns for f in pair)]
        for pair in [("both_orders", "greedy")]
        for kinds in groups.values()
        for kind in kinds
    ]
    names = [f"{h}: {what}" for h, *_ in columns for what in ("both orders", "greedy")]
    return "".join(
        [
            "<p>Accuracy is the share of questions whose most likely choice is right. Bars: models; "
            "whiskers: 95% intervals; dashes: chance; diamonds: a model trained without images.</p>",
            _figure(figure, "Accuracy per question kind."),
            _table("Accuracy (share answered right) [95% interval]", heading, rows),
            _details(
                "Right in both orders, and greedy answers",
                _table("Share right in both orders; share of greedy answers", ["kind", *names], more),
            ),
        ]
    )


def _losses(results: Results) -> str:
    logs = {name: log for name, run in results.items() if (log := total_log(run))}
    if not logs:
        return ""
    from cdfast.plots import LOSSES, loss_figure, number

    if not any(math.isfinite(number(e.get(k))) for log in logs.values() for e in log for k in LOSSES):
        return ""
    main = next(iter(results.values()))
    recipe = main.get("recipe", {})
    starts, at = [], 0
    for index, stage in enumerate(main.get("stages", []), 1):
        starts.append((at, f"{index} {stage.get('stage')}"))
        at += stage.get("steps") or 0
    unit = _ALIGNMENT_UNITS.get(recipe.get("objective") or "", "1 − cosine")
    if recipe.get("layer_reduction") == "sum" or recipe.get("preset") == "official":
        unit += ", sum over layers"
    last = "; ".join(f"{n}: {_fixed(log[-1].get('loss'))}" for n, log in logs.items())
    description = f"Training losses over {at} optimizer steps. Last weighted sum: {last}"
    fields = ["loss", *LOSSES, "learning_rate", "grad_norm"]
    every = max(math.ceil(len(log) / LOG_ROWS) for log in logs.values())
    rows = [
        [name, str(e["total_step"]), e["stage"], *(_general(e.get(f)) for f in fields)]
        for name, log in logs.items()
        for e in log[::every]
    ]
    thinned = f", every {every}th entry; all are in results.json" if every > 1 else ""
    heading = ["run", "step", "stage", "weighted sum", *LOSSES.values(), "learning rate"]
    table = _table(f"Losses{thinned}", [*heading, "gradient norm"], rows)
    caption = "Unweighted means over the steps since the entry before. Dotted: a stage begins."
    return _figure(
        loss_figure("losses", logs, starts, unit, description), caption, table
    )


def _similarity(results: Results) -> str:
    runs = {name: run["similarity"] for name, run in results.items() if run.get("similarity")}
    matched = {n: s for n, s in runs.items() if s.get("after", {}).get("matched")}
    grids = {n: s for n, s in runs.items() if s.get("after", {}).get("layers")}
    if not (matched or grids):
        return ""
    from cdfast.plots import matched_figure, number, similarity_figure

    first = next(iter(runs.values()))
    parts = [
        "<p>Cosine of student and teacher attention over the visual tokens, mean over "
        f"{_text(first.get('rows', 'all'))} rows of {_text(first.get('samples', '?'))} training "
        "samples. A matched student layer is compared with the mean map of its teacher window.</p>"
    ]
    if matched:
        rows = [
            [name, layer, _list(s.get("matches", {}).get(layer)), *_before_after(s, layer)]
            for name, s in matched.items()
            for layer in s["after"]["matched"]
        ]
        heading = ["run", "student layer", "teacher layers", "before", "after"]
        text = "; ".join(
            f"{n} {' → '.join(_fixed(matched_mean(results[n], p)) for p in ('before', 'after'))}"
            for n in matched
        )
        label = f"Similarity of matched layers before and after training, mean: {text}"
        table = _table("Similarity of matched layers", heading, rows)
        figure = matched_figure("matched", matched, label)
        parts.append(_figure(figure, "Matched layers before and after training.", table))
    values = [
        value
        for s in grids.values()
        for part in ("before", "after")
        for row in s.get(part, {}).get("layers", [])
        for value in map(number, row)
        if math.isfinite(value)
    ]
    limits = (min(values), max(values)) if values else (0.0, 1.0)
    for index, (name, s) in enumerate(grids.items()):
        label = f"Layer by layer similarity of {name} and its teacher before and after training"
        tables = "".join(
            _table(
                f"{part} training: student layers down, teacher layers across",
                ["student", *map(str, range(len(s[part]["layers"][0])))],
                [[str(i), *map(_fixed, row)] for i, row in enumerate(s[part]["layers"])],
            )
            for part in ("before", "after")
            if s.get(part, {}).get("layers")
        )
        figure = similarity_figure(f"similarity{index}", s, limits, label)
        parts.append(_figure(figure, f"{name}: every student layer and teacher layer.", tables))
    return "".join(parts)


def _setup(name: str, run: Mapping[str, Any]) -> str:
    recipe, environment = run.get("recipe", {}), run.get("environment", {})
    settings = recipe.get("stages", [])
    rows = []
    for index, stage in enumerate(run.get("stages", [])):
        s = settings[index] if index < len(settings) else {}
        matches = stage.get("matches") or {}
        rows.append(
            [
                f"{index + 1} {stage.get('stage')}",
                str(stage.get("steps", MISSING)),
                _fixed(stage.get("seconds"), 1),
                _fixed(stage.get("samples_per_second"), 1),
                f"{s.get('batch_size', MISSING)} × {s.get('gradient_accumulation_steps', 1)}",
                _general(s.get("learning_rate")),
                _general(s.get("muon_learning_rate")),
                *(_general(s.get(f"{w}_weight")) for w in ("lm", "kl", "alignment")),
                "; ".join(f"{k} ← {_list(v)}" for k, v in matches.items()) or MISSING,
                ", ".join(f"{k}: {v}" for k, v in (stage.get("skipped") or {}).items()) or "0",
            ]
        )
    heading = ["stage", "steps", "time (s)", "samples/s", "batch × accumulation", "learning rate"]
    heading += ["Muon rate", "LM weight", "KL weight", "alignment weight", "student ← teacher"]
    peak = environment.get("peak_memory_bytes")
    facts = {
        "command": environment.get("command"),
        "time in all": f"{_fixed(run.get('seconds'), 1)} s",
        "peak memory": f"{peak / 2**30:.2f} GiB" if peak else None,
        "device": environment.get("device"),
        "processes": environment.get("processes"),
        "threads per process": environment.get("threads"),
        "cores": environment.get("cores"),
        "python": environment.get("python"),
        **environment.get("versions", {}),
    }
    models = run.get("evaluation", {}).get("models", {})
    facts |= {f"evaluation, {m}": f"{_fixed(r.get('seconds'), 1)} s" for m, r in models.items()}
    known = [[key, str(value)] for key, value in facts.items() if value is not None]
    return "".join(
        [
            f"<h3>{_text(name)}</h3>",
            _table("Stages", [*heading, "skipped records"], rows) if rows else "",
            _table("Environment", ["what", "value"], known, text=(1,)),
            _details("Resolved recipe", f"<pre>{_text(json.dumps(recipe, indent=1))}</pre>"),
        ]
    )


# -- what the numbers are ----------------------------------------------------------------------------


def accuracy_columns(results: Results) -> list[tuple[str, Mapping[str, Any], int | None, bool]]:
    """(heading, report, number of the run or None for the teacher, is a control), in order."""
    models = [(n, run.get("evaluation", {}).get("models", {})) for n, run in results.items()]
    columns: list[tuple[str, Mapping[str, Any], int | None, bool]] = []
    teachers = [reports[TEACHER] for _, reports in models if TEACHER in reports]
    columns += [(TEACHER, report, None, False) for report in teachers[:1]]
    for index, (name, reports) in enumerate(models):
        heading = _student_heading(results, name)
        if STUDENT in reports:
            columns.append((heading, reports[STUDENT], index, False))
    for key, report in models[0][1].items():
        if key not in (STUDENT, TEACHER):
            heading = _student_heading(results, models[0][0])
            columns.append((key.replace(STUDENT, heading, 1), report, 0, True))
    return columns


def _student_heading(results: Results, name: str) -> str:
    return STUDENT if len(results) == 1 else name


def _groups(results: Results) -> dict[str, list[str]]:
    """Group -> its question kinds, over all models."""
    groups: dict[str, dict[str, None]] = {}
    for _, report, _, _ in accuracy_columns(results):
        for kind, cell in report["kinds"].items():
            groups.setdefault(cell.get("group", ""), {})[kind] = None
    return {group: list(kinds) for group, kinds in groups.items()}


def _text_only(results: Results) -> dict[str, float]:
    """Accuracy without images per kind, and the average of each group where all are known."""
    known: dict[str, float] = {}
    for run in reversed(list(results.values())):
        known |= run.get("evaluation", {}).get("text_only") or {}
    for group, kinds in _groups(results).items():
        if all(kind in known for kind in kinds):
            known[f"{group} average"] = sum(known[kind] for kind in kinds) / len(kinds)
    return known


def _accuracy_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: kinds and group averages down, models across; [] where none is known."""
    columns, text_only = accuracy_columns(results), _text_only(results)
    if not columns:
        return [], []
    first = columns[0][1]
    rows = []
    for group, kinds in _groups(results).items():
        for kind in kinds:
            cell = first["kinds"].get(kind, {})
            beside = [str(cell.get("n", MISSING)), _fixed(cell.get("chance"))]
            beside.append(_fixed(text_only.get(kind)))
            rows.append([kind, *beside, *(_interval(r["kinds"].get(kind)) for _, r, _, _ in columns)])
        average = f"{group} average"
        beside = ["", _fixed(first.get("averages_chance", {}).get(group))]
        beside.append(_fixed(text_only.get(average)))
        values = [_fixed(r.get("averages", {}).get(group)) for _, r, _, _ in columns]
        rows.append([average, *beside, *values])
    return ["kind", "n", "chance", "text-only", *(heading for heading, *_ in columns)], rows


def _interval(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return MISSING
    value = _fixed(cell.get("accuracy"))
    return f"{value} [{', '.join(map(_fixed, cell['ci95']))}]" if cell.get("ci95") else value


def matched_mean(run: Mapping[str, Any], part: str) -> float | None:
    """Mean similarity over the matched layers, "before" or "after"; None if there is none."""
    values = (run.get("similarity") or {}).get(part, {}).get("matched", {}).values()
    finite = [v for v in values if v is not None and math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def _before_after(similarity: Mapping[str, Any], layer: str) -> list[str]:
    return [_fixed(similarity.get(p, {}).get("matched", {}).get(layer)) for p in ("before", "after")]


def total_log(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The log entries of all stages, with `total_step` counted over stages and their `stage`."""
    entries, before = [], 0
    for index, stage in enumerate(run.get("stages", []), 1):
        label = f"{index} {stage.get('stage')}"
        for entry in stage.get("log", []):
            entries.append({**entry, "total_step": before + entry["step"], "stage": label})
        before += stage.get("steps") or 0
    return entries


def differences(main: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What a variant's recipe changes, as "option: main → variant"."""
    names = [name for name in {**main, **other} if name not in _NOT_COMPARED]
    found = [
        f"{name}: {_value(main.get(name))} → {_value(other.get(name))}"
        for name in names
        if main.get(name) != other.get(name)
    ]
    ours, theirs = main.get("stages", []), other.get("stages", [])
    kinds = [[stage.get("stage") for stage in stages] for stages in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return [*found, f"stages: {_list(kinds[0])} → {_list(kinds[1])}"]
    for a, b in zip(ours, theirs):
        changed = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        found += [f"{a['stage']}.{n}: {_value(a.get(n))} → {_value(b.get(n))}" for n in changed]
    return list(dict.fromkeys(found))


# -- pieces of HTML ----------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return value if isinstance(value, Raw) else html.escape(str(value))


def _table(
    caption: str, heading: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()
) -> str:
    """A table whose first column is headings; columns in `text` are left-aligned."""
    top = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in heading)
    lines = []
    for row in rows:
        kind = ' class="average"' if row[0].endswith(" average") else ""
        cells = [
            f"<td{' class=' + chr(34) + 'text' + chr(34) if i in text else ''}>{_text(cell)}</td>"
            for i, cell in enumerate(row[1:], 1)
        ]
        lines.append(f'<tr{kind}><th scope="row">{_text(row[0])}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}">'
        f"<table><caption>{_text(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _figure(svg: str, caption: str, table: str = "") -> str:
    numbers = _details("The numbers of this figure", table) if table else ""
    return (
        f'<figure><div class="card">{svg}</div><figcaption>{_text(caption)}</figcaption></figure>'
        + numbers
    )


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _fixed(value: Any, digits: int = 3) -> str:
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:.{digits}f}" if finite else MISSING


def _general(value: Any) -> str:
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:.4g}" if finite else MISSING


def _value(value: Any) -> str:
    return _general(value) if isinstance(value, float) else json.dumps(value)


def _list(values: Iterable[Any] | None) -> str:
    return ", ".join(map(str, values or [])) or MISSING
