"""The data of the attention explorer: maps of chosen questions, small enough for one page.

Per model, layer and text token there is the head-mean row over the visual tokens. A row v with the
largest value s is written as s (one float32) and a byte per visual token,

    q = round(255 sqrt(v / s)),    read back as v' = s (q / 255)^2,

with |v' - v| <= s (2 sqrt(v / s) + 1/510) / 510 < s / 254. The square root is there because of
sinks: beside one of 0.4, equal steps of s / 255 would round most other patches to zero.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cdfast.aligner import build_layout, image_token_id
from cdfast.analysis.cases import Case, EncodedCases, encode_cases
from cdfast.analysis.measure import answers, log_probabilities, read
from cdfast.maps import AttentionMaps, batch_attention_maps
from cdfast.matching import Matches
from cdfast.observe import check_layers, observed
from cdfast.planes import GeometryError
from cdfast.prompts import Prompt, encode_prompts
from cdfast.similarity import num_layers

# Pictures are shrunk to this many pixels on their longer side.
_SIDE = 512
# Up to this size a picture is kept without loss: toy scenes and icons.
_SMALL = 128
# Bytes of JSON around a token, and around anything larger: a layer, an image, a model, a sample.
_TOKEN_BYTES, _ITEM_BYTES = 90, 300

Layers = dict[str, list[int]]


class _Read(NamedTuple):
    """Who reads the samples, and which teacher layers a student layer stands beside."""

    models: Mapping[str, PreTrainedModel]
    processor: Any
    token: int
    reference: str
    student: str
    matches: Matches
    backend: str


class _Draft(NamedTuple):
    """A case before any model has read it, and the bytes of JSON it will take at most."""

    case: Case
    prompt: Prompt
    pictures: list[str]
    fixed: float
    per_layer: float


def explorer_data(
    models: Mapping[str, PreTrainedModel],
    processor: Any,
    cases: Sequence[Case],
    *,
    matches: Matches,
    layers: Mapping[str, Sequence[int]] | None = None,
    budget_bytes: int = 8 * 2**20,
    backend: str = "auto",
) -> dict[str, Any]:
    """Attention maps, pictures and texts of some cases, as plain JSON for `explorer_section`.

    Args:
        models: name -> model, in the order they are shown. The one named "teacher", or else the
            first, is what the others are compared with; the first other one is the student.
        processor: of all models.
        cases: the samples, in the order they are shown.
        matches: student layer -> teacher layers, whose mean map it is compared with.
        layers: model -> the layers to keep at most; default all of every model.
        budget_bytes: of the JSON. If everything does not fit, fewer layers are kept: those in
            `matches` first, evenly spaced, each with its counterparts in the other models; if even
            one layer of every sample does not fit, fewer samples, from the front.
        backend: backend of `cdfast_kernels`.

    Returns:
        `models`: name, depth and kept layers of each; `reference` and `student`: names;
        `matches`; `left_out`: a sentence about what did not fit, or ""; `samples`: of each
        `images` (data URI, size, planes of `cdfast.geometry` with -1 for dropped patches, tokens
        counted over all images), `geometry` (why there are no planes, or ""), `tokens` (text,
        number in the prompt, whether of the answer, and its row), and per model the answer's
        probability, `right`, the layers' rows (see the top of this module) with their exact
        `shares` of attention on the image, and the sinks of layers and windows.

    Raises:
        ValueError: no model, layers that do not exist, models that read a prompt differently, or
            attention that is not finite.
        ConfigError, DataError: a case that cannot be asked or scored, as `encode_cases`.
    """
    if not models:
        raise ValueError("models: expected at least one; got none.")
    reference = "teacher" if "teacher" in models else next(iter(models))
    student = next((name for name in models if name != reference), reference)
    depths = {name: num_layers(model) for name, model in models.items()}
    allowed = {
        name: check_layers(model, None if layers is None else layers.get(name))
        for name, model in models.items()
    }
    check_layers(models[student], matches)
    check_layers(models[reference], [t for window in matches.values() for t in window])
    token = image_token_id(models[reference])
    by = _Read(models, processor, token, reference, student, matches, backend)
    drafts = [_draft(by, case) for case in cases]
    kept, number = _fit(drafts, _plans(by, depths, allowed), budget_bytes)
    bar = tqdm(drafts[:number], desc="attention explorer", unit="sample", leave=False)
    samples = [_sample(by, draft, kept) for draft in bar]
    return {
        "reference": reference,
        "student": student,
        "models": [{"name": n, "depth": depths[n], "layers": kept[n]} for n in models],
        "matches": {str(s): list(window) for s, window in matches.items()},
        "left_out": _left_out(allowed, kept, drafts, number, budget_bytes),
        "samples": samples,
    }


# -- what fits -------------------------------------------------------------------------------------


def _draft(by: _Read, case: Case) -> _Draft:
    prompt = case.prompt(by.processor)
    layout = build_layout(encode_prompts(by.processor, [prompt]), by.token)
    visual = int(layout.visual.sum())
    rows = int((layout.live & ~layout.visual & (layout.visual.cumsum(1) > 0)).sum())
    pictures = [picture_uri(image) for image in prompt.images]
    fixed = sum(map(len, pictures)) + _ITEM_BYTES * (4 + len(pictures) + len(by.models))
    # A character is an escape of six bytes at most, in its token and in the question; a cell of a
    # plane is a number.
    fixed += rows * _TOKEN_BYTES + 12 * len(prompt.text) + 8 * visual
    # Base64 writes 3 bytes as 4: values, a scale and a share per row. Sinks are numbers, of the
    # layer and of a window.
    per_layer = _ITEM_BYTES + rows * (4 / 3 * visual + 20) + 2 * 7 * visual
    return _Draft(case, prompt, pictures, fixed, per_layer)


def _plans(by: _Read, depths: Mapping[str, int], allowed: Layers) -> list[Layers]:
    """Sets of layers to keep, the largest first: all, then with ever fewer of the student's."""
    ours = allowed[by.student]
    matched = [s for s in ours if s in by.matches]
    others = [s for s in ours if s not in by.matches]
    plans = [allowed]
    for number in range(len(ours), 0, -1):
        chosen = spread(matched, number) + spread(others, number - len(matched))
        plan = {}
        for name, depth in depths.items():
            beside: set[int] = set()
            for s in chosen:
                window = by.matches.get(s, ()) if name == by.reference else ()
                found = [t for t in window if t in allowed[name]]
                beside |= {*found} or {nearest(s, depths[by.student], depth, allowed[name])}
            plan[name] = sorted(chosen if name == by.student else beside)
        plans.append(plan)
    return plans


