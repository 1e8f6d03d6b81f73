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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track
from transformers import PreTrainedModel

from cdfast.aligner import build_layout, image_token_id
from cdfast.analysis import answers, log_probabilities, read
from cdfast.cases import Case, encode_cases
from cdfast.geometry import GeometryError
from cdfast.maps import AttentionMaps, batch_attention_maps
from cdfast.matching import Matches
from cdfast.observe import check_layers, observed
from cdfast.prompts import Prompt, encode_prompts
from cdfast.similarity import num_layers

# Pictures are shrunk to this many pixels on their longer side.
_SIDE = 512
# Up to this size a picture is kept without loss: toy scenes and icons.
_SMALL = 128
# Bytes of JSON around a layer's numbers, and around a token or a sample's other fields.
_LAYER_BYTES, _TOKEN_BYTES, _SAMPLE_BYTES = 160, 90, 1200
# Base64 writes 3 bytes as 4.
_BASE64 = 4 / 3

Layers = dict[str, list[int]]


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
    drafts = [_draft(processor, case, token) for case in cases]
    plans = _plans(depths, allowed, matches, reference, student)
    kept, number = _fit(drafts, plans, budget_bytes)
    samples = []
    for draft in track(drafts[:number], "attention explorer", transient=True):
        samples.append(
            _sample(models, processor, draft, token, kept, matches, (reference, student), backend)
        )
    return {
        "reference": reference,
        "student": student,
        "models": [{"name": n, "depth": depths[n], "layers": kept[n]} for n in models],
        "matches": {str(s): list(window) for s, window in matches.items()},
        "left_out": _left_out(depths, kept, len(cases), number, budget_bytes),
        "samples": samples,
    }


# -- what fits -------------------------------------------------------------------------------------


def _draft(processor: Any, case: Case, token: int) -> _Draft:
    prompt = case.prompt(processor)
    layout = build_layout(encode_prompts(processor, [prompt]), token)
    visual = int(layout.visual.sum())
    rows = int((layout.live & ~layout.visual & (layout.visual.cumsum(1) > 0)).sum())
    pictures = [picture_uri(image) for image in prompt.images]
    # Non-ASCII text is written as \\uXXXX; cells of planes as numbers with a comma.
    fixed = _SAMPLE_BYTES + sum(map(len, pictures)) + rows * _TOKEN_BYTES
    fixed += 12 * len(prompt.text) + 8 * visual
    # Values, then a scale and a share per row, then sinks as numbers.
    per_layer = _LAYER_BYTES + _BASE64 * (rows * visual + 2 * 4 * rows) + 2 * 7 * visual
    return _Draft(case, prompt, pictures, fixed, per_layer)


def _plans(
    depths: Mapping[str, int],
    allowed: Layers,
    matches: Matches,
    reference: str,
    student: str,
) -> list[Layers]:
    """Sets of layers to keep, the largest first: all, then with ever fewer of the student's."""
    matched = [s for s in allowed[student] if s in matches]
    others = [s for s in allowed[student] if s not in matches]
    plans = [allowed]
    for number in range(len(allowed[student]), 0, -1):
        chosen = spread(matched, number) + spread(others, number - len(matched))
        plan: Layers = {}
        for name, depth in depths.items():
            wanted = {nearest(s, depths[student], depth, allowed[name]) for s in chosen}
            if name == reference and reference != student:
                wanted = {
                    t
                    for s in chosen
                    for t in matches.get(s) or [nearest(s, depths[student], depth, allowed[name])]
                    if t in allowed[name]
                }
            plan[name] = sorted(chosen) if name == student else sorted(wanted)
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
        count = sum(map(len, plan.values()))
        sizes = np.cumsum([draft.fixed + count * draft.per_layer for draft in drafts])
        fitting = int((sizes <= budget - _SAMPLE_BYTES).sum())
        if fitting == len(drafts):
            break
    return plan, fitting


def _left_out(depths: Mapping[str, int], kept: Layers, cases: int, number: int, budget: int) -> str:
    parts = [
        f"{depth - len(kept[name])} of {depth} layers of {name}"
        for name, depth in depths.items()
        if len(kept[name]) < depth
    ]
    if number < cases:
        parts.append(f"{cases - number} of {cases} samples")
    if not parts:
        return ""
    return f"Left out (at most {budget / 2**20:.3g} MiB of data are kept): {'; '.join(parts)}."


# -- one sample ------------------------------------------------------------------------------------


def _sample(
    models: Mapping[str, PreTrainedModel],
    processor: Any,
    draft: _Draft,
    token: int,
    kept: Layers,
    matches: Matches,
    roles: tuple[str, str],
    backend: str,
) -> dict[str, Any]:
    case, prompt = draft.case, draft.prompt
    reference, student = roles
    maps = {
        name: batch_attention_maps(model, processor, [prompt], layers=kept[name], backend=backend)[
            0
        ]
        for name, model in models.items()
    }
    first = maps[reference]
    tokens, rows = _tokens(first)
    encoded = encode_cases(processor, [case], token)
    described = {}
    for name, model in models.items():
        if maps[name].rows != first.rows:
            raise ValueError(
                f"{name}: expected text tokens at the positions of {reference}'s; they are "
                "elsewhere. Models in one explorer share tokenizer and image processor."
            )
        with observed(model):
            hidden = read(model, encoded, {}, backend).hidden
            [answer] = answers(encoded, log_probabilities(model, hidden, encoded.answer_rows))
        # Sinks of a window's mean map are not those of its layers.
        windows = [matches[s] for s in kept[student] if s in matches] if name == reference else []
        described[name] = {
            **answer,
            "layers": {str(n): _layer(maps[name], n, rows, name) for n in kept[name]},
            "sinks": _sinks(maps[name], [*((n,) for n in kept[name]), *windows]),
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


def _layer(maps: AttentionMaps, layer: int, rows: Sequence[int], name: str) -> dict[str, str]:
    """Values, scales and shares of a layer's rows, in base64 (bytes, float32, float32)."""
    values = maps.layers[layer].select(rows).reduced("mean").float().numpy()
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name}: expected finite attention; layer {layer} has values that are not. Check the "
            "model's weights, and that its dtype holds its activations."
        )
    scales = values.max(1)
    roots = np.sqrt(values / np.where(scales > 0, scales, 1)[:, None])
    return {
        "values": _base64(np.rint(255 * roots).astype(np.uint8)),
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
