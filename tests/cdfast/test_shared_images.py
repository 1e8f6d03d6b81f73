"""Records of one image as one sample: LM and KL as alone, alignment over rows counted once."""

import json

import pytest
import torch
import yaml

from cdfast import VisualAttentionAligner
from cdfast.collator import VisionTextCollator
from cdfast.data import DataError, load_dataset
from cdfast.distill import LossOptions, StudentTask, TeacherTask, add_task
from cdfast.shared_images import SharedImages
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.command import arguments, options, refused
from tests.cdfast.tiny_families import sharpen

TOLERANCE = 1e-5


def record(image, question, answer, *more, behind=False):
    mark = f"{question}\n<image>" if behind else f"<image>\n{question}"
    turns = photo_setup.conversation([(mark, answer), *more])
    return {"image": image, "conversations": turns}


RECORDS = [
    record("chelsea.png", "Which animal is it?", "A cat."),
    record("coffee.png", "What is on the table?", "A cup."),
    record("chelsea.png", "Its eyes?", "Green, half shut.", ("Sure?", "Yes!")),
    {"conversations": photo_setup.conversation(photo_setup.TEXT_ONLY)},
    record("chelsea.png", "Is it day?", "Yes.", behind=True),
    record("chelsea.png", "Is it a dog?", "No, a cat."),
    {"conversations": photo_setup.conversation(photo_setup.TEXT_ONLY)},
]
GROUPS = [[0, 2, 5], [1], [3], [4], [6]]


@pytest.fixture(scope="module")
def processor():
    return photo_setup.make_processor()


@pytest.fixture
def opened(tmp_path, processor):
    def make(records=RECORDS, **options):
        path = photo_setup.write_records(tmp_path / "records.json", records)
        return load_dataset(path, photo_setup.PHOTO_FOLDER, processor, **options)

    return make


@pytest.fixture(scope="module")
def models(processor):
    tokenizer = processor.tokenizer
    teacher = sharpen(photo_setup.llava(tokenizer, seed=1, layers=4, hidden=48))
    return teacher.requires_grad_(False), sharpen(photo_setup.llava(tokenizer, 2, 3, 32))


def test_records_of_an_image_are_put_together(opened):
    data = opened()
    shared = SharedImages(data)
    assert shared.groups == GROUPS
    encoded = [shared[i] for i in range(len(shared))]
    alone = [data[i] for i in range(len(data))]
    image = photo_setup.NUM_VISUAL
    assert shared.tokens == sum(len(sample["input_ids"]) for sample in encoded)
    assert shared.alone == sum(len(sample["input_ids"]) for sample in alone)
    assert (shared.visual, shared.visual_alone) == (3 * image, 5 * image)
    assert "7 records in 5 samples; 48 visual tokens, not 80 (40.0% saved)" in shared.describe()
    assert encoded[0]["segment_ids"].unique().tolist() == [0, 1, 2, 3]
    assert all(sample["segment_ids"].max() == 0 for sample in encoded[1:])


def test_a_sample_grows_to_max_length(opened):
    limit = len(SharedImages(opened())[0]["input_ids"]) - 1
    shared = SharedImages(opened(max_length=limit))
    lengths = [len(shared[i]["input_ids"]) for i in range(len(shared))]
    assert shared.groups[0] == [0, 2]
    assert [5] in shared.groups
    assert max(lengths) <= limit
    assert not any(shared[i]["truncated"] for i in range(len(shared)))
    assert shared.tokens == sum(lengths)


