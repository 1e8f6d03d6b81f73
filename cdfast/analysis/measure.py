"""The measurements of `cdfast.analyze`, case by case, on fused attention.

Of every model one forward per batch is run, in which probes read the wanted rows; of the student
one more per substitution. All numbers of a case are plain JSON.

Source: CompoDistill, the analysis of visual attention (experiments 1 to 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdfast.analysis.cases import EncodedCases
from cdfast.analysis.substitution import Substitution
from cdfast.attention import AttentionCall
from cdfast.logits import model_logits
from cdfast.maps import to_model
from cdfast.matching import Matches
from cdfast.observe import RowsAndKeys, check_layers, observed, run, take_rows

ROWS = ("answer", "text")
SUBSTITUTE_ROWS = ("all", "text", "answer")


class Wanted(NamedTuple):
    """Rows to read in a forward: in which layers, of which keys, and how heads are reduced."""

    layers: Sequence[int]
    where: RowsAndKeys
    heads: str


class Reading(NamedTuple):
    """What a forward has shown: name -> layer -> (R, C) of each sample; hidden (B, N, width)."""

    attention: dict[str, dict[int, list[Tensor]]]
    hidden: Tensor


@dataclass(frozen=True)
class Plan:
    """What is measured; the defaults are those of the command.

    Attributes:
        layerwise: model -> student layer -> teacher layers, for the similarity layer by layer.
        matched: student layer -> teacher layers, for groups of samples.
        substituted: student layer -> teacher layers, for the substitution; {} is none.
        rows: rows over which similarity is averaged: "answer" or "text".
        heads: "mean" or "max" over heads, in everything but the substitution.
        weights: of the teacher in the substitution.
        substitute_rows: "all" that see the image, "text" or "answer".
        renormalise: as in `Substitution`.
        backend: backend of `cdfast_kernels`.
    """

    layerwise: Mapping[str, Matches]
    matched: Matches
    substituted: Matches = field(default_factory=dict)
    rows: str = "answer"
    heads: str = "mean"
    weights: tuple[float, ...] = (0.5, 1.0)
    substitute_rows: str = "all"
    renormalise: str = "row"
    backend: str = "auto"


@torch.no_grad()
def read(
    model: PreTrainedModel,
    encoded: EncodedCases,
    wanted: Mapping[str, Wanted],
    backend: str = "auto",
    substitution: Substitution | None = None,
) -> Reading:
    """One forward of an `observed` model that reads rows, or substitutes a teacher's."""
    layout = encoded.layout.to(model.device)
    found: dict[str, dict[int, list[Tensor]]] = {name: {} for name in wanted}

    def probe(call: AttentionCall) -> Tensor:
        for name, want in wanted.items():
            if call.layer in want.layers:
                taken = take_rows(call, want.where, layout)
                found[name][call.layer] = [rows.reduced(want.heads) for rows in taken]
        return call.out

    layers = {layer for want in wanted.values() for layer in want.layers}
    probes: dict[int, Any] = dict.fromkeys(check_layers(model, layers), probe)
    if substitution is not None:
        probes |= dict.fromkeys(check_layers(model, substitution.targets), substitution)
    hidden = run(model, to_model(encoded.batch, model), layout, probes, backend)
    return Reading(found, hidden)


def log_probabilities(
    model: PreTrainedModel, hidden: Tensor, rows: Sequence[Tensor]
) -> list[Tensor]:
    """Of each sample the log-probabilities (R, vocabulary) that its rows predict, on the host."""
    return [
        model_logits(model, hidden[sample, chosen.to(hidden.device)]).log_softmax(-1).cpu()
        for sample, chosen in enumerate(rows)
    ]


