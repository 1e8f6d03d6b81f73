"""Losses of the systems (LLaVADI, LLaVA-KD, LLaVA-MoD) against plain float64; recipes, run."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from cdfast import distill, losses
from cdfast.aligner import VisualAttentionAligner
from cdfast.config import load_recipe, to_dict
from cdfast.export import write_student
from cdfast.hidden_projector import FILE, load_hidden_projector
from cdfast.losses import (
    gram_matrix,
    hidden_loss_sum,
    kl_loss_sum,
    relation_loss_sum,
    soft_cross_entropy_sum,
)
from cdfast.train import main
from cdfast.trainer import unwrap_model
from tests.cdfast.test_losses import (
    TEACHER_WIDTH,
    TOLERANCE,
    VOCAB,
    WIDTH,
    normal,
    reference,
    relative_error,
    student_tensors,
    teacher_tensors,
)
from tests.cdfast.test_trainer import make_trainer, relative_change, state
from tests.cdfast.tiny_models import IMAGE_TOKEN, tiny_llava, tiny_teacher

SIZES = [9, 0, 5, 1]
ROWS = sum(SIZES)


# -- soft cross-entropy ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("teacher_vocab", [37, 50, 30], ids=["equal", "teacher-more", "less"])
def test_soft_cross_entropy(rows, teacher_vocab):
    hidden, weight = student_tensors(rows)
    teacher = teacher_tensors(rows, teacher_vocab)
    loss = soft_cross_entropy_sum(hidden, weight, *teacher)
    got = torch.autograd.grad(loss, [hidden, weight])

    def plain(h, w):
        shared = min(len(w), teacher_vocab)
        p = (teacher[0].double() @ teacher[1][:shared].double().T).softmax(-1)
        return -(p * (h @ w[:shared].T).log_softmax(-1)).sum()

    want, want_grads = reference(plain, hidden, weight)
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE)
    for g, w in zip(got, want_grads):
        assert relative_error(g, w) <= TOLERANCE


def test_soft_cross_entropy_has_the_gradient_of_the_kl_to_the_last_bit():
    hidden, weight = student_tensors(9)
    teacher = teacher_tensors(9)
    values = [f(hidden, weight, *teacher) for f in (kl_loss_sum, soft_cross_entropy_sum)]
    kl, soft = (torch.autograd.grad(value, [hidden, weight]) for value in values)
    assert all(torch.equal(a, b) for a, b in zip(kl, soft))
    assert values[1] > values[0] + 1


# -- hidden states ---------------------------------------------------------------------------------


def plain_hidden(objective, projected, teacher):
    total = 0.0
    for s, t in zip(projected, teacher.double()):
        if objective == "cosine":
            total = total + 1 - (s @ t) / (s.norm() * t.norm())
        else:
            total = total + ((s - t) ** 2).sum() / len(t)
    return total


@pytest.mark.parametrize("objective", ["cosine", "mse"])
def test_hidden_loss_and_gradient(objective):
    projected, teacher = normal(7, TEACHER_WIDTH, seed=1).requires_grad_(), normal(7, TEACHER_WIDTH)
    loss = hidden_loss_sum(projected, teacher, objective)
    (got,) = torch.autograd.grad(loss, [projected])
    want, (want_grad,) = reference(lambda p: plain_hidden(objective, p, teacher), projected)
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE)
    assert relative_error(got, want_grad) <= TOLERANCE


@pytest.mark.parametrize("objective", ["cosine", "mse"])
def test_hidden_loss_passes_gradcheck(objective):
    projected = normal(3, 5, seed=1).double().requires_grad_()
    teacher = normal(3, 5).double()
    assert torch.autograd.gradcheck(lambda p: hidden_loss_sum(p, teacher, objective), projected)


@pytest.mark.parametrize("objective", ["cosine", "mse"])
def test_hidden_loss_of_half_precision_is_computed_in_float32(objective):
    projected, teacher = (normal(50, 64, seed=s).bfloat16() for s in (1, 2))
    loss = hidden_loss_sum(projected.requires_grad_(), teacher, objective)
    assert loss.dtype == torch.float32
    want = plain_hidden(objective, projected.detach().double(), teacher)
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE)


def test_hidden_loss_of_no_rows_is_a_connected_zero():
    projected = torch.zeros(0, 4, requires_grad=True)
    for objective in ("cosine", "mse"):
        loss = hidden_loss_sum(projected, torch.zeros(0, 4), objective)
        assert loss.item() == 0
        loss.backward()


# -- relation --------------------------------------------------------------------------------------


def relation(hidden, weight, teacher_hidden, teacher_weight, sizes=SIZES):
    shared = min(len(weight), len(teacher_weight))
    grams = gram_matrix(weight, shared), gram_matrix(teacher_weight, shared)
    return relation_loss_sum(hidden, grams[0], teacher_hidden, grams[1], sizes)


def plain_relation(hidden, weight, teacher_hidden, teacher_weight, sizes=SIZES):
    """By every logit, and by loops over pairs of visual tokens."""
    shared, total, begin = min(len(weight), len(teacher_weight)), 0.0, 0
    for size in sizes:
        part = slice(begin, begin + size)
        begin += size
        if not size:
            continue
        y_s = hidden[part] @ weight[:shared].T
        y_t = (teacher_hidden[part] @ teacher_weight[:shared].T).to(y_s.dtype)
        pairs = [(i, j) for i in range(size) for j in range(size)]
        r_s = torch.stack([(y_s[i] * y_s[j]).sum() for i, j in pairs])
        r_t = torch.stack([(y_t[i] * y_t[j]).sum() for i, j in pairs])
        total = total + 1 - (r_s * r_t).sum() / (r_s.norm() * r_t.norm())
    return total


def relation_tensors(vocab=VOCAB, teacher_vocab=VOCAB):
    return (*student_tensors(ROWS, vocab), *teacher_tensors(ROWS, teacher_vocab))


@pytest.mark.parametrize(
    "vocab, teacher_vocab", [(37, 37), (37, 50), (50, 37)], ids=["equal", "teacher-more", "less"]
)
def test_relation_loss_and_gradients(vocab, teacher_vocab, monkeypatch):
    monkeypatch.setattr(losses, "_GRAM_ROWS", 8)  # several chunks, the last one shorter
    hidden, weight, *teacher = relation_tensors(vocab, teacher_vocab)
    loss = relation(hidden, weight, *teacher)
    got = torch.autograd.grad(loss, [hidden, weight])
    wide = [t.double() for t in teacher]
    want, want_grads = reference(lambda h, w: plain_relation(h, w, *wide), hidden, weight)
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE)
    for g, w in zip(got, want_grads):
        assert relative_error(g, w) <= TOLERANCE
    assert not got[1][min(vocab, teacher_vocab) :].any()


def test_relation_loss_passes_gradcheck():
    hidden, weight = normal(4, 3, seed=1).double(), normal(6, 3, seed=2).double()
    teacher = normal(4, 5, seed=3).double(), normal(6, 5, seed=4).double()
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: relation(h, w, *teacher, [3, 1]), inputs)


def test_gram_matrix_passes_gradcheck(monkeypatch):
    """Each entry by itself: the gradient that comes back to it need not be symmetric."""
    monkeypatch.setattr(losses, "_GRAM_ROWS", 2)
    weight = normal(5, 3, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: gram_matrix(w, 3), weight)


def test_relation_of_equal_models_is_zero_and_scale_does_not_matter():
    hidden, weight, *_ = relation_tensors()
    same = [3 * hidden.detach(), weight.detach()]
    assert abs(relation(hidden, weight, *same).item()) < 1e-5


def test_relation_without_images_is_a_connected_zero():
    hidden, weight = student_tensors(0)
    loss = relation(hidden, weight, *teacher_tensors(0), [0, 0])
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert not weight.grad.any()


def test_relation_in_bfloat16_is_as_exact_as_its_inputs():
    """The one error budget, with room: at most twice the error of eager PyTorch in that dtype."""
    sizes = [60, 40]
    tensors = [normal(100, WIDTH, seed=1), normal(500, WIDTH, seed=2)]
    tensors += [normal(100, TEACHER_WIDTH, seed=3), normal(500, TEACHER_WIDTH, seed=4)]
    half = [t.bfloat16() for t in tensors]
    for tensor in half[:2]:
        tensor.requires_grad_()

    def eager(hidden, weight, teacher_hidden, teacher_weight):
        total = 0.0
        for h_s, h_t in zip(hidden.split(sizes), teacher_hidden.split(sizes)):
            y_s, y_t = h_s @ weight.T, h_t @ teacher_weight.T
            r_s, r_t = ((y @ y.T).flatten() for y in (y_s, y_t))
            total = total + 1 - F.cosine_similarity(r_s, r_t, dim=0)
        return total

    teacher = [t.double() for t in half[2:]]
    want, want_grads = reference(lambda h, w: eager(h, w, *teacher), *half[:2])
    errors = []
    for loss in (relation(*half, sizes), eager(*half)):
        grads = torch.autograd.grad(loss, half[:2])
        errors.append([abs(loss.item() - want.item()) / want.item()])
        errors[-1] += [relative_error(g, w) for g, w in zip(grads, want_grads)]
    ours, plain = errors
    assert ours[0] <= 2 * plain[0]
    assert all(o <= 3 * p for o, p in zip(ours[1:], plain[1:]))
    assert ours[0] <= 1e-5
    assert max(ours[1:]) <= 2**-8  # gradients are stored in bfloat16


def test_relation_is_not_rounded_under_autocast():
    hidden, weight, *teacher = relation_tensors()
    plain = relation(hidden, weight, *teacher)
    want = torch.autograd.grad(plain, [hidden, weight])
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation(hidden, weight, *teacher)
    assert torch.equal(loss, plain)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, [hidden, weight]), want))


# -- in the trainer --------------------------------------------------------------------------------

ALL = {
    "hidden_weight": 0.5,
    "visual_kl_weight": 2.0,
    "relation_weight": 3.0,
    "kl_objective": "soft_ce",
}
NAMES = ("lm", "kl", "alignment", "hidden", "visual_kl", "relation")


@pytest.mark.parametrize("unshifted", [False, True])
def test_trainer_takes_the_losses_by_their_definitions(tmp_path, unshifted):
    """Every mean against plain logits and hidden states, with a sample without an image."""
    trainer = make_trainer(tmp_path, unshifted_kl_mask=unshifted, **ALL)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss, means = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    student, teacher = tiny_llava(), tiny_teacher()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        h_s, h_t = (m.base_model(**inputs).last_hidden_state.double() for m in (student, teacher))
        y_s, y_t = (h @ m.lm_head.weight.double().T for h, m in ((h_s, student), (h_t, teacher)))
        f = trainer.model.hidden_projector.double()(h_s)
    answers = losses.answer_rows(batch["labels"])
    kl_rows = losses.unshifted_rows(batch["labels"]) if unshifted else answers
    visual = batch["input_ids"] == IMAGE_TOKEN
    pairs = [(y_s[i][visual[i]], y_t[i][visual[i]]) for i in range(4) if visual[i].any()]
    assert len(pairs) == 3
    relations = [[(y @ y.T).flatten() for y in pair] for pair in pairs]
    want = {
        "kl": -(y_t.softmax(-1) * y_s.log_softmax(-1)).sum(-1)[kl_rows].mean(),
        "hidden": (1 - F.cosine_similarity(f, h_t, dim=-1))[answers].mean(),
        "visual_kl": F.kl_div(
            y_s[visual].log_softmax(-1),
            y_t[visual].log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        ),
        "relation": sum(1 - F.cosine_similarity(a, b, dim=0) for a, b in relations) / 3,
    }
    for name, value in want.items():
        assert means[name].item() == pytest.approx(value.item(), rel=TOLERANCE, abs=1e-7), name
    weights = {name: getattr(trainer.args, f"{name}_weight") for name in NAMES}
    total = sum(weights[name] * means[name].item() for name in NAMES)
    assert loss.item() == pytest.approx(total, rel=TOLERANCE)


def test_an_lm_loss_without_weight_is_logged_and_has_no_backward(tmp_path):
    """LLaVA-MoD's mimic stage; another loss on logits reaches the output embedding."""
    trainer = make_trainer(tmp_path / "a", lm_weight=0.0, kl_objective="soft_ce")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss, means = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert not means["lm"].requires_grad
    assert means["lm"] > 0
    loss.backward()
    plain = make_trainer(tmp_path / "b", lm_weight=1.0, kl_objective="soft_ce")
    _, want = plain.compute_loss(plain.model, batch, return_outputs=True)
    assert torch.equal(means["lm"], want["lm"])
    (want["kl"] + plain.args.alignment_weight * want["alignment"] + 0.0 * want["lm"]).backward()
    for (name, got), other in zip(trainer.model.named_parameters(), plain.model.parameters()):
        assert (got.grad is None) == (other.grad is None), name
        assert got.grad is None or torch.equal(got.grad, other.grad), name


