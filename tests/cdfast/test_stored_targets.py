"""Stored targets: the files, a step beside the teacher's own, the command, refusals."""

import copy
import json
import math
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from cdfast import DistillationConfig, DistillationTrainer, targets
from cdfast.adapters import vision_tower
from cdfast.aligner import AlignmentTargets, VisualAttentionAligner
from cdfast.collator import VisionTextCollator
from cdfast.config import ConfigError, load_recipe, override
from cdfast.data import DataError
from cdfast.distill import (
    LossOptions,
    StudentTask,
    TeacherOutput,
    TeacherTask,
    student_step,
    teacher_step,
)
from cdfast.losses import answer_rows
from cdfast.similarity import model_inputs, visual_maps
from cdfast.stages import student as stage_student
from cdfast.stages import training
from cdfast.stored_targets.files import (
    ALIGNMENT,
    FORMAT,
    INDEX_FILE,
    KL,
    ShardPlan,
    StoredTargets,
    WithStoredTargets,
    shard_path,
    shard_problem,
    write_shard,
)
from cdfast.stored_targets.maker import TargetMaker
from cdfast.stored_targets.plan import check_storable
from cdfast.stored_targets.pooled_vectors import PooledVectors, pool_map
from cdfast.stored_targets.sizes import map_bytes, measure_samples, stored_bytes
from cdfast.stored_targets.top_k import TopK, top_k_of
from cdfast.synthetic import EncodedScenes, SceneDataset, teacher_path
from cdfast.train import main as train
from cdfast.trainer import LayoutCollator, unwrap_model
from tests.cdfast.command import options as photo_options
from tests.cdfast.command import refused
from tests.cdfast.samples import TinySamples, one_step
from tests.cdfast.test_trainer import relative_change, state
from tests.cdfast.tiny_models import (
    IMAGE_TOKEN,
    NUM_VISUAL,
    VOCAB,
    tiny_batch,
    tiny_llava,
    tiny_teacher,
)

SAMPLES, PER_SHARD = 8, 3
TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


def peaked_teacher():
    """Far from uniform, so that few of its tokens hold most of the probability."""
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(15)
    return teacher


def trainer(folder, stored=None, aligner=None, **options):
    """Of one global step over all samples; online where nothing is stored."""
    values = one_step(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        layers="all",
        alignment_weight=2.0,
        objective="pooled_stored",
    )
    student, samples = tiny_llava(), TinySamples(SAMPLES)
    vision_tower(unwrap_model(student))[2].requires_grad_(False)
    if aligner is not None:
        aligner = copy.copy(aligner)
        aligner.student = student
    return DistillationTrainer(
        model=student,
        teacher=peaked_teacher() if stored is None else None,
        stored_targets=stored,
        aligner=aligner,
        args=DistillationConfig(**{**values, **options}),
        train_dataset=samples if stored is None else WithStoredTargets(samples, stored),
        eval_dataset=TinySamples(4, seed=9),
        data_collator=VisionTextCollator(0),
    )


@pytest.fixture(scope="module")
def online_aligner(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("aligner")).aligner


def store(folder, aligner, top_k, dtype, parts=frozenset({KL, ALIGNMENT}), **losses):
    """Targets of the samples, in three shards."""
    losses = LossOptions(frozenset({"kl"}), **losses)
    maker = TargetMaker(
        aligner.teacher, aligner, losses, VOCAB, top_k, dtype, torch.device("cpu"), autocast=None
    )
    collate, samples = LayoutCollator(VisionTextCollator(0), IMAGE_TOKEN), TinySamples(SAMPLES)
    plan = ShardPlan(0, SAMPLES, PER_SHARD)
    (folder / "shards").mkdir(parents=True)
    for shard in plan.shards:
        batch = collate([samples[i] for i in plan.indices(shard)])
        write_shard(shard_path(folder, 0, shard), maker.batch(batch, set(parts)))
    return StoredTargets(folder, plan, parts, VOCAB, sorted(aligner.matches))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, online_aligner):
    """All tokens in float32."""
    return store(tmp_path_factory.mktemp("whole") / "targets", online_aligner, VOCAB, "float32")


