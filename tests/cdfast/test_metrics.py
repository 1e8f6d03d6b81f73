"""Throughput: the count of operations against PyTorch's, shares of the time, distortions."""

import itertools
import time

import pytest
import torch
from cdfast_kernels import VisualLayout
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import ProgressCallback, TrainerCallback

from cdfast import flops, metrics
from cdfast.adapters import assemble_student, set_trainable, share_vision_tower, vision_tower
from cdfast.aligner import build_layout
from cdfast.flops import COUNTS, device_peak, patch_size, step_counts, step_flops, visible_pairs
from cdfast.hidden_projector import add_hidden_projector, hidden_projector
from cdfast.losses import answer_rows, gram_matrix, relation_loss_sum
from cdfast.metrics import PHASES, THROUGHPUT_FIELDS, Throughput
from cdfast.trainer import unwrap_model
from tests.cdfast.samples import TinySamples
from tests.cdfast.test_trainer import make_trainer
from tests.cdfast.tiny_models import (
    IMAGE_TOKEN,
    tiny_batch,
    tiny_language_model,
    tiny_llava,
    tiny_teacher,
)


def taf_pair(train):
    """Teacher and student that share a tower; what is trained set as in the stages."""
    teacher = tiny_teacher()
    student = assemble_student(teacher, tiny_language_model(), taf=True)
    share_vision_tower(teacher, student)
    set_trainable(student, projector=True, language_model=train == "everything")
    if train == "lora":
        config = LoraConfig(
            r=4,
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
            modules_to_save=[f"multi_modal_projector.linear_{n}" for n in (1, 2)],
        )
        get_peft_model(student, config)  # in place
    return teacher, student


def llava_pair(train):
    teacher, student = tiny_teacher(), tiny_llava()
    frozen = train != "with the tower"
    vision_tower(student)[2].requires_grad_(not frozen)
    return teacher, student


