"""The data of the attention explorer against cdfast.maps."""

import base64
import json

import numpy as np
import pytest
import torch

from cdfast import geometry
from cdfast.analysis import explorer as module
from cdfast.analysis.cases import Case
from cdfast.analysis.explorer import explorer_data, nearest, picture_uri, spread
from cdfast.analysis.explorer_page import explorer_section
from cdfast.images import load_image
from cdfast.maps import batch_attention_maps
from cdfast.prompts import encode_prompts
from tests.cdfast.tiny_families import (
    LAYERS,
    llava,
    llava_onevision,
    llava_pad,
    photo,
    qwen,
    smolvlm,
)
from tests.cdfast.tiny_processors import IMAGE, user

EVIL = "</script><img src=x onerror='window.hacked=1'><!--\u2028&amp; \"left\""
MATCHES = {0: (0, 1), 1: (1, 2), 2: (2, 3)}


def case(images, question, answer, kind="photo", choices=()):
    return Case(
        kind, "g", question, images, [user(*[IMAGE] * len(images), question)], answer, choices
    )


def cases():
    return [
        case((photo(100, 60), photo(50, 90, 1)), "What is left of the cat?", "the dog"),
        case((photo(64, 64, 2),), EVIL, "no", choices=("no", "yes")),
        case((photo(40, 120, 3),), "Where?\n\nThere", "up", "other"),
    ]


def models_of(family=llava):
    """A teacher and a student, of other weights, and with llava also of another depth."""
    student, processor = family()
    if family is llava:
        return {"teacher": llava(seed=1, layers=4)[0], "student": student}, processor
    torch.manual_seed(1)
    teacher, _ = family()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return {"teacher": teacher, "student": student}, processor


def decoded(sample, model, layer, token):
    """The values of a token as the page reads them."""
    stored = sample["models"][model]["layers"][str(layer)]
    row = next(t["row"] for t in sample["tokens"] if t["number"] == token)
    scale = np.frombuffer(base64.b64decode(stored["scales"]), "<f4")[row]
    codes = np.frombuffer(base64.b64decode(stored["values"][row]), np.uint8)
    share = np.frombuffer(base64.b64decode(stored["shares"]), "<f4")[row]
    return scale * (codes / 255.0) ** 2, share


# -- the data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [llava, llava_pad, qwen, smolvlm], ids=lambda f: f.__name__)
def test_rows_are_those_of_the_maps(family):
    models, processor = models_of(family)
    matches = {1: (1, 2)}
    data = explorer_data(models, processor, cases(), matches=matches)
    for sample, one in zip(data["samples"], cases()):
        for name, model in models.items():
            [maps] = batch_attention_maps(model, processor, [one.prompt(processor)])
            answer = maps.find(None, None, None)
            assert [t["number"] for t in sample["tokens"] if t["answer"]] == answer
            for token in sample["tokens"]:
                row = "before" if token["answer"] else "own"
                assert token["text"] == maps.tokens[token["number"]].text
                for layer in (0, 2):
                    want = maps.vector(layer, token=token["number"], row=row)
                    got, share = decoded(sample, name, layer, token["number"])
                    top = want.max()
                    bound = top * (2 * np.sqrt(want / top) + 1 / 510) / 510
                    assert (np.abs(got - want) <= bound * 1.001 + 1e-7 * top).all()
                    assert np.abs(got - want).max() < top / 254
                    assert share == pytest.approx(want.sum(), rel=1e-5)
            windows = ["1,2"] if name == "teacher" else []
            sinks = sample["models"][name]["sinks"]
            assert list(sinks) == [*map(str, maps.layers), *windows]
            for layers, marked in sinks.items():
                wanted = maps.sinks([int(layer) for layer in layers.split(",")])
                assert marked == np.flatnonzero(wanted).tolist()
        assert sum(t["answer"] for t in sample["tokens"]) == len(one.answer)


@pytest.mark.parametrize("family", [llava_pad, smolvlm], ids=lambda f: f.__name__)
def test_planes_are_those_of_the_images(family):
    models, processor = models_of(family)
    data = explorer_data(models, processor, cases()[:1], matches={})
    [sample] = data["samples"]
    [maps] = batch_attention_maps(models["teacher"], processor, [cases()[0].prompt(processor)])
    vector = maps.vector(1)
    for number, image in enumerate(sample["images"]):
        grid = maps.grids[number]
        planes = {plane["name"]: plane for plane in image["planes"]}
        assert list(planes) == list(grid.planes)
        for name, plane in planes.items():
            want = grid.array(maps.vector(1, image=number), name)
            np.testing.assert_array_equal(vector[plane["tokens"]].reshape(plane["shape"]), want)
            assert tuple(plane["box"]) == grid.planes[name].box


def test_one_reading_of_maps_per_case_and_model(monkeypatch):
    calls = []
    monkeypatch.setattr(
        module,
        "batch_attention_maps",
        lambda *a, **k: calls.append(a) or batch_attention_maps(*a, **k),
    )
    models, processor = models_of()
    explorer_data(models, processor, cases(), matches=MATCHES)
    assert len(calls) == 2 * 3