@pytest.fixture(scope="module")
def half(tmp_path_factory, online_aligner):
    """Ten tokens in float16."""
    return store(tmp_path_factory.mktemp("half") / "targets", online_aligner, 10, "float16")


# -- a step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_objective": "soft_ce"}, {"layer_reduction": "sum"}, {"alignment_weight": 0.0}],
    ids=["kl", "soft-ce", "sum-over-layers", "no-alignment"],
)
def test_step_from_stored_targets_is_the_teachers(options, whole, online_aligner, tmp_path):
    start = state(tiny_llava())
    online = trainer(tmp_path / "online", **options)
    online.train()
    aligner = copy.copy(online_aligner)
    aligner.layer_reduction = options.get("layer_reduction", "mean")
    stored = trainer(tmp_path / "stored", whole, aligner, **options)
    stored.train()
    got, want = stored.state.log_history[0], online.state.log_history[0]
    names = {name for name in want if name.startswith("loss")}
    assert len(names) == (3 if "alignment_weight" in options else 4)
    for name in names:
        assert got[name] == pytest.approx(want[name], rel=TOLERANCE), name
        assert want[name] > 0.02
    assert relative_change(state(stored.model), state(online.model), start) <= TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
def test_loss_of_a_layer_is_the_cosine_of_what_is_left_of_its_map(padding, online_aligner):
    """The student's attention as the model computes it, its map pooled as a teacher's."""
    aligner, batch = online_aligner, tiny_batch(padding=padding, images="mixed")
    layout = aligner.layout(batch)
    with torch.no_grad():
        _, made = aligner.teacher_forward(**batch)
        _, alignment = aligner.student_forward(made, **batch)
    maps = visual_maps(aligner.student, batch, layout)
    sizes = layout.visual.sum(1).tolist()
    for layer, loss in alignment.per_layer.items():
        pooled = [v.data.split(sizes)[:2] for v in (pool_map(maps[layer]), made.maps[layer])]
        want = sum(1 - torch.cosine_similarity(s, t, dim=0) for s, t in zip(*pooled, strict=True))
        assert loss.item() == pytest.approx(want.item(), rel=1e-4)
        assert want > 0.02


def test_unshifted_rows(online_aligner, tmp_path):
    parts, rows = frozenset({KL}), {"unshifted_kl_mask": True}
    stored = store(tmp_path / "targets", online_aligner, VOCAB, "float32", parts, **rows)
    options = {**rows, "alignment_weight": 0.0}
    online, beside = trainer(tmp_path / "a", **options), trainer(tmp_path / "b", stored, **options)
    for one in (online, beside):
        one.train()
    got, want = (one.state.log_history[0]["loss_kl"] for one in (beside, online))
    assert got == pytest.approx(want, rel=TOLERANCE)
    assert set(load_file(stored.paths[0])) >= {"indices", "log_probs"}
    assert "vectors" not in load_file(stored.paths[0])


def test_fewer_tokens_in_float16_are_near_and_below(half, online_aligner, tmp_path):
    online, stored = trainer(tmp_path / "a"), trainer(tmp_path / "b", half, online_aligner)
    for one in (online, stored):
        one.train()
    got, want = stored.state.log_history[0], online.state.log_history[0]
    assert 0.5 * want["loss_kl"] < got["loss_kl"] < 0.99 * want["loss_kl"]
    assert got["loss_alignment"] == pytest.approx(want["loss_alignment"], rel=2e-3)
    assert got["loss_alignment"] != pytest.approx(want["loss_alignment"], rel=1e-7)
    assert got["loss_lm"] == pytest.approx(want["loss_lm"], rel=TOLERANCE)


def test_recomputed_layers_keep_the_gradient(half, online_aligner, tmp_path):
    kept = trainer(tmp_path / "a", half, online_aligner)
    again = trainer(tmp_path / "b", half, online_aligner, gradient_checkpointing=True)
    for one in (kept, again):
        one.train()
    start = state(tiny_llava())
    assert relative_change(state(again.model), state(kept.model), start) <= TOLERANCE


def test_evaluation_has_the_lm_loss_alone(half, online_aligner, tmp_path):
    stored = trainer(tmp_path, half, online_aligner)
    found = stored.evaluate()
    assert found["eval_loss"] == found["eval_loss_lm"] > 0
    assert not {name for name in found if "kl" in name or "alignment" in name}


