"""VQAv2, GQA, TextVQA, VizWiz, MME and POPE: asked by lmms-eval, answered by scoring.py.

lmms-eval has these benchmarks' data sets, prompts and metrics; this module gives it a model of its
own, in the same process. Its command line exits with 0 when an evaluation fails, and its generic
model does not run on transformers 5.23; here an error stays an error, and a result that is missing,
empty or not a number is one too. Needs the extra `[eval]`.

Data sets come from the hub's cache, or from the hub unless HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdfast.evaluation.run import ResultsError, require_same
from cdfast.evaluation.scoring import Prompt, replies
from cdfast.evaluation.statistics import NORMAL_95
from cdfast.images import load_image
from cdfast.storage import write_text

# Where a task of lmms-eval says nothing; LLaVA's answers to these tasks are a word or a phrase.
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Delegated:
    """A task of lmms-eval.

    Args:
        task: its name there, which is that of a split.
        metrics: the sum of these, as named there, is the score.
        most: the most that the sum can be; the score is reported as a share of it.
    """

    task: str
    metrics: tuple[str, ...]
    most: float = 1.0


DELEGATED = {
    "vqav2": Delegated("vqav2_val", ("exact_match,none",)),
    "gqa": Delegated("gqa", ("exact_match,none",)),
    "textvqa": Delegated("textvqa_val", ("exact_match,none",)),
    "vizwiz": Delegated("vizwiz_vqa_val", ("exact_match,none",)),
    # 14 categories of accuracy and accuracy+, 100 each: perception 2000, cognition 800.
    "mme": Delegated("mme", ("mme_perception_score,none", "mme_cognition_score,none"), 2800.0),
    "pope": Delegated("pope", ("pope_f1_score,none",)),
}


def load_lmms_eval() -> Any:
    """The package lmms_eval.

    Raises:
        ValueError: it is not installed, or does not import.
    """
    try:
        importlib.import_module("lmms_eval.evaluator")
        return importlib.import_module("lmms_eval")
    # It imports dozens of packages, each of which may fail in its own way.
    except Exception as error:
        raise ValueError(
            f"--tasks: {', '.join(DELEGATED)} need lmms-eval; importing it gave "
            f"{type(error).__name__}: {error}. Install the extra: pip install 'cdfast[eval]'."
        ) from error


def answering(base: Any) -> Any:
    """A model class for lmms-eval that answers greedily, as `scoring.replies` does.

    Args:
        base: `lmms_eval.api.model.lmms`, which only exists where the package is installed.
    """

    class CdfastModel(base):  # type: ignore[misc]
        is_simple = True

        def __init__(self, model: Any, processor: Any, batch_size: int) -> None:
            super().__init__()
            # Hidden from `lmms.clean`, which takes modules off the model that it was given.
            self.asked = (model, processor, batch_size)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return answer(requests, self.task_dict, *self.asked)

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise NotImplementedError("expected a task of generate_until, got one of loglikelihood")

        def generate_until_multi_round(self, requests: list[Any]) -> Any:
            raise NotImplementedError("expected a task of generate_until, got one of several turns")

    return CdfastModel


def answer(
    requests: list[Any], documents: Any, model: Any, processor: Any, batch_size: int
) -> list[str]:
    """Reply to requests of lmms-eval.

    Args:
        requests: their `args` are text, generation options, doc_to_visual, and the document's
            number, task and split.
        documents: task -> split -> documents.
        model, processor, batch_size: see `cdfast.evaluation.scoring.replies`.

    Returns:
        One reply for each request, in order, cut at the options' `until`.
    """
    said = []
    size = 2 * batch_size
    for start in range(0, len(requests), size):
        prompts, options = [], []
        for request in requests[start : start + size]:
            text, given, visuals, number, task, split = request.args
            source = f"{task}, {split}, document {number}"
            images = [load_image(v, source) for v in visuals(documents[task][split][number])]
            if len(images) > 1:
                raise ValueError(f"{source}: expected at most one image, got {len(images)}")
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            prompts.append(Prompt(source, images[0] if images else None, messages))
            options.append(given)
        longest = max(given.get("max_new_tokens", MAX_NEW_TOKENS) for given in options)
        texts = replies(model, processor, prompts, batch_size=batch_size, max_new_tokens=longest)
        said += [_cut(text, given.get("until")) for text, given in zip(texts, options)]
    return said


def _cut(text: str, until: str | list[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def run_delegated(
    name: str,
    model: Any,
    processor: Any,
    path: Path,
    header: dict[str, Any],
    *,
    batch_size: int,
    limit: int | None,
) -> dict[str, Any]:
    """Evaluate a model on a task of lmms-eval, or read the result if there is one.

    Args:
        name: in `DELEGATED`.
        model, processor, batch_size: see `cdfast.evaluation.scoring.replies`.
        path: the result's file, of a finished task: lmms-eval cannot go on within one.
        header: what the result depends on; here the limit counts too.
        limit: only the first so many documents.

    Returns:
        As `measures.measure`, with one metric, "score": a share of the most there is. Its
        interval is +- 1.96 standard errors where lmms-eval gives one, else None.

    Raises:
        ResultsError: a result of another model or other options.
        ValueError: lmms-eval is missing, or gave no result that can be used.
    """
    header = {**header, "limit": limit}
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            require_same(path, found["header"], header)
            return found["measured"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ResultsError(
                f"{path}: expected a result of lmms-eval; got {type(error).__name__}: {error}. "
                "Delete the file to evaluate again."
            ) from error
    lmms_eval = load_lmms_eval()
    wanted = DELEGATED[name]
    answers = answering(lmms_eval.api.model.lmms)(model, processor, batch_size)
    try:
        found = lmms_eval.evaluator.simple_evaluate(
            model=answers, tasks=[wanted.task], limit=limit, batch_size=batch_size, log_samples=True
        )
    except ValueError:
        raise
    # Data sets that are not there, and assertions about documents, end in a dozen errors.
    except Exception as error:
        raise ValueError(
            f"lmms-eval, {wanted.task}: {type(error).__name__}: {error}. Expected its data set in "
            "the hub's cache, or a connection; MME needs an even --limit."
        ) from error
    measured = measured_of(wanted, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"header": header, "measured": measured}, indent=1) + "\n")
    return measured


def measured_of(wanted: Delegated, found: Any) -> dict[str, Any]:
    """The score in what lmms-eval returned.

    Raises:
        ValueError: no result, no documents, or a score that is missing or not a number.
    """

    def refuse(expected: str, got: Any) -> ValueError:
        return ValueError(
            f"lmms-eval, {wanted.task}: expected {expected}, got {got}. Its log above may say why; "
            "check that its data set is in the hub's cache."
        )

    if not isinstance(found, dict) or wanted.task not in (found.get("results") or {}):
        raise refuse("a result", sorted(found.get("results") or {}) if found else found)
    scores = found["results"][wanted.task]
    number = len((found.get("samples") or {}).get(wanted.task) or [])
    if not number:
        raise refuse("documents that were answered", "none")
    total, variance = 0.0, 0.0
    for metric in wanted.metrics:
        value = scores.get(metric)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise refuse(f"a number for {metric}", repr(value))
        error = scores.get(metric.replace(",", "_stderr,"))
        known = isinstance(error, int | float) and math.isfinite(error)
        total, variance = total + value, variance + (error**2 if known else math.nan)
    value, half = total / wanted.most, NORMAL_95 * math.sqrt(variance) / wanted.most
    if not 0 <= value <= 1:
        raise refuse(f"a score from 0 to {wanted.most:g}", total)
    interval = None if math.isnan(half) else [max(0.0, value - half), min(1.0, value + half)]
    score = {"value": value, "ci95": interval, "interval": "standard error", "chance": None}
    return {"n": number, "clusters": number, "metrics": {"score": score}, "subsets": {}}
