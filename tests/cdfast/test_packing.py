"""Packed rows: every loss and gradient as in padded batches, rows planned by length, resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard

from cdfast import DistillationConfig, DistillationTrainer
from cdfast.adapters import assemble_student, set_trainable, share_vision_tower, vision_tower
from cdfast.collator import VisionTextCollator
from cdfast.data import load_dataset
from cdfast.packing import PackedRows, check_packable, describe_rows, sample_lengths
from cdfast.resumable import ResumableTrainer
from cdfast.train import main
from cdfast.trainer import LayoutCollator
from tests.cdfast import photo_setup
from tests.cdfast.command import arguments, options, refused
from tests.cdfast.samples import TinyPairs, TinySamples, one_step
from tests.cdfast.tiny_families import qwen
from tests.cdfast.tiny_models import (
    IMAGE_TOKEN,
    NUM_VISUAL,
    sharpen,
    tiny_language_model,
    tiny_llava,
    tiny_teacher,
)

TOLERANCE = 1e-5
SYSTEMS = {
    "hidden_weight": 1.0,
    "visual_kl_weight": 1.0,
    "relation_weight": 0.5,
    "kl_objective": "soft_ce",
}


class MixedSamples(TinySamples):
    """TinySamples in which every fifth sample has two images with text between them."""

    def __getitem__(self, index):
        one = super().__getitem__(index)
        if index % 5 != 1 or not one["images"]:
            return one
        second = torch.tensor([5, *[IMAGE_TOKEN] * NUM_VISUAL, 7])
        at = 1 + NUM_VISUAL
        ids = torch.cat([one["input_ids"][:at], second, one["input_ids"][at:]])
        ignored = torch.full_like(second, -100)
        labels = torch.cat([one["labels"][:at], ignored, one["labels"][at:]])
        pixels = one["images"]["pixel_values"]
        pixels = torch.cat([pixels, pixels.flip(-1)])
        return {**one, "input_ids": ids, "labels": labels, "images": {"pixel_values": pixels}}


def make_trainer(folder, models=None, size=12, **options):
    values = one_step(
        folder,
        per_device_train_batch_size=2,
        packing=True,
        pack_tokens=60,
    )
    teacher, student = models or (tiny_teacher(), tiny_llava())
    vision_tower(student)[2].requires_grad_(False)
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        args=DistillationConfig(**{**values, **options}),
        train_dataset=MixedSamples(size),
        data_collator=VisionTextCollator(0),
    )


def taf_models():
    teacher = tiny_teacher()
    student = sharpen(assemble_student(teacher, tiny_language_model(), taf=True))
    share_vision_tower(teacher, student)
    set_trainable(student, projector=True, language_model=True)
    return teacher, student


def batches(samples):
    """The same samples padded and packed, each with its layout."""
    collator = VisionTextCollator(0)
    collators = (collator, collator.pack)
    return [LayoutCollator(make, IMAGE_TOKEN)(samples) for make in collators]


def gradients(trainer, batch):
    """Means and gradients of one micro-batch as the trainer computes them."""
    trainer.model.zero_grad()
    counts = trainer._counts(batch)
    loss, means = trainer.compute_loss(trainer.model, batch, True, counts)
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return means, found


CASES = {
    "paper": {"layers": "all", "alignment_weight": 2.0},
    "official": {"preset": "official", "layers": "all"},
    "some layers, recomputation": {"gradient_checkpointing": True},
    "kept alignment": {"gradient_checkpointing": True, "keep_alignment": True},
    "TAF": {"taf": True, "layers": "all"},
    "systems": {**SYSTEMS, "layers": "all"},
    "unshifted mask": {"unshifted_kl_mask": True},
    "adaptive": {"matching": "adaptive"},
    "LM alone": {"kl_weight": 0.0, "alignment_weight": 0.0},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_padded_batch(case, tmp_path):
    options = {**CASES[case]}
    models = taf_models() if options.pop("taf", False) else None
    trainer = make_trainer(tmp_path, models, **options)
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        trainer.model.train()
    samples = [trainer.train_dataset[i] for i in (0, 1, 3, 6, 7, 2)]
    assert len({len(s["input_ids"]) for s in samples}) > 3
    padded, packed = batches(samples)
    assert packed["input_ids"].shape == (1, sum(len(s["input_ids"]) for s in samples))
    assert torch.equal(trainer._counts(packed), trainer._counts(padded))
    want_means, want = gradients(trainer, padded)
    got_means, got = gradients(trainer, packed)
    assert got_means.keys() == want_means.keys()
    for name, value in want_means.items():
        assert got_means[name].item() == pytest.approx(value.item(), rel=TOLERANCE), name
        assert value.item() > 0
    assert got.keys() == want.keys()
    error = sum((got[n] - want[n]).double().square().sum() for n in want).sqrt()
    size = sum(w.double().square().sum() for w in want.values()).sqrt()
    assert size > 0
    assert error <= TOLERANCE * size


def test_no_row_predicts_the_first_token_of_the_next_sample():
    samples = [MixedSamples(4)[i] for i in (0, 3)]
    samples[1]["labels"][0] = 5
    packed = VisionTextCollator(0).pack(samples)
    start = len(samples[0]["input_ids"])
    assert packed["labels"][0, start] == -100
    assert packed["position_ids"][0, start] == 0
    assert packed["cu_seqlens"].tolist() == [0, start, packed["input_ids"].shape[1]]


def test_unaligned_layers_of_a_packed_batch_build_no_dense_mask(tmp_path, monkeypatch):
    from cdfast_kernels import VisualLayout

    def refuse(layout):
        raise AssertionError("dense mask")

    monkeypatch.setattr(VisualLayout, "dense_mask", refuse)
    trainer = make_trainer(tmp_path, layers="early", matching="simple")
    samples = [trainer.train_dataset[i] for i in range(4)]
    _, packed = batches(samples)
    seen = []
    for layer in trainer.model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    gradients(trainer, packed)
    assert seen
    assert all(mask is None for mask in seen)
    assert len(trainer.aligner.student_layers) < len(trainer.model.get_decoder().layers)


@pytest.mark.parametrize("losses", ["LM alone", "KL"])
def test_packed_layers_of_a_step_without_alignment_run_on_the_backend_asked_for(
    losses, tmp_path, monkeypatch
):
    import cdfast.attention

    seen = []
    stock = cdfast.attention.flash_attention

    def spy(*args, **kwargs):
        seen.append(kwargs["backend"])
        return stock(*args, **kwargs)

    monkeypatch.setattr("cdfast.attention.flash_attention", spy)
    options = CASES["LM alone"] if losses == "LM alone" else {"alignment_weight": 0.0}
    trainer = make_trainer(tmp_path, backend="reference", **options)
    samples = [trainer.train_dataset[i] for i in range(4)]
    gradients(trainer, batches(samples)[1])
    assert set(seen) == {"reference"}


# -- rows ------------------------------------------------------------------------------------------


def lengths_like_llava(count, seed=0):
    """Long-tailed: most near 700, some short, some at 2048."""
    random = np.random.default_rng(seed)
    made = 600 + random.gamma(1.2, 180, count)
    made[random.random(count) < 0.08] = 60
    return np.minimum(made, 2048).astype(int)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("capacity", [2048, 8192, 32768])
def test_rows_hold_every_sample_once_and_are_nearly_full(processes, capacity):
    lengths = lengths_like_llava(3000)
    rows = PackedRows(lengths, capacity, processes=processes)
    assert len(rows) % processes == 0
    for epoch in range(2):
        rows.set_epoch(epoch)
        made = list(rows)
        assert len(made) == len(rows)
        assert sorted(i for row in made for i in row) == list(range(3000))
        assert max(lengths[row].sum() for row in made) <= capacity
    assert rows.fill == lengths.sum() / (len(rows) * capacity)
    # Rows of 2048 hold two or three samples; of the rest little is lost.
    assert rows.fill > (0.89 if capacity == 2048 else 0.95)
    assert rows.fill > rows.padded_fill()


def test_order_depends_on_seed_and_epoch_alone_and_not_on_length():
    lengths = lengths_like_llava(3000)

    def order(seed, epoch):
        rows = PackedRows(lengths, 8192, seed=seed)
        rows.set_epoch(epoch)
        return list(rows)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    flat = [i for row in order(0, 0) for i in row]
    place = np.empty(3000)
    place[flat] = np.arange(3000)
    assert abs(np.corrcoef(place, lengths)[0, 1]) < 0.05
    # Samples that share a row in one epoch seldom do in the next.
    mates = [{(a, b) for row in order(0, e) for a in row for b in row if a < b} for e in (0, 1)]
    assert len(mates[0] & mates[1]) < 0.05 * len(mates[0])


def test_rows_are_alike_in_tokens_and_in_lengths():
    lengths = lengths_like_llava(3000)
    rows = [lengths[row] for row in PackedRows(lengths, 16384)]
    tokens = [row.sum() for row in rows]
    assert max(tokens) - min(tokens) < 0.05 * 16384
    assert all(row.max() - row.min() > 500 for row in rows)


def test_fill_is_what_the_page_says():
    lengths = lengths_like_llava(3000)
    page = (Path(__file__).parents[2] / "docs" / "packing.md").read_text()
    assert describe_rows(PackedRows(lengths, 8192).summary()) in page
    assert f"filled to {PackedRows(lengths, 2048).fill:.1%}" in page


def test_ranks_take_equally_many_rows_and_every_sample_once():
    rows = PackedRows(lengths_like_llava(1000), 8192, processes=3)
    ranks = [list(BatchSamplerShard(rows, 3, rank)) for rank in range(3)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for rank in ranks for row in rank for i in row) == list(range(1000))


def test_every_epoch_has_its_own_order_behind_any_loader(tmp_path, monkeypatch):
    """A resumed rank's sampler is inside two others, where Trainer does not find it."""
    monkeypatch.setattr(ResumableTrainer, "_run_epoch", lambda *args, **kwargs: None)
    trainer = make_trainer(tmp_path)
    trainer._run_epoch(epoch=3)
    assert trainer.packed_rows.epoch == 3


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match=r"sample 2 is longer.*Raise pack_tokens"):
        PackedRows([5, 7, 90], 64)
    with pytest.raises(ValueError, match="4 processes"):
        PackedRows([5, 7, 9], 64, processes=4)


