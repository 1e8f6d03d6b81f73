"""Every family, small and random, through its real processor: alignment against eager attention.

One padded batch has a sample with two pictures, one with one, none of them square, and one without
any. Losses are written out here from `output_attentions`, in float64, without cdfast_kernels.
"""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoProcessor

from cdfast import VisualAttentionAligner
from cdfast.adapters import set_trainable, share_vision_tower, vision_tower
from cdfast.aligner import build_layout, image_token_id
from cdfast.attention import _BIDIRECTIONAL_IMAGES, ATTENTION_NAME
from cdfast.config import load_recipe
from cdfast.data import Sample, VisionTextCollator, encode
from cdfast.distill import LossOptions, StudentTask, TeacherTask, add_task
from cdfast.lengths import measure
from cdfast.packing import FAMILIES as PACKED
from cdfast.stages.student import with_lora
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.command import refused
from tests.cdfast.test_aligner import TOLERANCE, gradients, relative_error
from tests.cdfast.test_attention import gemma3, paligemma
from tests.cdfast.tiny_families import FAMILIES
from tests.cdfast.tiny_processors import IMAGE, assistant, picture, user

# Wider, deeper, and with as many key heads as query heads.
TEACHER = {"seed": 1, "layers": 3, "hidden": 48, "heads": 6, "kv_heads": 6}
STUDENT = {"layers": 2}
WEIGHT = 5.0  # of the alignment loss, so that it shows in the gradient


