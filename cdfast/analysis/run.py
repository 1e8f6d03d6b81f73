"""The analysis on models in memory: `cdfast.analyze` runs it, and training at its end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cdfast.aligner import image_token_id
from cdfast.analysis.cases import Case, batches, encode_cases
from cdfast.analysis.measure import Plan, measure
from cdfast.analysis.summary import RESAMPLES, summarise
from cdfast.config import ConfigError
from cdfast.matching import LAYER_RANGES, Matches, layers_in_range, match_group, match_simple
from cdfast.similarity import num_layers
from cdfast.storage import write_text

ANALYSIS_FILE = "analysis.json"
CASES_FILE = "cases.jsonl"
MATCHED = "matched"
NO_LAYERS = "none"

# What every experiment runs on; goes into analysis.json.
RAN_ON = {
    "answer_attention": "Fused attention in every layer. Rows of the answer token are computed "
    "from q, k and the log-sum-exp it returns: per-head probabilities exist for these rows only, "
    "on all keys, because the sum over text keys is asked for.",
    "similarity": "Fused attention in every layer, rows as above (with rows='text' some rows at a "
    "time); text keys need no other kernel, they are the columns that are not visual.",
    "groups": "The numbers of 'similarity' and the logits of the answer: nothing more is run.",
    "substitution": "Fused attention in every layer. In the chosen layers the fused output is "
    "corrected by (P' - P) v over visual keys, because no fused kernel takes another model's "
    "probabilities: they are materialised for the chosen rows and visual keys, some rows at a "
    "time. Text keys need none.",
    "overlays": "Fused attention; rows of the chosen tokens on visual keys, as cdfast.maps.",
}


@dataclass(frozen=True)
class Settings:
    """How an analysis measures and sums up; the defaults are those of the command.

    Attributes:
        answer_tokens, heads, rows, substitute_rows, renormalise, backend: as in `Plan` and
            `encode_cases`.
        matching, layers: "group" or "simple" matching of a range of layers.
        matched: student layer -> teacher layers, in place of what `matching` and `layers` give.
        groups: of cases by similarity.
        substitute_layers: student layers, or one of `LAYER_RANGES`, "matched" or "none".
        substitute_weights: of the teacher's attention, each above 0 and at most 1.
        seed, resamples: of the intervals.
        batch_size: cases per forward.
    """

    answer_tokens: str = "first"
    heads: str = "mean"
    rows: str = "answer"
    matching: str = "group"
    layers: str = "intermediate"
    matched: Matches | None = None
    groups: int = 5
    substitute_layers: Sequence[str] = (MATCHED,)
    substitute_weights: Sequence[float] = (0.5, 1.0)
    substitute_rows: str = "all"
    renormalise: str = "row"
    seed: int = 0
    resamples: int = RESAMPLES
    batch_size: int = 16
    backend: str = "auto"

    def as_json(self) -> dict[str, Any]:
        """With the keys and lists of JSON, without `matched`: the windows are a plan's."""
        return {name: value for name, value in as_json(asdict(self)).items() if name != MATCHED}


def make_plan(models: Mapping[str, PreTrainedModel], settings: Settings) -> Plan:
    """Which layers are compared with which, and what is measured.

    Args:
        models: "teacher", "student" and, if there is one, "baseline".

    Raises:
        ConfigError: layers that a model does not have.
    """
    match = match_group if settings.matching == "group" else match_simple
    depth = {name: num_layers(model) for name, model in models.items()}
    every = range(depth["teacher"])

    def in_range(layers: str) -> Matches:
        ranges = [layers_in_range(depth[name], layers) for name in ("student", "teacher")]
        return match(*ranges)

    layerwise = {name: match(range(depth[name]), every) for name in models if name != "teacher"}
    wanted = list(settings.substitute_layers)
    try:
        matched = in_range(settings.layers) if settings.matched is None else settings.matched
        if wanted == [NO_LAYERS]:
            substituted: Matches = {}
        elif wanted == [MATCHED]:
            substituted = matched
        elif len(wanted) == 1 and wanted[0] in LAYER_RANGES:
            substituted = in_range(wanted[0])
        else:
            substituted = {layer: layerwise["student"][layer] for layer in map(int, wanted)}
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"layers: expected numbers from 0 to {depth['student'] - 1}, one of "
            f"{', '.join(LAYER_RANGES)} that both models have, {MATCHED} or {NO_LAYERS}; got "
            f"{wanted} and {settings.layers!r} ({error})."
        ) from error
    return Plan(
        layerwise,
        matched,
        substituted,
        settings.rows,
        settings.heads,
        tuple(settings.substitute_weights),
        settings.substitute_rows,
        settings.renormalise,
        settings.backend,
    )


