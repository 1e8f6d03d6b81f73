"""Evaluation of image-text models: benchmarks of compositional reasoning, and the miniature's.

    python -m cdfast.evaluate MODEL [MODEL ...] [--per-kind N] [--json FILE]
    python -m cdfast.evaluate MODEL [MODEL ...] --tasks TASK [TASK ...] [--data DIR]

With --tasks see docs/evaluation.md and `cdfast.evaluation`. Without, the miniature: each
question is scored twice, the most likely of its choices (accuracy), and whether the model's free
greedy continuation begins with the answer (greedy). Which of two captions fits is asked in both
orders. Chance is 1 / number of choices; text-only is a model trained without images.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast.config import EMBEDDED_TEACHERS, MINIATURE
from cdfast.evaluation.evaluate_tasks import evaluate_tasks
from cdfast.evaluation.run import SCORINGS
from cdfast.evaluation.scoring import MAX_NEW_TOKENS, likelihoods
from cdfast.evaluation.statistics import wilson_interval
from cdfast.evaluation.tasks import SHORTHANDS, TASKS
from cdfast.images import DataError
from cdfast.miniature.suites import Question, miniature_suite, with_shuffled_images
from cdfast.miniature.worlds import WORLDS
from cdfast.models import load_config
from cdfast.synthetic import read_card, teacher_path

__all__ = ["Question", "evaluate", "miniature_suite", "results_table", "with_shuffled_images"]


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 64,
    shuffle_images: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a LLaVA-like model on the questions.

    Args:
        model: an image-text model; it is evaluated in its own dtype, on its own device.
        processor: the model's processor, with a chat template.
        questions: in any order.
        batch_size: prompts at a time; prompts of similar length go together.
        shuffle_images: a control; each question is asked about another question's image.
        seed: of the shuffle.
        progress: whether to show a bar.

    Returns:
        `kinds`: for each kind `accuracy` (most likely choice; orders averaged), `both_orders`
        (right in every order), `greedy` (free continuation), `chance`, `n` (questions), `ci95`
        (Wilson, counting a pair as one observation) and `group`; `averages`: mean accuracy over
        the kinds of each group; `averages_greedy` and `averages_chance` likewise;
        `shuffled_images`; `seconds`.
    """
    if not questions:
        raise ValueError("questions: expected at least one, got none")
    start = time.perf_counter()
    if shuffle_images:
        questions = with_shuffled_images(questions, seed)
    training = model.training
    model.eval()
    with tqdm(total=len(questions), desc="evaluation", disable=not progress, leave=False) as bar:
        scores = likelihoods(model, processor, questions, batch_size=batch_size, advance=bar.update)
    model.train(training)
    right = [_is_right(question, score.log) for question, score in zip(questions, scores)]
    report = _summary(questions, right, [score.greedy for score in scores])
    report["shuffled_images"] = shuffle_images
    report["seconds"] = round(time.perf_counter() - start, 2)
    return report


def _is_right(question: Question, scores: Sequence[float]) -> bool:
    """A model that yields NaN is wrong, not lucky."""
    if any(math.isnan(score) for score in scores):
        return False
    return question.choices[scores.index(max(scores))] == question.answer


def _summary(
    questions: Sequence[Question], right: Sequence[bool], greedy: Sequence[bool]
) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(question.kind for question in questions):
        chosen = [i for i, question in enumerate(questions) if question.kind == kind]
        pairs: dict[int, list[bool]] = {}
        for i in chosen:
            pairs.setdefault(questions[i].pair, []).append(right[i])
        accuracy = _mean(right[i] for i in chosen)
        kinds[kind] = {
            "accuracy": accuracy,
            "both_orders": _mean(all(orders) for orders in pairs.values()),
            "greedy": _mean(greedy[i] for i in chosen),
            "chance": _mean(1 / len(questions[i].choices) for i in chosen),
            "n": len(chosen),
            "ci95": wilson_interval(accuracy, len(pairs)),
            "group": questions[chosen[0]].group,
        }
    report: dict[str, Any] = {"kinds": kinds}
    for name, field in (
        ("averages", "accuracy"),
        ("averages_greedy", "greedy"),
        ("averages_chance", "chance"),
    ):
        report[name] = {
            group: _mean(kind[field] for kind in kinds.values() if kind["group"] == group)
            for group in dict.fromkeys(kind["group"] for kind in kinds.values())
        }
    return report


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def results_table(reports: dict[str, dict[str, Any]], text_only: dict[str, float]) -> Table:
    """One row per kind, one column per model, beside chance and a model trained without images."""
    table = Table(caption="accuracy (right in every order); text-only: trained without images")
    for heading in ("kind", "n", "chance", "text-only", *reports):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    first = next(iter(reports.values()))
    for group, chance in first["averages_chance"].items():
        members = [name for name, kind in first["kinds"].items() if kind["group"] == group]
        for name in members:
            kind = first["kinds"][name]
            cells = [
                f"{report['kinds'][name]['accuracy']:.3f} "
                f"({report['kinds'][name]['both_orders']:.2f})"
                for report in reports.values()
            ]
            table.add_row(
                name, str(kind["n"]), f"{kind['chance']:.2f}", _cell(text_only.get(name)), *cells
            )
        baseline = [text_only[name] for name in members if name in text_only]
        table.add_row(
            f"{group} average",
            "",
            f"{chance:.2f}",
            _cell(_mean(baseline) if len(baseline) == len(members) else None),
            *(f"{report['averages'][group]:.3f}" for report in reports.values()),
            style="bold",
            end_section=True,
        )
    return table


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1; got {text!r}")
    return int(text)