def spread(layers: Sequence[int], number: int) -> list[int]:
    """`number` of the layers (at most all), evenly spaced."""
    number = max(0, min(number, len(layers)))
    return [layers[(2 * i + 1) * len(layers) // (2 * number)] for i in range(number)]


def nearest(layer: int, depth: int, other: int, kept: Sequence[int]) -> int:
    """Of the `kept` layers of a model of `other` layers, the one at the relative place of a layer.

    Places are (l + 0.5) / depth, as in `cdfast.matching`; the earlier layer wins a tie.
    """
    # In units of 1 / (2 depth other): whole numbers, so that ties do not depend on rounding.
    return min(kept, key=lambda k: abs((2 * k + 1) * depth - (2 * layer + 1) * other))


def _fit(drafts: Sequence[_Draft], plans: Sequence[Layers], budget: int) -> tuple[Layers, int]:
    """The first plan in which all drafts fit, or the last one; and how many drafts fit."""
    for plan in plans:
        sizes = np.cumsum([_size(draft, plan) for draft in drafts])
        fitting = int((sizes <= budget).sum())
        if fitting == len(drafts):
            break
    return plan, fitting


def _size(draft: _Draft, plan: Layers) -> float:
    return draft.fixed + sum(map(len, plan.values())) * draft.per_layer


def _left_out(
    allowed: Layers, kept: Layers, drafts: Sequence[_Draft], number: int, budget: int
) -> str:
    parts = [
        f"{len(kept[name])} of {len(layers)} layers of {name} ({', '.join(map(str, kept[name]))})"
        for name, layers in allowed.items()
        if len(kept[name]) < len(layers)
    ]
    if number < len(drafts):
        parts.append(f"{number} of {len(drafts)} samples")
    if not parts:
        return ""
    sentence = f"To keep the data within {budget / 2**20:.3g} MiB, here are {', '.join(parts)}."
    if number:
        return sentence
    return f"{sentence} The first sample takes {_size(drafts[0], kept) / 2**20:.3g} MiB."


# -- one sample ------------------------------------------------------------------------------------


def _sample(by: _Read, draft: _Draft, kept: Layers) -> dict[str, Any]:
    case = draft.case
    encoded = encode_cases(by.processor, [case], by.token)
    maps: dict[str, AttentionMaps] = {}
    for name, model in by.models.items():
        [maps[name]] = batch_attention_maps(
            model, by.processor, [draft.prompt], layers=kept[name], backend=by.backend
        )
    first = maps[by.reference]
    tokens, rows = _tokens(first)
    described = {}
    for name, model in by.models.items():
        if maps[name].rows != first.rows:
            raise ValueError(
                f"{name}: expected text tokens at the positions of {by.reference}'s; they are "
                "elsewhere. Models in one explorer share tokenizer and image processor."
            )
        # Sinks of a window's mean map are not those of its layers.
        windows = [by.matches[s] for s in kept[by.student] if s in by.matches]
        layers = {str(n): _layer(maps[name], n, rows, name) for n in kept[name]}
        described[name] = {
            **_answer(model, encoded, name, by.backend),
            "layers": layers,
            "sinks": _sinks(
                maps[name],
                [*((n,) for n in kept[name]), *(windows if name == by.reference else [])],
            ),
        }
    images, geometry = _images(first, draft.pictures)
    asked = (p["text"] for m in case.messages for p in m["content"] if p["type"] == "text")
    return {
        "kind": case.kind,
        "group": case.group,
        "question": " ".join(asked),
        "answer": case.answer,
        "visual": int(encoded.layout.visual.sum()),
        "images": images,
        "geometry": geometry,
        "tokens": tokens,
        "models": described,
    }


def _answer(
    model: PreTrainedModel, encoded: EncodedCases, name: str, backend: str
) -> dict[str, Any]:
    """Probability of the right answer's first token, and whether the model is right."""
    with observed(model):
        hidden = read(model, encoded, {}, backend).hidden
        [found] = answers(encoded, log_probabilities(model, hidden, encoded.answer_rows))
    if not math.isfinite(found["probability"]):
        raise ValueError(
            f"{name}: expected a finite probability of the answer {encoded.cases[0].answer!r}; got "
            f"{found['probability']}. Check the model's weights, and that its dtype holds its "
            "activations."
        )
    return found


def _tokens(maps: AttentionMaps) -> tuple[list[dict[str, Any]], list[int]]:
    """Text tokens up to the answer's end, and the places in `maps.rows` that they are read from.

    A token of the answer is read in the row before it, which predicts it; any other in its own.
    """
    places = {position: place for place, position in enumerate(maps.rows)}
    answer = maps.find(None, None, None)
    tokens: list[dict[str, Any]] = []
    rows: dict[int, int] = {}
    for number, token in enumerate(maps.tokens[: answer[-1] + 1 if answer else None]):
        of_answer = number in answer
        position = token.position
        place = None if position is None else places.get(position - int(of_answer))
        if place is None and position is not None and position < maps.rows[0]:
            continue  # before the images: it sees none
        # None: a token that the processor merged with its own text; shown, but not to be chosen.
        row = None if place is None else rows.setdefault(place, len(rows))
        tokens.append({"text": token.text, "number": number, "answer": of_answer, "row": row})
    return tokens, list(rows)


def _layer(maps: AttentionMaps, layer: int, rows: Sequence[int], name: str) -> dict[str, Any]:
    """A layer's rows in base64: the values (bytes) of each; all scales and shares (float32)."""
    values = maps.layers[layer].select(rows).reduced("mean").float().numpy()
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name}: expected finite attention; layer {layer} has values that are not. Check the "
            "model's weights, and that its dtype holds its activations."
        )
    scales = values.max(1)
    roots = np.sqrt(values / np.where(scales > 0, scales, 1)[:, None])
    return {
        "values": [_base64(row) for row in np.rint(255 * roots).astype(np.uint8)],
        "scales": _base64(scales.astype("<f4")),
        "shares": _base64(values.sum(1).astype("<f4")),
    }


