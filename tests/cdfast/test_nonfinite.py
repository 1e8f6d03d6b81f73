"""A step that is not finite is skipped as if it had not been taken, named, counted, and limited."""

import contextlib
import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import cdfast.distill
import cdfast.trainer
from cdfast import DistillationConfig, DistillationTrainer
from cdfast.adapters import vision_tower
from cdfast.collator import VisionTextCollator
from cdfast.nonfinite import NonFiniteError
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.samples import TinySamples
from tests.cdfast.tiny_models import tiny_llava, tiny_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

BAD = 6
# What is made not finite -> the terms that the report names.
POISONS = {
    "lm is nan": "lm",
    "kl is infinite": "kl",
    "alignment is nan": "alignment",
    "infinite without a gradient": "lm",
    "teacher's hidden state": "kl and teacher",
    "teacher's map": "alignment and teacher",
    "gradient": "gradient",
    "sum overflows": "loss",
    "image": "lm and kl and alignment and teacher",
}
SETTINGS = {
    "clipped": {},
    "not clipped": {"max_grad_norm": 0.0},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "muon": {"muon_learning_rate": 0.01},
    "bf16": {"bf16": True},
    "lora": {},
    "reference": {"backend": "reference"},
    "checkpointing": {"gradient_checkpointing": True},
}
GOOD_STEPS = ([0, 1], [2, 4], [5, 8], [9, 10])
BAD_STEP = [1, BAD]