def test_targets_that_are_not_finite_skip_the_step(half, online_aligner, tmp_path):
    stored = trainer(tmp_path, half, online_aligner)
    batch = stored.data_collator([stored.train_dataset[i] for i in range(4)])
    batch["stored_targets"]["vectors"][3] = math.nan
    counts = stored._counts(batch)
    loss = stored.compute_loss(stored.model, batch, num_items_in_batch=counts)
    loss.backward()
    assert loss.item() == 0
    assert stored.model.lm_head.weight.grad.isnan().all()
    assert [named.terms for named in stored.nonfinite._checked()] == [("alignment", "teacher")]


def test_samples_without_their_targets_are_refused(half, online_aligner, tmp_path):
    stored = trainer(tmp_path, half, online_aligner)
    stored.train_dataset = TinySamples(SAMPLES)
    with pytest.raises(ValueError, match=r"stored_targets: expected them.*WithStoredTargets"):
        stored.train()
    with pytest.raises(ValueError, match="aligner: expected one beside stored_targets"):
        trainer(tmp_path, half)


def test_float16_is_enough_on_the_embedded_teachers():
    """Losses of one embedded teacher as the student of the other."""
    teacher, student = (
        AutoModelForImageTextToText.from_pretrained(teacher_path(name)).eval()
        for name in ("miniature", "miniature-unprivileged")
    )
    processor = AutoProcessor.from_pretrained(teacher_path("miniature"))
    aligner = VisualAttentionAligner(teacher, student, objective="pooled_stored")
    samples = EncodedScenes(SceneDataset(size=8), processor)
    collate = LayoutCollator(VisionTextCollator(0), aligner.image_token_id)
    batch = collate([samples[i] for i in range(8)])
    inputs = {k: v for k, v in model_inputs(batch).items() if k != "labels"}
    common, losses = (batch["labels"], batch["layout"]), LossOptions(frozenset({"kl"}))
    made = teacher_step(teacher, inputs, TeacherTask(*common, aligner, losses))
    vocabulary = len(made.weight)

    def both(k, dtype):
        top = top_k_of(made.hidden["answer"], made.weight, vocabulary, k)
        top = TopK(top.indices, top.log_probs.to(dtype), vocabulary)
        maps = {n: PooledVectors(m.data.to(dtype).float()) for n, m in made.targets.maps.items()}
        targets = AlignmentTargets(maps, batch["layout"])
        output = TeacherOutput(targets, hidden={}, weight=None, top_k=top)
        with torch.no_grad():
            return student_step(student, inputs, StudentTask(*common, output, aligner, losses))

    exact, rounded = both(16, torch.float32), both(16, torch.float16)
    full = both(vocabulary, torch.float32)
    for name in ("kl", "alignment"):
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=1e-5)
        assert exact[name] > 0.1
    assert 0.99 * full["kl"] < exact["kl"] < full["kl"]


# -- files -----------------------------------------------------------------------------------------