def _sinks(maps: AttentionMaps, groups: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """ "2" or "2,3" -> the visual tokens that are sinks in this layer, or in the mean of these."""
    return {
        ",".join(map(str, layers)): np.flatnonzero(maps.sinks(layers)).tolist()
        for layers in groups
        if all(layer in maps.layers for layer in layers)
    }


def _images(maps: AttentionMaps, pictures: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The pictures with their planes, and why they have none where that is so."""
    grids = [] if isinstance(maps.grids, GeometryError) else maps.grids
    images: list[dict[str, Any]] = []
    start = 0
    for number, (image, uri) in enumerate(zip(maps.prompt.images, pictures)):
        described: dict[str, Any] = {"uri": uri, "width": image.width, "height": image.height}
        if grids:
            described["planes"] = [
                {
                    "name": name,
                    "shape": list(plane.tokens.shape),
                    "box": [float(edge) for edge in plane.box],
                    "tokens": np.where(plane.tokens < 0, -1, plane.tokens + start).ravel().tolist(),
                }
                for name, plane in grids[number].planes.items()
            ]
            start += grids[number].count
        images.append(described)
    return images, "" if grids else str(maps.grids)


def picture_uri(picture: Image.Image) -> str:
    """The picture as a data URI: at most 512 pixels wide and high; PNG where it is small."""
    picture = picture.convert("RGB")
    longer = max(picture.size)
    if longer > _SIDE:
        size = [max(1, round(edge * _SIDE / longer)) for edge in picture.size]
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    kind, options = ("PNG", {"optimize": True}) if longer <= _SMALL else ("JPEG", {"quality": 85})
    with io.BytesIO() as file:
        picture.save(file, kind, **options)
        return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
