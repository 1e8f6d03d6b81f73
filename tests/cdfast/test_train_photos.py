"""The real command on checkpoints in folders and real photographs, all stages, start to finish."""

import json
import os
import re
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipVisionModel
from transformers import Qwen2ForCausalLM as Qwen2

from cdfast.config import recipe_files
from cdfast.storage import write_json
from cdfast.train import main
from cdfast.trainer import DistillationTrainer
from tests.cdfast import photo_setup
from tests.cdfast.command import options

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
# LM, P_s and so on of a student in memory, by parameter name.
PARTS = {
    "tower": "model.vision_tower.",
    "fetched": "model.multi_modal_projector.teacher.",
    "projector": "model.multi_modal_projector.linear_",
    "language model": "model.language_model.",
}
FAST = {"logging_steps": 1, "disable_tqdm": True}
STAGE = {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "warmup": 0}


def write_recipe(folder, stages, **fields):
    path = folder / "given.yaml"
    made = {"name": "photos", "workers": 0, "lora_r": 4, "arguments": FAST, **fields}
    path.write_text(yaml.safe_dump({**made, "stages": [{**STAGE, **s} for s in stages]}))
    return path


def run_command(*arguments, **settings):
    """`python` in a process of its own, offline."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        **settings,
    )


def load(path):
    return AutoModelForImageTextToText.from_pretrained(path).eval()


def weights(path):
    return {name: value.clone() for name, value in load(path).state_dict().items()}


def part(state, name):
    return {k: v for k, v in state.items() if k.startswith(PARTS[name])}


def equal(a, b):
    assert a
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


# -- all stages ------------------------------------------------------------------------------------

STAGES = [
    {"stage": "dpt"},
    {"stage": "dft", "lora": True},
    {"stage": "dft", "gradient_accumulation_steps": 2},
    {"stage": "sft"},
]


@pytest.fixture(scope="module")
def all_stages(paths, tmp_path_factory):
    """One run of every stage as a command, with a loader process."""
    folder = tmp_path_factory.mktemp("all-stages")
    recipe = write_recipe(folder, STAGES, workers=1)
    done = run_command("-m", "cdfast.train", recipe, *options(paths, folder / "run"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done


@pytest.fixture(scope="module")
def after(all_stages):
    """Weights before the first stage and after each."""
    folder, _ = all_stages
    stages = [folder / "stages" / f"{n}-{s['stage']}" / "model" for n, s in enumerate(STAGES, 1)]
    return [weights(p) for p in (folder / "student-init", *stages[:-1], folder / "model")]


@pytest.mark.slow
def test_outputs_of_all_stages(all_stages, paths):
    folder, done = all_stages
    results = results_of(folder)
    assert [stage["stage"] for stage in results["stages"]] == ["dpt", "dft", "dft", "sft"]
    assert [stage["steps"] for stage in results["stages"]] == [2, 2, 2, 2]
    wanted = {"dpt": {"lm", "kl"}, "dft": {"lm", "kl", "alignment"}, "sft": {"lm"}}
    for stage in results["stages"]:
        assert len(stage["log"]) == 2
        for entry in stage["log"]:
            losses = {name[5:]: v for name, v in entry.items() if name.startswith("loss_")}
            assert set(losses) == wanted[stage["stage"]]
            assert all(value > 0 for value in losses.values())
            assert entry["loss"] == pytest.approx(sum(losses.values()), rel=1e-3)
        # Intermediate layers: 1 of the student's 3 and 1 to 3 of the teacher's 5.
        matches = {"1": [1, 2, 3]} if stage["stage"] == "dft" else None
        assert stage["matches"] == matches
        assert stage["skipped"] == {}
    assert results["similarity"]["matches"] == {"1": [1, 2, 3]}
    assert results["similarity"]["samples"] == 8  # all records but the one without an image
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == results["recipe"]
    assert results["recipe"]["teacher"] == str(paths.teacher)
    report = (folder / "report.html").read_text()
    assert "photos" in report
    assert "Training losses" in report
    for name in ("model", "results.json", "report.html"):
        assert str(folder / name) in done.stdout.replace("\n", "")


@pytest.mark.slow
def test_each_stage_changes_what_it_trains_and_nothing_else(after):
    changed = {
        (number, name): not equal(part(before, name), part(now, name))
        for number, (before, now) in enumerate(pairwise(after), 1)
        for name in PARTS
    }
    assert {key for key, is_changed in changed.items() if is_changed} == {
        *((number, "projector") for number in (1, 2, 3, 4)),
        *((number, "language model") for number in (2, 3, 4)),
    }
    # LoRA is merged into the projections of the decoder layers; everything else stays.
    before, now = part(after[1], "language model"), part(after[2], "language model")
    moved = {name for name in before if not torch.equal(before[name], now[name])}
    assert moved == {name for name in before if re.search(r"\.(q|k|v|o|gate|up|down)_proj.w", name)}
    assert torch.equal(after[1]["lm_head.weight"], after[2]["lm_head.weight"])
    assert not torch.equal(after[2]["lm_head.weight"], after[3]["lm_head.weight"])


@pytest.mark.slow
def test_the_adapter_and_the_encoder_stay_the_teachers(after, paths):
    teacher = weights(paths.teacher)
    adapter = {
        name.replace("projector.", "projector.teacher."): value
        for name, value in teacher.items()
        if name.startswith("model.multi_modal_projector.")
    }
    for state in after:
        assert equal(part(state, "fetched"), adapter)
        assert equal(part(state, "tower"), part(teacher, "tower"))


@pytest.mark.slow
def test_the_student_starts_from_its_own_language_model(after, paths):
    language_model = Qwen2.from_pretrained(paths.student).state_dict()
    own = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in language_model.items()
        if name.startswith("model.")
    }
    assert equal(part(after[0], "language model"), own)
    assert torch.equal(after[0]["lm_head.weight"], language_model["lm_head.weight"])


def photo_inputs(folder):
    processor = AutoProcessor.from_pretrained(folder)
    question = [{"type": "image"}, {"type": "text", "text": "Which animal is it?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )
    photo = Image.open(photo_setup.PHOTO_FOLDER / "chelsea.png").convert("RGB")
    return processor(text=prompt, images=photo, return_tensors="pt")


@pytest.mark.slow
def test_the_final_model_loads_and_generates(all_stages):
    folder, _ = all_stages
    model, inputs = load(folder / "model"), photo_inputs(folder / "model")
    assert type(model).__name__ == "CdfastLlavaForConditionalGeneration"
    with torch.no_grad():
        most_likely = model(**inputs).logits[0, -1].argmax()
    answer = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert answer[0, -1] == most_likely
    answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4


def test_the_final_model_has_a_card_of_its_results(all_stages):
    folder, _ = all_stages
    card = ModelCard.load(folder / "model" / "README.md")
    assert "trust_remote_code=True" in card.text
    results = json.loads((folder / "results.json").read_text())
    assert card.text.count("\n| d") == len([s for s in results["stages"] if s["stage"] != "sft"])
    assert str(folder) not in str(card)


@pytest.mark.slow
def test_the_final_model_loads_where_cdfast_is_not_installed(all_stages, tmp_path):
    folder, _ = all_stages
    inputs = photo_inputs(folder / "model")
    with torch.no_grad():
        want = load(folder / "model")(**inputs).logits
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    script = textwrap.dedent(
        """
        import os, sys
        # None makes an import fail, wherever the package lies.
        sys.modules["cdfast"] = sys.modules["cdfast_kernels"] = None
        source, folder, threads = sys.argv[1:]
        os.environ["HF_MODULES_CACHE"] = folder + "/modules"
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        try:
            import cdfast
        except ImportError:
            pass
        else:
            raise SystemExit("cdfast is there")
        torch.set_num_threads(int(threads))
        model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True).eval()
        inputs = torch.load(folder + "/inputs.pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert answer.shape[1] == inputs["input_ids"].shape[1] + 2
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        assert processor.batch_decode(answer)[0]
        torch.save({"logits": logits, "module": type(model).__module__}, folder + "/out.pt")
        """
    )
    arguments = (folder / "model", tmp_path, torch.get_num_threads())
    done = run_command("-I", "-c", script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Do you wish to run the custom code?" not in done.stdout
    got = torch.load(tmp_path / "out.pt")
    assert got["module"].startswith("transformers_modules.")
    assert (got["logits"] - want).abs().max() == 0


# -- stages one after the other --------------------------------------------------------------------


def test_a_stage_starts_from_the_weights_of_the_one_before(paths, tmp_path):
    """Stages at rate 0 hand on, bit for bit, what the first one has trained."""
    stages = [
        {"stage": "dpt"},
        {"stage": "dft", "lora": True, "learning_rate": 0.0},
        {"stage": "dft", "learning_rate": 0.0},
    ]
    main([str(write_recipe(tmp_path, stages)), *options(paths, tmp_path / "run")])
    first = weights(tmp_path / "run" / "stages" / "1-dpt" / "model")
    assert not equal(first, weights(tmp_path / "run" / "student-init"))
    assert equal(weights(tmp_path / "run" / "stages" / "2-dft" / "model"), first)
    assert equal(weights(tmp_path / "run" / "model"), first)


class Killed(BaseException):
    """As an interrupt: nothing on the way may catch it."""


# Options of the stage that is interrupted, how often it saves, and whether the student has TAF: one
# without is saved under other parameter names than it has in memory.
RESUMED = {
    "lora": ({"lora": True}, 2, True),
    "lora, no checkpoint yet": ({"lora": True}, 2, True),
    "muon": ({"muon_learning_rate": 1e-2}, 1, False),
}
SAVED = {"lora": ["checkpoint-2"], "muon": ["checkpoint-2", "checkpoint-3"]}


def resume_recipe(folder, kind):
    settings, save_steps, taf = RESUMED[kind]
    second = {"stage": "dft", "max_steps": 4, "arguments": {"save_steps": save_steps}, **settings}
    return write_recipe(folder, [{"stage": "dpt"}, second], lora_dropout=0.1, taf=taf)


@pytest.fixture(scope="module")
def uninterrupted(paths, tmp_path_factory):
    folders = {}
    for kind in ("lora", "muon"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        main([str(resume_recipe(folders[kind], kind)), *options(paths, folders[kind] / "run")])
    return folders


# Ends the process in the second stage before its fourth step.
KILL = """
import os, sys
from cdfast.trainer import DistillationTrainer
from cdfast.train import main

step = DistillationTrainer.training_step

def training_step(self, *args, **kwargs):
    if self.aligner is not None and self.state.global_step == 3:
        os._exit(7)
    return step(self, *args, **kwargs)

DistillationTrainer.training_step = training_step
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_run_ends_with_the_same_weights(kind, uninterrupted, paths, tmp_path, monkeypatch):
    recipe, out = resume_recipe(tmp_path, kind), tmp_path / "run"
    arguments = [str(recipe), *options(paths, out)]
    if kind == "lora":
        assert run_command("-c", KILL, *arguments).returncode == 7
    else:
        _kill_at_step(1 if kind.endswith("yet") else 3, monkeypatch, arguments)
    stage = out / "stages" / "2-dft"
    saved = sorted(path.name for path in stage.glob("checkpoint-*"))
    assert saved == SAVED.get(kind, [])
    assert (out / "stages" / "1-dpt" / "stage.json").exists()
    assert not (stage / "stage.json").exists()
    assert not (out / "model").exists()

    main([*arguments, "--resume"])
    whole = uninterrupted[kind.split(",")[0]] / "run"
    assert equal(weights(out / "model"), weights(whole / "model"))
    got, want = results_of(out)["stages"], results_of(whole)["stages"]
    for resumed, straight in zip(got, want):
        assert resumed["steps"] == straight["steps"]
        assert [e["loss"] for e in resumed["log"]] == [e["loss"] for e in straight["log"]]


def _kill_at_step(number, monkeypatch, arguments):
    step = DistillationTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.aligner is not None and self.state.global_step == number:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", training_step)
        with pytest.raises(Killed):
            main(arguments)


def test_resuming_a_finished_run_trains_nothing(uninterrupted, paths, monkeypatch):
    folder = uninterrupted["muon"]
    before = results_of(folder / "run")
    monkeypatch.setattr(DistillationTrainer, "train", None)
    main([str(folder / "given.yaml"), *options(paths, folder / "run"), "--resume"])
    assert results_of(folder / "run") == before


def test_resuming_with_other_options_is_refused(paths, tmp_path, capsys):
    recipe = write_recipe(tmp_path, [{"stage": "dpt", "max_steps": 1}])
    main([str(recipe), *options(paths, tmp_path / "run")])
    before = results_of(tmp_path / "run")
    given = [recipe, *options(paths, tmp_path / "run"), "--resume", "--kl-weight", "0.5"]
    printed = refused(given, capsys)
    assert "--resume: stages[1].kl_weight was 1.0" in printed
    assert "Give the same options" in printed
    # What the weights do not depend on may change.
    main([str(recipe), *options(paths, tmp_path / "run"), "--resume", "--workers", "1"])
    assert results_of(tmp_path / "run") == before


def test_overwrite_starts_anew(paths, tmp_path):
    out = tmp_path / "run"
    recipe = write_recipe(tmp_path, [{"stage": "dpt", "max_steps": 1}])
    main([str(recipe), *options(paths, out)])
    (out / "stages" / "left-over").mkdir()
    main([str(recipe), *options(paths, out), "--overwrite"])
    assert not (out / "stages" / "left-over").exists()
    assert results_of(out)["stages"][0]["steps"] == 1


# -- kinds of students and teachers ----------------------------------------------------------------

SHORT = [{"stage": "dpt", "max_steps": 1}, {"stage": "dft", "max_steps": 1}]


def run_short(paths, folder, stages=SHORT, fields=None, **changed):
    recipe = write_recipe(folder, stages, **(fields or {}))
    main([str(recipe), *options(paths, folder / "run", **changed)])
    return weights(folder / "run" / "student-init"), weights(folder / "run" / "model")


def test_plain_language_model_without_taf(paths, tmp_path):
    start, end = run_short(paths, tmp_path, taf="false")
    teacher = weights(paths.teacher)
    assert load(tmp_path / "run" / "model").config.model_type == "llava"
    assert not (tmp_path / "run" / "model" / "modeling_cdfast_llava.py").exists()
    assert equal(part(end, "tower"), part(teacher, "tower"))
    assert not equal(part(start, "projector"), part(end, "projector"))
    assert not part(end, "fetched")


def test_llava_student_without_taf_keeps_its_projector(paths, tmp_path):
    start, end = run_short(paths, tmp_path, student=paths.llava_student, taf="false")
    given = weights(paths.llava_student)
    assert equal(start, given)
    assert not equal(part(end, "projector"), part(given, "projector"))
    assert not equal(part(end, "language model"), part(given, "language model"))
    assert equal(part(end, "tower"), part(given, "tower"))


def test_llava_student_with_taf_brings_its_language_model_only(paths, tmp_path):
    start, _ = run_short(paths, tmp_path, student=paths.other_student)
    assert equal(
        part(start, "language model"), part(weights(paths.other_student), "language model")
    )
    assert equal(part(start, "tower"), part(weights(paths.teacher), "tower"))


def test_llava_student_with_an_encoder_of_its_own(paths, tmp_path):
    start, end = run_short(
        paths, tmp_path, student=paths.other_student, taf="false", share_vision_tower="false"
    )
    assert equal(start, weights(paths.other_student))
    assert equal(part(end, "tower"), part(start, "tower"))


def test_half_precision_teacher_and_float32_student(paths, tmp_path):
    start, end = run_short(paths, tmp_path, teacher_dtype="bfloat16")
    teacher = weights(paths.teacher)
    for state in (start, end):  # as in the checkpoint: not rounded
        assert equal(part(state, "tower"), part(teacher, "tower"))
    for entry in results_of(tmp_path / "run")["stages"][1]["log"]:
        assert 0 < entry["loss_kl"] < 1
        assert 0 < entry["loss_alignment"] < 1


@pytest.fixture(scope="module")
def built_teacher(paths, tmp_path_factory):
    """A LLaVA model from a language model and a vision encoder, without any teacher."""
    folder = tmp_path_factory.mktemp("built")
    stages = [{"stage": "pretrain"}, {"stage": "sft", "lora": True}]
    fields = {"taf": False, "vision_tower": str(paths.vision)}
    recipe = write_recipe(folder, stages, **fields)
    main([str(recipe), *options(paths, folder / "run", teacher=None)])
    return folder / "run"


def test_teacher_built_from_an_encoder_and_a_language_model(built_teacher, paths):
    start = weights(built_teacher / "student-init")
    pretrained = weights(built_teacher / "stages" / "1-pretrain" / "model")
    end = weights(built_teacher / "model")
    encoder = SiglipVisionModel.from_pretrained(paths.vision).state_dict()
    # 5.17 keeps the encoder inside of a child named vision_model, 5.23 does not.
    names = {name.removeprefix("vision_model."): value for name, value in encoder.items()}
    for state in (start, end):
        tower = part(state, "tower")
        bare = {
            name.removeprefix(PARTS["tower"]).removeprefix("vision_model."): value
            for name, value in tower.items()
        }
        assert equal(bare, names)
    own = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in Qwen2.from_pretrained(paths.student).state_dict().items()
        if name.startswith("model.")
    }
    assert equal(part(start, "language model"), own)
    assert equal(part(pretrained, "language model"), own)
    assert not equal(part(start, "projector"), part(pretrained, "projector"))
    assert not equal(part(pretrained, "language model"), part(end, "language model"))
    assert not equal(part(pretrained, "projector"), part(end, "projector"))
    results = results_of(built_teacher)
    assert "similarity" not in results
    assert [set(stage["log"][0]) & {"loss_lm", "loss_kl"} for stage in results["stages"]] == [
        {"loss_lm"},
        {"loss_lm"},
    ]


