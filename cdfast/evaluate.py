"""Multiple-choice evaluation of image-text models by the likelihood of the answers.

    python -m cdfast.evaluate MODEL [MODEL ...] [--suite miniature] [--per-kind N] [--json FILE]

Each question is scored twice: the most likely of its choices (accuracy), and whether the model's
free greedy continuation begins with the answer (greedy). Which of two captions fits is asked in
both orders. Chance is 1 / number of choices; text-only is a model trained without images.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast.chat import chat_template
from cdfast.models import load_config
from cdfast.suites import Question, miniature_suite, with_shuffled_images
from cdfast.synthetic import read_card

__all__ = ["Question", "evaluate", "miniature_suite", "results_table", "with_shuffled_images"]

NORMAL_95 = 1.959963984540054


@dataclass
class _Row:
    """A prompt and one continuation; scores every choice that differs in its last token only."""

    question: int
    text: str
    length: int
    # Choice index -> its tokens; all but the last token are the same.
    choices: dict[int, list[int]]


def _rows(processor: Any, questions: Sequence[Question]) -> list[_Row]:
    template = chat_template(processor)
    prompts = [template.render(q.messages, f"question {q.kind}", prompt=True) for q in questions]
    # What the template puts between the prompt and an answer, such as a space.
    answer = {"role": "assistant", "content": [{"type": "text", "text": questions[0].answer}]}
    text, spans = template.answers([*questions[0].messages, answer], "question")
    separator = text[len(prompts[0]) : spans[-1][0]]
    texts: list[str] = []
    for question, prompt in zip(questions, prompts):
        texts += [prompt, *(prompt + separator + choice for choice in question.choices)]
    tokenizer = getattr(processor, "tokenizer", processor)
    encoded = tokenizer(texts, add_special_tokens=not _has_bos(tokenizer, prompts[0]))["input_ids"]
    rows: list[_Row] = []
    at = 0
    for number, question in enumerate(questions):
        prompt_ids, *full = encoded[at : at + 1 + len(question.choices)]
        # A tokenizer may merge the end of the prompt with the answer: score from where they differ.
        shared = min(_common_prefix(prompt_ids, ids) for ids in full)
        by_prefix: dict[tuple[int, ...], _Row] = {}
        for choice, ids in enumerate(full):
            tokens = ids[shared:]
            if not tokens:
                raise ValueError(f"choices: {question.choices[choice]!r} has no tokens")
            text = texts[at + 1 + choice]
            row = by_prefix.setdefault(tuple(tokens[:-1]), _Row(number, text, len(ids), {}))
            row.choices[choice] = tokens
        rows += by_prefix.values()
        at += 1 + len(question.choices)
    return rows


def _has_bos(tokenizer: Any, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _common_prefix(a: list[int], b: list[int]) -> int:
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _batch(processor: Any, rows: Sequence[_Row], questions: Sequence[Question]) -> dict[str, Any]:
    tokenizer = getattr(processor, "tokenizer", processor)
    images = [questions[row.question].image for row in rows]
    arguments: dict[str, Any] = {} if images[0] is None else {"images": images}
    return processor(
        text=[row.text for row in rows],
        padding=True,
        padding_side="right",
        add_special_tokens=not _has_bos(tokenizer, rows[0].text),
        return_tensors="pt",
        **arguments,
    )


def _logits(model: Any, batch: dict[str, Any], rows: Tensor, positions: Tensor) -> Tensor:
    """Float32 logits at the given (row, position) pairs only: a vocabulary of 150k is large."""
    outputs = model.base_model(**batch, use_cache=False)
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        return outputs.logits[rows, positions].float()
    logits = model.get_output_embeddings()(hidden[rows, positions]).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _score_batch(
    model: Any, processor: Any, rows: Sequence[_Row], questions: Sequence[Question]
) -> list[tuple[dict[int, float], bool]]:
    """Of each row the log-likelihood of its choices, and whether greedy decoding is right."""
    batch = _batch(processor, rows, questions)
    lengths = batch["attention_mask"].sum(1).tolist()
    wanted = []
    for number, row in enumerate(rows):
        first = next(iter(row.choices.values()))
        tail = batch["input_ids"][number, lengths[number] - len(first) : lengths[number]].tolist()
        if tail != first:
            raise ValueError("processor: expected the answer's tokens at the end of the text")
        # The token at position p is predicted at p - 1.
        start = lengths[number] - len(first) - 1
        wanted += [(number, start + k) for k in range(len(first))]
    index, positions = torch.tensor(wanted, device=model.device).unbind(1)
    moved = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    log_probabilities = _logits(model, moved, index, positions).log_softmax(-1).cpu()
    greedy_tokens = log_probabilities.argmax(-1)
    results = []
    at = 0
    for row in rows:
        scores, greedy = {}, False
        question = questions[row.question]
        for choice, tokens in row.choices.items():
            steps = slice(at, at + len(tokens))
            target = torch.tensor(tokens)
            scores[choice] = log_probabilities[steps].gather(1, target[:, None]).sum().item()
            if question.choices[choice] == question.answer:
                greedy = bool((greedy_tokens[steps] == target).all())
        results.append((scores, greedy))
        at += len(tokens)
    return results


@torch.inference_mode()
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
    rows = _rows(processor, questions)
    rows.sort(key=lambda row: (questions[row.question].image is None, row.length))
    scores: list[dict[int, float]] = [{} for _ in questions]
    greedy = [False] * len(questions)
    with tqdm(total=len(rows), desc="evaluation", disable=not progress, leave=False) as bar:
        for chunk in _chunks(rows, questions, batch_size):
            for row, result in zip(chunk, _score_batch(model, processor, chunk, questions)):
                scores[row.question].update(result[0])
                greedy[row.question] |= result[1]
            bar.update(len(chunk))
    model.train(training)
    right = [_is_right(question, score) for question, score in zip(questions, scores)]
    report = _summary(questions, right, greedy)
    report["shuffled_images"] = shuffle_images
    report["seconds"] = round(time.perf_counter() - start, 2)
    return report


def _chunks(rows: list[_Row], questions: Sequence[Question], size: int) -> list[list[_Row]]:
    """At most `size` rows each; rows with and without an image never together."""
    with_image = [row for row in rows if questions[row.question].image is not None]
    without = [row for row in rows if questions[row.question].image is None]
    return [part[i : i + size] for part in (with_image, without) for i in range(0, len(part), size)]


def _is_right(question: Question, scores: dict[int, float]) -> bool:
    """A model that yields NaN is wrong, not lucky."""
    if any(math.isnan(score) for score in scores.values()):
        return False
    return question.choices[max(scores, key=scores.__getitem__)] == question.answer


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


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share observed in n trials."""
    z2 = NORMAL_95**2
    centre = share + z2 / (2 * n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("cdfast.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folder or hub name")
    parser.add_argument("--suite", choices=["miniature"], default="miniature")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument(
        "--per-kind", type=_at_least_one, default=300, help="caption pairs per kind"
    )
    parser.add_argument("--vqa-per-kind", type=_at_least_one, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=_at_least_one, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shuffle-images", action="store_true", help="add the image-blind control")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    options = parser.parse_args(arguments)
    if options.json is not None:  # before hours of evaluation, not after
        options.json.parent.mkdir(parents=True, exist_ok=True)
    questions = miniature_suite(options.split, options.per_kind, options.vqa_per_kind, options.seed)
    reports: dict[str, dict[str, Any]] = {}
    for name in options.models:
        try:
            load_config(name)  # refuses code from the hub
            model = AutoModelForImageTextToText.from_pretrained(name).to(options.device)
            processor = AutoProcessor.from_pretrained(name)
        # Configurations, tokenizers and unpicklers raise a dozen errors on damaged files.
        except Exception as error:
            parser.error(
                f"model {name!r} cannot be loaded: {error} Expected a vision-language checkpoint "
                "with its processor, or a hub name."
            )
        size = options.batch_size
        reports[name] = evaluate(model, processor, questions, batch_size=size)
        if options.shuffle_images:
            control = evaluate(model, processor, questions, batch_size=size, shuffle_images=True)
            reports[f"{name}, shuffled images"] = control
    text_only = read_card().get("text_only", {})
    Console().print(results_table(reports, text_only))
    if options.json is not None:
        settings = {name: getattr(options, name) for name in ("suite", "split", "seed")}
        content = {"settings": settings, "text_only": text_only, "models": reports}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
