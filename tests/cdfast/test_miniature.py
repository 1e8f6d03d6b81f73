"""The main job as a new user runs it: the embedded miniature, start to finish."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import cdfast  # noqa: F401  (registers the student's class)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def torchrun(folder, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "-m", "cdfast.train", *options]
    return subprocess.run(
        [*command, "--output-dir", str(folder)], capture_output=True, text=True, timeout=1500
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The default run, and KD for comparison."""
    folder = tmp_path_factory.mktemp("runs") / "miniature"
    done = torchrun(folder, "--compare", "kd")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_alignment_does_its_work(run):
    """Matched layers look where the teacher looks with VAT, and do not without."""
    folder, _ = run
    with_vat = results(folder)["similarity"]["after"]["matched"]
    without = results(folder / "compare" / "kd")["similarity"]["after"]["matched"]
    assert set(with_vat) == set(without)
    assert len(with_vat) == 2
    for layer, similarity in with_vat.items():
        assert similarity > 0.8
        assert similarity - without[layer] >= 0.3


def test_accuracy_and_its_controls_are_reported(run):
    folder, stdout = run
    evaluation = results(folder)["evaluation"]
    models = evaluation["models"]
    assert set(models) == {"student", "student, shuffled images", "teacher"}
    for report in models.values():
        assert len(report["kinds"]) == 11
        assert set(report["averages"]) == {"CR", "VQA"}
    assert set(evaluation["text_only"]) == {*models["student"]["kinds"], "CR", "VQA"}
    # The teacher knows its task, and no one knows it without the image.
    assert models["teacher"]["averages"]["CR"] > 0.9
    assert abs(models["student, shuffled images"]["averages"]["CR"] - 0.5) < 0.05
    for name in ("CR average", "VQA average", "chance", "kd"):
        assert name in stdout


def test_losses_are_logged_separately_and_fall(run):
    folder, _ = run
    stages = results(folder)["stages"]
    assert [s["stage"] for s in stages][:2] == ["dpt", "dft"]
    aligned = [s for s in stages if s["stage"] == "dft"]
    first, last = aligned[0]["log"][0], aligned[-1]["log"][-1]
    for name in ("loss_lm", "loss_kl", "loss_alignment"):
        assert last[name] < first[name]
    assert all("loss_alignment" not in entry for entry in stages[0]["log"])


def test_report_is_written(run):
    folder, _ = run
    page = (folder / "report.html").read_text()
    for word in ("kd", "swap_att", "similarity", "privileged"):
        assert word in page


def test_attention_of_both_runs_is_analysed(run):
    """On the same questions; the explorer has no baseline, because KD has the teacher's loss."""
    folder, _ = run
    with_vat, without = (
        json.loads((place / "analysis" / "analysis.json").read_text())
        for place in (folder, folder / "compare" / "kd")
    )
    assert with_vat["cases"] == without["cases"]
    assert with_vat["settings"]["matched"] == without["settings"]["matched"]
    for group in ("CR", "VQA"):
        a, b = (c["groups"][group]["similarity"] for c in (with_vat, without))
        assert a - b >= 0.3
    explorer = json.loads((folder / "analysis" / "explorer.json").read_text())["explorer"]
    assert [m["name"] for m in explorer["models"]] == ["teacher", "student (miniature)"]
    assert "Attention explorer" in (folder / "report.html").read_text()


def test_checkpoint_loads_and_answers(run):
    folder, _ = run
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    assert model.config.model_type == "cdfast_llava"
    from cdfast.miniature.suites import miniature_suite

    question = miniature_suite("validation", per_kind=1, vqa_per_kind=1)[0]
    text = processor.apply_chat_template(question.messages, add_generation_prompt=True)
    inputs = processor(images=question.image, text=text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert processor.decode(out[0, -1:]).strip() in question.choices


def test_resume_of_a_finished_run_changes_nothing(run):
    folder, _ = run
    before = (folder / "results.json").read_bytes()
    done = torchrun(folder, "--compare", "kd", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "results.json").read_bytes() == before


def test_evaluation_command(run, tmp_path):
    folder, _ = run
    out = tmp_path / "evaluation.json"
    done = subprocess.run(
        [sys.executable, "-m", "cdfast.evaluate", str(folder / "model"), "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [report] = json.loads(out.read_text())["models"].values()
    want = results(folder)["evaluation"]["models"]["student"]["averages"]
    assert report["averages"] == pytest.approx(want, abs=0.01)


def test_evaluation_scenes_are_not_training_scenes(run):
    """Checked on the very scenes of this run, not only on the splits' definition."""
    from cdfast.config import load_recipe
    from cdfast.miniature.suites import miniature_suite
    from cdfast.synthetic import SceneDataset, check_disjoint

    recipe = load_recipe("miniature")
    evaluated = {question.source for question in miniature_suite()}
    trained = set()
    for number, stage in enumerate(recipe.stages, 1):
        seed = recipe.seed * 100 + number
        size = stage.max_steps * stage.batch_size
        trained |= SceneDataset("train", seed=seed, size=size).scene_keys()
    assert len(evaluated) > 1000
    assert len(trained) > 1000
    check_disjoint(evaluated, trained)
    assert not evaluated & trained