def test_a_built_teacher_teaches(built_teacher, paths, tmp_path):
    start, end = run_short(paths, tmp_path, teacher=built_teacher / "model")
    teacher = weights(built_teacher / "model")
    assert equal(part(start, "tower"), part(teacher, "tower"))
    assert equal(part(end, "fetched"), part(start, "fetched"))
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert processor.vision_feature_select_strategy == "full"
    assert processor.num_additional_image_tokens == 0


# -- records that cannot be used -------------------------------------------------------------------


@pytest.fixture
def torn(tmp_path):
    """A JPEG whose header is right and whose end is missing, and records that name it."""
    images = tmp_path / "images"
    images.mkdir()
    whole = (photo_setup.PHOTO_FOLDER / "rocket.jpg").read_bytes()
    (images / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    turns = photo_setup.conversation([("What is it?", "A rocket.")], "<image>\n")
    record = {"id": "half", "image": "torn.jpg", "conversations": turns}
    data = photo_setup.write_records(tmp_path / "torn.json", [*photo_setup.records(), record])
    return ["--data", str(data), "--image-root", str(photo_setup.PHOTO_FOLDER), str(images)]


def torn_command(paths, folder, torn, *more):
    recipe = write_recipe(folder, [{"stage": "dpt", "batch_size": 10, "max_steps": 1}])
    given = options(paths, folder / "run", data=None, **{"image-root": None})
    return [str(recipe), *given, *torn, *more]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_torn_image_stops_the_run_by_its_name(paths, tmp_path, torn, workers, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(torn_command(paths, tmp_path, torn, "--workers", workers))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "error: torn.json, record 9 (id half): images[0]:" in printed
    assert "torn.jpg" in printed
    assert "Traceback" not in printed


@pytest.mark.filterwarnings("ignore:the next good record")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_torn_image_is_skipped_and_counted(paths, tmp_path, torn, workers):
    main(torn_command(paths, tmp_path, torn, "--workers", workers, "--on-error", "skip"))
    [stage] = results_of(tmp_path / "run")["stages"]
    assert stage["skipped"] == {"image corrupt": 1}
    assert "image corrupt: 1" in (tmp_path / "run" / "report.html").read_text()


def test_results_of_a_diverged_run_are_strict_json(tmp_path):
    write_json(tmp_path / "x.json", {"log": [{"loss": float("nan"), "step": 1}], "m": {3: (0.5,)}})
    text = (tmp_path / "x.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"log": [{"loss": None, "step": 1}], "m": {"3": [0.5]}}


# -- refusals --------------------------------------------------------------------------------------


def refused(arguments, capsys):
    """What the command prints when it ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed[printed.index("error: ") :]


REFUSED = {
    "teacher that is not there": (
        {"teacher": "/absent/teacher"},
        r"model '/absent/teacher' cannot be loaded.*Expected a Hugging Face checkpoint",
    ),
    "student that is not there": ({"student": "/absent/student"}, "model '/absent/student' cannot"),
    "no teacher": ({"teacher": None}, r"teacher: stage 1 \(dpt\) distils.*Give --teacher PATH"),
    "no student": ({"student": None}, "Give --student PATH"),
    "no data": ({"data": None}, r"data: stage 1 \(dpt\) has none"),
    "data that is not there": (
        {"dft.data": "/absent/x.json"},
        r"data: stage 2 \(dft\): expected an existing file; got '/absent/x.json'",
    ),
    # Of a later stage: refused before the first begins.
    "no such objective": (
        {"objective": "cosine"},
        "objective: expected one of row, map,.*'cosine'",
    ),
    # No extra that the tests need installs it.
    "backend that cannot run": ({"backend": "xformers"}, "backend: 'xformers' cannot run here: "),
    "empty batches": (
        {"dft.batch-size": 0},
        r"batch_size: stage 2 \(dft\): expected at least 1; got 0",
    ),
    "image root that is not there": (
        {"image-root": "/absent/photos"},
        r"image_root: stage 1 \(dpt\): expected a folder; got '/absent/photos'",
    ),
    "unknown option": ({"aligment-weight": 1}, "aligment_weight.*Did you mean 'alignment_weight'"),
    "unknown stage": ({"dfft.max-steps": 1}, "'dfft' is unknown. Did you mean 'dft'"),
    "value of the wrong type": ({"batch-size": "many"}, "batch_size: expected int; got 'many'"),
    "unknown scheduler": ({"lr-scheduler-type": "cosin"}, "cosin is not a valid SchedulerType"),
    "unknown layers": ({"layers": "middle"}, "layers: expected one of early, intermediate"),
    "unknown backend": ({"backend": "cudnn"}, "backend: expected one of auto"),
    "nothing left": ({"max-length": 8}, "within max_length=8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_to_change(case, paths, tmp_path, capsys):
    changed, message = REFUSED[case]
    stages = [{"stage": "dpt", "alignment_weight": 1.0}, {"stage": "dft"}]
    recipe = write_recipe(tmp_path, [{**stage, "max_steps": 1} for stage in stages])
    printed = refused([recipe, *options(paths, tmp_path / "run", **changed)], capsys)
    assert re.search(message, printed, re.DOTALL), printed
    assert not (tmp_path / "run" / "stages" / "1-dpt" / "stage.json").exists()


def test_layers_that_a_student_does_not_have_are_refused_at_once(paths, tmp_path, capsys):
    tokenizer = AutoProcessor.from_pretrained(paths.teacher).tokenizer
    config = photo_setup.text_config(tokenizer, layers=2, hidden=32)
    Qwen2(config).save_pretrained(tmp_path / "shallow")
    given = options(paths, tmp_path / "run", student=tmp_path / "shallow")
    printed = refused([write_recipe(tmp_path, SHORT), *given], capsys)
    assert "a model of 2 layers has none in the range 'intermediate'" in printed
    assert not (tmp_path / "run" / "student-init").exists()


def test_encoders_that_differ_are_refused(paths, tmp_path, capsys):
    recipe = write_recipe(tmp_path, SHORT)
    changed = {"student": paths.other_student, "taf": "false"}
    printed = refused([recipe, *options(paths, tmp_path / "run", **changed)], capsys)
    assert "vision encoder: expected teacher and student to have the same" in printed
    assert "share_vision_tower=False" in printed


@pytest.mark.slow
def test_a_teacher_with_a_fetched_adapter_is_refused_for_taf(all_stages, paths, tmp_path, capsys):
    recipe, teacher = write_recipe(tmp_path, SHORT), all_stages[0] / "model"
    printed = refused([recipe, *options(paths, tmp_path / "run", teacher=teacher)], capsys)
    assert "Distil from it with taf=False" in printed


def test_a_language_model_without_an_encoder_is_refused(paths, tmp_path, capsys):
    recipe = write_recipe(tmp_path, [{"stage": "sft", "max_steps": 1}], taf=False)
    given = options(paths, tmp_path / "run", teacher=None)
    assert "Give --vision-tower PATH" in refused([recipe, *given], capsys)


def test_a_folder_in_use_is_refused(paths, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    recipe = write_recipe(tmp_path, SHORT)
    for more in ([], ["--overwrite"]):  # not even then: it is no run of this command
        printed = refused([recipe, *options(paths, tmp_path / "run"), *more], capsys)
        assert "is not empty. Give --resume" in printed
    assert (tmp_path / "run" / "thesis.tex").read_text() == "mine"


def test_broken_yaml_is_refused(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text("name: [photos\nstages: - x")
    printed = refused([path], capsys)
    assert f"{path}: no valid YAML" in printed
    assert "line 2" in printed
    path.write_text("stagse: []")
    assert "'stagse' is unknown. Did you mean 'stages'" in refused([path], capsys)
    assert "'compodistil-2b' is unknown. Did you mean 'compodistill-2b'" in refused(
        ["compodistil-2b"], capsys
    )


@pytest.mark.slow
def test_a_missing_image_ends_the_process_with_code_2(paths, tmp_path):
    """As a process: the exit code, and nothing of a traceback on standard error."""
    records = photo_setup.records()
    records[5]["image"] = "atlantis.jpg"
    data = photo_setup.write_records(tmp_path / "lost.json", records)
    recipe = write_recipe(tmp_path, SHORT)
    given = options(paths, tmp_path / "run", data=data)
    done = run_command("-m", "cdfast.train", recipe, *given, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for text in ("lost.json", "record 5", records[5]["id"], "atlantis.jpg", "image_root"):
        assert text in line


# -- without training ------------------------------------------------------------------------------


def test_list_names_every_shipped_recipe(capsys):
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert sorted(names) == sorted(recipe_files())
    assert {"miniature", "compodistill-2b", "llava-4b-teacher"} <= set(names)
    assert all(len(line.split()) > 4 for line in lines)


def dry_run(arguments, capsys, monkeypatch, ready=True):
    monkeypatch.setenv("COLUMNS", "400")
    if ready:
        main([*map(str, arguments), "--dry-run"])
    else:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--dry-run"])
        assert stopped.value.code == 1
    return capsys.readouterr().out


def sizes(printed):
    found = re.findall(r"^(teacher|student): \w+, ([\d,]+) parameters", printed, re.MULTILINE)
    return {role: int(number.replace(",", "")) for role, number in found}


# Parameters of Qwen1.5-4B, Qwen1.5-1.8B and SigLIP-so400m without its pooling head, as published.
QWEN_4B, QWEN_2B, TOWER = 3_950_369_280, 1_836_828_672, 413e6


@pytest.mark.parametrize("recipe", ["compodistill-2b", "compodistill-2b-official"])
def test_dry_run_of_the_papers_recipes(recipe, capsys, monkeypatch):
    printed = dry_run([recipe], capsys, monkeypatch, ready=False)
    adapter, projector = 9.5e6, 9.4e6 if recipe == "compodistill-2b" else 5.2e6
    got = sizes(printed)
    assert got["teacher"] == pytest.approx(QWEN_4B + TOWER + adapter, rel=1e-3)
    assert got["student"] == pytest.approx(QWEN_2B + TOWER + adapter + projector, rel=1e-3)
    assert "729 visual tokens per image" in printed
    if recipe == "compodistill-2b":
        matched = {student: (student + 5, student + 11) for student in range(7, 17)}
        assert matched[7] == (12, 18)
        assert matched[16] == (21, 27)
        assert "row, intermediate layers, group matching, mean over layers" in printed
    else:
        matched = {student: (student + 5, student + 9) for student in range(8, 15)}
        assert "pooled, intermediate layers, group matching, sum over layers" in printed
    pairs = re.findall(r"(\d+) <- (\d+)\.\.(\d+)", printed)
    assert {int(s): (int(a), int(b)) for s, a, b in pairs} == matched
    assert "not ready to run: teacher: stage 1 (dpt) distils" in printed


def test_dry_run_of_the_teachers_recipe(capsys, monkeypatch):
    printed = dry_run(["llava-4b-teacher"], capsys, monkeypatch, ready=False)
    assert sizes(printed) == {"student": pytest.approx(QWEN_4B + TOWER + 9.5e6, rel=1e-3)}
    assert "alignment:" not in printed
    assert "not ready to run: data: stage 1 (pretrain) has none" in printed


def test_dry_run_of_the_miniature(capsys, monkeypatch):
    printed = dry_run(["miniature"], capsys, monkeypatch)
    assert set(sizes(printed)) == {"teacher", "student"}
    assert max(sizes(printed).values()) < 2e6
    assert "not ready" not in printed


def test_dry_run_of_the_recipe_for_models_of_ones_own(paths, tmp_path, capsys, monkeypatch):
    given = options(paths, tmp_path / "run")
    printed = dry_run(["compodistill", *given], capsys, monkeypatch)
    assert set(sizes(printed)) == {"teacher", "student"}
    assert "1 <- 1..3" in printed
    assert "not ready" not in printed
    assert "Give --student PATH" in refused(["compodistill", "--dry-run"], capsys)


def test_dry_run_of_broken_data_names_it_and_ends_with_1(paths, tmp_path, capsys, monkeypatch):
    """As the run would: --on-error skip makes both go on."""
    made = photo_setup.records()
    made[5]["image"] = "atlantis.jpg"
    data = photo_setup.write_records(tmp_path / "lost.json", made)
    given = options(paths, tmp_path / "run", data=data)
    printed = dry_run(["compodistill", *given], capsys, monkeypatch, ready=False)
    assert "the run would stop" in printed
    assert re.search(r"lost.json, record 5 .*atlantis.jpg", printed)
    report = tmp_path / "check.json"
    skip = ["--on-error", "skip", "--dry-run-json", report]
    dry_run(["compodistill", *given, *skip], capsys, monkeypatch)
    [result] = json.loads(report.read_text())["data_sets"]
    assert (result["checked"], result["usable"]) == (9, 8)
    assert result["broken"]["image missing"]["records"] == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_counts_what_a_run_would_train(paths, tmp_path, capsys, monkeypatch, after):
    arguments = [write_recipe(tmp_path, STAGES), *options(paths, tmp_path / "run")]
    printed = dry_run(arguments, capsys, monkeypatch)
    assert not (tmp_path / "run").exists()
    student, teacher = after[0], weights(paths.teacher)
    assert sizes(printed) == {
        "teacher": sum(v.numel() for v in teacher.values()),
        "student": sum(v.numel() for v in student.values()),
    }
    projector = sum(v.numel() for v in part(student, "projector").values())
    frozen = sum(v.numel() for p in ("tower", "fetched") for v in part(student, p).values())
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert f" {projector:,} " in rows[0]
    assert f" {projector:,} + LoRA r4 " in rows[1]
    assert f" {sizes(printed)['student'] - frozen:,} " in rows[2]
    assert "1 <- 1..3" in printed
    assert "(absent)" not in printed
    assert "not ready" not in printed
