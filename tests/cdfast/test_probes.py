"""What is measured while a student trains, and that it trains as if nothing were."""

import json
import random
import re

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM, TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from cdfast import DistillationConfig, DistillationTrainer, metrics
from cdfast.adapters import assemble_student, set_trainable, share_vision_tower
from cdfast.aligner import build_layout
from cdfast.collator import VisionTextCollator
from cdfast.data import load_dataset
from cdfast.evaluate import evaluate
from cdfast.miniature.suites import miniature_suite
from cdfast.probes import SIMILARITY_BATCH, Probe, samples_with_image
from cdfast.similarity import matched_similarity
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.command import options, refused
from tests.cdfast.test_metrics import Clock
from tests.cdfast.test_trainer import TinySamples, make_trainer
from tests.cdfast.tiny_models import sharpen

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def processor():
    return photo_setup.make_processor()


@pytest.fixture(scope="module")
def photos(paths, processor):
    return load_dataset(paths.data, paths.images, processor)


@pytest.fixture(scope="module")
def questions():
    return miniature_suite("validation", 1, 1)


@pytest.fixture
def make(photos, processor, questions, tmp_path):
    """A trainer of a TAF student with LoRA and dropout beside a teacher with the same tower."""

    def make(probe=True, folder=tmp_path, **changed):
        tokenizer = processor.tokenizer
        teacher = sharpen(photo_setup.llava(tokenizer, seed=1, layers=5, hidden=48))
        torch.manual_seed(2)
        small = Qwen2ForCausalLM(photo_setup.text_config(tokenizer, layers=3, hidden=32))
        student = sharpen(assemble_student(teacher, small, taf=True))
        share_vision_tower(teacher, student)
        set_trainable(student, projector=True, language_model=False)
        config = LoraConfig(
            r=4,
            lora_dropout=0.3,
            target_modules=r".*language_model.*\.(q|v|down)_proj",
            modules_to_save=["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"],
        )
        values = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "layers": "all",
        }
        if probe:
            values |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
        return DistillationTrainer(
            model=get_peft_model(student, config),
            teacher=teacher,
            args=DistillationConfig(**{**values, **changed}),
            train_dataset=photos,
            eval_dataset=torch.utils.data.Subset(photos, [0, 3]) if probe else None,
            data_collator=VisionTextCollator(tokenizer.pad_token_id),
            probe=Probe(questions, samples_with_image(photos, 5), processor) if probe else None,
        )

    return make


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_runtime" in entry]


# -- training goes on as if there had been nothing -------------------------------------------------