def analyze_cases(
    models: Mapping[str, PreTrainedModel],
    processor: Any,
    cases: Sequence[Case],
    plan: Plan,
    settings: Settings,
    folder: Path,
) -> dict[str, Any] | None:
    """Measure all cases, writing `folder/cases.jsonl` on the way, and sum up.

    Args:
        models: "teacher", "student" and, if there is one, "baseline", in evaluation mode.
        processor: of all of them.
        cases: the questions.
        plan: from `make_plan`.
        settings: those that the plan was made of.
        folder: is there already.

    Returns:
        The part of analysis.json that follows from models, cases and settings: `settings` with the
        layers compared, `ran_on`, `interrupted` (the user stopped before the end: it is of the
        cases before), and what `summarise` returns. None if no case was done.

    Raises:
        ConfigError: a probability that is not finite.
    """
    measured, interrupted = _measure_all(models, processor, cases, plan, settings, folder)
    if not measured:
        return None
    windows = {
        "layerwise": plan.layerwise,
        MATCHED: plan.matched,
        "substituted": plan.substituted,
    }
    return {
        "settings": {**settings.as_json(), **as_json(windows)},
        "ran_on": RAN_ON,
        "interrupted": interrupted,
        **summarise(measured, settings.groups, settings.seed, settings.resamples),
    }


def write_analysis(content: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder/analysis.json`, complete or not at all."""
    path = folder / ANALYSIS_FILE
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def _measure_all(
    models: Mapping[str, PreTrainedModel],
    processor: Any,
    cases: Sequence[Case],
    plan: Plan,
    settings: Settings,
    folder: Path,
) -> tuple[list[dict[str, Any]], bool]:
    """The numbers of all cases, and whether the user stopped before the end."""
    measured: list[dict[str, Any]] = []
    token = image_token_id(models["student"])
    with (
        (folder / CASES_FILE).open("w") as file,
        tqdm(total=len(cases), desc="analysis", unit="case") as bar,
    ):
        try:
            for chunk in batches(cases, settings.batch_size):
                encoded = encode_cases(processor, chunk, token, settings.answer_tokens)
                found = measure(models, encoded, plan)
                _check_finite(found, models)
                measured += found
                file.writelines(json.dumps(case) + "\n" for case in found)
                file.flush()
                bar.update(len(chunk))
        except KeyboardInterrupt:
            print(f"stopped after {len(measured)} of {len(cases)} cases", file=sys.stderr)
            return measured, True
    return measured, False


def _check_finite(
    cases: Sequence[Mapping[str, Any]], models: Mapping[str, PreTrainedModel]
) -> None:
    for case in cases:
        for name, answer in case["answers"].items():
            if not math.isfinite(answer["probability"]):
                dtype = str(models[name].dtype).removeprefix("torch.")
                raise ConfigError(
                    f"{name}: expected a finite probability of the answer; got "
                    f"{answer['probability']} ({case['kind']}, {case['unit']}). Its weights or "
                    f"activations are not finite in {dtype}: give another --dtype, or check them."
                )


def as_json(value: Any) -> Any:
    """The value with the keys and lists of JSON."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [as_json(v) for v in value]
    return value
