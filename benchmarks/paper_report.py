"""The tables of the paper in miniature, from records alone: numbers, Markdown, README."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.paper_arms import ARMS, EVALUATION, ROW_LABELS, TABLES, TEACHERS, Table
from benchmarks.paper_records import Records, stale
from benchmarks.paper_statistics import paired, summary
from benchmarks.result_files import headline, table
from cdfast.evaluation.statistics import wilson_interval

if TYPE_CHECKING:  # importing it loads models' code, which readme.py has no use for
    from benchmarks.paper_resolve import Resolved

THEME = "paper_tables"
COMMAND = "python -m benchmarks.paper_tables"
GROUPS = ("CR", "VQA")
# Steps until a run has this CR: what a head start is.
REACHED = 0.9
NEVER = "never"
NOT_RUN = "not run"
NOT_SAID = "-"
QUICK_NOTE = (
    "**Quick: a few steps and questions, to see that the command works. The numbers say nothing.**"
)
# Headline: name -> (arm, arm that is subtracted or None).
_HEADLINE = {
    "CompoDistill": ("compodistill", None),
    "SFT at equal compute": ("sft-equal-compute", None),
    "CompoDistill over SFT at equal compute": ("compodistill", "sft-equal-compute"),
}
BySeed = dict[int, dict[str, Any]]
Arms = Mapping[str, "Resolved | str"]


def build(records: Records, arms: Arms, seeds: int, quick: bool = False) -> dict[str, Any]:
    """Everything that tables and plots show.

    Args:
        records: of runs.jsonl.
        arms: name -> what it resolves to, or why it is absent from this package.
        seeds: 0 to seeds - 1 are shown.
        quick: whether the records are of a quick run.
    """
    by_arm = {name: _of_arm(records, arms[name], seeds) for name in ARMS}
    used = [record for runs in by_arm.values() for record in runs.values()]
    newest = max(used, key=lambda r: r["date"], default=None)
    keys = [resolved.key for resolved in arms.values() if not isinstance(resolved, str)]
    return {
        "theme": THEME,
        "command": COMMAND + (" --quick" if quick else ""),
        "date": newest["date"] if newest else None,
        "environment": newest["environment"] if newest else None,
        "machines": sorted({_machine(record["environment"]) for record in used}),
        "headline": {} if quick else _headline(by_arm, seeds),
        "quick": quick,
        "seeds": seeds,
        "evaluation": {**EVALUATION, **_questions(used)},
        "commits": sorted({r["commit"] for r in used if r["commit"]}),
        "arms": {name: _arm(name, arms[name], by_arm[name], seeds) for name in ARMS},
        "tables": {name: _table(name, t, by_arm, arms) for name, t in TABLES.items()},
        "stale": sorted({f"{r['arm']} ({r['key']})" for r in stale(records, keys)}),
    }


def _machine(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    named = [f"{n} {versions[n]}" for n in ("torch", "transformers") if versions.get(n)]
    return ", ".join([environment["processor"], f"{environment['threads']} thread per run", *named])


def _of_arm(records: Records, resolved: Resolved | str, seeds: int) -> BySeed:
    if isinstance(resolved, str):
        return {}
    return {s: records[resolved.key, s] for s in range(seeds) if (resolved.key, s) in records}


def _arm(name: str, resolved: Resolved | str, runs: BySeed, seeds: int) -> dict[str, Any]:
    missing = [seed for seed in range(seeds) if seed not in runs]
    if isinstance(resolved, str):
        return {"absent": resolved, "missing": missing}
    return {
        "key": resolved.key,
        "recipe": resolved.arm.recipe,
        "options": resolved.options,
        "factor": resolved.factor,
        "missing": missing,
    }


def _questions(used: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Independent observations per group: a pair of captions, asked in both orders, is one."""
    found = dict.fromkeys(GROUPS, 0)
    for kind in used[0]["student"]["kinds"].values() if used else ():
        # The orders of a pair are two questions.
        found[kind["group"]] += kind["n"] // (2 if kind["group"] == "CR" else 1)
    return {"observations": found}


def _values(runs: BySeed, value: Callable[[Any], float | None]) -> dict[int, float]:
    found = {seed: value(record) for seed, record in runs.items()}
    return {seed: number for seed, number in found.items() if number is not None}


def _accuracy(group: str) -> Callable[[Any], float]:
    return lambda record: record["student"]["averages"][group]