def test_an_epoch_trains_on_every_sample_once(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.data_collator.collator.pack, seen = None, []
    pack = VisionTextCollator(0).pack

    def noted(samples):
        seen.append([s["source"] for s in samples])
        return pack(samples)

    trainer.data_collator.collator.pack = noted
    trainer.train()
    rows = len(trainer.packed_rows)
    assert trainer.state.global_step == len(seen) == 2 * rows
    for epoch in (seen[:rows], seen[rows:]):
        assert len([s for row in epoch for s in row]) == 12
        assert len({s for row in epoch for s in row}) == 12
    assert seen[:rows] != seen[rows:]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["row_fill"] <= 1 for entry in log)
    mean = sum(entry["row_fill"] for entry in log) / len(log)
    assert mean == pytest.approx(trainer.packed_rows.fill)


@pytest.mark.parametrize("stop", [2, 5])
def test_resume_continues_bit_for_bit(stop, tmp_path):
    """Stopped within the first epoch and within the second."""
    options = {"max_steps": 7, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = make_trainer(tmp_path / "whole", **options)
    assert stop != len(whole.packed_rows) < 7
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": stop}
    first = make_trainer(tmp_path / "part", **options, **saving)
    first.train()
    for path in (tmp_path / "part").glob("checkpoint-*"):
        if path.name != f"checkpoint-{stop}":
            shutil.rmtree(path)
    resumed = make_trainer(tmp_path / "part", **options, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    want = whole.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in resumed.model.state_dict().items())


# -- the command -----------------------------------------------------------------------------------


def test_planned_lengths_are_those_of_encoded_samples(paths, monkeypatch):
    data = load_dataset(paths.data, paths.images, photo_setup.make_processor(), max_length=60)
    encoded = [len(data[i]["input_ids"]) for i in range(len(data))]
    monkeypatch.setattr("cdfast.encoding.load_image", None)  # nothing is decoded
    assert data.lengths().tolist() == encoded
    assert max(encoded) == 60
    assert len(set(encoded)) > 3


@pytest.mark.slow
def test_the_command_packs(paths, tmp_path, capsys):
    out = tmp_path / "run"
    recipe = tmp_path / "two.yaml"
    stages = [{"stage": "dpt", "batch_size": 2}, {"stage": "dft", "batch_size": 3}]
    recipe.write_text(yaml.safe_dump({"stages": stages}))
    given = {"packing": "true", "max-length": 100, "max-steps": 2, "workers": 0}
    main([str(recipe), *options(paths, out, **given)])
    results = json.loads((out / "results.json").read_text())
    printed = capsys.readouterr().out
    for stage, batch in zip(results["stages"], (2, 3), strict=True):
        packing = stage["packing"]
        assert packing["samples"] == 9
        assert packing["capacity"] == batch * 100
        assert f"in {packing['rows']} rows of at most {batch * 100}" in printed
        assert all(entry["row_fill"] <= 1 for entry in stage["log"])


REFUSED = {
    "turns": ({"turns": "independent"}, "packing: expected turns 'dialogue'"),
    "streaming": ({"streaming": "true"}, "packing: expected streaming false"),
    "stored": ({"objective": "pooled_stored"}, "another objective than 'pooled_stored'"),
    "short rows": ({"pack-tokens": 20, "batch-size": 2}, "rows of at least max_length = 2048"),
    "off": ({"packing": "false", "pack-tokens": 20}, "pack_tokens: expected none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_of_the_command(case, paths, tmp_path, capsys):
    changed, message = REFUSED[case]
    given = arguments(paths, tmp_path / "run", **{"packing": "true", **changed})
    assert message in refused(given, capsys)


def test_a_dry_run_refuses_a_family_that_is_not_packed(paths, tmp_path, capsys):
    qwen()[0].save_pretrained(tmp_path / "qwen")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"stages": [{"stage": "sft"}]}))
    given = {"teacher": None, "student": tmp_path / "qwen", "packing": "true"}
    given = [str(tmp_path / "one.yaml"), *options(paths, tmp_path / "run", **given), "--dry-run"]
    assert "packing: expected a model of the kinds" in (line := refused(given, capsys))
    assert "got 'qwen2_5_vl'" in line


