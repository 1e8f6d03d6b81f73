"""The memory estimate: against DeepSpeed's allocations, saved tensors, layouts; and the command."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cdfast_kernels import VisualMap, flash_attention, visual_attention_map
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from cdfast import memory
from cdfast.adapters import vision_tower
from cdfast.attention import use_cdfast_attention
from cdfast.config import ConfigError, load_recipe, override
from cdfast.footprint import (
    TextShape,
    Training,
    activations,
    alignment_maps,
    hidden_loss,
    logits_chunk,
    model_states,
    one_image_layout,
    parameter_sizes,
    relation_loss,
    sharded,
    tower_features,
)
from cdfast.hidden_projector import hidden_projector_size
from cdfast.losses import gram_matrix, hidden_loss_sum, kl_loss_sum, relation_loss_sum
from cdfast.memory import parse_size
from cdfast.stage_memory import combinations, fits, footprint, stage_models
from tests.cdfast.tiny_models import tiny_batch, tiny_llava

ROOT = Path(__file__).parents[2]
GIB = 2**30


# Model states


@pytest.fixture(scope="module")
def allocated(tmp_path_factory):
    """ZeRO stage -> bytes that each of two ranks holds in a real step of DeepSpeed."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("states")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distributed.state_script", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_are_those_that_deepspeed_allocates(stage, allocated):
    """Stage 3 to the byte; stages 1 and 2 up to the padding of the two parameter groups."""
    model = tiny_llava()
    vision_tower(model)[2].requires_grad_(False)
    counted = model_states(
        *parameter_sizes(model),
        zero_stage=stage,
        world_size=2,
        itemsize=2,
        persistence_threshold=100,  # as in the script
    )
    for rank in allocated:
        real = rank[str(stage)]
        for name, size in (("parameters", 2), ("gradients", 2), ("optimizer", 12)):
            padding = 0 if stage == 3 else 2 * (2 * 2) * size
            assert 0 <= real[name] - getattr(counted, name) <= padding, name


@pytest.mark.slow
def test_engine_step_is_the_optimizers_time_on_a_real_engine(allocated):
    want = ["data", "student", "optimizer", "other", None]
    assert all(found["marks"] == want for rank in allocated for found in rank.values())


def test_states_without_deepspeed():
    states = model_states([100, 28], [72], zero_stage=0, world_size=2, itemsize=4)
    assert (states.parameters, states.gradients, states.optimizer) == (800, 512, 1024)
    assert states.buckets == 512
    alone = model_states([100, 28], [72], zero_stage=0, world_size=1, itemsize=4)
    assert alone.buckets == 0


def test_offloaded_states_are_in_host_memory():
    options = {"zero_stage": 2, "world_size": 4, "itemsize": 2}
    kept = model_states([1000], [500], **options)
    away = model_states([1000], [500], offload_optimizer=True, **options)
    assert (kept.optimizer, kept.host) == (12 * 250, 0)
    assert (away.optimizer, away.host) == (0, 18 * 250)
    assert away.parameters == kept.parameters


def test_a_share_pads_every_parameter():
    assert sharded([10, 7, 1], 4) == 3 + 2 + 1


# Activations


