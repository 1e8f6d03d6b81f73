"""The text of a model card, section by section; see model_card.py."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cdfast.config import (
    EMBEDDED_SCENES,
    EMBEDDED_TEACHERS,
    HUB_ARGUMENTS,
    Recipe,
    StageRecipe,
    to_dict,
)
from cdfast.report import BEFORE_AFTER, CAVEAT, PRIVILEGED_TEACHERS, STUDENT
from cdfast.terms import TERMS, WEIGHTS

# Stands for the model's name on the hub until it has one.
HERE = "PATH_OR_HUB_NAME"
NO_LICENSE = "None is stated. Licenses of the base models and of the training data apply."
PAPER = """```bibtex
@inproceedings{kim2026compodistill,
  author    = {Kim, Jiwan and Kim, Kibum and Seo, Sangwoo and Park, Chanyoung},
  title     = {CompoDistill: Attention Distillation for Compositional Reasoning in Multimodal LLMs},
  booktitle = {ICLR},
  year      = {2026},
  note      = {arXiv:2510.12184}
}
```"""
# Options of a recipe that have a place of their own in the card, or say nothing about the weights.
_SHOWN_APART = (
    *("name", "description", "teacher", "student", "vision_tower", "data", "image_root", "stages"),
    *("eval_data", "eval_image_root", "output_dir", "compare", "architecture", "license"),
)
_STAGE_SHOWN_APART = (
    *("stage", "data", "image_root", "epochs", "max_steps", "batch_size", "learning_rate"),
    *("gradient_accumulation_steps", *WEIGHTS),
)

_OWN_CODE = "modeling_cdfast_llava.py"
_FUSED = (
    "The teacher's adapter and P_s were then fused into one projector by `python -m cdfast.fuse`."
)

Results = Mapping[str, Any]


def card_text(
    results: Results, *, code: Sequence[str], fused: bool, license: str | None, taken_over: bool
) -> str:
    """The sections below the title.

    Args:
        results: of results.json, models and data named without paths, `recipe` perhaps empty.
        code: files that loading the model runs.
        fused: its projector was made by `cdfast.fuse`.
        license: as the front matter states it.
        taken_over: the front matter has something of the card of the model it was made of.
    """
    recipe = results["recipe"]
    sections = {
        "Loading it": _loading(code),
        "How it was made": _making(results, fused, taken_over),
        "Accuracy": _accuracy(results),
        "Attention similarity": _similarity(results),
        "Not measured": _not_measured(results),
        "Environment": _environment(results),
        "License": license_text(license),
        "Citation": f"{_cited(recipe)}\n\n{PAPER}",
    }
    return "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items() if body)


def _loading(files: Sequence[str]) -> str:
    option = ", trust_remote_code=True" if files else ""
    code = (
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'source = "{HERE}"\n'
        f"processor = AutoProcessor.from_pretrained(source{option})\n"
        f"model = AutoModelForImageTextToText.from_pretrained(source{option})\n```\n\n"
    )
    if not files:
        return f"{code}No code of this repository is run: the classes are those of transformers."
    text = (
        f"{code}`trust_remote_code=True` means that {_listed(files)} of this repository is run on "
        "your machine with your rights. Read it first, and name the `revision` that you have read."
    )
    if _OWN_CODE in files:
        text += (
            " It is short: a LLaVA model whose projector is the teacher's followed by its own. "
            "With the package cdfast installed, `import cdfast` brings the same classes, and the "
            "option can be left out."
        )
    return text


def _making(results: Results, fused: bool, taken_over: bool) -> str:
    recipe = results["recipe"]
    if not recipe:
        but = (
            " but what the front matter of this card says, which is that of the card of the model "
            "it was made of"
        )
        text = (
            f"Nothing is known about its training{but if taken_over else ''}: no recipe was found "
            "beside its weights."
        )
        return f"{text}\n\n{_FUSED}" if fused else text
    parts = [_origin(recipe)]
    if results.get("checkpoint"):
        parts.append(
            f"The weights are those of {markdown(results['checkpoint'])}: what comes after it in "
            "the recipe was not run on them."
        )
    if fused:
        parts.append(f"{_FUSED} The numbers below are of the model before that.")
    parts.append(f"Training data, by name: {_listed(_data_names(recipe))}.")
    parts.append(_stage_table(results))
    changed = [f"{k} {_shown(v)}" for k, v in _changed(recipe, to_dict(Recipe()), _SHOWN_APART)]
    if changed:
        parts.append(f"Options that differ from the defaults: {markdown('; '.join(changed))}.")
    return "\n\n".join(part for part in parts if part)


def _origin(recipe: Mapping[str, Any]) -> str:
    teacher, student = recipe.get("teacher"), recipe.get("student")
    if not teacher:
        return f"Trained with cdfast from {_model(student)}, without a teacher."
    text = f"Distilled with cdfast from the teacher {_model(teacher)} into {_model(student)}."
    if recipe.get("taf"):
        kind = recipe.get("student_projector")
        text += (
            " It sees through the teacher's vision encoder and frozen adapter P_t: visual tokens "
            f"are P_s(P_t(z)), with its own P_s ({markdown(kind)})."
        )
    if any(stage.get("alignment_weight") for stage in recipe.get("stages", [])):
        text += " Its attention over visual tokens was aligned with the teacher's."
    return text


def _model(source: Any) -> str:
    embedded = source in (*EMBEDDED_SCENES, *EMBEDDED_TEACHERS)
    return f"{markdown(source)} (embedded in cdfast)" if embedded else f"{markdown(source)}"


def _data_names(recipe: Mapping[str, Any]) -> list[str]:
    files = [f for s in recipe.get("stages", []) for f in s.get("data") or recipe.get("data", [])]
    return [Path(file).name for file in dict.fromkeys(files)]


def _stage_table(results: Results) -> str:
    recipe, done = results["recipe"], results.get("stages", [])
    processes = results.get("environment", {}).get("processes")
    rows = []
    for number, stage in enumerate(recipe.get("stages", [])):
        ran = done[number] if number < len(done) else {}
        samples = stage["batch_size"] * stage["gradient_accumulation_steps"]
        losses = [f"{t.label} {stage[t.weight]:g}" for t in TERMS if stage.get(t.weight)]
        default = dataclasses.asdict(StageRecipe(stage=stage["stage"]))
        others = _changed(stage, default, _STAGE_SHOWN_APART)
        rows.append(
            [
                stage["stage"],
                ran.get("steps", "not recorded"),
                samples * processes if processes else f"{samples} per process",
                f"{stage['learning_rate']:g}",
                " + ".join(losses),
                "; ".join(f"{k} {_shown(v)}" for k, v in others),
            ]
        )
    heading = ["stage", "steps", "samples per step", "learning rate", "losses", "other options"]
    return _table(heading, rows) if rows else ""


def _changed(
    values: Mapping[str, Any], default: Mapping[str, Any], apart: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Options that are not as by default; TrainingArguments by their own names."""
    for name, value in values.items():
        if name == "arguments":
            yield from ((k, v) for k, v in value.items() if k not in HUB_ARGUMENTS)
        elif name not in apart and value != default.get(name):
            yield name, value