def test_every_sample_gets_its_own_rows(half):
    """Also a text-only one, and in a process that was handed a copy of the store."""
    tables = [load_file(path) for path in half.paths]
    assert [len(t["source"]) for t in tables] == [3, 3, 2]
    for one in (half, pickle.loads(pickle.dumps(half))):
        for i, sample in enumerate(TinySamples(SAMPLES)):
            if i == SAMPLES:
                break
            found, shard = one.read(sample), tables[i // PER_SHARD]
            rows = int(answer_rows(sample["labels"][None]).sum())
            visual = int((sample["input_ids"] == IMAGE_TOKEN).sum())
            assert found["indices"].shape == (rows, 10)
            assert found["log_probs"].shape == (rows, 11)
            assert found["vectors"].shape == (visual, 3)
            assert visual == (0 if i % 4 == 3 else NUM_VISUAL)
            first = int(shard["answer_rows"][: i % PER_SHARD].sum())
            assert torch.equal(found["indices"], shard["indices"][first : first + rows])


def test_stored_numbers_are_what_they_are_said_to_be(whole, half):
    exact, rounded = (load_file(s.paths[0]) for s in (whole, half))
    assert exact["indices"].dtype == torch.int32
    assert exact["log_probs"].dtype == exact["vectors"].dtype == torch.float32
    assert rounded["log_probs"].dtype == rounded["vectors"].dtype == torch.float16
    assert (exact["log_probs"][:, -1] == -torch.inf).all()
    sums = rounded["log_probs"].float().exp().sum(1)
    assert (sums - 1).abs().max() < 1e-3
    assert (rounded["log_probs"][:, -1].exp() > 0.01).any()
    by_sample = exact["vectors"].split(exact["visual_tokens"].tolist())
    assert all((part.amax(0) == 1).all() for part in by_sample if len(part))


def test_a_missing_sample_is_named(half):
    sample = TinySamples(SAMPLES + 1)[SAMPLES]
    with pytest.raises(DataError, match=r"tiny, sample 8: stored targets: expected the sample"):
        half.read(sample)


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_a_sample_of_other_tokens_is_named(half, name):
    sample = TinySamples(SAMPLES)[2]
    sample[name][-1] += 1
    with pytest.raises(DataError, match="tiny, sample 2: stored targets: expected the tokens"):
        half.read(sample)


@pytest.fixture
def broken(half, tmp_path):
    """A copy of the ten-token store, to break."""
    folder = tmp_path / "targets"
    shutil.copytree(half.paths[0].parents[1], folder)
    plan = ShardPlan(0, SAMPLES, PER_SHARD)
    return folder, lambda: StoredTargets(folder, plan, half.parts, VOCAB, half.layers)


@pytest.mark.parametrize("damage", ["missing", "cut", "no-proof", "other-plan"])
def test_shards_that_are_not_whole_are_refused_at_the_start(broken, damage):
    folder, open_it = broken
    path = shard_path(folder, 0, 1)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no-proof":
        path.with_suffix(".json").unlink()
    else:
        shutil.copy(path.with_name("0-00002.json"), path.with_suffix(".json"))
    with pytest.raises(ConfigError, match=r"0-00001.*Run cdfast.targets again"):
        open_it()


def test_a_flipped_bit_is_found_by_the_hash(broken):
    path = shard_path(broken[0], 0, 1)
    assert shard_problem(path, PER_SHARD, content=True) is None
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    assert shard_problem(path, PER_SHARD, content=False) is None
    assert "content is not what was written" in shard_problem(path, PER_SHARD, content=True)


def test_a_torn_header_is_named(broken):
    folder, open_it = broken
    path = shard_path(folder, 0, 1)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match=r"0-00001.safetensors: shard: expected a readable shard"):
        open_it()


def test_targets_that_are_no_numbers_are_refused_by_the_samples_name():
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.lm_head.weight[4] = math.nan
    losses = LossOptions(frozenset({"kl"}))
    maker = TargetMaker(teacher, None, losses, VOCAB, 10, "float16", torch.device("cpu"), None)
    batch = LayoutCollator(VisionTextCollator(0), IMAGE_TOKEN)([TinySamples(2)[1]])
    with pytest.raises(DataError, match=r"tiny, sample 1: log_probs: expected numbers"):
        maker.batch(batch, {KL})


def test_batch_without_an_image_has_rows_and_no_vectors(online_aligner):
    losses, device = LossOptions(frozenset({"kl"})), torch.device("cpu")
    maker = TargetMaker(
        online_aligner.teacher, online_aligner, losses, VOCAB, 10, "float16", device, None
    )
    batch = LayoutCollator(VisionTextCollator(0), IMAGE_TOKEN)([TinySamples(4)[3]])
    made = maker.batch(batch, {KL, ALIGNMENT})
    assert made["vectors"].shape == (0, 3)
    assert len(made["indices"]) == made["answer_rows"].item() > 0


# -- sizes -----------------------------------------------------------------------------------------


def test_estimate_is_the_size_of_the_files(half):
    measured = measure_samples(TinySamples(SAMPLES), IMAGE_TOKEN, "answer")
    assert (measured.samples, measured.looked_at) == (SAMPLES, SAMPLES)
    assert measured.visual_tokens == NUM_VISUAL * 6 / 8
    parts = stored_bytes(
        SAMPLES, measured.answer_rows, measured.visual_tokens, layers=3, top_k=10, itemsize=2
    )
    size = sum(path.stat().st_size for path in half.paths)
    headers = len(half.paths) * 800
    assert sum(parts.values()) < size < sum(parts.values()) + headers
    assert map_bytes(2048, 729, layers=3) == 3 * 2048 * 729 * 2