class Generators(TrainerCallback):
    """The state of the random generators and modes of modules before each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        modes = [module.training for module in model.modules()]
        numpy_state = np.random.get_state()[1].tolist()
        self.seen.append((torch.get_rng_state().tolist(), random.getstate(), numpy_state, modes))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"gradient_checkpointing": True, "keep_alignment": True},
        {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1},
    ],
    ids=["dropout", "activation checkpointing", "accumulation, loader process"],
)
def test_training_is_the_same_to_the_last_bit(changed, make):
    ends = []
    for probe in (False, True):
        trainer, generators = make(probe, **changed), Generators()
        trainer.add_callback(generators)
        trainer.train()
        assert len(evaluations(trainer)) == (4 if probe else 0)
        trained = [e for e in trainer.state.log_history if "loss" in e]
        losses = [{k: e[k] for k in e if k.startswith("loss") or k == "grad_norm"} for e in trained]
        moments = list(trainer.optimizer.state_dict()["state"].values())
        ends.append((losses, generators.seen, trainer.model.state_dict(), moments))
    (losses, seen, weights, moments), (losses_2, seen_2, weights_2, moments_2) = ends
    assert losses == losses_2
    assert len(losses) == 3
    assert all(entry["loss_alignment"] > 0 for entry in losses)
    assert seen == seen_2
    assert all(torch.equal(weights[name], weights_2[name]) for name in weights)
    for one, other in zip(moments, moments_2, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_time_of_a_probe_is_counted_as_training(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)

    def probe(trainer):
        clock.now += 1000
        return {"probe_seconds": 1000.0}

    trainer = make_trainer(
        tmp_path,
        eval_dataset=TinySamples(8),
        max_steps=2,
        size=8,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.probe = probe

    def forward(*_):
        clock.now += 1

    trainer.teacher.model.register_forward_pre_hook(forward)
    trainer.train()
    assert clock.now > 2000
    summary = trainer.throughput.summary(trainer.accelerator.gather)
    assert summary["samples_per_second"] == 4  # a batch in the one second of the teacher
    first = evaluations(trainer)[0]
    assert first["eval_probe_seconds"] == 1000
    # Trainer's rates would count the probe.
    assert not any(name.endswith("per_second") for name in first)


# -- what is measured ------------------------------------------------------------------------------


def test_numbers_are_those_of_the_functions_that_the_report_uses(make, processor):
    trainer = make(max_steps=1)
    trainer.train()
    logged = evaluations(trainer)[-1]
    student = trainer.model.get_base_model().eval()
    probe = trainer.probe
    answers = evaluate(student, processor, probe.questions, progress=False)["averages"]
    assert {name: logged[f"eval_{name}"] for name in ("CR", "VQA")} == answers
    sums = dict.fromkeys(trainer.aligner.matches, 0.0)
    collate = VisionTextCollator(processor.tokenizer.pad_token_id)
    chunks = [probe.samples[:SIMILARITY_BATCH], probe.samples[SIMILARITY_BATCH:]]
    for chunk in chunks:
        batch = {k: v for k, v in collate(chunk).items() if k != "labels"}
        layout = build_layout(batch, trainer.aligner.image_token_id)
        found = matched_similarity(
            trainer.teacher, student, batch, layout, trainer.aligner.matches, rows="text"
        )
        sums = {layer: sums[layer] + found[layer] / len(chunks) for layer in sums}
    assert [*sums] == [0, 1, 2]
    for layer, value in sums.items():
        assert logged[f"eval_similarity/layer_{layer}"] == pytest.approx(value, abs=1e-6)
    mean = sum(sums.values()) / len(sums)
    assert logged["eval_similarity/mean"] == pytest.approx(mean, abs=1e-6)
    assert logged["eval_loss_kl"] > 0


def test_similarity_follows_the_student(make):
    """Of a model with itself it is 1; a student that changes has another one."""
    trainer = make(max_steps=2, learning_rate=0.1)
    trainer.train()
    means = [entry["eval_similarity/mean"] for entry in evaluations(trainer)]
    assert len(set(means)) == 3
    assert all(0 < mean < 1 for mean in means)
    trainer.probe.teacher, trainer.teacher = trainer.model.get_base_model(), None
    trainer.aligner.matches = {layer: (layer,) for layer in range(3)}
    trainer.model.eval()
    assert trainer.probe(trainer)["similarity/mean"] == pytest.approx(1, abs=1e-5)


def test_trackers_get_the_names(make):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(rewrite_logs(logs))

    trainer = make(max_steps=1, eval_on_start=False)
    trainer.add_callback(Tracker())
    trainer.train()
    [entry] = [entry for entry in seen if "eval/CR" in entry]
    names = {"eval/VQA", "eval/loss_alignment", "eval/similarity/mean", "eval/similarity/layer_1"}
    assert names <= entry.keys()


def test_the_best_checkpoint_may_be_chosen_by_accuracy(make):
    trainer = make(
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_on_start=False,
        load_best_model_at_end=True,
        metric_for_best_model="similarity/mean",
        greater_is_better=True,
    )
    trainer.train()
    means = [entry["eval_similarity/mean"] for entry in evaluations(trainer)]
    assert trainer.state.best_metric == max(means)


def test_adaptive_matching_is_waited_for(make):
    trainer = make(max_steps=1, matching="adaptive")
    assert "to be chosen" in trainer.probe.describe(trainer)
    trainer.probe.questions = ()
    assert [*trainer.probe(trainer)] == ["probe_seconds"]
    trainer.train()
    assert "eval_similarity/mean" in evaluations(trainer)[-1]


def test_a_resumed_run_logs_every_evaluation_once(make):
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = make(**saves)
    whole.train()
    folder = f"{whole.args.output_dir}/checkpoint-2"
    again = make(**saves)
    again.train(resume_from_checkpoint=folder)
    want, got = evaluations(whole), evaluations(again)
    assert [entry["step"] for entry in got] == [0, 1, 2, 3]
    for one, other in zip(want, got, strict=True):
        timed = ("eval_runtime", "eval_probe_seconds")
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


# -- the command -----------------------------------------------------------------------------------


def recipe_file(folder, **fields):
    stage = {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "warmup": 0}
    stages = [{"stage": "dft", **stage}, {"stage": "sft", **stage}, {"stage": "dft", **stage}]
    path = folder / "given.yaml"
    arguments = {"logging_steps": 1, "disable_tqdm": True}
    made = {"name": "probed", "workers": 0, "arguments": arguments, "stages": stages, **fields}
    path.write_text(yaml.safe_dump(made))
    return path


@pytest.fixture(scope="module")
def held_out_file(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    return photo_setup.write_records(folder / "held-out.json", photo_setup.records()[:4])


@pytest.fixture(scope="module")
def run(paths, held_out_file, tmp_path_factory):
    """(folder, results, what was printed) of a run that evaluates."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_file(folder)
    given = options(paths, folder / "run", **{"eval-steps": 1, "eval-data": held_out_file})
    main([str(recipe), *given])
    return folder / "run", json.loads((folder / "run" / "results.json").read_text())