def saved_bytes(run, model):
    """Bytes of the tensors that autograd keeps, each storage once, without parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, Parameter) and storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: no reuse
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(size for size, _ in storages.values())


SIZES = {
    "tiny": {"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 4},
    "medium": {"layers": 6, "hidden": 256, "heads": 8, "kv_heads": 8},
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("what", ["all", "none", "lora", "lora with dropout"])
@pytest.mark.parametrize("size", SIZES)
def test_activations_are_those_that_autograd_keeps(size, what, precision):
    """Within -10% and +10% of the saved tensors' bytes."""
    autocast = precision == "autocast"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    compute = 4 if precision == "float32" else 2
    student = tiny_llava(**SIZES[size]).to(dtype).train()
    use_cdfast_attention(student)
    dropout = 0.05 if what == "lora with dropout" else 0.0
    decoder = student.model.language_model
    if what != "all":
        student.requires_grad_(False)
    if what.startswith("lora"):
        names = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        config = LoraConfig(r=8, lora_dropout=dropout, target_modules=names)
        # As DeepSpeed leaves them: adapters in the compute dtype.
        get_peft_model(student, config, autocast_adapter_dtype=False)
    width = student.config.text_config.hidden_size
    embeddings = torch.randn(2, 200, width, dtype=dtype, requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return decoder(inputs_embeds=embeddings, use_cache=False)

    shape = TextShape.of(student.config)
    training = Training(what.partition(" ")[0], 8, dropout)
    counted = activations(
        shape, training, tokens=400, itemsize=compute, checkpointing=False, autocast=autocast
    )
    if autocast:  # footprint() adds these for the whole model
        matrices = [m.weight for m in decoder.layers.modules() if isinstance(m, torch.nn.Linear)]
        counted += compute * sum(w.numel() for w in matrices)
    if dropout:  # a CPU keeps the mask in the tensor's dtype, CUDA as bool
        mask = embeddings.element_size() - 1
        counted += 400 * shape.layers * mask * (5 * shape.width + shape.query + shape.mlp)
    assert counted == pytest.approx(saved_bytes(run, student), rel=0.10)


@pytest.mark.parametrize("size", SIZES)
def test_checkpointing_keeps_the_inputs_of_layers(size):
    """Between forward and backward; the layer that is repeated comes on top of it."""
    student = tiny_llava(**SIZES[size]).train()
    use_cdfast_attention(student)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    embeddings = torch.randn(2, 200, student.config.text_config.hidden_size, requires_grad=True)
    decoder = student.model.language_model
    kept = saved_bytes(lambda: decoder(inputs_embeds=embeddings, use_cache=False), student)
    shape = TextShape.of(student.config)
    counted = activations(shape, Training("all"), tokens=400, itemsize=4, checkpointing=True)
    one = {**SIZES[size], "layers": 1}
    layer = activations(
        TextShape.of(tiny_llava(**one).config),
        Training("all"),
        tokens=400,
        itemsize=4,
        checkpointing=False,
    )
    last_norm = 400 * 8 * shape.width
    assert counted - (layer - last_norm) == pytest.approx(kept, rel=0.10)


def test_features_of_the_tower_are_all_its_hidden_states():
    student = tiny_llava()
    batch = tiny_batch()
    tower = vision_tower(student)[2]
    output = tower(batch["pixel_values"], output_hidden_states=True)
    real = sum(h.nbytes for h in output.hidden_states)
    assert tower_features(student.config.vision_config, 3, 4) == real


# Alignment


def test_maps_are_as_large_as_the_ones_that_are_made():
    layout = one_image_layout(2, 200, 100)
    matches = {1: (1, 2), 2: (2, 3)}
    q, k, v = (torch.randn(2, 200, 2, 8).half() for _ in range(3))
    _, lse = flash_attention(q, k, v, layout=layout)
    maps = {t: visual_attention_map(q, k, lse, layout) for t in (1, 2, 3)}
    means = [VisualMap.mean([maps[t] for t in window]) for window in matches.values()]
    real = sum(m.data.nbytes for m in [*maps.values(), *means])
    found = alignment_maps(layout, matches, "row", kept_layers=2)
    assert found.teacher == real
    assert alignment_maps(layout, {}, "row", kept_layers=0).student == 0
    more = alignment_maps(layout, matches, "kl", kept_layers=2)
    assert more.student - found.student == 2 * means[0].data.nbytes  # G in float32


# Logits


@pytest.mark.parametrize("rows, vocabulary", [(1500, 8192), (3000, 16384)])
def test_the_kl_chunk_takes_what_the_allocator_sees(rows, vocabulary):
    """Peak of forward and backward in float32, within 10%."""
    student, teacher = (TextShape(1, d, d, d, 1, d, vocabulary) for d in (64, 96))
    hidden = torch.randn(rows, 64, requires_grad=True)
    weight = torch.randn(vocabulary, 64)
    other, head = torch.randn(rows, 96), torch.randn(vocabulary, 96)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kl_loss_sum(hidden, weight, other, head).backward()
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    options = {"itemsize": 4, "teacher_itemsize": 4, "head_trained": False}
    counted = logits_chunk(student, teacher, rows=rows, **options)
    assert counted == pytest.approx(max(itertools.accumulate(changes)), rel=0.10)


def peak_of(step):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("samples, visual, d", [(4, 200, 64), (2, 100, 256)])
def test_the_relation_loss_takes_what_the_allocator_sees(trained, samples, visual, d):
    vocabulary = 20_000
    student, teacher = (TextShape(1, w, w, w, 1, w, vocabulary) for w in (d, 96))
    hidden = torch.randn(samples * visual, d, requires_grad=True)
    weight = torch.randn(vocabulary, d, requires_grad=trained)
    other, head = torch.randn(samples * visual, 96), torch.randn(vocabulary, 96)

    def step():
        # As the step does: rows are gathered, G of a trained head is made in each of them.
        grams = gram_matrix(weight, vocabulary), gram_matrix(head, vocabulary)
        relation_loss_sum(hidden * 1, grams[0], other * 1, grams[1], [visual] * samples).backward()

    options = {"itemsize": 4, "teacher_itemsize": 4, "head_trained": trained}
    counted = relation_loss(student, teacher, samples, visual, **options)
    assert counted == pytest.approx(peak_of(step), rel=0.25)


def test_the_hidden_state_loss_takes_what_the_allocator_sees():
    student, teacher = (TextShape(1, w, w, w, 1, w, 100) for w in (64, 96))
    hidden, other = torch.randn(3000, 64, requires_grad=True), torch.randn(3000, 96)
    mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96))

    def step():
        hidden_loss_sum(mlp(hidden * 1), other * 1).backward()

    counted = hidden_loss(student, teacher, rows=3000, itemsize=4)
    assert counted == pytest.approx(peak_of(step), rel=0.25)