def test_samples_that_are_measured_are_spread(monkeypatch):
    monkeypatch.setattr("cdfast.stored_targets.sizes.MEASURED_SAMPLES", 4)
    seen = []

    class Counted(TinySamples):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    assert measure_samples(Counted(18), IMAGE_TOKEN, "answer").looked_at == 4
    assert seen == [0, 4, 9, 13]


# -- what is refused -------------------------------------------------------------------------------

REFUSED = {
    "hidden": ({"hidden_weight": 1}, r"stage 1 \(dpt\).*hidden_weight above 0"),
    "visual-kl": ({"visual_kl_weight": 1}, "visual_kl_weight above 0"),
    "relation": ({"dft.relation_weight": 1}, r"stage 2 \(dft\).*relation_weight above 0"),
    "row": ({"objective": "none"}, r"'row', which needs the teacher's whole maps: up to 0.1 MiB"),
    "pooled": ({"preset": "official", "objective": "none"}, "got 'pooled'"),
    "map": ({"objective": "map"}, "got 'map'"),
    "mse": ({"objective": "mse"}, "got 'mse'"),
    "kl": ({"objective": "kl"}, "got 'kl'"),
    "adaptive": ({"matching": "adaptive"}, "matching: expected group or simple"),
    "sharded": ({"teacher_placement": "sharded"}, "teacher_placement: expected the default"),
    "packing": ({"packing": True}, "packing: expected false"),
    "streaming": ({"streaming": True}, "streaming: expected false"),
    "shared": ({"share_images": True}, "share_images: expected false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_more_of_the_teacher_is_refused_by_name(case):
    changed, message = REFUSED[case]
    given = {"objective": "pooled_stored", "max_length": 2048, **changed}
    recipe = override(load_recipe("miniature"), given)
    with pytest.raises(ConfigError, match=message):
        check_storable(recipe)


def test_a_dry_run_names_targets_that_are_not_there(tmp_path, capsys):
    given = ["miniature", "--objective", "pooled_stored", "--teacher-targets", str(tmp_path / "no")]
    with pytest.raises(SystemExit) as stopped:
        train([*given, "--dry-run", "--dry-run-samples", "0"])
    assert stopped.value.code == 1
    assert "not ready to run: teacher_targets: expected a folder" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_stage_is_not_resumed_with_targets_made_anew(tmp_path):
    run = SimpleNamespace(
        stage_folder=lambda number: tmp_path / "stage",
        state=SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None),
    )
    for k in (4, 4, 8):
        index = {"format": FORMAT, "facts": {"top k": k}}
        (tmp_path / INDEX_FILE).write_text(json.dumps(index))
        if k == 4:
            training._keep_targets(run, 1, str(tmp_path))
    with pytest.raises(ConfigError, match="expected those that the stage was begun with"):
        training._keep_targets(run, 1, str(tmp_path))


def test_preference_stages_are_refused():
    with pytest.raises(ConfigError, match=r"preference_weight above 0"):
        check_storable(load_recipe("miniature-llava-mod"))


def test_any_objective_is_fine_where_no_stage_aligns():
    recipe = load_recipe("miniature")
    check_storable(override(recipe, {"objective": "pooled_stored"}))
    check_storable(override(recipe, {"alignment_weight": 0}))


# -- the commands ----------------------------------------------------------------------------------


def recipe_file(folder):
    """Two stages, one without alignment, on the same records."""
    common = {"max_steps": 1, "batch_size": 3, "learning_rate": 0.01, "warmup": 0}
    stages = [{"stage": name, **common} for name in ("dpt", "dft")]
    values = {"name": "stored", "objective": "pooled_stored", "layers": "all", "stages": stages}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "student_projector": "linear", "workers": 1}))
    return path