def _accuracy(results: Results) -> str:
    evaluation = results.get("evaluation") or {}
    models = evaluation.get("models", {})
    if STUDENT not in models:
        known = "Not measured: the run evaluated no suite of questions."
        return known if results["recipe"] else "Not known."
    student = models[STUDENT]
    others = [name for name in models if name != STUDENT]
    blind = evaluation.get("text_only", {})
    rows = []
    for kind, entry in student["kinds"].items():
        low, high = entry["ci95"]
        beside = [_number(models[name]["kinds"].get(kind, {}).get("accuracy")) for name in others]
        interval = f"{_number(low)} to {_number(high)}"
        row = [kind, entry["n"], _number(entry["accuracy"]), interval, *beside]
        rows.append([*row, _number(blind.get(kind)), _number(entry["chance"])])
    for group, value in student["averages"].items():
        beside = [_number(models[name]["averages"].get(group)) for name in others]
        row = [f"{group}, mean of its kinds", "", _number(value), "", *beside]
        rows.append([*row, _number(blind.get(group)), _number(student["averages_chance"][group])])
    heading = ["kind", "questions", "accuracy", "95% interval", *others]
    heading += ["trained without images", "chance"]
    where = markdown(evaluation.get("suite"))
    split = evaluation.get("split")
    seed = evaluation.get("seed")
    where += f", {markdown(split)} scenes" if split else ""
    where += f", seed {markdown(seed)}" if seed is not None else ""
    caveat = recipe_caveat(results["recipe"])
    text = (
        f"Suite: {where}. No question is about a scene that was trained on. Intervals are Wilson's "
        "and count the two orders of a pair of captions as one observation."
    )
    return f"{text}\n\n{_table(heading, rows)}" + (f"\n\n{caveat}" if caveat else "")


