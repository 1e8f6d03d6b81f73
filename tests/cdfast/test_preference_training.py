"""The preference stage: losses by their definition, metrics, resume, refusals, the recipe's end."""

import json
import logging
import math
import re

import pytest
import torch
import yaml

import cdfast.distill
from cdfast import DistillationConfig, DistillationTrainer, preference
from cdfast.adapters import vision_tower
from cdfast.collator import VisionTextCollator
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.command import options, refused
from tests.cdfast.samples import TinyPairs, TinySamples
from tests.cdfast.tiny_models import tiny_llava, tiny_teacher

TOLERANCE, BETA = 1e-5, 0.5
ALONE = {"lm_weight": 0.0, "kl_weight": 0.0, "alignment_weight": 0.0, "preference_weight": 1.0}


def make_trainer(folder, samples=None, **changed):
    student = tiny_llava()
    vision_tower(student)[2].requires_grad_(False)
    values = {
        **ALONE,
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "preference_beta": BETA,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **changed,
    }
    return DistillationTrainer(
        model=student,
        teacher=tiny_teacher(),
        args=DistillationConfig(**values),
        train_dataset=samples or TinyPairs(8),
        eval_dataset=TinyPairs(6, seed=1),
        data_collator=VisionTextCollator(0),
    )


def plain_log_probs(model, batch):
    """Log-probability of every answer, one token after another, from all logits."""
    given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
    with torch.no_grad():
        log_probs = model(**given).logits.log_softmax(-1)
    labels = batch["labels"]
    places = [(b, n) for b, n in (labels != -100).nonzero().tolist()]
    out = torch.zeros(len(labels), dtype=torch.float64)
    for b, n in places:
        out[b] += log_probs[b, n - 1, labels[b, n]].double()
    return out


def expected(student, teacher, batch):
    """(loss, accuracy, LM loss of chosen answers) by the text of preference.py."""
    policy = plain_log_probs(student, batch)
    chosen, rejected = (policy - plain_log_probs(teacher, batch)).chunk(2)
    kl_chosen, kl_rejected = (max(0.0, r.mean().item()) for r in (chosen, rejected))
    losses = [
        *(1 - 1 / (1 + math.exp(-BETA * (r - kl_rejected))) for r in chosen.tolist()),
        *(1 - 1 / (1 + math.exp(-BETA * (kl_chosen - r))) for r in rejected.tolist()),
    ]
    tokens = (batch["labels"][: len(chosen)] != -100).sum().item()
    lm = -policy[: len(chosen)].sum().item() / tokens
    return sum(losses) / len(losses), (chosen > rejected).float().mean().item(), lm


def test_losses_equal_their_definitions(tmp_path, monkeypatch):
    monkeypatch.setattr(preference, "CHUNK", 3)
    trainer = make_trainer(tmp_path, lm_weight=0.3)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    want, accuracy, lm = expected(tiny_llava(), tiny_teacher(), batch)
    loss, means = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert means["preference"].item() == pytest.approx(want, rel=TOLERANCE)
    assert means["lm"].item() == pytest.approx(lm, rel=TOLERANCE)
    assert means["preference_accuracy"].item() == accuracy
    assert loss.item() == pytest.approx(want + 0.3 * lm, rel=TOLERANCE)