def test_an_lm_loss_without_weight_or_other_loss_on_logits_still_gives_every_gradient(tmp_path):
    """DDP waits for that of the output embedding."""
    trainer = make_trainer(tmp_path, lm_weight=0.0, kl_weight=0.0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(trainer.model, batch).backward()
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert not trained["lm_head.weight"].grad.any()


def test_batches_without_images_count_nothing_and_train_all(tmp_path):
    trainer = make_trainer(tmp_path, **ALL)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (3, 7)])
    loss, means = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert means["visual_kl"] == means["relation"] == 0
    assert means["hidden"] > 0
    loss.backward()
    trained = [p for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_accumulation_and_recomputation_do_not_change_the_step(tmp_path):
    start = state(make_trainer(tmp_path / "start", **ALL).model)
    whole = make_trainer(tmp_path / "whole", **ALL)
    whole.train()
    split = make_trainer(
        tmp_path / "split",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        **ALL,
    )
    split.train()
    assert relative_change(state(split.model), state(whole.model), start) <= TOLERANCE
    logs = [trainer.state.log_history[0] for trainer in (split, whole)]
    for name in NAMES:
        assert logs[0][f"loss_{name}"] == pytest.approx(logs[1][f"loss_{name}"], rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_mlp_is_trained_resumed_and_left_out_of_students(tmp_path, lora):
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3, "size": 16, **ALL}
    options |= {"save_strategy": "steps", "save_steps": 2}

    def trainer():
        student = tiny_llava()
        if lora:
            torch.manual_seed(0)
            targets = r".*language_model.*\.(q|v)_proj"
            student = get_peft_model(student, LoraConfig(r=4, target_modules=targets))
        return make_trainer(tmp_path / "run", student, **options)

    start = state(trainer().model)
    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    got, want = state(again.model), state(whole.model)
    assert all(torch.equal(got[n], want[n]) for n in want)
    mlp = [n for n in want if "hidden_projector" in n]
    assert len(mlp) == 4
    assert not any(torch.equal(start[n], want[n]) for n in mlp)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    weights = "adapter_model" if lora else "model"
    assert not [n for n in load_file(checkpoint / f"{weights}.safetensors") if "hidden_" in n]
    assert set(load_file(checkpoint / FILE)) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    (tmp_path / "student").mkdir()
    tiny_llava().save_pretrained(tmp_path / "base")
    write_student(whole.model, whole.model.state_dict(), tmp_path / "student", tmp_path / "base")
    exported = load_file(tmp_path / "student" / "model.safetensors")
    assert not [n for n in exported if "hidden_" in n]
    (checkpoint / FILE).unlink()
    with pytest.raises(ValueError, match=r"hidden_projector.safetensors: .*Resume with"):
        load_hidden_projector(unwrap_model(again.model), checkpoint)


def test_gram_matrices_of_frozen_heads_are_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        distill, "gram_matrix", lambda w, v: made.append(w.requires_grad) or gram_matrix(w, v)
    )
    make_trainer(tmp_path / "a", max_steps=3, **ALL).train()
    assert made == [True, False, True, True]
    made.clear()
    student = get_peft_model(tiny_llava(), LoraConfig(r=2, target_modules=["q_proj"]))
    make_trainer(tmp_path / "b", student, max_steps=3, **ALL).train()
    assert made == [False, False]