def test_the_mlp_of_the_hidden_state_loss_is_among_the_states():
    recipe = load_recipe("llavadi-2b")
    stage = recipe.stages[1]
    with_mlp, without = (
        footprint(stage_models(recipe, s), 8, 2, "replicated", checkpointing=True)
        for s in (stage, replace(stage, hidden_weight=0.0))
    )
    size = hidden_projector_size(2048, 2560)
    assert with_mlp.columns["student"] - without.columns["student"] == 2 * size
    assert with_mlp.columns["optimizer"] - without.columns["optimizer"] == 12 * size / 8
    assert with_mlp.columns["logits"] > without.columns["logits"]


# Combinations


@pytest.fixture(scope="module")
def dft():
    recipe = load_recipe("compodistill-2b")
    return stage_models(recipe, recipe.stages[1])


def test_columns_of_the_papers_dft_stage(dft):
    """Sizes that can be checked by hand."""
    found = footprint(dft, 8, 1, "replicated", checkpointing=True)
    lora = sum(p.numel() for n, p in dft.student.named_parameters() if "lora_" in n)
    projector = 2560 * 2048 + 2048 + 2048 * 2048 + 2048
    assert found.columns["gradients"] == 2 * (lora + projector)
    assert found.columns["optimizer"] == 12 * (lora + projector) / 8
    teacher = sum(p.numel() for n, p in dft.teacher.named_parameters() if "vision" not in n)
    assert found.columns["teacher"] == 2 * teacher
    tower = sum(p.numel() for p in vision_tower(dft.teacher)[2].parameters())
    assert found.columns["tower"] == 4 * tower  # the student's float32 is kept
    layout = one_image_layout(8, 2048, 729)
    every = found.columns["maps"], alignment_maps(layout, dft.matches, "row", kept_layers=1).student
    assert every[0] == every[1] > len(dft.matches) * 8 * (2048 - 36) * 729 * 2
    sharded_teacher = footprint(dft, 8, 3, "sharded", checkpointing=True)
    assert sharded_teacher.columns["teacher"] == pytest.approx(2 * teacher / 8, rel=1e-4)
    away = footprint(dft, 8, 3, "offloaded", checkpointing=True)
    assert away.columns["teacher"] == 0
    assert away.host == sharded_teacher.columns["teacher"]


def test_more_tokens_more_ranks_and_recomputation_move_the_right_columns(dft):
    base = footprint(dft, 8, 2, "replicated", checkpointing=False)
    longer_recipe = override(dft.recipe, {"max_length": 4096})
    longer = stage_models(longer_recipe, longer_recipe.stages[1])
    more = footprint(longer, 8, 2, "replicated", checkpointing=False)
    assert more.columns["maps"] > base.columns["maps"]
    assert more.columns["activations"] > 1.9 * base.columns["activations"]
    assert more.columns["student"] == base.columns["student"]
    ranks = footprint(dft, 16, 2, "replicated", checkpointing=False)
    assert ranks.columns["optimizer"] == base.columns["optimizer"] / 2
    repeated = footprint(dft, 8, 2, "replicated", checkpointing=True)
    assert repeated.columns["activations"] < 0.15 * base.columns["activations"]
    assert repeated.columns["maps"] < base.columns["maps"]