def _similarity(record: Any) -> float | None:
    """Mean over matched layers, after training."""
    matched = list((record["similarity"] or {"after": {}})["after"].values())
    return sum(matched) / len(matched) if matched else None


def _table(name: str, chosen: Table, by_arm: Mapping[str, BySeed], arms: Arms) -> dict[str, Any]:
    reference = by_arm[chosen.reference]
    rows = [_row(arm, _label(name, arm), by_arm[arm], arms[arm], reference) for arm in chosen.arms]
    teacher = _teacher(by_arm[chosen.teacher_of]) if chosen.teacher_of else None
    for row in rows:
        if row["arm"] == chosen.reference:
            row["against"] = None
        if chosen.teacher_of and _teachers(by_arm[row["arm"]]) - {teacher and teacher["name"]}:
            row["similarity"] = summary([])  # with another teacher
    found: dict[str, Any] = {
        "letter": chosen.letter,
        "title": chosen.title,
        "note": chosen.note,
        "reference": _label(name, chosen.reference),
        "teacher": teacher,
        "shows_teacher": bool(chosen.teacher_of),
        "chance": _chance(record for arm in chosen.arms for record in by_arm[arm].values()),
        "rows": rows,
        "also": [
            {
                "label": f"{_label(name, arm)} against {_label(name, less)}",
                "against": _against(by_arm[arm], by_arm[less]),
            }
            for arm, less in chosen.also
        ],
    }
    if chosen.curve:
        found["curves"] = {arm: curve(by_arm[arm]) for arm in chosen.arms}
        found["reached"] = {arm: reached(by_arm[arm]) for arm in chosen.arms}
    return found


def _label(table_name: str, arm: str) -> str:
    return ROW_LABELS.get((table_name, arm), ARMS[arm].label)


def _teachers(runs: BySeed) -> set[str | None]:
    return {record["teacher_name"] for record in runs.values()}


def _teacher(runs: BySeed) -> dict[str, Any] | None:
    """One model on the same questions: an interval over questions, none over seeds."""
    record = next((record for record in runs.values() if record["teacher"]), None)
    if record is None:
        return None
    observations = _questions([record])["observations"]
    averages = record["teacher"]["averages"]
    return {
        "name": record["teacher_name"],
        **{
            group: {
                "mean": averages[group],
                "questions95": wilson_interval(averages[group], observations[group]),
            }
            for group in GROUPS
        },
    }


