"""Bad options and recipes, each through the command: exit code 2, one line, a remedy.

What test_config.py and test_train_photos.py have already is not repeated.
"""

import os
import re

import pytest
import yaml

from cdfast import train
from tests.cdfast.command import arguments, refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_models(monkeypatch):
    """What is wrong in an option shows before a model is loaded."""

    def load(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train, "load_processor", load)
    monkeypatch.setattr("cdfast.models.AutoConfig.from_pretrained", load)


POSITIVE, NOT_NEGATIVE = ("0", "-1", "-1e30", "inf", "nan"), ("-1", "-1e-4", "-.5", "inf", "nan")
NUMBERS = {
    "learning-rate": NOT_NEGATIVE,
    "muon-learning-rate": NOT_NEGATIVE,
    "weight-decay": NOT_NEGATIVE,
    "max-grad-norm": NOT_NEGATIVE,
    "warmup": NOT_NEGATIVE,
    "lm-weight": NOT_NEGATIVE,
    "kl-weight": NOT_NEGATIVE,
    "alignment-weight": NOT_NEGATIVE,
    "epochs": POSITIVE,
    "rank-timeout": POSITIVE,
    "batch-size": (*POSITIVE, "1.5"),
    "gradient-accumulation-steps": POSITIVE,
    "max-length": POSITIVE,
    "max-pixels": POSITIVE,
    "lora-r": POSITIVE,
    "lora-alpha": POSITIVE,
    "lora-dropout": ("-0.1", "1", "nan"),
    "evaluate-per-kind": POSITIVE,
    "evaluate-vqa-per-kind": POSITIVE,
    "max-steps": ("0", "-2", "1.5", "inf"),
    "workers": ("-1", "0.5"),
    "max-skipped-steps": ("-1", "nan"),
    "seed": ("-1", "4294967296"),
    "turns-mix": ("-1",),
    "adam-beta1": ("-0.1", "1"),
    "adam-beta2": ("2", "nan"),
    "adam-epsilon": ("0", "-1e-8"),
    "label-smoothing-factor": ("1", "-1"),
    "save-steps": ("0", "-5"),
    "logging-steps": ("0",),
    "save-total-limit": ("0",),
}


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry-run"])
@pytest.mark.parametrize("name, value", [(n, v) for n, values in NUMBERS.items() for v in values])
def test_number_out_of_range(name, value, dry, no_models, capsys):
    line = refused(["miniature", f"--{name}", value, *["--dry-run"] * dry], capsys)
    field = name.replace("-", "_")
    found = re.search(rf"\b{field}\b.*: .*expected .+; got '?(\S+?)'?\. (Correct|Give)", line)
    assert found, line
    assert found[1] == value or float(found[1]) == float(value) or found[1] == value == "nan"
    assert f"--{name}" in line or "on the command line" in line


def test_stage_at_fault_is_named(no_models, capsys):
    line = refused(["miniature", "--dft.learning-rate", "-1e-4"], capsys)
    assert line == (
        "error: learning_rate: stage 2 (dft): expected at least 0; got -0.0001. Correct the "
        "recipe, or give --learning-rate NUMBER."
    )