def test_losses_that_are_not_used_cost_and_log_nothing(tmp_path, monkeypatch):
    for name in ("hidden_loss_sum", "relation_loss_sum", "soft_cross_entropy_sum", "gram_matrix"):
        monkeypatch.setattr(distill, name, None)
    trainer = make_trainer(tmp_path)
    trainer.train()
    logged = {n for n in trainer.state.log_history[0] if n.startswith("loss_")}
    assert logged == {"loss_lm", "loss_kl", "loss_alignment"}
    assert not hasattr(trainer.model, "hidden_projector")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_weight": -1.0}, "hidden_weight: expected a finite number >= 0; got -1.0"),
        ({"relation_weight": float("nan")}, "relation_weight: expected a finite"),
        ({"kl_objective": "ce"}, "kl_objective: expected kl or soft_ce; got 'ce'"),
        ({"hidden_objective": "l1"}, "hidden_objective: expected cosine or mse; got 'l1'"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_each_loss_needs_a_teacher(tmp_path):
    off = {"kl_weight": 0.0, "alignment_weight": 0.0}
    for name in ("hidden_weight", "visual_kl_weight", "relation_weight"):
        with pytest.raises(ValueError, match=f"because {name} > 0; got None"):
            make_trainer(tmp_path, teacher=False, **off, **{name: 1.0})


RECIPES = {
    "miniature-llavadi": {"loss_lm", "loss_kl", "loss_hidden"},
    "miniature-llava-kd": {"loss_lm", "loss_kl", "loss_visual_kl", "loss_relation"},
    "miniature-llava-mod": {"loss_lm", "loss_kl"},
    "miniature-official": {"loss_lm", "loss_kl", "loss_alignment"},
}


@pytest.mark.parametrize("lora", [False, True])
def test_later_stages_take_over_the_mlp_and_the_matched_layers(
    tmp_path, monkeypatch, one_thread, lora
):
    chosen = []
    calibrate = VisualAttentionAligner.calibrate
    monkeypatch.setattr(
        VisualAttentionAligner,
        "calibrate",
        lambda self, **batch: chosen.append(calibrate(self, **batch)) or chosen[-1],
    )
    recipe = to_dict(load_recipe("miniature-llavadi"))
    for stage in recipe["stages"][1:]:
        stage |= {"alignment_weight": 1.0, "turns_mix": [0, 1, 1, 0, 0, 0], "lora": lora}
    for stage in recipe["stages"]:
        stage |= {"max_steps": 1, "batch_size": 2, "warmup": 0}
    last = recipe["stages"][-1]
    last |= {"learning_rate": 0.0, "weight_decay": 0.0, "alignment_weight": 0.0}
    last["arguments"] |= {"eval_steps": 1}
    recipe |= {"matching": "adaptive", "layers": "all", "evaluate": None, "workers": 0}
    recipe |= {"analyze_questions": 0, "eval_questions": 0, "eval_samples": 2}
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(recipe))
    main([str(path), "--output-dir", str(tmp_path / "run")])
    second, third, fourth = (
        load_file(tmp_path / "run" / "stages" / f"{n}-dft" / FILE) for n in (2, 3, 4)
    )
    assert not any(torch.equal(second[name], third[name]) for name in second)
    assert all(torch.equal(third[name], fourth[name]) for name in third)
    stages = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
    [matches] = chosen
    want = {str(s): list(t) for s, t in matches.items()}
    assert [stage["matches"] for stage in stages] == [None, want, want, None]
    # What aligns nothing is compared on the layers that were chosen.
    assert stages[-1]["evaluated"]["matches"] == want
    assert "eval_similarity/mean" in stages[-1]["evaluations"][-1]
    assert not (tmp_path / "run" / "stages" / "1-pretrain" / FILE).exists()
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not any("hidden_projector" in name for name in exported)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_systems_run_to_their_end(tmp_path, name, one_thread):
    recipe = to_dict(load_recipe(name))
    for stage in recipe["stages"]:
        stage |= {"max_steps": 1, "batch_size": 4}
    recipe |= {"evaluate_per_kind": 2, "evaluate_vqa_per_kind": 2, "workers": 0}
    recipe |= {"analyze_questions": 0}
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(recipe))
    main([str(path), "--output-dir", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [s["steps"] for s in results["stages"]] == [1] * len(recipe["stages"])
    # The longest stage is the one that distils.
    logged = results["stages"][2]["log"][0]
    assert {key for key in logged if key.startswith("loss_")} == RECIPES[name]
    assert all(math.isfinite(logged[key]) for key in RECIPES[name])
    if name == "miniature-llava-mod":
        assert "loss_preference" in results["stages"][-1]["log"][0]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