@pytest.fixture(scope="module")
def command(paths, tmp_path_factory):
    """(arguments of both commands, those of cdfast.targets alone, folder)."""
    folder = tmp_path_factory.mktemp("stored-command")
    arguments = [str(recipe_file(folder)), *photo_options(paths, None)]
    at = arguments.index("--output-dir") if "--output-dir" in arguments else None
    assert at is None  # each test has its own
    size = len(AutoTokenizer.from_pretrained(paths.teacher))
    made = ["--targets-dir", str(folder / "targets"), "--targets-dtype", "float32"]
    made += ["--shard-samples", "4", "--top-k", str(size)]
    return arguments, made, folder


def stopped(arguments, capsys, code=2):
    """What a command prints when it ends with this code."""
    with pytest.raises(SystemExit) as end:
        targets.main(arguments)
    assert end.value.code == code
    return capsys.readouterr().err


def test_estimate_writes_nothing(command, capsys):
    arguments, made, folder = command
    targets.main([*arguments, *made, "--estimate"])
    printed = capsys.readouterr().out
    assert "1 (dpt), 2 (dft)" in printed
    assert "means of 9 samples, evenly spread" in printed
    assert not (folder / "targets").exists()


def test_what_does_not_fit_is_refused_before_it_begins(command, capsys, monkeypatch):
    arguments, made, folder = command
    free = shutil.disk_usage(folder)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    error = stopped([*arguments, *made], capsys)
    assert re.search(r"targets-dir: expected \d+ KiB free for .*targets.*; got 20 KiB", error)
    assert not (folder / "targets").exists()


def test_command_is_interrupted_and_goes_on(command, capsys, monkeypatch):
    """Leaves the targets of the two tests below."""
    arguments, made, folder = command
    shards = folder / "targets" / "shards"
    make_shard, calls = targets.make_shard, []

    def interrupted(run, maker, one, shard, *rest):
        calls.append(shard)
        if shard == 1:
            raise KeyboardInterrupt
        make_shard(run, maker, one, shard, *rest)

    monkeypatch.setattr(targets, "make_shard", interrupted)
    assert "finished shards are kept" in stopped([*arguments, *made], capsys, code=130)
    assert sorted(p.name for p in shards.glob("*.safetensors")) == ["0-00000.safetensors"]
    first = (shards / "0-00000.safetensors").read_bytes()
    monkeypatch.undo()
    targets.main([*arguments, *made])
    assert "3 shards in" in (printed := capsys.readouterr().out)
    assert "1 kept" in printed
    broken = bytearray(first)
    broken[-5] ^= 4
    (shards / "0-00000.safetensors").write_bytes(broken)
    targets.main([*arguments, *made])
    printed = capsys.readouterr().out
    assert "content is not what was written: made again" in " ".join(printed.split())
    assert "2 kept" in printed
    assert (shards / "0-00000.safetensors").read_bytes() == first
    assert "top k: 5 there" not in (error := stopped([*arguments, *made[:-1], "5"], capsys))
    assert re.search(r"holds targets of something else: top k: \d+ there, 5 here", error)


@pytest.mark.slow
def test_run_without_the_teacher_is_the_run_with_it(command, tmp_path, monkeypatch):
    arguments, made, folder = command
    if not (folder / "targets").exists():
        targets.main([*arguments, *made])
    loaded, load_model = [], training.load_model

    def recorded(source, *rest, **options):
        loaded.append(str(source))
        return load_model(source, *rest, **options)

    for module in (training, stage_student):
        monkeypatch.setattr(module, "load_model", recorded)
    train([*arguments, "--workers", "0", "--output-dir", str(tmp_path / "online")])
    teacher = arguments[arguments.index("--teacher") + 1]
    assert teacher in loaded
    loaded.clear()
    stored = ["--teacher-targets", str(folder / "targets")]
    train([*arguments, *stored, "--output-dir", str(tmp_path / "stored")])
    assert teacher not in loaded
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("online", "stored")
    ]
    for want, got in zip(*(r["stages"] for r in results), strict=True):
        assert want["matches"] == got["matches"]
        for a, b in zip(want["log"], got["log"], strict=True):
            names = [name for name in a if name.startswith("loss")]
            assert len(names) == {"dpt": 3, "dft": 4}[want["stage"]]
            assert all(b[n] == pytest.approx(a[n], rel=1e-4) for n in names)
    assert "similarity" in results[0]
    assert "similarity" not in results[1]