def _chance(runs: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """Accuracy of guessing: mean over the kinds of a group, as the accuracies are."""
    kinds = next((list(r["student"]["kinds"].values()) for r in runs), None)
    if kinds is None:
        return None
    return {g: statistics.fmean(k["chance"] for k in kinds if k["group"] == g) for g in GROUPS}


def _against(runs: BySeed, reference: BySeed) -> dict[str, Any]:
    return {
        group: paired(_values(runs, _accuracy(group)), _values(reference, _accuracy(group)))
        for group in GROUPS
    }


def _row(
    arm: str,
    label: str,
    runs: BySeed,
    resolved: Resolved | str,
    reference: BySeed,
) -> dict[str, Any]:
    kinds = list(next(iter(runs.values()))["student"]["kinds"]) if runs else []
    first = next(iter(runs.values()), None)
    accuracy = {group: _values(runs, _accuracy(group)) for group in GROUPS}
    return {
        "arm": arm,
        "label": label,
        "absent": resolved if isinstance(resolved, str) else None,
        "seeds": sorted(runs),
        **{group: summary(list(accuracy[group].values())) for group in GROUPS},
        "by_seed": {group: {str(s): v for s, v in accuracy[group].items()} for group in GROUPS},
        "against": _against(runs, reference),
        "shuffled": {g: summary([r["shuffled"][g] for r in runs.values()]) for g in GROUPS if runs},
        "kinds": {
            kind: summary([r["student"]["kinds"][kind]["accuracy"] for r in runs.values()])
            for kind in kinds
        },
        "similarity": summary(list(_values(runs, _similarity).values())),
        "steps": sum(first["steps"]) if first else None,
        "cpu_seconds": summary(list(_values(runs, lambda r: r["cpu_seconds"]).values())),
        "commits": sorted({r["commit"] for r in runs.values() if r["commit"]}),
    }


def curve(runs: BySeed) -> list[dict[str, Any]]:
    """Mean, spread, interval and each seed's value at every step that was measured."""
    steps = sorted({point["step"] for record in runs.values() for point in record["curve"]})
    at = {s: {p["step"]: p for p in r["curve"]} for s, r in runs.items()}

    def of(name: str, step: int) -> dict[str, Any]:
        values = {s: p[step][name] for s, p in at.items() if name in p.get(step, {})}
        by_seed = {str(s): value for s, value in values.items()}
        return {**summary(list(values.values())), "by_seed": by_seed}

    return [
        {"step": step, **{name: of(name, step) for name in (*GROUPS, "similarity")}}
        for step in steps
    ]


def reached(runs: BySeed) -> dict[str, int | None]:
    """Seed -> the first measured step with a CR of REACHED; None: not in this run."""
    return {
        str(seed): next((p["step"] for p in r["curve"] if p["CR"] >= REACHED), None)
        for seed, r in runs.items()
    }


def reached_cell(steps: Mapping[str, int | None]) -> str:
    """ "2600 [2300, never]": median, first and last seed; a seed that never got there is last."""
    if not steps:
        return NOT_SAID
    ordered = sorted(math.inf if step is None else step for step in steps.values())
    shown = [NEVER if step == math.inf else str(step) for step in ordered]
    # The higher of two in the middle: a step that was measured, and never between.
    return f"{shown[len(shown) // 2]} [{shown[0]}, {shown[-1]}]"


def _headline(by_arm: Mapping[str, BySeed], seeds: int) -> dict[str, Any]:
    """None in place of a number that a seed is missing of."""
    found = {}
    for name, (arm, less) in _HEADLINE.items():
        for group in GROUPS:
            values = _values(by_arm[arm], _accuracy(group))
            got = paired(values, _values(by_arm[less], _accuracy(group))) if less else None
            shown = got or summary(list(values.values()))
            mean = shown["mean"] if shown["n"] == seeds else None
            found[f"{name}, {group}"] = headline(mean, "fraction correct", "more")
    return found


def markdown(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """The page of the tables."""
    title = "# The paper's tables in miniature"
    parts = [title, *([QUICK_NOTE] if report["quick"] else []), described(report)]
    for found in report["tables"].values():
        parts += [f"## ({found['letter']}) {found['title']}", *_table_text(found, report)]
    parts += [f"![{name}]({name})" for name in plots]
    absent = {name: arm["absent"] for name, arm in report["arms"].items() if "absent" in arm}
    if absent:
        parts += ["## Not in this package", _list(f"{n}: {why}" for n, why in absent.items())]
    if report["stale"]:
        parts += [
            "## Records of another version",
            "Package, teacher, scenes or recipe have changed since; they are in no table.",
            _list(report["stale"]),
        ]
    return "\n\n".join(parts) + "\n"


def readme_text(report: Mapping[str, Any], page: str) -> str:
    """The same tables for the README, with a link to the page."""
    parts = [f"{described(report)} [Page with plots]({page})."]
    for name, found in report["tables"].items():
        if any(row["seeds"] for row in found["rows"]):
            caption, *rest = _table_text(found, report)
            parts += [f"**({found['letter']}) {found['title']}.** {caption}", *rest]
        else:
            parts.append(f"({found['letter']}) {found['title']}: not run yet (`--tables {name}`).")
    return "\n\n".join(parts)


def _list(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def described(report: Mapping[str, Any]) -> str:
    """What the numbers are, what the intervals cover, and where they were made."""
    if report["environment"] is None:
        return f"No run yet: `{report['command']}`."
    counts = report["evaluation"]["observations"]
    widest = {g: 100 * (wilson_interval(0.5, n)[1] - 0.5) for g, n in counts.items() if n}
    error = " and ".join(f"±{width:.1f} points in {g}" for g, width in widest.items())
    return (
        f"`{report['command']}`, seeds: {report['seeds']}, {report['date']}, "
        f"{'; '.join(report['machines'])}; commits "
        f"{', '.join(report['commits']) or 'not recorded'}. {TEACHERS} Accuracy: mean ± standard "
        "deviation over seeds of weights and training scenes. Differences: paired by seed, with "
        "the 95% interval of Student's t. All seeds answer the same test scenes "
        f"(seed {report['evaluation']['evaluate_seed']}, drawn for these tables alone), so the "
        "intervals cover the training's chance and not the choice of scenes: for one model that "
        f"adds up to {error}, for a difference up to twice that. Rows at chance in CR are not told "
        "apart by it. Similarity: cosine with the teacher's attention over visual tokens, mean of "
        "text rows and matched layers, 32 validation samples. CPU s: user + system seconds of a "
        "run with its evaluation, mean ± standard deviation of runs that were never interrupted; "
        "other load on the machine moves it."
    )


def _table_text(found: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Caption and table."""
    steps = "reached" in found
    columns = ["", "seeds", *(f(g) for g in GROUPS for f in (str, lambda g: f"{g} against it"))]
    columns += ["similarity", *([f"steps to CR {REACHED:g}"] if steps else []), "steps", "CPU s"]
    rows = [_teacher_cells(found["teacher"], len(columns))] if found["shows_teacher"] else []
    rows += [_cells(row, found, report["seeds"]) for row in found["rows"]]
    if found["chance"]:
        rows.append(_accuracy_cells("chance", found["chance"], len(columns)))
    caption = f"Differences are against {found['reference']}."
    caption += f" {found['note']}" if found["note"] else ""
    also = _also(found, report["seeds"])
    return [caption + _compute_note(found, report), table(columns, rows), *([also] if also else [])]


def _also(found: Mapping[str, Any], seeds: int) -> str:
    """Further differences as a list; those without a pair are left out."""
    pairs = [pair for pair in found["also"] if pair["against"][GROUPS[0]]["n"]]
    return _list(
        f"{pair['label']}: "
        + ", ".join(f"{group} {difference(pair['against'][group], seeds)}" for group in GROUPS)
        for pair in pairs
    )


def _compute_note(found: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What equal compute means, in the table that has such a row."""
    for row in found["rows"]:
        arm = ARMS[row["arm"]]
        if arm.compute_of:
            factor = report["arms"][row["arm"]].get("factor")
            times = "" if factor is None else f": {factor:.2f} times the steps of SFT"
            return (
                f" Equal compute{times}, so that counted operations (student, teacher's forward, "
                f"vision encoder) are those of {ARMS[arm.compute_of].label}; CPU seconds beside."
            )
    return ""


def _teacher_cells(teacher: Mapping[str, Any] | None, columns: int) -> list[str]:
    if teacher is None:
        return ["teacher", NOT_RUN, *[NOT_SAID] * (columns - 2)]
    means = {group: teacher[group]["mean"] for group in GROUPS}
    return _accuracy_cells("teacher (one model)", means, columns)


def _accuracy_cells(label: str, means: Mapping[str, float], columns: int) -> list[str]:
    """A row of accuracies alone."""
    cells = [label, NOT_SAID]
    cells += [c for group in GROUPS for c in (f"{means[group]:.3f}", NOT_SAID)]
    return cells + [NOT_SAID] * (columns - len(cells))


def _cells(row: Mapping[str, Any], found: Mapping[str, Any], seeds: int) -> list[str]:
    state = f"{len(row['seeds'])} of {seeds}"
    if row["absent"]:
        state = "absent"
    elif not row["seeds"]:
        state = NOT_RUN
    cells = [row["label"], state]
    for group in GROUPS:
        against = row["against"]
        cells += [mean_sd(row[group]), difference(against[group], seeds) if against else NOT_SAID]
    cells.append(mean_sd(row["similarity"], 2))
    if "reached" in found:
        cells.append(reached_cell(found["reached"][row["arm"]]))
    steps = row["steps"]
    return [*cells, NOT_SAID if steps is None else str(steps), mean_sd(row["cpu_seconds"], 0)]


def mean_sd(found: Mapping[str, Any], digits: int = 3) -> str:
    """ "0.985 ± 0.003", or without spread for one seed."""
    if found["mean"] is None:
        return NOT_SAID
    spread = "" if found["sd"] is None else f" ± {found['sd']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}"


def difference(found: Mapping[str, Any], seeds: int) -> str:
    """ "+0.480 [+0.451, +0.509]", without interval for one seed; of fewer pairs than `seeds` with
    their number."""
    if found["mean"] is None:
        return NOT_SAID
    interval = "" if found["sd"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    if found["n"] < seeds:
        interval += f" (n = {found['n']})"
    return f"{found['mean']:+.3f}{interval}"
