"""Evaluation by likelihood: the suite, the scores, the controls and the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from cdfast.encoding import Sample, encode
from cdfast.evaluate import (
    Question,
    evaluate,
    main,
    miniature_suite,
    wilson_interval,
    with_shuffled_images,
)
from cdfast.evaluation import scoring as module
from cdfast.miniature.questions import VQA_KINDS, vqa_choices
from cdfast.miniature.scenes import CR_KINDS, TOYS, split_of
from cdfast.synthetic import (
    SceneDataset,
    build_miniature_model,
    check_disjoint,
    make_processor,
    miniature_configs,
    teacher_path,
)

from . import tiny_processors


@pytest.fixture(scope="module")
def model():
    config, _ = miniature_configs()
    config.text_config.num_hidden_layers = 2
    model = build_miniature_model(config, 0).eval()
    with torch.no_grad():
        # The shipped initialisation predicts almost evenly; here the answers should differ.
        model.lm_head.weight.mul_(50)
    return model


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def _question(text, choices, answer, image, pair=0, kind="k", group="G"):
    content = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image"})
    return Question(
        kind, group, image, [{"role": "user", "content": content}], choices, answer, pair
    )


def _multi_token_questions(seed=0):
    image = SceneDataset(seed=seed, size=1)[0].images[0]
    return [
        _question("where is red circle ?", ("top west", "top", "bottom center"), "top", image, 0),
        _question(
            "where is blue square ?", ("left", "above left", "above"), "above left", image, 1
        ),
        _question("list objects :", ("red circle", "red square", "blue"), "red square", image, 2),
    ]


def _slow_scores(model, processor, question):
    """One forward pass for each choice, without padding or batching."""
    scores = []
    prompt = processor.apply_chat_template(
        question.messages, tokenize=False, add_generation_prompt=True
    )
    for choice in question.choices:
        images = None if question.image is None else [question.image]
        arguments = {"add_special_tokens": False, "return_tensors": "pt"}
        start = processor(text=[prompt], images=images, **arguments)["input_ids"].shape[1]
        batch = processor(text=[f"{prompt} {choice}"], images=images, **arguments)
        with torch.no_grad():
            logits = model(**batch).logits[0].double()
        tokens = batch["input_ids"][0, start:]
        steps = logits[start - 1 : -1].log_softmax(-1)
        scores.append(steps.gather(1, tokens[:, None]).sum().item())
    return scores


def _captured(monkeypatch, model, processor, questions, **arguments):
    """The report, and the scores behind it."""
    seen = {}
    original = module._score_batch

    def score(*args):
        results = original(*args)
        for row, (scores, _) in zip(args[2], results):
            seen.setdefault(row.question, {}).update(scores)
        return results

    monkeypatch.setattr(module, "_score_batch", score)
    report = evaluate(model, processor, questions, progress=False, **arguments)
    return report, [[seen[i][c] for c in range(len(q.choices))] for i, q in enumerate(questions)]


def test_suite_shares_no_scene_with_training():
    questions = miniature_suite("test", 20, 20)
    keys = {question.source for question in questions}
    assert all(split_of(key) == "test" for key in keys)
    check_disjoint(keys, SceneDataset("train", 0, 2000).scene_keys())
    with pytest.raises(ValueError, match="split"):
        miniature_suite("train")


@pytest.mark.parametrize("kind", CR_KINDS)
def test_every_caption_question_in_both_orders(kind):
    questions = [q for q in miniature_suite("test", 30, 1) if q.kind == kind]
    assert len(questions) == 60
    for first, second in zip(questions[::2], questions[1::2]):
        assert first.pair == second.pair
        assert first.image is second.image
        assert (first.answer, second.answer) == ("A", "B")
        captions = []
        for question in (first, second):
            words = question.messages[0]["content"][1]["text"].split()
            assert words[:3] == ["which", "fits", "A"]
            captions.append((words[3 : words.index("B")], words[words.index("B") + 1 : -1]))
        assert captions[0] == captions[1][::-1]
        assert len(captions[0][0]) == len(captions[0][1])
    assert len({q.pair for q in questions}) == 30


def test_suite_is_reproducible_and_seeds_differ():
    def texts(**arguments):
        suite = miniature_suite(per_kind=5, vqa_per_kind=5, **arguments)
        return [q.messages[0]["content"][1]["text"] for q in suite]

    assert texts() == texts()
    assert texts() != texts(seed=1)
    assert texts() != texts(split="validation")
    for question in miniature_suite(per_kind=1, vqa_per_kind=20):
        if question.group == "VQA":
            assert question.choices == vqa_choices(TOYS)[question.kind]


def test_scores_are_the_plain_forwards(monkeypatch, model, processor):
    questions = [*miniature_suite(per_kind=1, vqa_per_kind=2), *_multi_token_questions()]
    _, scores = _captured(monkeypatch, model, processor, questions, batch_size=5)
    for question, got in zip(questions, scores):
        want = _slow_scores(model, processor, question)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3, err_msg=str(question.choices))


def test_batch_size_and_padding_side_change_nothing(monkeypatch, model, processor):
    questions = [*miniature_suite(per_kind=2, vqa_per_kind=2), *_multi_token_questions()]
    _, one = _captured(monkeypatch, model, processor, questions, batch_size=1)
    monkeypatch.undo()
    other = make_processor()
    other.tokenizer.padding_side = "left"
    _, many = _captured(monkeypatch, model, other, questions, batch_size=50)
    for a, b in zip(one, many):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_greedy_is_generation(model, processor):
    """Asked with what the model generates as the answer, greedy is right; else it is wrong."""
    compared = 0
    for question in miniature_suite(per_kind=1, vqa_per_kind=3):
        text = processor.apply_chat_template(
            question.messages, tokenize=False, add_generation_prompt=True
        )
        batch = processor(text=[text], images=[question.image], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=2, do_sample=False)
        words = processor.tokenizer.convert_ids_to_tokens(ids[0, batch["input_ids"].shape[1] :])
        if len(words) < 2 or any(word.startswith("<") for word in words):
            continue
        compared += 1
        said = " ".join(words)
        for answer, expected in ((said, 1.0), (f"{words[0]} Q Q", 0.0)):
            choices = (said, f"{words[0]} Q Q", "left Q")
            asked = replace(question, choices=choices, answer=answer)
            report = evaluate(model, processor, [asked], progress=False)
            assert report["kinds"][question.kind]["greedy"] == expected
    assert compared >= 5


def test_report_counts(monkeypatch, model, processor):
    image = SceneDataset(size=1)[0].images[0]
    questions = [
        _question("is there red circle ?", ("A", "B"), "A", image, 0, "one", "X"),
        _question("is there red square ?", ("A", "B"), "B", image, 0, "one", "X"),
        _question("is there blue square ?", ("A", "B"), "A", image, 1, "one", "X"),
        _question("is there blue circle ?", ("A", "B"), "B", image, 1, "one", "X"),
        _question("how many objects ?", ("1", "2", "3", "4"), "2", image, 0, "two", "X"),
        _question("how many objects ?", ("yes", "no"), "no", image, 0, "three", "Y"),
    ]
    preferred = ["A", "A", "A", "B", "2", "yes"]

    def score(model, processor, rows, questions):
        results = []
        for row in rows:
            choices = questions[row.question].choices
            wanted = preferred[row.question]
            results.append(({c: float(choices[c] == wanted) for c in row.choices}, True))
        return results

    monkeypatch.setattr(module, "_score_batch", score)
    report = evaluate(model, processor, questions, progress=False, batch_size=2)
    one = report["kinds"]["one"]
    assert (one["accuracy"], one["both_orders"], one["n"], one["chance"]) == (0.75, 0.5, 4, 0.5)
    assert one["ci95"] == wilson_interval(0.75, 2)
    assert report["kinds"]["two"]["chance"] == 0.25
    assert report["averages"] == {"X": 0.875, "Y": 0.0}
    assert report["averages_chance"] == {"X": 0.375, "Y": 0.5}
    assert report["averages_greedy"] == {"X": 1.0, "Y": 1.0}
    json.dumps(report)


def test_wilson_interval():
    low, high = wilson_interval(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(1.0, 10)[0] < 0.75


def test_nan_is_wrong(processor):
    model = build_miniature_model(miniature_configs()[0], 0)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    report = evaluate(model, processor, miniature_suite(per_kind=1, vqa_per_kind=2), progress=False)
    assert report["averages"] == {"CR": 0.0, "VQA": 0.0}
    assert report["averages_greedy"] == {"CR": 0.0, "VQA": 0.0}
    assert model.training


def test_shuffled_images_belong_to_other_questions():
    questions = miniature_suite(per_kind=7, vqa_per_kind=7)
    shuffled = with_shuffled_images(questions, seed=3)
    images = {}
    for before, after in zip(questions, shuffled):
        assert before.image is not after.image
        assert replace(after, image=before.image) == before
        images.setdefault((after.kind, after.pair), set()).add(id(after.image))
    assert all(len(of_pair) == 1 for of_pair in images.values())
    assert {id(q.image) for q in questions} == {id(q.image) for q in shuffled}
    with pytest.raises(ValueError, match="at least two"):
        with_shuffled_images(questions[:2])


def test_questions_without_images(monkeypatch, model, processor):
    image = SceneDataset(size=1)[0].images[0]
    questions = [
        _question("how many objects ?", ("2", "3"), "2", picture, pair)
        for pair, picture in enumerate((image, None, image, None))
    ]
    _, scores = _captured(monkeypatch, model, processor, questions, batch_size=4)
    assert scores[0] == pytest.approx(scores[2], abs=1e-5)
    assert scores[1] == pytest.approx(scores[3], abs=1e-5)
    assert scores[1] != pytest.approx(scores[0], abs=1e-3)
    assert scores[1] == pytest.approx(_slow_scores(model, processor, questions[1]), abs=1e-3)


@pytest.mark.parametrize("name", ["llava", "words", "chatml"])
def test_other_templates_and_tokenizers(monkeypatch, name):
    """Byte-level answers of many tokens, templates of strings, a begin-of-text token added."""
    processor = tiny_processors.MAKERS[name]()
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=48,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    choices = ("w1", "w1 w2", "w12", "w3")
    questions = [
        _question(text, choices, "w12", tiny_processors.picture(seed), seed)
        for seed, text in enumerate(("w5 w6", "w5", "w7 w8 w9"))
    ]
    _, scores = _captured(monkeypatch, model, processor, questions, batch_size=7)
    for question, got in zip(questions, scores):
        for choice, score in zip(choices, got):
            answer = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
            item = encode(processor, Sample([*question.messages, answer], (question.image,)))
            with torch.no_grad():
                logits = model(item["input_ids"][None], **item["images"]).logits[0]
            # The labels also hold the end-of-turn token, which is not scored.
            steps = torch.nonzero(item["labels"] >= 0)[:-1, 0]
            tokens = item["input_ids"][steps]
            want = logits[steps - 1].log_softmax(-1).gather(1, tokens[:, None]).sum().item()
            assert score == pytest.approx(want, rel=1e-4, abs=1e-3)


def test_bad_questions_are_refused(model, processor):
    with pytest.raises(ValueError, match="choices"):
        _question("how many objects ?", ("2",), "2", None)
    with pytest.raises(ValueError, match="choices"):
        _question("how many objects ?", ("2", "2"), "2", None)
    with pytest.raises(ValueError, match="answer"):
        _question("how many objects ?", ("2", "3"), "4", None)
    with pytest.raises(ValueError, match="questions"):
        evaluate(model, processor, [])


def test_teacher_knows_and_needs_the_image():
    teacher = AutoModelForImageTextToText.from_pretrained(teacher_path())
    processor = AutoProcessor.from_pretrained(teacher_path())
    questions = miniature_suite("validation", 20, 20)
    report = evaluate(teacher, processor, questions, progress=False)
    assert report["averages"]["CR"] >= 0.9
    assert report["averages"]["VQA"] >= 0.9
    assert report["averages_greedy"]["CR"] >= 0.9
    control = evaluate(teacher, processor, questions, progress=False, shuffle_images=True)
    assert control["shuffled_images"]
    assert control["averages"]["CR"] <= 0.65


def test_command(tmp_path, capsys):
    result = tmp_path / "new" / "result.json"
    path = str(teacher_path())
    arguments = [path, "--per-kind", "3", "--vqa-per-kind", "3", "--shuffle-images"]
    assert main([*arguments, "--json", str(result), "--device", "cpu"]) == 0
    content = json.loads(result.read_text())
    assert set(content["models"]) == {path, f"{path}, shuffled images"}
    assert set(content["models"][path]["kinds"]) == {*CR_KINDS, *VQA_KINDS}
    assert set(content["text_only"]) >= {*CR_KINDS, *VQA_KINDS}
    shown = capsys.readouterr().out
    for word in ("swap_att", "chance", "text-only", "CR average"):
        assert word in shown


def test_command_names_a_model_it_cannot_load(tmp_path, capsys):
    path = str(tmp_path / "absent")
    with pytest.raises(SystemExit):
        main([path, "--per-kind", "1", "--vqa-per-kind", "1"])
    assert f"model {path!r} cannot be loaded" in capsys.readouterr().err