def test_a_lost_image_takes_all_its_records_with_it(tmp_path, processor):
    pixels = (photo_setup.PHOTO_FOLDER / "coins.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(pixels[:999])  # its header is whole
    lost = [{**RECORDS[i], "image": "broken.png"} for i in (0, 5)]
    path = photo_setup.write_records(tmp_path / "lost.json", [RECORDS[1], *lost])
    roots = [photo_setup.PHOTO_FOLDER, tmp_path]
    with pytest.raises(DataError, match=r"record 1.*broken\.png"):
        SharedImages(load_dataset(path, roots, processor))[1]
    shared = SharedImages(load_dataset(path, roots, processor, on_error="skip"))
    assert shared.groups == [[0], [1, 2]]
    with pytest.warns(UserWarning, match="next good record"):
        replaced = shared[1]
    assert torch.equal(replaced["input_ids"], shared[0]["input_ids"])
    assert shared.skipped == {"image corrupt": 2}


def sums_of(models, samples, preset):
    """Sums of the step's losses over a batch, and gradients of LM + KL."""
    teacher, student = models
    for model in models:
        add_task(model)
    batch = VisionTextCollator(0)(samples)
    batch.pop("sample_ids")
    aligner = VisualAttentionAligner(teacher, student, preset=preset, layers="all")
    labels, layout = batch.pop("labels"), aligner.layout(batch)
    batch.pop("segment_ids", None)
    losses = LossOptions(frozenset({"kl"}))
    asked = TeacherTask(labels, layout, aligner, losses)
    teacher(**batch, task=asked)
    student.zero_grad()
    task = StudentTask(labels, layout, asked.output, aligner, losses)
    sums = student(**batch, task=task)
    (sums["lm"] + sums["kl"]).backward()
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in sums.items()}, grads


def test_language_and_logit_losses_are_those_of_the_records_alone(models, opened):
    data = opened()
    shared = SharedImages(data)
    want, want_grads = sums_of(models, [data[i] for i in range(len(data))], "paper")
    got, grads = sums_of(models, [shared[i] for i in range(len(shared))], "paper")
    for name in ("lm", "kl"):
        assert got[name] == pytest.approx(want[name], rel=TOLERANCE)
    error = sum((grads[n] - want_grads[n]).double().square().sum() for n in want_grads).sqrt()
    size = sum(g.double().square().sum() for g in want_grads.values()).sqrt()
    assert error <= TOLERANCE * size


def test_rows_of_the_shared_prefix_count_once_in_the_alignment(models, opened):
    """Preset "paper" is a mean over rows: n_p of the prefix with mean p, n_q of each question."""
    data = opened()
    shared = SharedImages(data)[0]
    prefix = int((shared["segment_ids"] == 0).sum())
    first = data[0]
    head = {name: first[name][:prefix] for name in ("input_ids", "labels")}
    visual = (first["input_ids"] == models[1].config.image_token_id).nonzero().flatten()

    def alone(sample):
        loss = sums_of(models, [sample], "paper")[0]["alignment"]
        return loss, len(sample["input_ids"]) - int(visual[0])

    p, n_p = alone({**first, **head})
    members = [alone(data[i]) for i in GROUPS[0]]
    total = p * n_p + sum(loss * n - p * n_p for loss, n in members)
    rows = n_p + sum(n - n_p for _, n in members)
    assert sums_of(models, [shared], "paper")[0]["alignment"] == pytest.approx(
        total / rows, rel=1e-4
    )


def test_the_pooled_alignment_is_that_of_one_record(models, opened):
    """Preset "official" looks at rows of visual tokens alone, which see no question."""
    data = opened()
    want = [sums_of(models, [data[i]], "official")[0]["alignment"] for i in GROUPS[0]]
    got = sums_of(models, [SharedImages(data)[0]], "official")[0]["alignment"]
    assert want == pytest.approx([got] * 3, rel=TOLERANCE)


@pytest.mark.slow
def test_the_command_shares_images(paths, tmp_path, capsys):
    data = photo_setup.write_records(tmp_path / "records.json", RECORDS)
    out = tmp_path / "run"
    recipe = tmp_path / "one.yaml"
    recipe.write_text(yaml.safe_dump({"stages": [{"stage": "dft", "batch_size": 2}]}))
    given = {"share-images": "true", "workers": 0, "max-steps": 1}
    main([str(recipe), *options(paths, out, data=data, **given)])
    assert "shared images: 7 records in 5 samples" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    [stage] = results["stages"]
    assert stage["steps"] == 1
    saved = {"records": 7, "samples": 5, "visual_tokens": 48, "visual_tokens_alone": 80}
    assert stage["shared_images"].items() >= saved.items()
    given = arguments(paths, tmp_path / "both", **{"packing": "true", "share-images": "true"})
    assert "share_images: expected packing false" in refused(given, capsys)
    given = arguments(paths, tmp_path / "stream", **{"streaming": "true", "share-images": "true"})
    assert "share_images: expected streaming false" in refused(given, capsys)