def samples():
    return [
        Sample(
            [user(IMAGE, "What?"), assistant("a cat"), user("And ", IMAGE), assistant("no")],
            (picture(0, 60, 100), picture(1, 90, 40)),
        ),
        Sample([user("Is it so?"), assistant("yes")]),
        Sample([user(IMAGE, "Where is it now?"), assistant("left of it")], (picture(2, 140, 70),)),
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Models, the batch, what eager attention gives for it, aligners, other forms of the batch."""
    make = FAMILIES[request.param]
    teacher, processor = make(**TEACHER)
    student, _ = make(**STUDENT)
    teacher.requires_grad_(False)
    encoded = [encode(processor, sample) for sample in samples()]
    forms = {side: VisionTextCollator(0, side)(encoded) for side in ("right", "left")}
    forms["packed"] = VisionTextCollator(0).pack(encoded)
    batch = forms["right"]
    assert batch["attention_mask"].min() == 0  # padded
    for form in forms.values():
        form.pop("sample_ids")
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        want_teacher = teacher(**batch, use_cache=False, output_attentions=True)
    want = student(**batch, use_cache=False, output_attentions=True)
    own = student.config.vision_config._attn_implementation
    aligners = {
        preset: VisualAttentionAligner(teacher, student, preset=preset, layers="all")
        for preset in ("paper", "official")
    }
    assert student.config.vision_config._attn_implementation == own != ATTENTION_NAME
    return teacher, student, batch, want_teacher, want, aligners, forms


def eager_alignment(family, preset):
    """Sum over samples with an image of the preset's loss over all matched layers."""
    _, student, batch, want_teacher, want, aligners, _ = family
    matches = aligners[preset].matches
    assert matches == {0: (0, 1), 1: (1, 2)}  # windows of two
    live = batch["attention_mask"].bool()
    visual = (batch["input_ids"] == student.config.image_token_id) & live
    total = 0.0
    for b in range(len(live)):
        columns = visual[b].nonzero().flatten()
        for layer, window in matches.items() if len(columns) else ():
            s = want.attentions[layer][b].double().mean(0)[:, columns]
            t = sum(want_teacher.attentions[i][b].double().mean(0)[:, columns] for i in window)
            t = t / len(window)
            if preset == "paper":
                total = total + row_loss(s, t, columns, live[b]) / len(matches)
            else:
                total = total + pooled_loss(s[columns], t[columns])
    return total


def row_loss(s, t, columns, live):
    """Mean over live rows behind the first visual token of 1 - cos; 0 where a row sees just one."""
    rows = live.nonzero().flatten()
    seen = columns[None] <= rows[:, None]
    cosine = F.cosine_similarity(s[rows] * seen, t[rows] * seen, dim=-1)
    return (1 - cosine)[seen.sum(1) > 1].sum() / (seen.sum(1) > 0).sum()


def pooled_loss(s, t):
    """The authors': 1 - cos of the column means of what the sink filter leaves of visual rows."""
    keep = (s <= s.mean() + s.std()) & (t <= t.mean() + t.std()) & (t != 0)
    s, t = ((x * keep).sum(0) / keep.sum(0).clamp(min=1) for x in (s, t))
    return 1 - F.cosine_similarity(s, t, dim=0)


def gradients_of(student, loss, keep_graph=False):
    student.zero_grad()
    loss.backward(retain_graph=keep_graph)
    return gradients(student)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_loss_and_gradients_equal_eager(family, preset):
    _, student, batch, _, eager, aligners, _ = family
    aligner = aligners[preset]
    want = eager_alignment(family, preset)
    want_gradients = gradients_of(student, eager.loss + WEIGHT * want, keep_graph=True)
    # The comparison below would also pass if the alignment term vanished on both sides.
    without = gradients_of(student, eager.loss, keep_graph=True)
    assert relative_error(without, want_gradients) > 1e-2

    with torch.no_grad():
        _, targets = aligner.teacher_forward(**batch)
    out, alignment = aligner.student_forward(targets, **batch)
    assert alignment.count == 2
    assert alignment.sum.item() == pytest.approx(want.item(), rel=TOLERANCE)
    got = gradients_of(student, out.loss + WEIGHT * alignment.sum)
    assert relative_error(got, want_gradients) <= TOLERANCE


@pytest.mark.parametrize("form", ["left", "packed"])
def test_the_form_of_the_batch_does_not_matter(family, form):
    _, student, right, _, _, aligners, forms = family
    assert not torch.equal(forms[form]["input_ids"], right["input_ids"])
    if form == "packed" and student.config.model_type not in PACKED:
        refuses_packed_rows(student, aligners["paper"], right, forms["packed"])
        return
    found = []
    for batch in (right, forms[form]):
        with torch.no_grad():
            _, targets = aligners["paper"].teacher_forward(**batch)
        out, alignment = aligners["paper"].student_forward(targets, **batch)
        sums = [out.loss.item(), alignment.sum.item()]
        found.append((sums, gradients_of(student, out.loss + WEIGHT * alignment.sum)))
    assert found[1][0] == pytest.approx(found[0][0], rel=TOLERANCE)
    assert relative_error(found[1][1], found[0][1]) <= TOLERANCE


def refuses_packed_rows(student, aligner, padded, packed):
    """A family whose packed rows are not tested, in whatever loop, with an aligner or without."""
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**padded)
    rows = build_layout(packed, aligner.image_token_id)
    plain = StudentTask(packed["labels"], rows, None, None, LossOptions())
    add_task(student)
    inputs = {name: v for name, v in packed.items() if name not in ("labels", "cu_seqlens")}
    calls = (
        lambda: aligner.teacher_forward(**packed),
        lambda: aligner.student_forward(replace(targets, layout=rows), **packed),
        lambda: aligner.similarity(**packed),
        lambda: student(**inputs, task=plain),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"packing: .*got '{student.config.model_type}'"):
            call()


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_known_without_decoding(name):
    """Pictures of several sizes: as many visual tokens as of a blank picture of the size."""
    _, processor = FAMILIES[name](layers=1)
    want = [len(encode(processor, sample)["input_ids"]) for sample in samples()]
    assert measure(processor, samples().__getitem__, 3).tolist() == want


