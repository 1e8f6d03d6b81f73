"""DistillationTrainer: normalisation over the global step, logs, resume, refusals."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from cdfast_kernels import keep_alignment, library_calls
from peft import LoraConfig, get_peft_model

from cdfast import DistillationConfig, DistillationTrainer
from cdfast.adapters import share_vision_tower, vision_tower
from cdfast.collator import VisionTextCollator
from cdfast.trainer import unwrap_model
from tests.cdfast.samples import TinySamples, one_step
from tests.cdfast.tiny_models import tiny_llava, tiny_teacher

TOLERANCE = 1e-5


def make_trainer(
    folder, student=None, teacher=None, size=8, text_only_every=4, eval_dataset=None, **options
):
    values = one_step(
        folder,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        layers="all",
        alignment_weight=2.0,
    )
    student = student or tiny_llava()
    vision_tower(unwrap_model(student))[2].requires_grad_(False)
    teacher = tiny_teacher() if teacher is None else teacher
    return DistillationTrainer(
        model=student,
        teacher=teacher or None,
        args=DistillationConfig(**{**values, **options}),
        train_dataset=TinySamples(size, text_only_every=text_only_every),
        eval_dataset=eval_dataset,
        data_collator=VisionTextCollator(0),
    )


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def relative_change(got, want, start):
    error = sum((got[n] - want[n]).square().sum() for n in want).sqrt()
    size = sum((want[n] - start[n]).square().sum() for n in want).sqrt()
    assert size > 0
    return float(error / size)


@pytest.mark.parametrize("batch_size, accumulation", [(2, 2), (1, 4)])
def test_accumulation_does_not_change_the_step(tmp_path, batch_size, accumulation):
    start = state(tiny_llava())
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    split = make_trainer(
        tmp_path / "split",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    split.train()
    error = relative_change(state(split.model), state(whole.model), start)
    assert error <= TOLERANCE
    for name in ("loss", "loss_lm", "loss_kl", "loss_alignment"):
        got, want = split.state.log_history[0][name], whole.state.log_history[0][name]
        assert got == pytest.approx(want, rel=1e-4)


def test_losses_equal_their_definitions(tmp_path):
    """Every logged number against plain logits and the aligner used by hand."""
    trainer = make_trainer(tmp_path, learning_rate=0.0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    student, teacher = tiny_llava(), tiny_teacher()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    rows = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        s = student(**inputs).logits[:, :-1][rows].log_softmax(-1)
        t = teacher(**inputs).logits[:, :-1][rows].log_softmax(-1)
    want_lm = F.nll_loss(s, batch["labels"][:, 1:][rows])
    want_kl = F.kl_div(s, t, log_target=True, reduction="batchmean")
    aligner = trainer.aligner
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**inputs)
        _, alignment = aligner.student_forward(targets, **inputs)
    loss, means = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert means["lm"].item() == pytest.approx(want_lm.item(), rel=TOLERANCE)
    assert means["kl"].item() == pytest.approx(want_kl.item(), rel=TOLERANCE)
    assert means["alignment"].item() == pytest.approx(alignment.loss.item(), rel=TOLERANCE)
    total = means["lm"] + means["kl"] + 2 * means["alignment"]
    assert loss.item() == pytest.approx(total.item(), rel=TOLERANCE)


def test_copy_of_a_trained_student_runs_its_own_weights(tmp_path):
    trainer = make_trainer(tmp_path)
    twin = copy.deepcopy(trainer.model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert twin(**inputs).logits.abs().max() == 0
        assert trainer.model(**inputs).logits.abs().max() > 0
    _, means = trainer.compute_loss(twin, batch, return_outputs=True)
    assert means["lm"].item() == pytest.approx(math.log(100))  # the vocabulary's size


def test_vision_tower_runs_once_per_batch(tmp_path):
    student, teacher = tiny_llava(), tiny_teacher()
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    tower = share_vision_tower(teacher, student)
    alone = make_trainer(tmp_path / "a", tiny_llava(), _teacher_like(student), max_steps=3)
    alone.train()
    shared = make_trainer(tmp_path / "b", student, teacher, max_steps=3)
    shared.train()
    assert tower.runs == 3
    theirs = {n: p for n, p in state(alone.model).items() if "vision_tower" not in n}
    assert relative_change(state(shared.model), theirs, state(tiny_llava())) <= TOLERANCE


def _teacher_like(student):
    teacher = tiny_teacher()
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    return teacher


def test_resume_continues_bitwise(tmp_path):
    options = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-3, "size": 16}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "run", **options, **saving)
    whole.train()
    again = make_trainer(tmp_path / "run", **options, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    got, want = state(again.model), state(whole.model)
    assert all(torch.equal(got[n], want[n]) for n in want)
    tail = [e["loss"] for e in whole.state.log_history if "loss" in e][3:]
    assert [e["loss"] for e in again.state.log_history if "loss" in e][3:] == tail


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_best_model_is_loaded_at_the_end(tmp_path, lora):
    """What is left in memory are the weights of the best step, not of the last."""
    student, targets = tiny_llava(), r".*language_model.*\.(q|k|v|o)_proj"
    if lora:
        student = get_peft_model(student, LoraConfig(r=4, target_modules=targets))
    trainer = make_trainer(
        tmp_path,
        student,
        max_steps=3,
        learning_rate=1.0,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=TinySamples(4, seed=1),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    best = min(losses)
    assert best < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_adaptive_matches_survive_a_resume(tmp_path):
    options = {"max_steps": 2, "matching": "adaptive", "save_strategy": "steps", "save_steps": 1}
    first = make_trainer(tmp_path, **options)
    first.train()
    path = tmp_path / "checkpoint-1" / "alignment.json"
    matches = json.loads(path.read_text())["matches"]
    assert {int(k): tuple(v) for k, v in matches.items()} == first.aligner.matches
    again = make_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.aligner.matches == first.aligner.matches


def test_adaptive_matching_waits_for_an_image(tmp_path):
    trainer = make_trainer(tmp_path, matching="adaptive")
    text_only = trainer.data_collator([trainer.train_dataset[i] for i in (3, 7)])
    _, means = trainer.compute_loss(trainer.model, text_only, return_outputs=True)
    assert set(means) == {"loss", "lm", "kl"}
    assert trainer.aligner.matches is None
    mixed = trainer.data_collator([trainer.train_dataset[i] for i in (3, 4)])
    _, means = trainer.compute_loss(trainer.model, mixed, return_outputs=True)
    assert means["alignment"] > 0
    assert set(trainer.aligner.matches) == {0, 1, 2}


def test_unshifted_mask_is_the_authors_one(tmp_path):
    trainer = make_trainer(tmp_path, unshifted_kl_mask=True, learning_rate=0.0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    student, teacher = tiny_llava(), tiny_teacher()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    rows = batch["labels"] != -100
    with torch.no_grad():
        s = student(**inputs).logits[rows].log_softmax(-1)
        t = teacher(**inputs).logits[rows].log_softmax(-1)
    want = F.kl_div(s, t, log_target=True, reduction="batchmean")
    _, means = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert means["kl"].item() == pytest.approx(want.item(), rel=TOLERANCE)


@pytest.mark.parametrize("teacher_vocab", [92, 120])
def test_unequal_vocabularies_compare_their_shared_part(tmp_path, teacher_vocab):
    teacher = tiny_teacher(vocab=teacher_vocab)
    trainer = make_trainer(tmp_path, teacher=teacher, learning_rate=0.0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    rows, shared = batch["labels"][:, 1:] != -100, min(teacher_vocab, 100)
    with torch.no_grad():
        s = tiny_llava()(**inputs).logits[:, :-1][rows][:, :shared].log_softmax(-1)
        t = teacher(**inputs).logits[:, :-1][rows][:, :shared].log_softmax(-1)
    want = F.kl_div(s, t, log_target=True, reduction="batchmean")
    _, means = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert means["kl"].item() == pytest.approx(want.item(), rel=TOLERANCE)


def test_stage_without_teacher(tmp_path):
    trainer = make_trainer(tmp_path, teacher=False, kl_weight=0.0, alignment_weight=0.0)
    trainer.train()
    assert set(trainer.state.log_history[0]) >= {"loss", "loss_lm"}
    assert "loss_kl" not in trainer.state.log_history[0]


def test_bf16_autocast_runs_and_stays_close(tmp_path):
    plain = make_trainer(tmp_path / "a", learning_rate=0.0)
    plain.train()
    half = make_trainer(tmp_path / "b", learning_rate=0.0, bf16=True)
    half.train()
    for name in ("loss_lm", "loss_kl", "loss_alignment"):
        want = plain.state.log_history[0][name]
        assert half.state.log_history[0][name] == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("batch_size", [8, 3, 1])
def test_evaluation_losses_do_not_depend_on_the_batch_size(tmp_path, batch_size):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=batch_size)
    trainer.eval_dataset = TinySamples(8)
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    want, means = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert metrics["eval_loss"] == pytest.approx(want.item(), rel=TOLERANCE)
    for name in ("lm", "kl", "alignment"):
        assert metrics[f"eval_loss_{name}"] == pytest.approx(means[name].item(), rel=TOLERANCE)


def test_compute_metrics_is_refused(tmp_path):
    args = DistillationConfig(
        output_dir=str(tmp_path), use_cpu=True, kl_weight=0, alignment_weight=0
    )
    collator = VisionTextCollator(0)
    with pytest.raises(ValueError, match="compute_metrics"):
        DistillationTrainer(tiny_llava(), args, data_collator=collator, compute_metrics=print)


def test_weights_that_need_a_teacher_are_refused_without_one(tmp_path):
    with pytest.raises(ValueError, match="kl_weight and alignment_weight > 0"):
        make_trainer(tmp_path, teacher=False)


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant"):
        make_trainer(
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


def test_checkpointing_does_not_change_the_step(tmp_path):
    plain = make_trainer(tmp_path / "a")
    plain.train()
    recomputed = make_trainer(tmp_path / "b", gradient_checkpointing=True)
    recomputed.train()
    layers = recomputed.model.model.language_model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    start = state(tiny_llava())
    assert relative_change(state(recomputed.model), state(plain.model), start) <= TOLERANCE


def test_keep_alignment_does_not_repeat_attention(tmp_path, monkeypatch):
    """The aligned layers' attention runs once, and the step is the same to the last bit."""
    steps, calls = [], []
    forward, backward = library_calls.LIBRARIES["sdpa"]
    for keep in (False, True):
        count = []

        def counted(*args, count=count):
            count.append(1)
            return forward(*args)

        monkeypatch.setitem(library_calls.LIBRARIES, "sdpa", (counted, backward))
        trainer = make_trainer(
            tmp_path / str(keep),
            gradient_checkpointing=True,
            keep_alignment=keep,
            backend="sdpa",
            layers="intermediate",
        )
        trainer.train()
        steps.append(state(trainer.model))
        calls.append(len(count))
        aligned = [*trainer.aligner.student_layers]
        layers = trainer.model.model.language_model.layers
        kept = ["context_fn" in layer._gradient_checkpointing_func.keywords for layer in layers]
        assert kept == [keep and i in aligned for i in range(len(layers))]
    assert calls[0] - calls[1] == len(aligned) > 0
    for name, got in steps[1].items():
        assert torch.equal(got, steps[0][name]), name


def test_keep_alignment_of_an_adapted_student(tmp_path):
    """Through a PEFT model, whose decoder is deeper inside; a second run puts it on again."""
    student = get_peft_model(tiny_llava(), LoraConfig(target_modules=["q_proj"], r=2))
    trainer = make_trainer(
        tmp_path, student, gradient_checkpointing=True, keep_alignment=True, backend="sdpa"
    )
    for _ in range(2):
        trainer.train()
        for layer in unwrap_model(trainer.model).model.language_model.layers:
            keywords = layer._gradient_checkpointing_func.keywords
            assert keywords == {"use_reentrant": False, "context_fn": keep_alignment}
