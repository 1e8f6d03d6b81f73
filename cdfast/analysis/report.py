"""The analysis as sections of a page: of one run, or of several beside each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdfast.analysis.explorer_page import SCRIPT, explorer_section
from cdfast.analysis.numbers import (
    Analyses,
    Content,
    bounds,
    layers_table,
    of_attention,
    of_groups,
    of_similarity,
    of_substitution,
    summary_rows,
)
from cdfast.page import details, figure, fixed, listed, page, table, text

# Key of an analysis, or of an explorer, that there is not: the reason, one sentence.
UNAVAILABLE = "unavailable"
ANALYSIS_PAGE = "report.html"
EXPLORER_FILE = "explorer.json"
TEACHER = "teacher"

_INTERVALS = """Intervals are 95% bootstraps over questions, each for itself: where many are looked
at, some exclude 0 by chance. A correlation says nothing about cause."""


def write_analysis_page(folder: Path, content: Content, explorer: Content) -> Path:
    """Write `folder/report.html` of one analysis, self-contained.

    Args:
        folder: of analysis.json.
        content: what that holds.
        explorer: of `explorer_data`, or why there is none.
    """
    models = content["models"]
    named = "".join(f"<li>{text(role)}: {text(source)}</li>" for role, source in models.items())
    settings = json.dumps({"settings": content["settings"], "ran_on": content["ran_on"]}, indent=1)
    cut = "<p>It was stopped before its last question.</p>" if content["interrupted"] else ""
    title = "Attention analysis"
    sections = {
        title: analysis_section({"student": content}),
        "Attention explorer": explorer_part(explorer),
        "Settings": details("As in analysis.json", f"<pre>{text(settings)}</pre>"),
    }
    path = folder / ANALYSIS_PAGE
    header = f"<h1>{title}</h1><ul>{named}</ul>{cut}"
    script = SCRIPT if explorer.get("samples") else ""
    path.write_text(page(title, header, sections, script), encoding="utf-8")
    return path


def explorer_part(explorer: Content | None) -> str:
    """The explorer, or a sentence that says why there is none."""
    if not explorer:
        return ""
    if UNAVAILABLE in explorer:
        return f"<p>There is no explorer: {text(explorer[UNAVAILABLE])}</p>"
    return explorer_section(explorer)


def analysis_section(
    analyses: Analyses, accuracy: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Figures and tables of the analyses of one or several runs.

    Args:
        analyses: run -> contents of its analysis.json, or {"unavailable": reason}.
        accuracy: run -> group of questions -> accuracy of the evaluation, of more questions than
            are analysed; where it has none, accuracy is that of the questions analysed.
    """
    if not analyses:
        return ""
    done = {run: content for run, content in analyses.items() if UNAVAILABLE not in content}
    parts = _reasons(analyses)
    if done:
        first = next(iter(done.values()))
        asked = first.get("questions") or f"Questions: {first['cases']['all']}."
        parts.append(f"<p>{text(asked)} {text(_INTERVALS)}</p>")
    if len(done) == 1:
        [(run, content)] = done.items()
        parts += [f"<h3>{text(run)}</h3>" if len(analyses) > 1 else "", *_one(content)]
    elif done:
        parts += _several(done, accuracy or {})
    return "".join(parts)


def _reasons(analyses: Analyses) -> list[str]:
    """Why runs were not analysed; runs with the same reason share a sentence."""
    runs: dict[str, list[str]] = {}
    for run, content in analyses.items():
        if UNAVAILABLE in content:
            runs.setdefault(content[UNAVAILABLE], []).append(run)
    return [
        f"<p>Attention was not analysed{text(_of(names, analyses))}: {text(reason)}</p>"
        for reason, names in runs.items()
    ]


def _of(names: Sequence[str], analyses: Analyses) -> str:
    return "" if len(names) == len(analyses) else f" in {listed(names)}"


# -- one run ---------------------------------------------------------------------------------------


def _one(content: Content) -> list[str]:
    from cdfast.analysis.plots import figures_of, inline

    scopes = content["scopes"]["groups"]
    runs = {"student": content}
    described = {
        "attention": of_attention(content["answer_attention"], scopes),
        "similarity": of_similarity(content["similarity"], scopes),
        "groups": of_groups(runs, scopes),
        "substitution": of_substitution(runs, [*scopes, *content["scopes"]["kinds"]], scopes),
    }
    parts = [layers_table(runs), _summary(content)]
    for name, drawn in figures_of(content, scopes[:3]).items():
        sentence, numbers = described[name]
        parts.append(figure(inline(drawn, f"analysis-{name}", sentence), sentence, numbers))
    return parts


