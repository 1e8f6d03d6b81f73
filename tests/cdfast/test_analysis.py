"""Every number of the analysis against a direct computation on materialised float64 attention."""

import json

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cdfast.aligner import image_token_id
from cdfast.analysis.cases import Case, cases_of_file, cases_of_questions, encode_cases
from cdfast.analysis.measure import Plan, measure
from cdfast.analysis.substitution import Substitution
from cdfast.config import ConfigError
from cdfast.images import DataError
from cdfast.miniature.suites import miniature_suite
from tests.cdfast.tiny_families import llava, photo, qwen, smolvlm

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
MATCHES = {0: (0, 1), 1: (1, 2), 2: (2, 3)}
LAYERWISE = {"student": MATCHES, "baseline": {0: (0,), 1: (2, 3)}}


def case(images, question, answer, choices=(), kind="swap_obj"):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return Case(kind, "CR", f"{kind} {question}", tuple(images), messages, answer, choices)


CASES = [
    case([photo(48, 48)], "which one fits the picture ?", "B", ("A", "B")),
    case([photo(60, 40, 1), photo(48, 48, 2)], "what colour ?", "red", ("blue", "green", "red")),
    case([photo(48, 30, 3)], "what is it ?", "dog"),
]


class Direct:
    """Attention with all probabilities in float64, and the blend of the definition put into it."""

    def __init__(self):
        self.live = self.change = None
        self.seen = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        n = scores.shape[-1]
        sees = torch.ones(n, n, dtype=torch.bool).tril() & self.live[:, None, None, :]
        probabilities = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        if self.change is not None:
            probabilities = self.change(module.layer_idx, probabilities)
        self.seen[module.layer_idx] = probabilities
        return (probabilities @ value).transpose(1, 2), None


DIRECT = Direct()
AttentionInterface.register("direct", lambda *args, **kwargs: DIRECT(*args, **kwargs))
AttentionMaskInterface.register("direct", sdpa_mask)


def direct(model, encoded, change=None):
    """Attention (layer -> (B, H, N, N)) and log-probabilities (B, N, vocabulary)."""
    DIRECT.live, DIRECT.change = encoded.layout.live, change
    DIRECT.seen = {}
    model.set_attn_implementation({"text_config": "direct"})
    batch = {k: v.double() if v.is_floating_point() else v for k, v in encoded.batch.items()}
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    model.set_attn_implementation({"text_config": "sdpa"})
    assert logits.dtype == torch.float64
    return DIRECT.seen, logits.log_softmax(-1)


def answer_positions(processor, encoded, sample):
    """Of the answer's tokens, from the end of the sequence: `answer</s>`."""
    ids = encoded.batch["input_ids"][sample][encoded.layout.live[sample]]
    answer = processor.tokenizer(CASES[sample].answer, add_special_tokens=False)["input_ids"]
    end = len(ids) - 1
    assert ids[end - len(answer) : end].tolist() == answer
    return list(range(end - len(answer), end)), answer


@pytest.fixture(scope="module")
def models():
    student, processor = llava()
    teacher, _ = llava(seed=1, layers=4, hidden=48, heads=6, kv_heads=6)
    baseline, _ = llava(seed=2, layers=2)
    made = {"teacher": teacher, "student": student, "baseline": baseline}
    return {name: model.double() for name, model in made.items()}, processor


def plan(**options):
    return Plan(LAYERWISE, {1: (1, 2)}, **options)


def encode(models, answer_tokens="first"):
    return encode_cases(models[1], CASES, image_token_id(models[0]["student"]), answer_tokens)


def reduced(attention, heads):
    return {layer: p.mean(1) if heads == "mean" else p.amax(1) for layer, p in attention.items()}


@pytest.fixture(scope="module", params=["first", "all"])
def read(request, models):
    encoded = encode(models, request.param)
    expected = {name: direct(model, encoded) for name, model in models[0].items()}
    rows = []
    for sample in range(len(CASES)):
        positions, ids = answer_positions(models[1], encoded, sample)
        chosen = positions[:1] if request.param == "first" else positions
        rows.append(([p - 1 for p in chosen], ids[: len(chosen)]))
    return models, encoded, expected, rows


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_attention_of_the_answer_on_visual_and_text_keys(read, heads):
    models, encoded, expected, rows = read
    measured = measure(models[0], encoded, plan(heads=heads))
    visual = encoded.layout.visual
    for name in models[0]:
        maps = reduced(expected[name][0], heads)
        for sample, (chosen, _) in enumerate(rows):
            got = measured[sample]["attention"][name]
            live = encoded.layout.live[sample]
            for kind, keys in (("visual", visual[sample]), ("text", live & ~visual[sample])):
                want = [m[sample, chosen][:, keys].sum(-1).mean().item() for m in maps.values()]
                np.testing.assert_allclose(got[kind], want, **TOLERANCE)
            if heads == "mean":
                np.testing.assert_allclose(np.add(got["visual"], got["text"]), 1)