def command_parser() -> argparse.ArgumentParser:
    """The command line of `python -m cdfast.evaluate`."""
    parser = argparse.ArgumentParser("cdfast.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="checkpoint folder, hub name or embedded teacher"
    )
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument(
        "--per-kind", type=_at_least_one, default=300, help="caption pairs per kind (miniature)"
    )
    parser.add_argument("--vqa-per-kind", type=_at_least_one, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=_at_least_one, help="default: 64; with --tasks: 16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: the checkpoint's own",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    alone = parser.add_argument_group("without --tasks")
    alone.add_argument("--suite", choices=list(WORLDS), default=MINIATURE)
    alone.add_argument("--shuffle-images", action="store_true", help="add the image-blind control")
    known = ", ".join([*TASKS, *SHORTHANDS])
    group = parser.add_argument_group("tasks")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help=f"some of {known}")
    group.add_argument("--data", type=Path, metavar="DIR", help="holds a folder for every task")
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="results of every sample, with which an interrupted evaluation goes on, and report",
    )
    group.add_argument("--scoring", choices=SCORINGS, default="both")
    group.add_argument(
        "--length-normalise",
        action="store_true",
        help="divide the log-likelihood of an answer by its number of tokens",
    )
    group.add_argument("--max-new-tokens", type=_at_least_one, default=MAX_NEW_TOKENS)
    group.add_argument(
        "--limit", type=_at_least_one, metavar="N", help="the first N records of every subset"
    )
    group.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="skip: leave out and count records that cannot be used",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser()
    options = parser.parse_args(arguments)
    if options.json is not None:  # before hours of evaluation, not after
        options.json.parent.mkdir(parents=True, exist_ok=True)
    if options.batch_size is None:
        options.batch_size = 16 if options.tasks else 64

    def load(name: str) -> tuple[Any, Any]:
        try:
            source = teacher_path(name) if name in EMBEDDED_TEACHERS else name
            load_config(source)  # refuses code from the hub
            model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=options.dtype)
            return model.to(options.device).eval(), AutoProcessor.from_pretrained(source)
        # Configurations, tokenizers and unpicklers raise a dozen errors on damaged files.
        except Exception as error:
            parser.error(
                f"model {name!r} cannot be loaded: {error} Expected a vision-language checkpoint "
                "with its processor, or a hub name."
            )

    if not options.tasks:
        _evaluate_suite(options, load)
        return 0
    if options.shuffle_images:
        parser.error("--shuffle-images: expected without --tasks; give one of the two")
    try:
        content = evaluate_tasks(options, load)
    except (DataError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is scored", file=sys.stderr)
        return 130
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _evaluate_suite(options: argparse.Namespace, load: Callable[[str], tuple[Any, Any]]) -> None:
    questions = miniature_suite(
        options.split, options.per_kind, options.vqa_per_kind, options.seed, WORLDS[options.suite]
    )
    reports: dict[str, dict[str, Any]] = {}
    for name in options.models:
        model, processor = load(name)
        size = options.batch_size
        reports[name] = evaluate(model, processor, questions, batch_size=size)
        if options.shuffle_images:
            control = evaluate(model, processor, questions, batch_size=size, shuffle_images=True)
            reports[f"{name}, shuffled images"] = control
    text_only = read_card(options.suite).get("text_only", {})
    Console().print(results_table(reports, text_only))
    if options.json is not None:
        settings = {name: getattr(options, name) for name in ("suite", "split", "seed")}
        content = {"settings": settings, "text_only": text_only, "models": reports}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