def test_training_logs_and_evaluation_measure_pairs(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=10)
    batches = [[trainer.eval_dataset[i] for i in range(6)]]
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(log[0]["loss_preference"], rel=TOLERANCE)
    assert log[-1]["loss_preference"] < log[0]["loss_preference"]
    assert log[-1]["preference_accuracy"] == 1.0
    assert all(0 <= entry["preference_accuracy"] <= 1 for entry in log)
    trainer.args.per_device_eval_batch_size = 6  # KL is a mean over a forward pass
    metrics = trainer.evaluate()
    batch = trainer.data_collator(batches[0])
    want, accuracy, lm = expected(trainer.model, trainer.teacher, batch)
    assert metrics["eval_loss_preference"] == pytest.approx(want, rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(want, rel=1e-4)
    assert metrics["eval_loss_lm"] == pytest.approx(lm, rel=1e-4)
    assert metrics["eval_preference_accuracy"] == pytest.approx(accuracy)


def test_throughput_counts_pairs_as_samples(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.train()
    entry = trainer.state.log_history[0]
    per_sample = entry["tokens_per_second"] / entry["samples_per_second"]
    used = TinyPairs(8)
    every = [used[i] for i in range(8)]
    longest = max(len(p["input_ids"]) + len(p["rejected"]["input_ids"]) for p in every)
    assert longest / 2 < per_sample <= longest
    assert batch["input_ids"].shape[0] == 8


def test_resumed_run_is_the_run(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    again = make_trainer(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), name


def test_a_reference_that_is_not_finite_is_a_skipped_step(tmp_path, monkeypatch, caplog):
    teacher_step = cdfast.distill.teacher_step

    def poisoned(*args):
        output = teacher_step(*args)
        output.log_probs[0] = math.nan
        return output

    monkeypatch.setattr(cdfast.distill, "teacher_step", poisoned)
    trainer = make_trainer(tmp_path, max_steps=1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with caplog.at_level(logging.WARNING, "cdfast"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    assert trainer.nonfinite.total == 1
    assert re.search(r"preference.*teacher.*tiny, sample", caplog.text)


# -- refusals --------------------------------------------------------------------------------------


def test_pairs_and_the_loss_belong_together(tmp_path):
    with pytest.raises(ValueError, match=r"expected pairs of answers in a batch.*1; got none"):
        make_trainer(tmp_path, samples=TinySamples(8)).train()
    with pytest.raises(ValueError, match=r"expected no pairs in a batch.*it is 0; got some"):
        make_trainer(tmp_path, preference_weight=0.0, lm_weight=1.0).train()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"kl_weight": 1.0}, "no other loss with a teacher beside it; got kl_weight > 0"),
        ({"alignment_weight": 0.5}, "got alignment_weight > 0"),
        ({"preference_beta": 0.0}, "preference_beta: expected a finite number > 0; got 0.0"),
        ({"preference_weight": -1.0}, "preference_weight: expected a finite number >= 0"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **{**ALONE, **changed})


# -- the command -----------------------------------------------------------------------------------


def with_rejected(folder):
    """The photo data, every record with a rejected answer to its last question."""
    records = photo_setup.records()
    for record in records:
        record["rejected"] = "no " + record["conversations"][-1]["value"]
    return photo_setup.write_records(folder / "pairs.json", records)


STAGES = [
    {"stage": "dft", "max_steps": 1, "batch_size": 2, "alignment_weight": 0.0},
    {"stage": "preference", "max_steps": 2, "batch_size": 2},
]


def test_data_without_rejected_answers_are_refused_before_the_first_stage(paths, tmp_path, capsys):
    recipe = tmp_path / "given.yaml"
    recipe.write_text(yaml.safe_dump({"name": "x", "workers": 0, "stages": STAGES}))
    line = refused([recipe, *options(paths, tmp_path / "run")], capsys)
    assert re.search(r"record 0 .*rejected: expected .*got none.*--preference\.data FILE", line)
    assert not (tmp_path / "run" / "stages").exists()


def test_command_trains_and_evaluates_on_files_of_pairs(paths, tmp_path):
    recipe, pairs = tmp_path / "given.yaml", with_rejected(tmp_path)
    arguments = {"logging_steps": 1, "disable_tqdm": True, "eval_steps": 2}
    stages = [STAGES[0], {**STAGES[1], "data": [str(pairs)], "arguments": arguments}]
    recipe.write_text(yaml.safe_dump({"name": "x", "workers": 0, "stages": stages}))
    given = {"eval-data": pairs, "eval-samples": 2}
    main([str(a) for a in (recipe, *options(paths, tmp_path / "run", **given))])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    stage = results["stages"][1]
    assert stage["stage"] == "preference"
    assert {"loss_preference", "preference_accuracy"} <= stage["log"][0].keys()
    assert "loss_kl" not in stage["log"][0]
    assert {"eval_loss_preference", "eval_preference_accuracy"} <= stage["evaluations"][0].keys()
    assert "preference loss" in (tmp_path / "run" / "report.html").read_text()