class InOrder(DistillationTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Weights(TrainerCallback):
    """Copies of the trained weights after every step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.after.append(trained)


def make_trainer(folder, steps, lora=False, **options):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": len(steps),
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "layers": "all",
        "alignment_weight": 2.0,
    }
    student = tiny_llava()
    vision_tower(student)[2].requires_grad_(False)
    if lora:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        student = get_peft_model(student, config)
    trainer = InOrder(
        model=student,
        teacher=tiny_teacher(),
        args=DistillationConfig(**{**values, **options}),
        train_dataset=torch.utils.data.Subset(TinySamples(16), [i for s in steps for i in s]),
        data_collator=VisionTextCollator(0),
    )
    trainer.weights = Weights()
    trainer.add_callback(trainer.weights)
    return trainer


def poison(patch, what, trainer=None, bad=f"tiny, sample {BAD}"):
    """Make something not finite in the micro-batch that holds the sample `bad`."""
    now = {"bad": False}
    compute_loss = cdfast.trainer.DistillationTrainer.compute_loss
    teacher_step, student_step = cdfast.distill.teacher_step, cdfast.distill.student_step

    def watched(self, model, inputs, *args, **kwargs):
        now["bad"] = bad in inputs["sample_ids"]
        if now["bad"] and what == "image":
            inputs["pixel_values"][-1, 0, 3, 3] = math.nan
        return compute_loss(self, model, inputs, *args, **kwargs)

    def poisoned_teacher(*args):
        output = teacher_step(*args)
        if now["bad"] and what == "teacher's hidden state":
            output.hidden["answer"][-1, 2] = math.inf
        for rows, hidden in output.hidden.items():
            if now["bad"] and what == f"teacher's {rows} rows":
                hidden[-1, 2] = math.inf
        if now["bad"] and what == "teacher's map":
            data = output.targets.maps[1].data
            live = data.nonzero()[7]
            data[tuple(live)] = math.nan
        return output

    def poisoned_student(*args, **kwargs):
        sums = student_step(*args, **kwargs)
        if now["bad"] and what in ADDED:
            name, number = ADDED[what]
            sums[name] = sums[name] + number
        if now["bad"] and what == "lm is nan":
            sums["lm"] = sums["lm"] * math.nan
        if now["bad"] and what == "sum overflows":
            # Their means and the sum over 2 images, doubled by the weight, are in range alone.
            sums["lm"], sums["alignment"] = sums["lm"] + 3.3e38, sums["alignment"] + 3.3e38
        return sums

    patch.setattr(cdfast.trainer.DistillationTrainer, "compute_loss", watched)
    patch.setattr(cdfast.distill, "teacher_step", poisoned_teacher)
    patch.setattr(cdfast.distill, "student_step", poisoned_student)
    if what == "gradient":
        parameter = [p for p in trainer.model.parameters() if p.requires_grad][-1]
        parameter.register_hook(lambda g: g * math.nan if now["bad"] else g)


VISUAL_TERMS = "visual_kl and relation"
ADDED = {
    "kl is infinite": ("kl", math.inf),
    "alignment is nan": ("alignment", math.nan),
    "infinite without a gradient": ("lm", math.inf),
}


def losses(trainer):
    wanted = ("loss", "loss_lm", "loss_kl", "loss_alignment", "grad_norm", "learning_rate")
    return [{k: entry[k] for k in wanted} for entry in trainer.state.log_history if "loss" in entry]


CASES = [(what, "clipped") for what in POISONS] + [
    ("teacher's hidden state", setting) for setting in SETTINGS if setting != "clipped"
]


@pytest.mark.parametrize("what, setting", CASES)
def test_a_skipped_step_changes_nothing(what, setting, tmp_path, monkeypatch, caplog):
    options = {"lora": setting == "lora", **SETTINGS[setting]}
    first, *others = GOOD_STEPS
    without = make_trainer(tmp_path / "a", [first, *others], **options)
    without.train()
    trainer = make_trainer(tmp_path / "b", [first, BAD_STEP, *others[:-1]], **options)
    poison(monkeypatch, what, trainer)
    with caplog.at_level(logging.WARNING, "cdfast"):
        trainer.train()
    # The trace, the learning rates and the weights are those of the run without the step.
    assert losses(trainer) == losses(without)[:-1]
    assert all(math.isfinite(v) for entry in losses(trainer) for v in entry.values())
    got, want = trainer.weights.after, without.weights.after
    for step in (0, 2, 3):
        same = want[step - (step > 1)]
        assert all(torch.equal(got[step][n], same[n]) for n in same)
    assert all(torch.equal(got[1][n], got[0][n]) for n in got[0])
    # It is counted and named.
    counts = [entry.get("skipped_steps", 0) for entry in trainer.state.log_history][:4]
    assert counts == [0, 1, 1, 1]
    assert trainer.nonfinite.total == 1
    (message,) = [r.getMessage() for r in caplog.records if r.name == "cdfast.nonfinite"]
    samples = f"tiny, sample {BAD}"
    if setting != "accumulation" or what == "gradient":
        samples = f"tiny, sample 1; {samples}"
    terms = POISONS[what]
    assert message == (
        f"step 2 skipped, not finite: {terms} on rank 0 (samples: {samples}). Skipped in a row: 1 "
        "of at most 5; in this run: 1."
    )


def test_a_finite_run_says_and_logs_nothing_of_it(tmp_path, caplog):
    trainer = make_trainer(tmp_path, GOOD_STEPS)
    with caplog.at_level(logging.WARNING, "cdfast"):
        trainer.train()
    assert not [r for r in caplog.records if r.name.startswith("cdfast")]
    assert not any("skipped_steps" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("rows, terms", [("answer", "kl and hidden"), ("visual", VISUAL_TERMS)])
def test_every_loss_on_hidden_states_is_named(tmp_path, monkeypatch, caplog, rows, terms):
    weights = {"hidden_weight": 1.0, "visual_kl_weight": 1.0, "relation_weight": 1.0}
    trainer = make_trainer(tmp_path, [GOOD_STEPS[0], BAD_STEP], **weights)
    poison(monkeypatch, f"teacher's {rows} rows")
    trainer.train()
    assert f"step 2 skipped, not finite: {terms} and teacher on rank 0" in caplog.text
    after = trainer.weights.after
    assert all(torch.equal(after[1][name], value) for name, value in after[0].items())
    assert any("hidden_projector" in name for name in after[0])


def test_logged_means_are_those_of_the_steps_that_were_taken(tmp_path, monkeypatch):
    whole = make_trainer(tmp_path / "a", GOOD_STEPS)
    whole.train()
    steps = losses(whole)
    trainer = make_trainer(tmp_path / "b", [*GOOD_STEPS[:3], BAD_STEP, BAD_STEP], logging_steps=5)
    poison(monkeypatch, "image")
    trainer.train()
    (entry,) = losses(trainer)
    for name in ("loss", "loss_lm", "loss_kl", "loss_alignment"):
        assert entry[name] == pytest.approx(sum(s[name] for s in steps[:3]) / 3, rel=1e-6)
    assert [e.get("skipped_steps") for e in trainer.state.log_history[:2]] == [1, 2]
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


@pytest.mark.parametrize("saved", [False, True], ids=["no checkpoint", "checkpoint"])
def test_the_run_ends_after_the_limit(tmp_path, monkeypatch, saved):
    options = {"save_strategy": "steps", "save_steps": 1} if saved else {}
    # The good step between them starts the count anew.
    steps = [GOOD_STEPS[0], BAD_STEP, GOOD_STEPS[1], BAD_STEP, [BAD, 8], GOOD_STEPS[2]]
    trainer = make_trainer(tmp_path, steps, max_skipped_steps=2, **options)
    poison(monkeypatch, "teacher's hidden state")
    with pytest.raises(NonFiniteError) as raised:
        trainer.train()
    message = str(raised.value)
    assert message.startswith("2 steps in a row were not finite, so the run stops")
    assert f"step 4: kl and teacher on rank 0 (samples: tiny, sample 1; tiny, sample {BAD})" in (
        message
    )
    assert f"step 5: kl and teacher on rank 0 (samples: tiny, sample {BAD}; tiny, sample 8)" in (
        message
    )
    assert "step 2" not in message
    assert "--teacher-dtype bfloat16" in message
    newest = tmp_path / "checkpoint-4"
    assert (f"The last checkpoint is {newest}." if saved else "There is no checkpoint.") in message
    assert len(trainer.weights.after) == 4
    assert trainer.nonfinite.total == 3


def test_the_count_survives_a_resume(tmp_path, monkeypatch):
    steps = [GOOD_STEPS[0], BAD_STEP, *GOOD_STEPS[1:], BAD_STEP]
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    poison(monkeypatch, "image")
    whole = make_trainer(tmp_path, steps, **options)
    whole.train()
    again = make_trainer(tmp_path, steps, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.nonfinite.total == again.nonfinite.total == 2
    assert losses(again) == losses(whole)
    got, want = again.weights.after[-1], whole.weights.after[-1]
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_batches_without_sample_ids_and_long_lists_are_reported_too(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, [[BAD, *range(19)]], per_device_train_batch_size=20)
    poison(monkeypatch, "teacher's hidden state")
    trainer.train()
    assert "tiny, sample 14 and 4 more)" in caplog.text
    caplog.clear()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    loss, means = torch.tensor(math.nan, requires_grad=True), {"lm": torch.tensor(math.nan)}
    del batch["sample_ids"]
    trainer.nonfinite._micro_batches.clear()
    trainer.nonfinite.check(loss, means, None, batch.get("sample_ids"))
    trainer.nonfinite._count(trainer)
    assert "lm on rank 0 (samples: unknown, the batch has no sample_ids)" in caplog.text


@pytest.mark.parametrize("scale, counts", [(65536.0, False), (1.0, True)])
def test_overflows_of_the_scale_search_do_not_end_the_run(tmp_path, scale, counts):
    """fp16 needs a GPU in accelerate: its scaler is stood in for here."""
    trainer = make_trainer(tmp_path, GOOD_STEPS, max_skipped_steps=1)
    trainer.args.fp16 = True
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale)
    ended = pytest.raises(NonFiniteError) if counts else contextlib.nullcontext()
    with ended:
        assert trainer.nonfinite.skip(trainer, trainer.model, torch.tensor(math.inf))
    assert trainer.nonfinite.total == 1
    # A loss that is not finite is not the scale's fault.
    bad = torch.tensor(math.nan)
    trainer.nonfinite.check(bad, {"lm": bad}, None, ["a"])
    with pytest.raises(NonFiniteError):
        trainer.nonfinite.skip(trainer, trainer.model, bad)


def test_evaluation_shows_what_is_not_finite(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, GOOD_STEPS)
    poison(monkeypatch, "lm is nan")
    trainer.eval_dataset = TinySamples(8)
    assert math.isnan(trainer.evaluate()["eval_loss_lm"])


def command(folder, steps):
    """The real command on photographs, one stage; returns its arguments."""
    paths = photo_setup.make_checkpoints(folder)
    return [
        *("--teacher", paths.teacher, "--student", paths.student, "--data", paths.data),
        *("--image-root", paths.images, "--output-dir", folder / "run", "--workers", "0"),
        *("--dpt.max-steps", "1", "--dft.max-steps", str(steps), "--sft.max-steps", "1"),
        *("--batch-size", "2", "--gradient-accumulation-steps", "1", "--logging-steps", "1"),
        *("--max-skipped-steps", "2"),
    ]


@pytest.mark.slow
def test_the_command_writes_the_count_or_ends_with_an_error(tmp_path, monkeypatch, capsys):
    arguments = [str(a) for a in command(tmp_path, 2)]
    calls = []
    step = cdfast.distill.teacher_step

    def poisoned(*args, **kwargs):
        output = step(*args, **kwargs)
        calls.append(output)
        if len(calls) in wanted:
            output.hidden["answer"][0, 0] = math.nan
        return output

    monkeypatch.setattr(cdfast.distill, "teacher_step", poisoned)
    wanted = {2}
    main(arguments)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [stage["skipped_steps"] for stage in results["stages"]][:2] == [0, 1]
    calls.clear()
    wanted = {2, 3}
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--overwrite"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "error: 2 steps in a row were not finite" in error
    assert "kl and teacher on rank 0 (samples: photos.json, record" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match="max_skipped_steps: expected at least 1; got"):
        make_trainer(tmp_path, GOOD_STEPS, max_skipped_steps=limit)