OPTIONS = {
    "resume and overwrite": (["--resume", "--overwrite"], "--resume, --overwrite: expected one"),
    "nothing to train": (
        ["--lm-weight", "0", "--kl-weight", "0", "--alignment-weight", "0"],
        r"lm_weight, kl_weight, alignment_weight, .*: stage 1 \(dpt\): .*leave the stage out",
    ),
    "a stage option by its Trainer name": (
        ["--per-device-train-batch-size", "0"],
        "arguments.per_device_train_batch_size: expected the option 'batch_size'.*--batch-size",
    ),
    "unknown stage": (["--dtf.max-steps", "1"], "stage: 'dtf' is unknown. Did you mean 'd[pf]t'"),
    "name of spaces": (["--name", "  "], "name: expected a name .*Give --name"),
    "unknown choice": (["--turns", "both"], "turns: 'both' is unknown.*Known: dialogue"),
    "two values for one": (["--seed", "1", "2"], "unexpected argument '2': options start with --"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_contradictory_or_unknown_option(case, no_models, capsys):
    arguments, words = OPTIONS[case]
    assert re.search(words, refused(["miniature", *arguments], capsys))


def laughs(levels=30):
    rows = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "l0: &l0 [lol]\n" + "\n".join(rows)


def merges(levels=30):
    rows = [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "m0: &m0 {a: 1}\n" + "\n".join(rows)


RECIPES = {
    "tabs": ("stages:\n\t- stage: dft", r"no valid YAML: .*line 2"),
    "a key twice": ("name: a\nname: b", r"the key 'name' stands twice.*line 2.*Keep one"),
    "a key twice in a stage": (
        "stages: [{stage: dft, epochs: 1, epochs: 2}]",
        "the key 'epochs' stands twice",
    ),
    "billion laughs": (laughs(), "with aliases written out"),
    "laughs where text belongs": (laughs(7) + "\nname: *l6", "with aliases written out"),
    "laughs by merging": (merges(), "with aliases written out"),
    "alias of itself": ("a: &a [*a]", "an alias of itself.*line 1.*remove it"),
    "undefined alias": ("a: *b", "undefined alias"),
    "too deep": ("a: " + "[" * 3000, "nested too deeply; flatten it"),
    "python object": (
        "name: !!python/object/apply:os.system ['true']",
        "could not determine a con",
    ),
    "python name": ("name: !!python/name:os.system", "could not determine a constructor"),
    "python module": ("name: !!python/module:antigravity", "could not determine a constructor"),
    "python tuple": ("data: !!python/tuple [a]", "could not determine a constructor"),
    "two documents": ("name: a\n---\nname: b", "expected a single document"),
    "a list": ("- name: a", "expected a mapping of options; got .*Write `option: value`"),
    "a number": ("0", "expected a mapping of options; got 0"),
    "no UTF-8": (b"name: \xff", "expected UTF-8; got .*Save it again"),
    "zero bytes": (b"name: a\0b", "no valid YAML: .*special characters are not allowed"),
    "too large": (b"#" * 1_000_001, "at most 1,000,000 bytes; got 1,000,001. Check"),
    "option as a list": ("epochs: 3", "recipe: 'epochs' is unknown.*Known"),
    "stage that is text": ("stages: [dft]", r"stages\[0\]: expected StageRecipe; got 'dft'"),
    "unknown stage": ("stages: [{stage: dtf}]", "stage: 'dtf' is unknown. Did you mean 'd[pf]t'"),
    "number for a list": ("data: {a: 1}", r"recipe.data\[0\]: expected str; got {'a': 1}"),
    "null where a number belongs": ("seed: null", "recipe.seed: expected int; got None. Correct"),
    "date for a name": ("name: 2026-01-01", "recipe.name: expected str; got datetime"),
    "not a number": ("stages: [{learning_rate: .nan}]", r"learning_rate: expected float; got nan"),
    "infinite": ("stages: [{warmup: .inf}]", r"warmup: stage 1 \(dft\): expected a finite number"),
    "huge integer": ("seed: " + "9" * 400, "recipe.seed: expected int; got 999"),
    "variant outside": ("compare: {../../x: {}}", "compare: expected names .*'../../x'. Rename"),
    "variant of an absolute path": ("compare: {/tmp/x: {}}", "compare: expected names .*Rename"),
    "stage option among arguments": (
        "arguments: {learning_rate: -1}",
        "arguments.learning_rate: expected the option 'learning_rate'.*--learning-rate",
    ),
    "output among arguments": ("arguments: {output_dir: /}", "arguments.output_dir: expected the"),
    "argument out of range": ("arguments: {adam_beta2: 7}", "arguments.adam_beta2: expected less"),
    "laughs in a text": (
        "arguments: {report_to: '" + laughs(12).replace("\n", "\\n") + "'}",
        "arguments.report_to: expected text or YAML",
    ),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", RECIPES)
def test_bad_recipe_file_is_named(case, tmp_path, no_models, capsys):
    content, words = RECIPES[case]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused([path, "--dry-run"], capsys)
    assert line.startswith(f"error: {path}: ")
    assert re.search(words, line), line
    assert len(line) < 3000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["folder", "pipe", "absent"])
def test_recipe_that_is_no_file(kind, tmp_path, no_models, capsys):
    path = tmp_path / "mine.yaml"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "absent": lambda: None}[kind]()
    line = refused([path], capsys)
    assert re.search(r"recipe: '.*mine\.yaml' is unknown.*Or give a YAML file", line)


def test_empty_recipe_says_what_it_needs(tmp_path, no_models, capsys):
    (tmp_path / "mine.yaml").write_text("# nothing\n")
    assert "student: expected a checkpoint" in refused([tmp_path / "mine.yaml"], capsys)


ARCHITECTURES = {
    "no student": ({"vision": {"model_type": "siglip_vision_model"}}, "'vision' and 'student'"),
    "unknown part": ({"vision": {}, "student": {}, "head": {}}, "got .*'head'.* Correct"),
    "text for a part": ({"vision": "siglip", "student": {}}, "a mapping of sizes; got 'siglip'"),
    "unknown type": ({"vision": {"model_type": "sig"}, "student": {}}, "model_type of transfor"),
    "text for a size": (
        {"vision": {"model_type": "siglip_vision_model", "hidden_size": "wide"}, "student": {}},
        "expected fields of 'siglip_vision_model'.*hidden_size.*Correct",
    ),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_architecture_that_cannot_be_built(case, tmp_path, no_models, capsys):
    sizes, words = ARCHITECTURES[case]
    values = {"student": "s", "teacher": "t", "stages": [{"stage": "dft"}], "architecture": sizes}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    assert re.search(
        f"architecture: .*{words}", refused([tmp_path / "mine.yaml", "--dry-run"], capsys)
    )


def make_output(folder, kind):
    if kind == "a file":
        folder.write_text("mine")
    elif kind == "below a file":
        folder.write_text("mine")
        return folder / "run"
    elif kind == "takes no files":
        return "/proc/run"
    elif kind == "a device":
        return "/dev/null"
    elif kind == "another run":
        folder.mkdir()
        (folder / "recipe.yaml").write_text("name: other\n")
    elif kind == "a broken run":
        folder.mkdir()
        (folder / "recipe.yaml").write_bytes(b"\xff\xfe")
    elif kind == "zero byte":
        return "a\0b"
    return folder


OUTPUTS = {
    "a file": r"output_dir: expected a folder that can be written; got '.*': .*--output-dir",
    "below a file": r"output_dir: expected a folder that can be written; .*--output-dir",
    "takes no files": r"output_dir: expected a folder that can be written; got '/proc/run'",
    "a device": r"output_dir: expected a folder that can be written; got '/dev/null'",
    "zero byte": r"output_dir: expected a folder; got 'a\\x00b'. Give another",
    "another run": r"output_dir: .* is not empty. Give --resume",
    "a broken run": r"recipe\.yaml: .*UTF-8",
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_output_folder_that_cannot_be_used(kind, paths, tmp_path, no_models, capsys):
    out = make_output(tmp_path / "run", kind)
    more = ["--resume"] if kind == "a broken run" else []
    assert re.search(OUTPUTS[kind], refused([*arguments(paths, out), *more], capsys))
    if kind == "a file":
        assert (tmp_path / "run").read_text() == "mine"