def operations(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "pair, train",
    [
        (taf_pair, "everything"),
        (taf_pair, "projector"),
        (taf_pair, "lora"),
        (llava_pair, "frozen tower"),
        (llava_pair, "with the tower"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_counted_operations_are_those_of_pytorch(pair, train):
    """Eager attention computes the whole square; all else must agree."""
    teacher, student = pair(train)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    batch = tiny_batch(batch=2, padding=None)
    rows = answer_rows(batch["labels"])
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def logits(model):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden[rows])

    def step():
        with torch.no_grad():
            logits(teacher)
        logits(student).sum().backward()

    batch["layout"] = build_layout(batch, IMAGE_TOKEN)
    counts = step_counts(batch, rows.sum(), rows.sum(), patch_size(student))
    counts = dict(zip(COUNTS, counts.tolist()))
    assert counts["pairs"] == 2 * 40 * 41 // 2
    per = step_flops(student, teacher)
    whole_square = {**counts, "pairs": 2 * 40 * 40}
    counted = sum(per[name] * n for name, n in whole_square.items())
    # transformers 5.17 multiplies rotary angles as a matrix: 2e-5 of a model as small as this.
    assert counted == pytest.approx(operations(step), rel=1e-4)


@pytest.mark.parametrize("train", ["everything", "projector"])
def test_counted_operations_of_the_other_losses_are_those_of_pytorch(train):
    """What hidden states, visual KL and relation add; logits of the visual KL by plain products."""
    teacher, student = taf_pair(train)
    add_hidden_projector(student, 48, 0)
    batch = tiny_batch(batch=2, padding=None)
    layout, rows = build_layout(batch, IMAGE_TOKEN), answer_rows(batch["labels"])
    counts = step_counts({**batch, "layout": layout}, rows.sum(), rows.sum(), patch_size(student))
    counts = dict(zip(COUNTS, counts.tolist()))
    hidden = torch.randn(2, 40, 32, requires_grad=True)
    theirs, heads = torch.randn(2, 40, 48), (student.lm_head.weight, teacher.lm_head.weight)
    grams = [gram_matrix(head, 100) for head in heads]
    visual, sizes = layout.visual, [16, 16]

    def steps():
        yield "hidden", lambda: hidden_projector(student)(hidden[rows]).sum()
        yield (
            "visual_kl",
            lambda: sum((h[visual] @ w.T).sum() for h, w in zip((hidden, theirs), heads)),
        )

        def relation():
            gram = gram_matrix(heads[0], 100) if train == "everything" else grams[0]
            return relation_loss_sum(hidden[visual], gram, theirs[visual], grams[1], sizes)

        yield "relation", relation

    def total(per):
        return sum(per[name] * n for name, n in counts.items())

    plain = total(step_flops(student, teacher))
    for name, loss in steps():
        measured = operations(lambda loss=loss: loss().backward())
        if name == "hidden":
            projector = student.hidden_projector
            del student.hidden_projector
            counted = plain - total(step_flops(student, teacher))
            student.hidden_projector = projector
        else:
            counted = total(step_flops(student, teacher, losses=[name])) - plain
        assert counted == pytest.approx(measured, rel=1e-6), name


def test_a_teacher_without_logits_has_no_output_projection():
    teacher, student = taf_pair("projector")
    with_logits, without = (step_flops(student, teacher, logits) for logits in (True, False))
    assert without["kl_rows"] == 0
    assert with_logits["kl_rows"] == 2 * teacher.lm_head.weight.numel()
    assert {**with_logits, "kl_rows": 0} == without


LIVE = torch.ones(3, 12, dtype=torch.bool)
LIVE[0, 9:] = LIVE[1, :4] = LIVE[2, 5] = False
SEGMENTS = torch.tensor([[0] * 4 + [1] * 3 + [4] * 5, [0] * 12, [2] * 6 + [3] * 6])


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["padded", "segments"])
def test_pairs_are_those_that_the_layout_shows(segments):
    visual = torch.zeros_like(LIVE)
    visual[:, 4:7] = True
    if segments is None:
        layout = VisualLayout.from_mask(visual, LIVE)
    else:
        layout = VisualLayout.from_segments(segments, visual, LIVE)
    assert visible_pairs(layout) == layout.dense_mask().sum()


def test_a_matrix_outside_linear_is_not_passed_over():
    student = tiny_llava()
    experts = student.model.language_model.layers[1].mlp
    experts.experts = torch.nn.Parameter(torch.zeros(2, 8, 8))
    measured = Throughput(
        student, None, teacher_logits=False, device=torch.device("cpu"), dtype=torch.float32
    )
    one_step(measured)
    report = measured.summary(lambda x: x)
    assert report["mfu"] is None
    assert report["mfu_of"] == ("not counted: Qwen2MLP.experts is a matrix outside torch.nn.Linear")
    assert report["tokens_per_second"] > 0


# Peaks


@pytest.mark.parametrize(
    "name, dtype, tflops, label",
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4, "H100 SXM dense BF16"),
        ("NVIDIA H100 PCIe", torch.float16, 756.0, "H100 PCIe dense FP16"),
        ("NVIDIA H200", torch.bfloat16, 989.4, "H200 SXM dense BF16"),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4, "GH200 dense BF16"),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0, "A100 dense BF16"),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 19.5, "A100 FP32"),
        ("NVIDIA L40S", torch.bfloat16, 362.0, "L40S dense BF16"),
        ("NVIDIA L4", torch.bfloat16, 121.0, "L4 dense BF16"),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2, "RTX 4090 dense BF16"),
    ],
)
def test_peak_by_name(name, dtype, tflops, label, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(torch.device("cuda"), dtype) == (tflops * 1e12, label)


def test_tf32_where_it_is_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    found = device_peak(torch.device("cuda"), torch.float32)
    assert found == (494.7e12, "H100 SXM dense TF32")


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA Something New"])
def test_the_peak_of_an_unknown_device_is_measured(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "_measured_peak", lambda device, dtype: 7.0)
    assert device_peak(torch.device("cuda"), torch.bfloat16) == (7.0, "measured matmul")


def test_the_measured_peak_is_plausible_and_draws_none_of_the_runs_random_numbers():
    flops._measured_peak.cache_clear()
    before = torch.get_rng_state()
    peak, of = device_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert of == "measured matmul"
    assert 1e9 < peak < 1e14


# A run


def one_step(measured, seconds=0.0):
    """A step of 1 of 5 parts each, on a clock of its own."""
    batch = tiny_batch()
    batch["layout"] = build_layout(batch, IMAGE_TOKEN)
    rows = answer_rows(batch["labels"]).sum()
    measured.begin_step()
    measured.mark("other")
    measured.count(batch, rows, rows)
    for phase in ("teacher", "student", "optimizer"):
        measured.mark(phase)
        time.sleep(seconds)
    measured.end_step()
    return batch


def throughput(student=None, teacher=None):
    return Throughput(
        student or tiny_llava(),
        teacher,
        teacher_logits=teacher is not None,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def test_numbers_of_a_step_on_a_clock_made_up(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(metrics, "device_peak", lambda *_: (1000.0, "a made-up device"))
    student, teacher = tiny_llava(), tiny_teacher()
    measured = throughput(student, teacher)
    batch = one_step(measured)  # 5 phases of a second
    per, rows = step_flops(student, teacher), answer_rows(batch["labels"]).sum()
    counts = step_counts(batch, rows, rows, patch_size(student)).tolist()
    total = sum(per[name] * n for name, n in zip(COUNTS, counts))
    two_ranks = lambda x: torch.cat([x, x])  # noqa: E731
    report = measured.read(two_ranks)
    live = int(batch["attention_mask"].sum())
    assert report["tokens_per_second"] == pytest.approx(2 * live / 5)
    assert report["samples_per_second"] == pytest.approx(2 * 3 / 5)
    assert report["mfu"] == pytest.approx(total / 5 / 1000)
    assert {report[f"time_{phase}"] for phase in PHASES} == {0.2}
    assert report["peak_memory_bytes"] > 2**20
    assert measured.read(two_ranks) == {}  # no step since
    summary = measured.summary(two_ranks)
    assert summary == {**report, "mfu_of": "a made-up device"}


def test_time_between_steps_is_no_part_of_them():
    measured = throughput()
    for _ in range(3):
        one_step(measured, 0.01)
        time.sleep(0.1)
    assert sum(measured._seconds()) < 0.15


def test_every_log_entry_has_throughput_and_shares_sum_to_one(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=2, size=32
    )
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    summary = trainer.throughput.summary(trainer.accelerator.gather)
    assert len(entries) == 2
    for entry in [*entries, summary]:
        assert set(THROUGHPUT_FIELDS) <= entry.keys()
        assert sum(entry[f"time_{phase}"] for phase in PHASES) == pytest.approx(1)
        assert all(entry[f"time_{phase}"] > 0 for phase in PHASES)
        assert 0 < entry["mfu"] < 1
    assert summary["mfu_of"] == "measured matmul"
    # 4 steps of 2 x 4 samples: every sample once, whatever the order.
    tokens = sum(len(sample["input_ids"]) for sample in map(TinySamples(32).__getitem__, range(32)))
    ratio = summary["tokens_per_second"] / summary["samples_per_second"]
    assert ratio == pytest.approx(tokens / 32)


class Clock(TrainerCallback):
    """Stands still but for what it is told: pauses between steps take 100 seconds."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def on_save(self, *args, **kwargs):
        self.now += 100

    on_evaluate = on_log = on_save


@pytest.mark.parametrize("part", ["data", "teacher", "student", "optimizer"])
def test_a_slow_part_is_seen_as_that_part(part, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)

    def slow(function):
        def run(*args, **kwargs):
            clock.now += 1
            return function(*args, **kwargs)

        return run

    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=2)
    if part == "data":
        monkeypatch.setattr(TinySamples, "__getitem__", slow(TinySamples.__getitem__))
    elif part == "optimizer":
        monkeypatch.setattr(torch.optim.SGD, "step", slow(torch.optim.SGD.step))
    elif part == "teacher":
        trainer.teacher.model.register_forward_pre_hook(slow(lambda *_: None))
    else:
        trainer.model.register_forward_pre_hook(slow(lambda *_: None))
    trainer.train()
    summary = trainer.throughput.summary(trainer.accelerator.gather)
    shares = {phase: summary[f"time_{phase}"] for phase in PHASES}
    assert max(shares, key=shares.get) == part, shares


@pytest.mark.parametrize("accumulation", [1, 2])
def test_evaluation_and_saving_are_no_part_of_a_step(accumulation, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    trainer = make_trainer(
        tmp_path,
        eval_dataset=TinySamples(8),
        max_steps=3,
        size=16,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        logging_steps=3,
    )
    trainer.add_callback(clock)

    def forward(*_):
        clock.now += 1

    trainer.teacher.model.register_forward_pre_hook(forward)
    trainer.train()
    assert clock.now > 600  # 3 x (evaluation, save), and logs
    summary = trainer.throughput.summary(trainer.accelerator.gather)
    assert summary["samples_per_second"] == 12 / (3 * accumulation)
    assert summary["time_teacher"] == 1
    # The evaluated samples are not counted as trained ones.
    assert trainer.throughput._totals[COUNTS.index("samples")] == 12


def test_deepspeed_steps_inside_backward(tmp_path):
    """accelerate's DeepSpeed wrapper steps the engine in `backward`: the optimizer's part."""

    class Engine:
        def step(self, *args):
            time.sleep(0.02)
            return args

    engine, measured = Engine(), throughput()
    metrics.mark_engine_step(engine, measured)
    measured.begin_step()
    measured.mark("student")
    assert engine.step(1) == (1,)
    measured.mark("other")
    measured.end_step()
    assert [phase for phase, _ in measured._marks] == [
        "data",
        "student",
        "optimizer",
        "other",
        "other",
        None,
    ]
    seconds = dict(zip(PHASES, measured._seconds()))
    assert seconds["optimizer"] >= 0.02
    assert seconds["student"] < 0.01


def test_progress_prints_two_numbers_of_throughput(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    trainer.train()
    [line] = [line for line in capsys.readouterr().out.splitlines() if "grad_norm" in line]
    names = ("tokens_per_second", "mfu", "time_", "peak_memory", "samples_per_second")
    assert [name for name in names if name in line] == ["tokens_per_second", "mfu"]
    assert len(line) < 260
    with_bar = make_trainer(tmp_path, disable_tqdm=False)
    assert any(isinstance(c, metrics.ShortProgress) for c in with_bar.callback_handler.callbacks)
    assert not any(type(c) is ProgressCallback for c in with_bar.callback_handler.callbacks)


def test_students_with_adapters_are_measured(tmp_path):
    teacher, student = taf_pair("projector")
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj")
    trainer = make_trainer(tmp_path, student=get_peft_model(student, config), teacher=teacher)
    trainer.train()
    assert unwrap_model(trainer.model) is student
    assert trainer.state.log_history[0]["mfu"] > 0