def test_results_have_the_history_of_every_stage(run):
    for stage in run[1]["stages"]:
        assert [entry["step"] for entry in stage["evaluations"]] == [1, 2]
        assert 0 < stage["evaluation_seconds"] < stage["seconds"]
        assert stage["evaluated"]["questions"] == 0
        assert stage["evaluated"]["samples"] == 3
        assert all("eval_runtime" not in entry for entry in stage["log"])
    # The teacher is at hand in the second stage, because the third needs it.
    assert all("eval_similarity/mean" in s["evaluations"][0] for s in run[1]["stages"])
    assert "eval_loss_kl" not in run[1]["stages"][1]["evaluations"][0]


def test_the_last_similarity_is_that_of_the_report(run):
    after = run[1]["similarity"]["after"]["matched"]
    assert run[1]["similarity"]["samples"] == 3
    last = run[1]["stages"][-1]["evaluations"][-1]
    assert after
    for layer, value in after.items():
        assert last[f"eval_similarity/layer_{layer}"] == pytest.approx(value, abs=1e-4)


def test_the_report_draws_every_stage_and_lists_the_numbers(run):
    page = (run[0] / "report.html").read_text()
    start = page.index('<section aria-labelledby="evaluation-during-training"')
    section = page[start : page.index("</section>", start)]
    assert "<svg" in section
    for stage in run[1]["stages"]:
        for entry in stage["evaluations"]:
            assert f"<td>{entry['eval_similarity/mean']:.3f}</td>" in section
            assert f"<td>{entry['eval_loss_lm']:.3f}</td>" in section
    assert "similarity/layer_1" in section
    assert re.findall(r'<td class="text">(\d \w+)</td>', section) == [
        stage for stage in ("1 dft", "2 sft", "3 dft") for _ in range(2)
    ]
    seconds = run[1]["stages"][0]["evaluation_seconds"]
    assert f"<td>{seconds:.1f}</td>" in page


def test_a_run_without_evaluation_ends_with_the_same_student(run, paths, tmp_path):
    main([str(recipe_file(tmp_path)), *options(paths, tmp_path / "run")])
    ours, theirs = (folder / "model" / "model.safetensors" for folder in (run[0], tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not any("evaluat" in key for stage in results["stages"] for key in stage)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Evaluation during training" not in page


def test_what_cannot_be_compared_is_named_once(paths, tmp_path, capsys):
    stages = [{"stage": "sft", "batch_size": 2, "max_steps": 2}]
    text_only = photo_setup.write_records(tmp_path / "text.json", [photo_setup.records()[3]])
    cases = {"no held-out sample has an image": text_only, "no teacher is loaded": paths.data}
    for reason, file in cases.items():
        recipe = recipe_file(tmp_path, stages=stages)
        given = {"eval-steps": 1, "eval-data": file, "taf": "false"}
        main([str(recipe), *options(paths, tmp_path / reason, **given)])
        assert capsys.readouterr().out.count(f"similarity is not available: {reason}") == 1
        results = json.loads((tmp_path / reason / "results.json").read_text())
        [stage] = results["stages"]
        assert stage["evaluations"][0]["eval_loss_lm"] > 0
        assert not any("similarity" in name for e in stage["evaluations"] for name in e)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"eval-steps": 1}, "eval_data: stage 1 (dft) evaluates during training"),
        ({"eval-strategy": "epoch"}, "eval_data: stage 1 (dft) evaluates during training"),
        ({"eval-on-start": "true"}, "eval_data: stage 1 (dft) evaluates during training"),
        ({"eval-steps": 1, "eval-data": "nowhere.json"}, "eval_data: expected an existing file"),
        ({"eval-questions": 5}, "eval_questions: expected none, because the recipe names no suite"),
        ({"eval-samples": -1}, "eval_samples: expected at least 0"),
        ({"eval-steps": 0}, "eval_steps: expected more than 0"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_refusals(given, message, paths, tmp_path, capsys):
    recipe = recipe_file(tmp_path)
    line = refused([recipe, *options(paths, tmp_path / "run", **given)], capsys)
    assert message in line