def test_answers_are_those_of_the_model():
    models, processor = models_of()
    data = explorer_data(models, processor, cases()[1:2], matches=MATCHES)
    prompt = cases()[1].prompt(processor)
    batch = encode_prompts(processor, [prompt])
    ids = batch["input_ids"][0].tolist()
    no, yes = (processor.tokenizer.convert_tokens_to_ids(c) for c in "ny")
    at = max(i for i, token in enumerate(ids) if token == no and ids[i + 1] != yes)
    for name, model in models.items():
        with torch.no_grad():
            scores = model(**batch).logits[0, at - 1].softmax(-1)
        found = data["samples"][0]["models"][name]
        assert found["probability"] == pytest.approx(scores[no].item(), rel=1e-4)
        assert found["right"] == (scores[no] > scores[yes]).item()


def test_unknown_places_are_told_and_the_values_stay(monkeypatch):
    monkeypatch.setattr(geometry, "ANYRES", ())  # as if LLaVA-OneVision were not known
    models, processor = models_of(llava_onevision)
    data = explorer_data(models, processor, cases()[:1], matches={})
    [sample] = data["samples"]
    assert "llava_onevision: it is not known" in sample["geometry"]
    assert all("planes" not in image for image in sample["images"])
    stored = sample["models"]["student"]["layers"]["0"]["values"]
    assert {len(base64.b64decode(row)) for row in stored} == {sample["visual"]}


@pytest.mark.parametrize("kib", [4000, 200, 160, 110, 60])
def test_budget_is_kept_and_what_is_left_out_is_said(kib):
    models, processor = models_of()
    data = explorer_data(models, processor, cases(), matches={1: (2, 3)}, budget_bytes=kib * 2**10)
    assert len(json.dumps(data["samples"])) <= kib * 2**10
    kept = {model["name"]: model["layers"] for model in data["models"]}
    whole = kept == {"teacher": [0, 1, 2, 3], "student": [0, 1, 2]} and len(data["samples"]) == 3
    assert (data["left_out"] == "") == whole == (kib == 4000)
    # Matched layers and their windows stay longest; samples go only after all other layers.
    assert 1 in kept["student"]
    assert {2, 3} <= {*kept["teacher"]}
    if len(data["samples"]) < 3:
        assert kept == {"teacher": [2, 3], "student": [1]}
        assert f"{len(data['samples'])} of 3 samples" in data["left_out"]
    for name, layers in kept.items():
        if not whole and len(layers) < LAYERS + (name == "teacher"):
            listed = ", ".join(map(str, layers))
            assert f"layers of {name} ({listed})" in data["left_out"]
    if not data["samples"]:
        assert "The first sample takes" in data["left_out"]
        assert explorer_section(data) == f'<p class="caveat">{data["left_out"]}</p>'


def test_layers_may_be_chosen():
    models, processor = models_of()
    chosen = {"teacher": [2, 3], "student": [2]}
    data = explorer_data(models, processor, cases()[:1], matches=MATCHES, layers=chosen)
    assert {model["name"]: model["layers"] for model in data["models"]} == chosen
    assert data["left_out"] == ""


def test_layers_are_spread_evenly_and_found_by_relative_place():
    assert spread(range(8, 15), 3) == [9, 11, 13]
    assert spread([4, 5], 9) == [4, 5]
    assert spread([], 2) == spread([1], 0) == []
    assert [nearest(layer, 4, 6, range(6)) for layer in range(4)] == [0, 2, 3, 5]
    assert [nearest(layer, 24, 24, [3, 9, 20]) for layer in (0, 6, 23)] == [3, 3, 20]


@pytest.mark.parametrize("size, shown", [((36, 36), (36, 36)), ((3000, 1000), (512, 171))])
def test_pictures_are_shrunk_and_small_ones_kept(size, shown):
    picture = photo(*size)
    kind, data = picture_uri(picture).split(",")
    read = load_image(base64.b64decode(data), "test", field="uri")
    assert read.size == shown
    assert kind == f"data:image/{'png' if shown == size else 'jpeg'};base64"
    if shown == size:
        np.testing.assert_array_equal(np.asarray(read.convert("RGB")), np.asarray(picture))


def test_what_cannot_be_shown_is_refused():
    models, processor = models_of()
    with pytest.raises(ValueError, match="models: expected at least one"):
        explorer_data({}, processor, cases(), matches={})
    with pytest.raises(ValueError, match="layers: expected numbers from 0 to 2"):
        explorer_data(models, processor, cases(), matches={3: (0,)})
    with pytest.raises(ValueError, match="layers: expected numbers from 0 to 3"):
        explorer_data(models, processor, cases(), matches={0: (4,)})
    layer = models["student"].model.language_model.layers[1]
    layer.self_attn.q_proj.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="student: expected finite attention; layer 1"):
        explorer_data(models, processor, cases(), matches=MATCHES)
    models["student"].lm_head.weight.data[0] = torch.nan
    layer.self_attn.q_proj.weight.data[0] = 0
    with pytest.raises(ValueError, match="student: expected a finite probability of the answer"):
        explorer_data(models, processor, cases(), matches=MATCHES)