@pytest.mark.parametrize("rows_of", ["answer", "text"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_similarity_layer_by_layer(read, rows_of, heads):
    models, encoded, expected, rows = read
    measured = measure(models[0], encoded, plan(heads=heads, rows=rows_of))
    teacher = reduced(expected["teacher"][0], heads)
    for sample, (chosen, _) in enumerate(rows):
        visual, live = encoded.layout.visual[sample], encoded.layout.live[sample]
        if rows_of == "text":
            first = int(visual.nonzero()[0, 0])
            chosen = [p for p in range(first, chosen[-1] + 1) if not visual[p]]
        for name, matches in LAYERWISE.items():
            own = reduced(expected[name][0], heads)
            for kind, keys in (("visual", visual), ("text", live & ~visual)):
                want = []
                for layer, window in matches.items():
                    ours = own[layer][sample, chosen][:, keys]
                    theirs = sum(teacher[t][sample, chosen][:, keys] for t in window) / len(window)
                    want.append(torch.cosine_similarity(ours, theirs, dim=-1).mean().item())
                got = measured[sample]["similarity"][name][kind]
                np.testing.assert_allclose(got, want, **TOLERANCE)
                assert max(want) < 0.999
        matched = measured[sample]["similarity"]["student"]["visual"][1]
        assert measured[sample]["matched"] == pytest.approx(matched, rel=1e-12)


def test_answer_probability_and_right(read):
    models, encoded, expected, rows = read
    measured = measure(models[0], encoded, plan())
    for name in models[0]:
        for sample, (chosen, ids) in enumerate(rows):
            scores = expected[name][1][sample, chosen]
            own = scores[range(len(ids)), ids]
            got = measured[sample]["answers"][name]
            assert got["probability"] == pytest.approx(own.mean().exp().item(), rel=1e-9)
            if CASES[sample].choices:
                tokenizer = models[1].tokenizer
                first = [
                    tokenizer(c, add_special_tokens=False)["input_ids"][0]
                    for c in CASES[sample].choices
                ]
                best = CASES[sample].choices[int(scores[0, first].argmax())]
                assert got["right"] == (best == CASES[sample].answer)
            else:
                assert got["right"] == (scores.argmax(-1).tolist() == ids)


def blend(targets, encoded, rows, weight, renormalise, layers):
    """The definition, on whole (N, N) maps: for the chosen rows and the visual keys."""
    visual = encoded.layout.visual

    def change(layer, p):
        if layer not in layers:
            return p
        p = p.clone()
        for b, chosen in enumerate(rows):
            for i in chosen:
                own = p[b, :, i, visual[b]]
                new = (1 - weight) * own + weight * targets[layer][b, i, visual[b]]
                if renormalise == "visual":
                    new = new * own.sum(-1, keepdim=True) / new.sum(-1, keepdim=True)
                p[b, :, i, visual[b]] = new
                if renormalise == "row":
                    p[b, :, i] = p[b, :, i] / p[b, :, i].sum(-1, keepdim=True)
        return p

    return change


@pytest.mark.parametrize("renormalise", ["row", "visual", "none"])
@pytest.mark.parametrize("rows_of", ["all", "text", "answer"])
def test_substitution(read, renormalise, rows_of):
    models, encoded, expected, rows = read
    matches = {0: (0, 1), 2: (3,)}
    options = {"renormalise": renormalise, "substitute_rows": rows_of, "weights": (0.0, 0.5, 1.0)}
    measured = measure(models[0], encoded, plan(substituted=matches, **options))
    teacher = reduced(expected["teacher"][0], "mean")
    targets = {
        layer: sum(teacher[t] for t in window) / len(window) for layer, window in matches.items()
    }
    chosen = []
    for sample, (answer, _) in enumerate(rows):
        visual = encoded.layout.visual[sample]
        behind = range(int(visual.nonzero()[0, 0]), answer[-1] + 1)
        kept = [p for p in behind if rows_of == "all" or not visual[p]]
        chosen.append(answer if rows_of == "answer" else kept)
    student = models[0]["student"]
    for weight in (0.0, 0.5, 1.0):
        change = blend(targets, encoded, chosen, weight, renormalise, matches)
        _, log_probs = direct(student, encoded, change)
        for sample, (answer, ids) in enumerate(rows):
            want = log_probs[sample, answer][range(len(ids)), ids].mean().exp().item()
            got = measured[sample]["substitution"][f"{weight:g}"]["probability"]
            plain = measured[sample]["answers"]["student"]["probability"]
            assert got == pytest.approx(want, rel=1e-9)
            assert (abs(got - plain) > 1e-6 * plain) == (weight > 0)


def test_rows_in_chunks_are_the_same(models, monkeypatch):
    encoded = encode(models)
    options = {"substituted": {1: (1, 2)}, "rows": "text"}
    whole = measure(models[0], encoded, plan(**options))
    monkeypatch.setattr("cdfast.analysis.substitution._CHUNK", 1000)
    monkeypatch.setattr("cdfast.observe._CHUNK", 1000)
    parts = measure(models[0], encoded, plan(**options))
    for a, b in zip(whole, parts):
        for weight, answer in a["substitution"].items():
            assert b["substitution"][weight]["probability"] == pytest.approx(
                answer["probability"], rel=1e-12
            )
        assert a["matched"] == pytest.approx(b["matched"], rel=1e-12)


def test_float32_and_the_fused_backend_agree_with_float64(models):
    encoded = encode(models)
    options = {"substituted": {0: (0, 1), 2: (3,)}, "rows": "text"}
    exact = measure(models[0], encoded, plan(**options))
    try:
        single = {name: model.float() for name, model in models[0].items()}
        fused = measure(single, encoded, plan(**options))
    finally:
        for model in models[0].values():
            model.double()

    def numbers(value):
        if isinstance(value, dict):
            return [n for v in value.values() for n in numbers(v)]
        if isinstance(value, list):
            return [n for v in value for n in numbers(v)]
        return [value] if isinstance(value, float) else []

    assert len(numbers(exact)) > 60
    # Not bitwise: weights were rounded to float32 and back, exactly.
    np.testing.assert_allclose(numbers(fused), numbers(exact), atol=1e-5)
    json.dumps(fused)


def test_options_of_the_substitution_are_checked():
    for options, message in (
        ({"weight": 1.5}, "weight: expected a number from 0 to 1; got 1.5"),
        ({"weight": 0.5, "renormalise": "rows"}, "renormalise: expected one of row, visual, none"),
    ):
        with pytest.raises(ValueError, match=message):
            Substitution({}, None, None, **options)


@pytest.mark.parametrize("make", [qwen, smolvlm], ids=lambda f: f.__name__)
def test_other_families_equal_eager_attention(make):
    model, processor = make()
    encoded = encode_cases(processor, CASES, image_token_id(model), "all")
    for one, target in zip(CASES, encoded.targets):
        assert processor.tokenizer.decode(target).strip() == one.answer
    own = {0: (0,), 1: (1,), 2: (2,)}
    measured = measure(
        {"teacher": model, "student": model}, encoded, Plan({"student": own}, own, own)
    )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**encoded.batch, output_attentions=True, use_cache=False)
    for sample, found in enumerate(measured):
        rows, visual = encoded.answer_rows[sample], encoded.layout.visual[sample]
        want = [a[sample, :, rows][..., visual].mean(0).sum(-1).mean() for a in out.attentions]
        np.testing.assert_allclose(found["attention"]["student"]["visual"], want, atol=1e-5)
        scores = out.logits[sample, rows].log_softmax(-1)
        own_score = scores.gather(1, encoded.targets[sample][:, None]).mean().exp().item()
        assert found["answers"]["student"]["probability"] == pytest.approx(own_score, rel=1e-4)
        np.testing.assert_allclose(found["similarity"]["student"]["visual"], 1, atol=1e-5)
        plain = found["answers"]["student"]["probability"]
        assert found["substitution"]["1"]["probability"] != pytest.approx(plain, rel=1e-5)


# -- cases -----------------------------------------------------------------------------------------


def test_choices_with_one_first_token_are_refused(models):
    both = case([photo(48, 48)], "what ?", "blue", ("blue", "black"))
    with pytest.raises(ConfigError, match=r"differ in their first token.*cdfast.evaluate"):
        encode_cases(models[1], [both], image_token_id(models[0]["student"]))


def test_choices_are_scored_by_the_token_that_is_predicted(models):
    encoded = encode(models)
    for sample, one in enumerate(CASES):
        if one.choices:
            right = one.choices.index(one.answer)
            assert encoded.choices[sample][right] == encoded.targets[sample][0]


def test_limit_is_per_kind_and_orders_stay_together():
    questions = miniature_suite("validation", per_kind=4, vqa_per_kind=3)
    cases = cases_of_questions(questions, limit=4)
    kinds = {c.kind: [d.unit for d in cases if d.kind == c.kind] for c in cases}
    assert {len(units) for units in kinds.values()} == {3, 4}
    assert len(set(kinds["swap_obj"])) == 2  # two pairs, each in both orders
    assert len(cases_of_questions(questions)) == 7 * 4 * 2 + 4 * 3


def test_records_with_images_are_read(tmp_path):
    photo(48, 40).save(tmp_path / "a.png")
    turns = [("human", "<image>\nWhat?"), ("gpt", "a dog"), ("human", "Why?"), ("gpt", "so")]
    records = [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "no"}]},
        {"image": "a.png", "conversations": [{"from": a, "value": b} for a, b in turns]},
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(records))
    [one] = cases_of_file(path, [tmp_path])
    assert (one.kind, one.answer, one.choices, len(one.images)) == ("mine", "a dog", (), 1)
    assert [m["role"] for m in one.messages] == ["user"]
    path.write_text(json.dumps(records[:1]))
    with pytest.raises(DataError, match="at least one with an image and an answer"):
        cases_of_file(path, [tmp_path])