def test_the_distillation_step_equals_eager(family):
    """LM + KL + alignment as sums, in one forward of each model."""
    teacher, student, batch, eager_teacher, eager, aligners, _ = family
    labels = batch["labels"]
    rows = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
    log_s = eager.logits[rows].log_softmax(-1)
    log_t = eager_teacher.logits[rows].log_softmax(-1)
    want = {
        "lm": eager.loss * rows.sum(),
        "kl": (log_t.exp() * (log_t - log_s)).sum(),
        "alignment": eager_alignment(family, "paper").float(),
    }
    want_gradients = gradients_of(student, sum(want.values()), keep_graph=True)

    for model in (teacher, student):
        add_task(model)
    aligner = aligners["paper"]
    layout = aligner.layout(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    losses = LossOptions(frozenset({"kl"}))
    asked = TeacherTask(labels, layout, aligner, losses)
    teacher(**inputs, task=asked)
    sums = student(**inputs, task=StudentTask(labels, layout, asked.output, aligner, losses))
    assert {n: v.item() for n, v in sums.items()} == pytest.approx(
        {n: v.item() for n, v in want.items()}, rel=TOLERANCE
    )
    assert relative_error(gradients_of(student, sum(sums.values())), want_gradients) <= TOLERANCE


def test_a_blank_image_is_known_for_llava_alone(family):
    """What ZeRO needs in a batch without pictures is refused by name, not tried."""
    _, student, batch, _, _, aligners, _ = family
    words = {"input_ids": batch["input_ids"][1:2], "attention_mask": batch["attention_mask"][1:2]}
    labels = batch["labels"][1:2]
    layout = aligners["paper"].layout(words)
    task = StudentTask(labels, layout, None, None, LossOptions(), blank_image=True)
    add_task(student)
    if student.config.model_type == "llava":
        assert student(**words, task=task)["lm"] > 0
        return
    with pytest.raises(ValueError, match=f"{student.config.model_type}: expected an image in ev"):
        student(**words, task=task)


def test_visual_tokens_are_the_placeholders_of_all_pictures(family):
    """As many as the vision encoder has features for: newline tokens count, tags do not."""
    _, student, batch, *_ = family
    inputs = {
        name: batch[name]
        for name in ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
        if name in batch
    }
    if "pixel_attention_mask" in batch:
        inputs["pixel_attention_mask"] = batch["pixel_attention_mask"]
    with torch.no_grad():
        features = student.base_model.get_image_features(**inputs)
    features = getattr(features, "pooler_output", features)
    number = sum(part.shape[:-1].numel() for part in features)
    visual = batch["input_ids"] == image_token_id(student)
    assert visual.sum() == number
    assert (visual.sum(1) > 0).tolist() == [True, False, True]


# -- what a run trains, shares and refuses ---------------------------------------------------------


@pytest.fixture(scope="module")
def students():
    """A teacher and a student of each family, with unequal encoders of the same shapes."""
    sizes = {"layers": 1}
    return {name: (make(seed=1, **sizes)[0], make(**sizes)[0]) for name, make in FAMILIES.items()}


ONCE_PER_BATCH = ("llava", "llava-crop", "llava-pad", "internvl")


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_train_the_decoder_and_the_adapter(name, students):
    _, student = students[name]
    everything = {n for n, _ in student.named_parameters()}
    decoder = {id(p) for p in student.get_decoder().parameters()}
    text = {n for n, p in student.named_parameters() if id(p) in decoder} | {"lm_head.weight"}
    text &= everything  # a tied output embedding has no name of its own
    set_trainable(student, projector=False, language_model=True)
    assert trained(student) == text
    set_trainable(student, projector=True, language_model=False)
    adapter = trained(student)
    assert adapter
    assert not adapter & text
    # The rest is the encoder: patch embedding, blocks and final norm, never an adapter.
    encoder = everything - text - adapter
    assert any("embed" in n for n in encoder)
    assert not any("merger" in n or "connector" in n or "projector" in n for n in encoder)
    assert all(".blocks." not in n and ".layers." not in n for n in adapter)

    set_trainable(student, projector=True, language_model=False)
    adapted = with_lora(copy.deepcopy(student), load_recipe("compodistill"))
    lora = {n for n in trained(adapted) if ".lora_" in n}
    assert len(lora) == 2 * 7  # A and B of the seven matrices of one layer
    # Its newline token is a parameter of no module: LoRA stages leave it as it is.
    kept = {n for n in adapter if n != "model.image_newline"}
    assert len(trained(adapted) - lora) == len(kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_vision_encoder_for_both_models(name, students):
    teacher, student = copy.deepcopy(students[name])
    if "qwen" in name:
        with pytest.raises(ValueError, match=r"qwen.*adapter is a part of it.*--share-vision-tow"):
            share_vision_tower(teacher, student)
        return
    with pytest.raises(ValueError, match=r"same frozen one.*--share-vision-tower false --taf fal"):
        share_vision_tower(teacher, student)
    vision_tower(student)[2].load_state_dict(vision_tower(teacher)[2].state_dict())
    _, processor = FAMILIES[name]()
    batch = VisionTextCollator(0)([encode(processor, sample) for sample in samples()])
    batch.pop("sample_ids")
    with torch.no_grad():
        want = [model(**batch).logits for model in (teacher, student)]
        shared = share_vision_tower(teacher, student)
        got = [model(**batch).logits for model in (teacher, student)]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    # Where a model makes new pixels of those in the batch, the encoder does not know them again.
    assert shared.runs == (1 if name in ONCE_PER_BATCH else 2)


def save(folder, name, **sizes):
    model, processor = FAMILIES[name](**sizes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_options(tmp_path, teacher, student, *more):
    photo_setup.write_records(tmp_path / "data.json", photo_setup.records()[1:5])
    given = {
        "teacher": teacher,
        "student": student,
        "data": tmp_path / "data.json",
        "image-root": photo_setup.PHOTO_FOLDER,
        "output-dir": tmp_path / "run",
        "max-steps": 1,
    }
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return ["compodistill", *options, *more]


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry-run"])
def test_taf_needs_a_llava_teacher(tmp_path, capsys, dry):
    teacher = save(tmp_path / "teacher", "llava-next", **TEACHER)
    student = save(tmp_path / "student", "llava-next", **STUDENT)
    given = [*run_options(tmp_path, teacher, student), *["--dry-run"] * dry]
    line = refused(given, capsys)
    assert re.search("teacher: expected a LLaVA model.*got 'llava_next'.*--taf false", line), line


def test_taf_needs_a_student_without_another_encoder(tmp_path, capsys):
    teacher = save(tmp_path / "teacher", "llava", **TEACHER)
    student = save(tmp_path / "student", "llava-next", **STUDENT)
    line = refused(run_options(tmp_path, teacher, student), capsys)
    assert re.search("student: expected .*got 'llava_next', which has its own.*--taf false", line)


@pytest.mark.parametrize("make", [gemma3, paligemma], ids=["gemma3", "paligemma"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_bidirectional_images_are_refused_before_training(tmp_path, capsys, make, role):
    paths = {r: save(tmp_path / r, "llava", layers=1) for r in ("teacher", "student")}
    make().config.save_pretrained(paths[role])
    line = refused(run_options(tmp_path, **paths), capsys)
    assert re.search(rf"{role}: .*{make.__name__}: .*bidirectional image mask", line), line
    assert not (tmp_path / "run" / "stages").exists()


def test_the_table_names_every_family():
    table = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for name, make in FAMILIES.items():
        kind = make(layers=1)[0].config.model_type
        assert any(f"`{kind}`" in row for row in rows), name
    for kind in _BIDIRECTIONAL_IMAGES:
        assert any(f"`{kind}`" in row and "refused" in row for row in rows), kind


@pytest.mark.slow
def test_the_command_distils_another_family(tmp_path, capsys, one_thread):
    """Idefics3, whole: three stages, LoRA in the second, no TAF, each model its own encoder."""
    teacher = save(tmp_path / "teacher", "idefics3", **TEACHER)
    student = save(tmp_path / "student", "idefics3", **STUDENT)
    try:
        AutoProcessor.from_pretrained(teacher)
    except ValueError as error:  # transformers 5.17 without torchvision
        pytest.skip(str(error))
    more = ["--taf", "false", "--share-vision-tower", "false", "--dft.lora", "true"]
    main([*run_options(tmp_path, teacher, student, *more), "--layers", "all", "--warmup", "0"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [stage["stage"] for stage in results["stages"]] == ["dpt", "dft", "sft"]
    assert results["stages"][1]["log"][0]["loss_alignment"] > 0
    # Every stage has changed what it trains.
    first = load_file(tmp_path / "run" / "student-init" / "model.safetensors")
    last = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    assert "model.connector.modality_projection.proj.weight" in changed
    assert any("text_model.layers.1.self_attn.q_proj" in name for name in changed)
    assert not any("vision_model" in name for name in changed)