class Streamed(torch.utils.data.IterableDataset):
    def __len__(self):
        return 3

    def __iter__(self):
        yield TinySamples(1)[0]


def test_refusals_of_the_trainer(tmp_path):
    with pytest.raises(ValueError, match="pack_tokens: expected at least 1"):
        DistillationConfig(str(tmp_path), packing=True, use_cpu=True)
    base = {"output_dir": str(tmp_path), "packing": True, "pack_tokens": 9, "use_cpu": True}
    weights = {"kl_weight": 0.0, "alignment_weight": 0.0, "preference_weight": 1.0}
    with pytest.raises(ValueError, match="packing: expected no preference loss"):
        DistillationConfig(**base, **weights)
    with pytest.raises(ValueError, match="train_sampling_strategy 'random'"):
        DistillationConfig(**base, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="Streamed, which is streamed"):
        sample_lengths(Streamed())
    sample = {**TinySamples(1)[0], "segment_ids": torch.zeros(1)}
    with pytest.raises(ValueError, match="tiny, sample 0, which is split into independent turns"):
        VisionTextCollator(0).pack([sample])
    with pytest.raises(ValueError, match="tiny, sample 0, which is a pair of answers"):
        VisionTextCollator(0).pack([TinyPairs(1)[0]])
    model, _ = qwen()
    with pytest.raises(ValueError, match=r"packing: expected a model of the kinds.*'qwen2_5_vl'"):
        check_packable(model)