def _summary(content: Content) -> str:
    heading, rows = summary_rows(content)
    caption = (
        "By group and kind of question: accuracy of each model on these questions; matched: the "
        "student's visual similarity with the teacher; r: of similarity and answer probability; "
        "change: of accuracy with the teacher's attention"
    )
    return table(caption, heading, rows)


# -- several runs ----------------------------------------------------------------------------------


def _several(runs: Analyses, accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
    from cdfast.analysis import plots

    first = next(iter(runs.values()))
    scopes = first["scopes"]["groups"][:3]
    points, where = _points(runs, accuracy, scopes)
    sentence, numbers = _matched_accuracy(points, where)
    parts = [
        layers_table(runs),
        figure(
            plots.inline(plots.matched_accuracy_figure(points), "analysis-accuracy", sentence),
            sentence,
            details("Intervals of the similarity", _intervals_table(points)),
        ),
        numbers,
    ]
    merged = {name: _merged(runs, name, scopes) for name in ("answer_attention", "similarity")}
    drawn = {
        "groups": (
            plots.groups_figure({run: c["groups"] for run, c in runs.items()}, scopes),
            of_groups(runs, scopes),
        )
    }
    swapped = {run: c for run, c in runs.items() if c["substitution"]["all"]}
    if swapped:
        panels = {s: {run: c["substitution"][s] for run, c in swapped.items()} for s in scopes}
        drawn["substitution"] = (
            plots.substitution_figure(panels),
            of_substitution(swapped, scopes, scopes),
        )
    drawn["attention"] = (
        plots.attention_figure(merged["answer_attention"], scopes),
        of_attention(merged["answer_attention"], scopes),
    )
    drawn["similarity"] = (
        plots.similarity_figure(merged["similarity"], scopes),
        of_similarity(merged["similarity"], scopes),
    )
    for name, (made, (sentence, numbers)) in drawn.items():
        parts.append(figure(plots.inline(made, f"analysis-{name}", sentence), sentence, numbers))
    return parts


def _points(
    runs: Analyses, accuracy: Mapping[str, Mapping[str, float]], scopes: Sequence[str]
) -> tuple[dict[str, dict[str, dict[str, Any]]], str]:
    """group -> run -> similarity, interval and accuracy; and what the accuracy is of."""
    evaluated = all(
        accuracy.get(run, {}).get(scope) is not None for run in runs for scope in scopes
    )
    points = {
        scope: {
            run: {
                "similarity": content["groups"][scope]["similarity"],
                "interval": content["groups"][scope]["similarity_ci95"],
                "accuracy": accuracy[run][scope]
                if evaluated
                else content["answers"][scope]["student"]["accuracy"],
            }
            for run, content in runs.items()
        }
        for scope in scopes
    }
    return points, "all test questions" if evaluated else "the questions analysed"


def _matched_accuracy(
    points: Mapping[str, Mapping[str, Mapping[str, Any]]], where: str
) -> tuple[str, str]:
    parts = []
    for group, by_run in points.items():
        ends = []
        for field in ("similarity", "accuracy"):
            order = sorted(by_run, key=lambda run: by_run[run][field])
            low, high = (f"{run} ({fixed(by_run[run][field])})" for run in (order[0], order[-1]))
            ends.append(f"{field} is lowest in {low} and highest in {high}")
        parts.append(f"{group}: {'; '.join(ends)}")
    number = len(next(iter(points.values())))
    sentence = (
        f"A point per run, {number} runs of one seed each: too few to test a relation. "
        f"Similarity: visual attention of the answer token, matched layers, on the questions "
        f"analysed; accuracy: of {where}. {'. '.join(parts)}."
    )
    rows = [
        [
            run,
            *(
                fixed(by_run[run][field])
                for by_run in points.values()
                for field in ("similarity", "accuracy")
            ),
        ]
        for run in next(iter(points.values()))
    ]
    heading = ["run", *(f"{g} {f}" for g in points for f in ("similarity", "accuracy"))]
    return sentence, table("Similarity of matched layers and accuracy of each run", heading, rows)


def _intervals_table(points: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [
        [run, group, fixed(point["similarity"]), bounds(point["interval"])]
        for group, by_run in points.items()
        for run, point in by_run.items()
    ]
    heading = ["run", "questions", "similarity", "95% interval"]
    return table("Similarity of matched layers", heading, rows, left=(1,))


def _merged(runs: Analyses, name: str, scopes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """scope -> teacher and the student of every run -> numbers per layer."""
    merged: dict[str, dict[str, Any]] = {}
    for scope in scopes:
        first = next(iter(runs.values()))[name][scope]
        merged[scope] = {TEACHER: first[TEACHER]} if TEACHER in first else {}
        for run, content in runs.items():
            # A run of this name is not the teacher.
            label = f"run {run}" if run == TEACHER else run
            merged[scope][label] = content[name][scope]["student"]
    return merged