def answers(encoded: EncodedCases, log_probs: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Of each case the answer's probability, and whether the model is right.

    The probability is exp of the mean log-probability of the chosen answer tokens. Right means:
    the answer's first token is the most likely of the choices', or, without choices, every chosen
    token is the most likely of the vocabulary.
    """
    results = []
    for case, scores, target, choices in zip(
        encoded.cases, log_probs, encoded.targets, encoded.choices
    ):
        mean = scores.gather(1, target[:, None]).mean().item()
        if choices:
            best = scores[0, list(choices)]
            right = case.choices[int(best.argmax())] == case.answer and not best.isnan().any()
        else:
            right = torch.equal(scores.argmax(-1), target)
        results.append({"probability": math.exp(mean), "right": bool(right)})
    return results


def shares(reading: Reading, encoded: EncodedCases, sample: int) -> dict[str, list[float]]:
    """Attention of the answer's rows on visual keys and on text keys, layer by layer.

    Each is summed over keys and averaged over the chosen answer tokens. With the mean over heads
    the two add up to 1: text keys are all others, special tokens included.
    """
    visual = encoded.layout.visual[sample][encoded.layout.live[sample]]
    parts: dict[str, list[float]] = {"visual": [], "text": []}
    for _, samples in sorted(reading.attention["answer"].items()):
        row = samples[sample].cpu()
        parts["visual"].append(row[:, visual].sum(-1).mean().item())
        parts["text"].append(row[:, ~visual].sum(-1).mean().item())
    return parts


def cosine(a: Tensor, b: Tensor) -> float:
    """Mean over rows of cos(a_i, b_i); a row where either is all zero counts as 1."""
    norm = a.norm(dim=-1) * b.norm(dim=-1)
    cosines = torch.where(norm > 0, (a * b).sum(-1) / norm.clamp(min=1e-30), 1.0)
    return cosines.mean().item()


def similarities(
    teacher: Reading, student: Reading, encoded: EncodedCases, sample: int, matches: Matches
) -> dict[str, dict[int, float]]:
    """Similarity of each matched layer with its teacher window: over visual and over text keys.

    The rows' attention on the keys of one kind, without renormalising, is compared by `cosine`.
    """
    visual = encoded.layout.visual[sample][encoded.layout.live[sample]]
    found: dict[str, dict[int, float]] = {"visual": {}, "text": {}}
    rows = "rows" if "rows" in student.attention else "answer"
    for layer, window in matches.items():
        ours = student.attention[rows][layer][sample].cpu()
        maps = [teacher.attention[rows][t][sample].cpu() for t in window]
        theirs = torch.stack(maps).mean(0)
        for name, keys in (("visual", visual), ("text", ~visual)):
            found[name][layer] = cosine(ours[:, keys], theirs[:, keys])
    return found


def measure(
    models: Mapping[str, PreTrainedModel], encoded: EncodedCases, plan: Plan
) -> list[dict[str, Any]]:
    """Every number of every case of a batch.

    Args:
        models: "teacher", "student" and, if there is one, "baseline".
        encoded: the batch.
        plan: what to measure.

    Returns:
        Per case `kind`, `group`, `unit`; `attention`: model -> `shares`; `answers`: model ->
        `answers`; `similarity`: model -> {"visual", "text"} -> per layer; `matched`: mean visual
        similarity of the student over the matched layers; `substitution`: weight -> `answers`.
    """
    keys = encoded.live_keys()
    blended = _substituted_rows(encoded, plan.substitute_rows)
    readings, results = {}, {}
    for name, model in models.items():
        layers = check_layers(model, None)
        wanted = {"answer": Wanted(layers, RowsAndKeys(encoded.answer_rows, keys), plan.heads)}
        if plan.rows == "text":
            wanted["rows"] = Wanted(layers, RowsAndKeys(encoded.text_rows(), keys), plan.heads)
        if name == "teacher" and plan.substituted:
            theirs = sorted({t for window in plan.substituted.values() for t in window})
            wanted["substitute"] = Wanted(theirs, blended, "mean")
        with observed(model):
            readings[name] = read(model, encoded, wanted, plan.backend)
            scores = log_probabilities(model, readings[name].hidden, encoded.answer_rows)
            results[name] = answers(encoded, scores)
    swapped = substitute(models["student"], readings["teacher"], encoded, plan, blended)
    measured = []
    for sample, case in enumerate(encoded.cases):
        similar = {
            name: similarities(readings["teacher"], readings[name], encoded, sample, matches)
            for name, matches in plan.layerwise.items()
        }
        aligned = similarities(
            readings["teacher"], readings["student"], encoded, sample, plan.matched
        )["visual"].values()
        measured.append(
            {
                "kind": case.kind,
                "group": case.group,
                "unit": case.unit,
                "attention": {n: shares(r, encoded, sample) for n, r in readings.items()},
                "answers": {n: r[sample] for n, r in results.items()},
                "similarity": {
                    name: {kind: list(values.values()) for kind, values in by_kind.items()}
                    for name, by_kind in similar.items()
                },
                "matched": sum(aligned) / len(aligned),
                "substitution": {weight: r[sample] for weight, r in swapped.items()},
            }
        )
    return measured


def _substituted_rows(encoded: EncodedCases, rows: str) -> RowsAndKeys:
    chosen = {
        "all": encoded.live_rows,
        "text": encoded.text_rows,
        "answer": lambda: encoded.answer_rows,
    }[rows]()
    return RowsAndKeys(chosen, encoded.visual_keys())


def substitute(
    student: PreTrainedModel,
    teacher: Reading,
    encoded: EncodedCases,
    plan: Plan,
    where: RowsAndKeys,
) -> dict[str, list[dict[str, Any]]]:
    """Answers of the student with the teacher's visual attention blended in: weight -> per case."""
    if not plan.substituted:
        return {}
    maps = teacher.attention["substitute"]
    targets = {
        layer: [
            torch.stack([maps[t][sample] for t in window]).mean(0).to(student.device)
            for sample in range(len(encoded.cases))
        ]
        for layer, window in plan.substituted.items()
    }
    layout = encoded.layout.to(student.device)
    results = {}
    with observed(student):
        for weight in plan.weights:
            swap = Substitution(targets, where, layout, weight, plan.renormalise)
            hidden = read(student, encoded, {}, plan.backend, swap).hidden
            scores = log_probabilities(student, hidden, encoded.answer_rows)
            results[f"{weight:g}"] = answers(encoded, scores)
    return results
