"""Checkpoints and records that a run cannot use, through the command: exit code 2, one line.

What test_train_photos.py has already is not repeated.
"""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from cdfast import evaluate
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.command import arguments, refused

pytestmark = pytest.mark.usefixtures("one_thread")


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def narrow_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    changed = {k: v[..., :8].contiguous() for k, v in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


# Role, what is done to its folder, and the words of the refusal.
CHECKPOINTS = {
    "no config": ("teacher", remove("config.json"), "cannot be loaded"),
    "broken config": ("teacher", write("config.json", b'{"model_type": '), "cannot be loaded"),
    "config of a list": ("student", write("config.json", b"[]"), "cannot be loaded"),
    "config of no UTF-8": ("student", write("config.json", b"\xff"), "cannot be loaded"),
    "no model type": ("student", write("config.json", b"{}"), "cannot be loaded.*model_type"),
    "unknown model type": (
        "student",
        lambda f: change_json(f / "config.json", model_type="qwen99"),
        "cannot be loaded.*qwen99",
    ),
    "size of text": (
        "student",
        lambda f: change_json(f / "config.json", hidden_size="wide"),
        "cannot be loaded.*hidden_size",
    ),
    "no tokenizer": (
        "teacher",
        remove("tokenizer.json", "tokenizer_config.json"),
        "has a processor that cannot be loaded.*processor.save_pretrained",
    ),
    "broken tokenizer": (
        "teacher",
        write("tokenizer.json", b"{}"),
        "has a processor that cannot be loaded.*processor.save_pretrained",
    ),
    "broken processor": (
        "teacher",
        write("processor_config.json", b"{"),
        "has a processor that cannot be loaded",
    ),
    "no weights": ("student", remove("model.safetensors"), "has weights that cannot be loaded"),
    "torn weights": ("student", cut_weights, "has weights that cannot be loaded.*safetensors"),
    "empty weights": (
        "student",
        write("model.safetensors", b""),
        "has weights that cannot be loaded.*safetensors",
    ),
    "weights that are a page": (
        "student",
        write("model.safetensors", b"<html>404 not found</html>"),
        "has weights that cannot be loaded.*safetensors",
    ),
    "weights of another size": ("student", narrow_weights, "has weights that cannot be loaded"),
    "torn teacher": ("teacher", cut_weights, "has weights that cannot be loaded.*safetensors"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_broken_checkpoint_is_named(case, paths, tmp_path, capsys):
    role, change, words = CHECKPOINTS[case]
    folder = tmp_path / "broken"
    shutil.copytree(getattr(paths, role), folder)
    change(folder)
    line = refused(arguments(paths, tmp_path / "run", **{role: folder}), capsys)
    assert re.search(rf"model '{folder}' {words}", line), line
    assert "Expected" in line
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry-run"])
def test_teacher_without_vision_is_refused(paths, tmp_path, capsys, dry):
    given = arguments(paths, tmp_path / "run", teacher=paths.student)
    line = refused([*given, *["--dry-run"] * dry], capsys)
    assert re.search(r"teacher: expected a vision-language model.*'qwen2'. Give --teacher", line)


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry-run"])
def test_student_that_is_an_encoder_is_refused(paths, tmp_path, capsys, dry):
    given = arguments(paths, tmp_path / "run", student=paths.vision)
    line = refused([*given, *["--dry-run"] * dry], capsys)
    assert re.search(r"student: expected a causal language.*siglip.*Give --student", line), line


def test_student_without_the_image_token_gets_it(paths, tmp_path):
    """The teacher's processor is the run's, so the student's vocabulary grows to hold its token."""
    tokenizer = photo_setup.make_tokenizer()
    config = photo_setup.text_config(tokenizer, layers=3, hidden=32)
    config.vocab_size = tokenizer.convert_tokens_to_ids("<image>")
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "small")
    given = arguments(paths, tmp_path / "run", student=tmp_path / "small")
    with pytest.raises(SystemExit):
        main([*given, "--max-length", "1"])
    made = json.loads((tmp_path / "run" / "student-init" / "config.json").read_text())
    assert (
        made["text_config"]["vocab_size"] == made["image_token_index"] + 1 == config.vocab_size + 1
    )


def make_unusable(paths, folder, kind):
    if kind == "absent":
        return folder
    source = paths.student if kind == "no vision" else paths.teacher
    shutil.copytree(source, folder)
    if kind == "torn":
        cut_weights(folder)
    elif kind == "pickle":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    elif kind == "code of the hub":
        change_json(folder / "config.json", attn_implementation="a/b")
    return folder


@pytest.mark.parametrize("kind", ["absent", "no vision", "torn", "pickle", "code of the hub"])
def test_evaluation_of_an_unusable_model_is_refused(kind, paths, tmp_path, capsys):
    model = make_unusable(paths, tmp_path / "model", kind)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(model), "--per-kind", "1", "--vqa-per-kind", "1"])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"model '{model}' cannot be loaded: " in printed
    assert "Expected a vision-language checkpoint" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
@pytest.mark.parametrize("option", ["--batch-size", "--per-kind", "--vqa-per-kind"])
def test_evaluation_options_out_of_range(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["absent", f"{option}={value}"])
    assert stopped.value.code == 2
    assert (
        f"{option}: expected a whole number, at least 1; got '{value}'" in capsys.readouterr().err
    )


DRY = {
    "scheduler": (["--lr-scheduler-type", "cosin"], "cosin is not a valid SchedulerType"),
    "backend": (["--backend", "cudnn"], "backend: expected one of auto"),
    "objective": (["--objective", "cosine"], "objective: expected one of row"),
    "layers": (["--layers", "middle"], "layers: expected one of early"),
    "teacher": (["--teacher", "/absent"], "model '/absent' cannot be loaded.*Expected a Hugging"),
}


@pytest.mark.parametrize("case", DRY)
def test_dry_run_refuses_what_a_run_would(case, paths, tmp_path, capsys):
    more, words = DRY[case]
    given = [*arguments(paths, tmp_path / "run"), *more]
    first = refused([*given, "--dry-run"], capsys)
    assert re.search(words, first)
    assert refused(given, capsys) == first


# Records and images again, through the whole command.
RECORDS = {
    "url": ({"image": "https://example.com/a.png"}, r"image\[0\]: .*download it and point image_r"),
    "outside": ({"image": "../../etc/passwd"}, r"image\[0\]: .*inside its image root.*relative"),
    "absent": ({"image": "absent.png"}, r"image\[0\]: .*check image_root"),
    "number": ({"image": 7}, r"image\[0\]: .*got 7.*correct or remove"),
    "no turns": ({"conversations": []}, r"conversations: .*got \[\].*remove the record"),
    "id of many lines": ({"id": "a\nb\x1b[2J", "image": 7}, r"image\[0\]: .*got 7"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_bad_record_ends_the_command(case, paths, tmp_path, capsys):
    changed, words = RECORDS[case]
    records = photo_setup.records()
    records[2] = {**records[2], **changed}
    data = photo_setup.write_records(tmp_path / "mine.json", records)
    line = refused(arguments(paths, tmp_path / "run", data=data), capsys)
    shown = r"a\nb\x1b[2J" if "id" in changed else records[2]["id"]
    assert line.startswith(f"error: mine.json, record 2 (id {shown}): ")
    assert re.search(words, line), line
    assert "Remedy: " in line
