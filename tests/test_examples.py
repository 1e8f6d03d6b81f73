"""The scripts of examples/ run by the command that stands in them, and show what they claim."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
NUMBER = r"(-?\d+\.\d+)"


def source(script):
    return (ROOT / "examples" / script).read_text()


def command(script):
    """The command in the script's docstring, by this interpreter."""
    [line] = re.findall(rf"^    (.*examples/{script}.*)$", source(script), re.MULTILINE)
    words = shlex.split(re.sub(r"\s*\[.*\]", "", line))
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    at = words.index(f"examples/{script}")
    launched = ["tests/distributed/leaving.py", *words[at:]]
    return [sys.executable, "-m", "torch.distributed.run", *words[1:at], *launched]


def run(script, *options, **environment):
    """What the script prints, run from the repository root in a process without network."""
    result = subprocess.run(
        [*command(script), *options],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def printed(pattern, text):
    """All numbers that follow a name."""
    found = [float(number) for number in re.findall(pattern.replace("N", NUMBER), text)]
    assert found, f"no {pattern!r} in:\n{text}"
    return found


def similarities(text):
    """Before and after, by layer."""
    before, after = re.findall(r"similarity (?:before|after), by layer: \{(.*)\}", text)
    return [dict(re.findall(rf"(\d+): {NUMBER}", line)) for line in (before, after)]


def assert_similarity_rises(text, by):
    before, after = similarities(text)
    assert before.keys() == after.keys() == {"1", "2"}
    for layer in before:
        assert float(after[layer]) > float(before[layer]) + by, (layer, before, after)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_has_less_than_sixty_lines(script):
    assert len((ROOT / "examples" / script).read_text().splitlines()) < 60


def test_the_examples_are_those_tested_here():
    tested = re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text())
    assert sorted({*tested}) == SCRIPTS


@pytest.mark.slow
def test_the_op_alone_learns_task_and_alignment():
    text = run("op_alone.py")
    for name, factor in (("task", 0.8), ("alignment", 0.7)):
        losses = printed(f"{name} N", text)
        assert losses[-1] < factor * losses[0], text


@pytest.mark.slow
def test_the_loop_learns_all_three_losses():
    text = run("hf_loop.py")
    for name, factor in (("LM", 0.6), ("KL", 0.6), ("alignment", 0.75)):
        losses = printed(f"{name} N", text)
        assert losses[-1] < factor * losses[0], text
    assert_similarity_rises(text, 0.03)


@pytest.mark.slow
def test_trainer_learns_with_the_alignment_loss():
    text = run("hf_trainer.py")
    losses = printed("'loss': '?N", text)
    assert losses[-1] < 0.65 * losses[0], text
    assert_similarity_rises(text, 0.05)
    assert printed("held-out loss: N", text)[0] < 0.65 * losses[0]


@pytest.mark.slow
def test_trl_learns_with_the_alignment_loss():
    pytest.importorskip("trl")
    text = run("trl_sft.py")
    losses = printed("'loss': '?N", text)
    assert losses[-1] < 0.65 * losses[0], text
    assert_similarity_rises(text, 0.05)


def test_trl_is_told_to_report_nothing_before_it_is_imported():
    text = source("trl_sft.py")
    told = text.index('os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"')
    assert told < text.index("import torch") < text.index("from trl")


@pytest.mark.slow
def test_two_ranks_of_fsdp_train_as_one_process_without_it():
    text = run("fsdp2.py", CUDA_VISIBLE_DEVICES="")
    ranks = np.array([printed(f"{name} N", text) for name in ("LM", "alignment", "norm")]).T
    alone = np.array(plain_training(steps=len(ranks), size=8))
    assert len(ranks) >= 5
    np.testing.assert_allclose(ranks, alone, rtol=1e-5, atol=1e-6)
    assert (ranks[-1, :2] < [0.6, 0.7] * ranks[0, :2]).all(), text


def plain_training(steps, size):
    """The training of fsdp2.py in one process, by the means that models return; a row a step."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from cdfast import VisualAttentionAligner
    from cdfast.data import VisionTextCollator, encode
    from cdfast.synthetic import SceneDataset, build_student, teacher_path

    processor = AutoProcessor.from_pretrained(teacher_path())
    teacher = AutoModelForImageTextToText.from_pretrained(teacher_path(), dtype=torch.float32)
    student = build_student().train()
    aligner = VisualAttentionAligner(teacher, student, preset="paper")
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    scenes = SceneDataset(size=steps * size, turns_mix={"vqa": 1})
    collate = VisionTextCollator(processor.tokenizer.pad_token_id)
    rows = []
    for step in range(steps):
        batch = collate([encode(processor, scenes[step * size + i]) for i in range(size)])
        with torch.no_grad():
            _, targets = aligner.teacher_forward(**batch)
        output, alignment = aligner.student_forward(targets, **batch)
        optimizer.zero_grad()
        (output.loss + alignment.loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        rows.append([output.loss.item(), alignment.loss.item(), norm.item()])
    return rows


@pytest.mark.slow
def test_maps_are_of_the_object_asked_about_and_drawn_on_the_picture(tmp_path):
    from cdfast.miniature.scenes import render
    from cdfast.synthetic import SceneDataset

    text = run("attention_maps.py", str(tmp_path / "overlay.png"))
    scene, _ = SceneDataset("test").draw(3)
    asked = scene.objects[0]
    assert f"what colour {asked.shape} ? ans {asked.colour} " in text
    assert "attention of the model: sdpa" in text
    places = re.findall(r"layer (\d): .* row (\d), column (\d)", text)
    assert len(places) == 6
    # The scene has 3 x 3 cells of 2 x 2 patches.
    assert int(places[2][1]) // 2 * 3 + int(places[2][2]) // 2 == asked.cell
    overlay = np.asarray(Image.open(tmp_path / "overlay.png"), float)
    picture = Image.fromarray(render(scene)).resize(overlay.shape[1::-1])
    assert min(overlay.shape[:2]) >= 448
    assert np.abs(overlay - np.asarray(picture, float)).mean() > 10
    colourful = overlay.max(-1) - overlay.min(-1) > 40
    assert 0.02 < colourful.mean() < 0.5  # coloured where it looks, grey elsewhere