def recipe_caveat(recipe: Mapping[str, Any]) -> str:
    """What must stand beside accuracies of students of a teacher with privileged supervision."""
    return " ".join(CAVEAT.split()) if recipe.get("teacher") in PRIVILEGED_TEACHERS else ""


def _similarity(results: Results) -> str:
    found = results.get("similarity") or {}
    if "after" not in found:
        return "Not measured." if results["recipe"].get("teacher") else ""
    rows = [
        [layer, _listed(map(str, theirs)), *(_matched(found, part, layer) for part in BEFORE_AFTER)]
        for layer, theirs in found["matches"].items()
    ]
    return (
        "Cosine similarity of head-mean attention over visual tokens (rows of text tokens) with "
        f"the teacher's matched layers, on {found['samples']} samples.\n\n"
        + _table(
            ["student layer", "teacher layers", *(f"{p} training" for p in BEFORE_AFTER)], rows
        )
    )


def _matched(found: Mapping[str, Any], part: str, layer: str) -> str:
    return _number(found.get(part, {}).get("matched", {}).get(layer))


def _not_measured(results: Results) -> str:
    missing = ["bias", "safety", "other languages", "speed when serving"]
    recipe = results["recipe"]
    if results.get("evaluation"):
        missing = ["public benchmarks", "photographs", *missing]
        if recipe.get("evaluate") == "miniature-photos":
            missing.remove("photographs")
    else:
        missing = ["accuracy", *missing]
    if not results.get("similarity"):
        missing.insert(0, "attention similarity with a teacher")
    if not recipe:
        return f"Nothing is known of: {_listed(missing)}."
    return f"This run did not measure: {_listed(missing)}. It was one run, with one seed."


def _environment(results: Results) -> str:
    found = results.get("environment")
    if not found:
        return "Not recorded."
    versions = [f"{name} {v}" for name, v in found.get("versions", {}).items() if v]
    text = f"Python {found.get('python')}, {', '.join(versions)}; {found.get('device')}, "
    text += f"processes: {found.get('processes')}"
    seconds = results.get("seconds")
    return markdown(text) + (f"; {seconds} s in all." if seconds is not None else ".")


def _cited(recipe: Mapping[str, Any]) -> str:
    if any(stage.get("alignment_weight") for stage in recipe.get("stages", [])):
        return "The method is CompoDistill:"
    return "cdfast was written for CompoDistill:"


def license_text(license: str | None) -> str:
    """The section about the license; None: none was stated."""
    return (
        f"{markdown(license)}, as stated by the people who made the model."
        if license
        else NO_LICENSE
    )


# -- Markdown --------------------------------------------------------------------------------------


def _table(heading: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(
        "| " + " | ".join(cell if cell == "---" else markdown(cell) for cell in line) + " |"
        for line in lines
    )


def markdown(value: Any) -> str:
    """A value in one line of Markdown, whatever is in it."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed(values: Any) -> str:
    return ", ".join(markdown(value) for value in values) or "none"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