def test_the_cheapest_that_fits_is_first(dft):
    found = combinations(dft, 8)
    chosen = [next(f for f in found if fits(f, size * GIB)) for size in (80, 40, 20)]
    assert [c.checkpointing for c in chosen] == [False, True, True]
    assert chosen[0].placement == chosen[1].placement == "replicated"
    assert chosen[2].placement != "replicated"
    assert chosen[0].total > chosen[1].total > chosen[2].total
    assert not any(fits(f, 10 * GIB) for f in found)


def test_packed_rows_are_as_many_full_samples(dft):
    """Rows of twice max_length are twice the samples that the padded batch would have."""
    found = []
    for options in (
        {"dft.batch_size": 8, "packing": True, "pack_tokens": 4096},
        {"dft.batch_size": 16},
    ):
        recipe = override(dft.recipe, options)
        models = stage_models(recipe, recipe.stages[1])
        found.append(footprint(models, 8, 1, "replicated", checkpointing=True))
    assert found[0] == found[1]


def test_a_stage_without_a_teacher_has_its_own_tower():
    recipe = load_recipe("compodistill-2b")
    sft = stage_models(recipe, recipe.stages[2])
    found = combinations(sft, 4)
    assert {f.placement for f in found} == {"none"}
    assert found[0].columns["teacher"] == found[0].columns["tower"] == 0


# The command


def run(capsys, *arguments):
    memory.main([*arguments])
    return capsys.readouterr().out


def test_the_command_prints_a_row_per_stage_and_placement(capsys):
    out = run(capsys, "compodistill-2b", "--world-size", "8", "--gpu-memory", "80GB")
    rows = re.findall(r"^ +([0-3]) (replicated|sharded|offloaded|none) ", out, re.MULTILINE)
    assert len(rows) == 10
    assert [r for r in rows if r[0] == "0"] == [("0", "replicated")]
    assert "compodistill-2b, dpt: GiB per GPU of 8; batch 16 x 2048 tokens" in out  # the worst
    assert "fits 80.00 GiB: --zero-stage 0 --teacher-placement replicated" in out
    assert "Nothing was measured on a GPU" in out


def test_options_of_training_are_options_here(capsys):
    options = ["--stage", "dft", "--batch-size", "2", "--max-length", "1024"]
    out = run(capsys, "compodistill-2b", "--world-size", "2", "--gpu-memory", "1GB", *options)
    assert "dft: GiB per GPU of 2; batch 2 x 1024 tokens" in out
    assert "nothing fits 1.00 GiB: the least is" in out
    out = run(capsys, "miniature", "--world-size", "2", "--stage", "all")
    assert re.findall(r"miniature, (\w+): GiB per GPU of 2", out) == [
        stage.stage for stage in load_recipe("miniature").stages
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["compodistill-2b"], "--world-size: expected the number of GPUs; got none"),
        (
            ["--world-size", "0"],
            "--world-size: expected a whole number of GPUs, at least 1; got '0'",
        ),
        (
            ["--world-size", "-2"],
            "--world-size: expected a whole number of GPUs, at least 1; got '-2'",
        ),
        (["--world-size", "two"], "got 'two'"),
        (
            ["--world-size", "2", "--gpu-memory", "much"],
            "--gpu-memory: expected a size greater than 0",
        ),
        (["--world-size", "2", "--gpu-memory", "0GB"], "such as 80GB, 40GiB or 81920MB; got '0GB'"),
        (["--world-size", "2", "--stage", "dpd"], "--stage: expected worst, all, or one of dpt"),
        (["--world-size", "2", "--batch-size", "0"], "(dpt): expected at least 1; got 0"),
        (["compodistill-3b", "--world-size", "2"], "Did you mean 'compodistill-2b'?"),
        (["--world-size", "2", "--zero-stage", "4"], "zero_stage"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(arguments)
    assert stopped.value.code == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert message in found


@pytest.mark.parametrize(
    "text, size",
    [
        ("80GB", 80 * GIB),
        ("80", 80 * GIB),
        ("40 GiB", 40 * GIB),
        ("81920MB", 80 * GIB),
        ("0.5t", 512 * GIB),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, "x") == size
    with pytest.raises(ConfigError):
        parse_size(text + "?", "x")