MISMATCHES = {
    "length": ({"--max-length": "300"}, r"max_length: 2048 there, 300 here"),
    "dtype": ({"--teacher-dtype": "bfloat16"}, r"teacher dtype: 'float32' there, 'bfloat16' here"),
    "rows": ({"--unshifted-kl-mask": "true"}, r"kl rows: 'answer' there, 'unshifted' here"),
    "layers": ({"--layers": "intermediate"}, r"stage 1 \(dpt\).*matched layers, 0: \[0,"),
    "folder": ({"--teacher-targets": "nowhere"}, r"nowhere has no index.json.*cdfast.targets"),
}


@pytest.mark.parametrize("case", [*MISMATCHES, "weights", "data"])
def test_targets_of_something_else_are_refused(case, command, paths, tmp_path, capsys):
    arguments, made, folder = command
    if not (folder / "targets").exists():
        targets.main([*arguments, *made])
    changed, message = MISMATCHES.get(case, ({}, ""))
    if case == "weights":
        shutil.copytree(paths.teacher, tmp_path / "teacher")
        model = tmp_path / "teacher" / "model.safetensors"
        content = bytearray(model.read_bytes())
        content[-2] ^= 1
        model.write_bytes(content)
        changed, message = {"--teacher": str(tmp_path / "teacher")}, r"teacher weights: '\w+' there"
    if case == "data":
        records = json.loads(paths.data.read_text())
        (tmp_path / paths.data.name).write_text(json.dumps(records[:-1]))
        changed, message = {"--data": str(tmp_path / paths.data.name)}, r"files: \[{"
    given = {"--teacher-targets": str(folder / "targets"), **changed}
    options = [text for pair in given.items() for text in pair]
    error = refused([*arguments, *options, "--output-dir", tmp_path / "run"], capsys)
    assert re.search(message, error), error


@pytest.mark.parametrize("case", ["length", "layers", "none"])
def test_a_dry_run_names_targets_of_something_else(case, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    arguments, made, folder = command
    if not (folder / "targets").exists():
        targets.main([*arguments, *made])
    changed, message = MISMATCHES.get(case, ({}, ""))
    given = {"--teacher-targets": str(folder / "targets"), "--dry-run-samples": "0", **changed}
    given = [*arguments, *(text for pair in given.items() for text in pair), "--dry-run"]
    if case == "none":
        train(given)
        assert "not ready" not in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as end:
        train(given)
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert re.search(f"not ready to run: teacher_targets: .*{message}", printed)
    assert printed.splitlines()[-1].startswith("not ready to run")


def test_a_run_that_takes_more_samples_than_are_stored_is_refused(tmp_path, capsys):
    """Generated scenes: as many as the steps need."""
    common = ["miniature", "--objective", "pooled_stored", "--batch-size", "2"]
    folder = str(tmp_path / "targets")
    targets.main([*common, "--max-steps", "1", "--targets-dir", folder, "--top-k", "9"])
    more = ["--teacher-targets", folder, "--output-dir", str(tmp_path / "run")]
    error = refused([*common, "--max-steps", "2", *more], capsys)
    assert "samples: 2 there, 4 in stage 1 (dpt)" in error
    error = refused([*common, "--max-steps", "1", "--seed", "1", *more], capsys)
    assert "seed of the scenes: 1 there, 101 here" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["miniature"], "--targets-dir: expected a folder"),
        (["miniature", "--targets-dir", "x", "--top-k", "0"], "--top-k: expected a whole number"),
        (["miniature", "--targets-dir", "x", "--targets-dtype", "int8"], "expected float16 or"),
        (["miniature", "--targets-dir", "x", "--resume"], "--resume: is an option of cdfast.train"),
        (["miniature", "--targets-dir", "x"], "objective: expected 'pooled_stored'"),
        (["miniature-sft", "--targets-dir", "x"], "There are no targets to compute"),
        (
            ["miniature", "--objective", "pooled_stored", "--targets-dir", "x", "--top-k", "52"],
            "--top-k: expected at most 51",
        ),
    ],
)
def test_wrong_options_of_the_command_are_refused(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in stopped([*arguments, "--max-steps", "1", "--batch-size", "1"], capsys)
    assert not [*tmp_path.iterdir()]
