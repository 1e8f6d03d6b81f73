"""Code and commands of README and docs/: run if small, parsed and dry-run if they need models."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]


def blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(text):
    """Lines of a shell block, continued lines joined, comments gone."""
    joined = text.replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def commands_with(module):
    found = [line for page in PAGES for block in blocks("bash", page) for line in commands(block)]
    return [line for line in found if f"-m {module}" in line]


def train_commands():
    return commands_with("cdfast.train")


def train_arguments(command):
    """What follows the module; `...` in a page stands for options shown before."""
    words = shlex.split(command)
    return [word for word in words[words.index("cdfast.train") + 1 :] if word != "..."]


def test_op_example_runs():
    namespace = {}
    exec(blocks("python")[0], namespace)
    assert 0 < namespace["loss"].item() < 1
    assert namespace["out"].shape == (2, 100, 4, 32)


def test_kernels_readme_example_runs():
    text = (ROOT / "kernels" / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        exec(example, {})


def test_aligner_example_runs():
    from cdfast import VisualAttentionAligner
    from tests.cdfast.tiny_models import tiny_batch, tiny_llava, tiny_teacher

    namespace = {
        "VisualAttentionAligner": VisualAttentionAligner,
        "torch": torch,
        "teacher": tiny_teacher(),
        "student": tiny_llava(),
        "batch": tiny_batch(),
    }
    exec(blocks("python")[1], namespace)
    namespace["loss"].backward()
    assert namespace["alignment"].count == 3


def test_loading_example_runs(tmp_path):
    from cdfast.adapters import assemble_student
    from tests.cdfast.tiny_models import tiny_language_model, tiny_teacher
    from tests.cdfast.tiny_processors import llava_processor

    student = assemble_student(tiny_teacher(), tiny_language_model(), taf=True)
    student.save_pretrained(tmp_path)
    llava_processor().save_pretrained(tmp_path)
    example = blocks("python")[2]
    assert "runs/miniature/model" in example
    namespace = {}
    exec(example.replace("runs/miniature/model", str(tmp_path)), namespace)
    assert type(namespace["model"]).__name__ == "CdfastLlavaForConditionalGeneration"
    assert namespace["processor"].image_token


@pytest.fixture
def readers_files(tmp_path, monkeypatch):
    """What the pages call path/to/llava, path/to/small-llm and so on, in the working folder."""
    from tests.cdfast.tiny_families import idefics3
    from tests.cdfast.tiny_models import tiny_language_model, tiny_teacher
    from tests.cdfast.tiny_processors import llava_processor

    monkeypatch.chdir(tmp_path)
    tiny_language_model().save_pretrained("path/to/small-llm")
    made = {"llava": (tiny_teacher(), llava_processor())}
    for role, layers in (("teacher", 6), ("student", 4)):
        made[f"{role}-vlm"] = idefics3(layers=layers)
    for name, (model, processor) in made.items():
        model.save_pretrained(f"path/to/{name}")
        processor.save_pretrained(f"path/to/{name}")
    # The pages name targets that nobody has made here; what is compared of them: see
    # test_stored_targets.py.
    monkeypatch.setattr("cdfast.dry_run.open_targets", lambda *args, **options: None)


def write_data(recipe):
    """The files and folders that a command of the pages names: records without an image."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A stream is to have a record for each of its workers.
        lines = (json.dumps(record) + "\n") * max(recipe.workers, 1)
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps([record]))

    from cdfast.config import EMBEDDED_SCENES
    from cdfast.stored_targets.files import FORMAT, INDEX_FILE
    from tests.cdfast.photo_setup import conversation

    record = {"conversations": conversation([("Who?", "I.")]), "rejected": "You."}
    for owner in (recipe, *recipe.stages):
        for folder in owner.image_root or []:
            Path(folder).mkdir(parents=True, exist_ok=True)
        for name in set(owner.data or []) - set(EMBEDDED_SCENES):
            # Names without a suffix are folders of shards.
            write(Path(name) if Path(name).suffix else Path(name) / "0.jsonl")
    for name in recipe.eval_data:
        write(Path(name))
    if recipe.teacher_targets:
        Path(recipe.teacher_targets).mkdir(parents=True)
        index = json.dumps({"format": FORMAT, "facts": {}})
        Path(recipe.teacher_targets, INDEX_FILE).write_text(index)
    for folder in recipe.eval_image_root:
        Path(folder).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("command", train_commands())
def test_train_commands_are_valid(command, readers_files, capsys):
    from cdfast.command_line import parse_command_line
    from cdfast.train import main

    arguments = train_arguments(command)
    recipe, flags = parse_command_line(arguments)
    write_data(recipe)
    status = 0
    try:
        main(arguments if flags.dry_run else [*arguments, "--dry-run", "--dry-run-samples", "1"])
    except SystemExit as stopped:
        status = stopped.code
    # "..." stands for options shown before, without which a run may not be ready.
    assert status == 0 or "..." in command
    printed = capsys.readouterr().out
    assert "stages" in printed
    assert "not ready to run" not in printed or "..." in command


def test_options_that_make_systems_alike_give_every_stage_the_lora_of_the_others():
    from cdfast.command_line import parse_command_line
    from cdfast.config import PROJECTOR_ONLY

    def trained(recipe):
        """Of stages that train the language model and that more than one system has."""
        stages = [s for s in recipe.stages if s.stage not in (*PROJECTOR_ONLY, "preference")]
        adapters = (recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout)
        return {(s.lora, s.learning_rate, *adapters) for s in stages}

    page = (ROOT / "docs" / "systems.md").read_text()
    rows = re.findall(r"^\| (`.*`) \| `(--lora true .*)` \|$", page, re.MULTILINE)
    recipes = {name: words for names, words in rows for name in re.findall("`(.*?)`", names)}
    assert set(recipes) == {"llavadi-2b", "llava-kd-2b", "llava-mod-2b"}
    [want] = trained(parse_command_line(["compodistill-2b"])[0])
    for name, words in recipes.items():
        assert trained(parse_command_line([name])[0]) != {want}
        assert trained(parse_command_line([name, *shlex.split(words)])[0]) == {want}


@pytest.mark.parametrize("command", commands_with("cdfast.memory"))
def test_memory_commands_run(command, capsys):
    from cdfast.memory import main

    words = shlex.split(command)
    main(words[words.index("cdfast.memory") + 1 :])
    assert "ZeRO teacher" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands_with("cdfast.targets"))
def test_targets_commands_are_valid(command, capsys):
    """Those on embedded data that stop after the estimate run; of the others options are read."""
    from cdfast import targets

    words = shlex.split(command)
    words = words[words.index("cdfast.targets") + 1 :]
    if "--estimate" in words:
        targets.main(words)
        assert "estimated size on disk" in capsys.readouterr().out
    options, rest = targets._options(words)
    assert targets._recipe(rest).objective == "pooled_stored"
    assert options.folder.name == "targets"


def test_sizes_of_stored_targets_are_those_of_the_formula():
    from cdfast.stored_targets.sizes import map_bytes, stored_bytes

    page = (ROOT / "docs" / "stored-targets.md").read_text()

    def row(name, top_k, part):
        cells = []
        for rows in (50, 100, 200):
            size = stored_bytes(665_000, rows, 729, layers=10, top_k=top_k, itemsize=2)
            cells.append(f"{sum(size[p] for p in part) / 2**30:.1f}")
        return f"| {name} | {' | '.join(cells)} |"

    for k in (16, 64, 256):
        assert row(f"logits, k = {k}", k, ("tokens", "log-probs")) in page
    assert row("attention vectors", 64, ("vectors",)) in page
    whole = map_bytes(2048, 729, layers=10)
    assert f"{whole / 2**20:.1f} MiB for one sample of 2048" in page
    assert f"{665_000 * whole / 2**40:.0f} TiB in all" in page


@pytest.mark.parametrize("command", commands_with("cdfast.evaluate"))
def test_evaluate_commands_are_valid(command):
    from cdfast.evaluate import command_parser
    from cdfast.evaluation.tasks import chosen_tasks

    words = shlex.split(command)
    options = command_parser().parse_args(words[words.index("cdfast.evaluate") + 1 :])
    assert options.models
    assert all(task.read is None or options.data for task in chosen_tasks(options.tasks or []))


def test_every_task_and_file_is_on_the_page_of_evaluation():
    from cdfast.evaluation.tasks import SHORTHANDS, TASKS

    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert all(f"`{name}`" in page for name in (*TASKS, *SHORTHANDS))
    files = ("sade.jsonl", "examples.jsonl", "image-level_filterd.json", "YESNO.jsonl")
    assert all(name in page for name in files)


def test_maps_examples_run(tmp_path, monkeypatch):
    from PIL import Image

    from tests.cdfast.tiny_families import llava, photo

    monkeypatch.chdir(tmp_path)
    model, processor = llava()
    pictures = {"image": photo(60, 40), "second": photo(40, 60, 1)}
    namespace = {"model": model, "processor": processor, **pictures}
    for example in blocks("python", "docs/analysis.md"):
        exec(example, namespace)
    assert namespace["grid"].shape == (6, 6)
    assert (namespace["grid"] != namespace["one_head"]).any()
    assert namespace["answer"].shape == namespace["sinks"].shape == (72,)
    for name in ("cat.png", "answer.png"):
        assert max(Image.open(tmp_path / name).size) >= 448


def test_packing_example_runs():
    from cdfast import VisualAttentionAligner
    from tests.cdfast.samples import TinySamples
    from tests.cdfast.tiny_models import tiny_llava, tiny_teacher

    samples = [TinySamples(5)[i] for i in range(5)]
    aligner = VisualAttentionAligner(tiny_teacher(), tiny_llava())
    namespace = {"samples": samples, "aligner": aligner, "torch": torch}
    exec(blocks("python", "docs/packing.md")[0], namespace)
    namespace["loss"].backward()
    assert namespace["alignment"].count == 4


def test_streaming_example_runs(tmp_path, monkeypatch, capsys):
    from tests.cdfast.photo_setup import conversation, make_processor

    monkeypatch.chdir(tmp_path)
    record = json.dumps({"conversations": conversation([("Who?", "I.")])})
    for folder in ("shards", "images"):
        Path(folder).mkdir()
    Path("shards/0.jsonl").write_text(f"{record}\n" * 7)
    [example] = blocks("python", "docs/data.md")
    exec(example, {"processor": make_processor()})
    assert capsys.readouterr().out.startswith("0 torch.Size([2, ")


def test_the_page_of_data_names_formats_and_options_as_they_are():
    from cdfast.config import RECIPE_FIELDS
    from cdfast.data_check.run import GENERATED, STREAMED
    from cdfast.shards import SUFFIXES

    page = (ROOT / "docs" / "data.md").read_text()
    assert all(f"`{suffix}" in page for suffix in (*SUFFIXES, ".json"))
    assert f"\n{STREAMED} of all files together" in page
    assert f"cannot be broken, {GENERATED}." in page
    known = {f"--{field.name.replace('_', '-')}" for field in RECIPE_FIELDS}
    known |= {"--dry-run", "--dry-run-samples", "--dry-run-json", "--resume", "--max-steps"}
    known |= {"--dataloader-prefetch-factor", "--dataloader-persistent-workers"}
    named = set(re.findall(r"`(--[a-z-]+)", page)) - {"--dft"}
    assert {"--streaming", "--shuffle-window", "--workers"} <= named <= known


@pytest.mark.parametrize("command", commands_with("cdfast.analyze"))
def test_analyze_commands_run(command, tmp_path, monkeypatch, capsys):
    """As written, on small models and few questions."""
    from cdfast.analyze import main
    from cdfast.synthetic import build_miniature_model, make_processor, miniature_configs
    from tests.cdfast.tiny_families import llava, photo

    monkeypatch.chdir(tmp_path)
    build_miniature_model(miniature_configs()[0], 0).save_pretrained("runs/miniature/model")
    make_processor().save_pretrained("runs/miniature/model")
    for name in ("llava", "student", "sft"):
        model, processor = llava(layers=12, hidden=16, heads=2, kv_heads=2)
        model.save_pretrained(f"path/to/{name}")
        processor.save_pretrained(f"path/to/{name}")
    (tmp_path / "images").mkdir()
    photo(60, 40).save("images/a.png")
    turns = [{"from": "human", "value": "<image>\nIs it left?"}, {"from": "gpt", "value": "no"}]
    Path("questions.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    words = shlex.split(command)
    few = ["--per-kind", "1", "--vqa-per-kind", "1", "--resamples", "10", "--overlays", "1"]
    assert main([*words[words.index("cdfast.analyze") + 1 :], *few]) == 0
    assert "runs/analysis/analysis.json" in capsys.readouterr().out
    content = json.loads(Path("runs/analysis/analysis.json").read_text())
    assert set(content["substitution"]["all"]) == {"0", "0.5", "1"}
    assert ("baseline" in content["models"]) == ("--baseline" in command)
    assert 'id="explorer-data"' in Path("runs/analysis/report.html").read_text()


def test_options_of_the_analysis_in_its_page_are_its_own():
    from cdfast.analyze import _parser
    from cdfast.config import RECIPE_FIELDS

    page = (ROOT / "docs" / "analysis.md").read_text()
    training = page[page.index("## In the report of") : page.index("## Options of the analysis")]
    named = set(re.findall(r"`(--[a-z-]+)", page.replace(training, "")))
    assert named <= {name for action in _parser()._actions for name in action.option_strings}
    assert len(named) >= 12
    of_runs = {f"--{field.name.replace('_', '-')}" for field in RECIPE_FIELDS}
    named = set(re.findall(r"`(--[a-z-]+)", training))
    assert "--analyze-questions" in named
    assert named <= {*of_runs, "--compare", "--resume"}


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """What the page of serving calls runs/mine: a student with a linear P_s and its results."""
    from cdfast.adapters import assemble_student
    from tests.cdfast.photo_setup import make_processor
    from tests.cdfast.tiny_models import tiny_language_model, tiny_teacher

    monkeypatch.chdir(tmp_path)
    student = assemble_student(
        tiny_teacher(), tiny_language_model(hidden=48), taf=True, student_projector="linear"
    )
    student.save_pretrained("runs/mine/model")
    make_processor().save_pretrained("runs/mine/model")
    Path("runs/mine/results.json").write_text('{"name": "mine"}')


@pytest.mark.parametrize("command", commands_with("cdfast.push"))
def test_push_commands_are_valid(command, finished_run, capsys):
    from cdfast.push import main

    words = shlex.split(command)
    main([*words[words.index("cdfast.push") + 1 :], "--dry-run"])
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands_with("cdfast.fuse"))
def test_fuse_commands_run(command, finished_run):
    from cdfast.fuse import main

    words = shlex.split(command)
    main(words[words.index("cdfast.fuse") + 1 :])
    assert Path(words[-1], "README.md").is_file()


def test_serving_example_runs(finished_run):
    namespace = {}
    [example] = blocks("python", "docs/serving.md")
    exec(example, namespace)
    assert namespace["model"].config.model_type == "cdfast_llava"
    assert type(namespace["processor"]).__name__ == "LlavaProcessor"


@pytest.mark.parametrize("command", commands_with("benchmarks"))
def test_benchmark_commands_are_valid(command):
    """Modules that exist, options that they know."""
    words = shlex.split(command.split("-m ", 1)[1])
    name = "benchmarks.__main__" if words[0] == "benchmarks" else words[0]
    if "--preset" in words:
        name = "benchmarks.preset_step"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        importlib.import_module(name).parse(words[1:])


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.name)
def test_an_example_stands_in_the_docs_as_it_is(path):
    """tests/test_examples.py runs the file, by the command in its docstring."""
    text = path.read_text()
    shown = blocks("python", "docs/examples.md")
    assert text in shown, f"docs/examples.md: expected examples/{path.name} as it is; copy it there"
    [command] = re.findall(rf"^    (.*examples/{path.name})", text, re.MULTILINE)
    assert command in [line for b in blocks("bash", "docs/examples.md") for line in commands(b)]


def test_there_are_commands_to_check():
    assert len(commands_with("cdfast.analyze")) >= 2
    assert len(commands_with("cdfast.evaluate")) >= 3
    assert len(commands_with("benchmarks")) >= 12
    assert len(train_commands()) >= 8
    assert len(commands_with("cdfast.memory")) >= 2
    assert len(commands_with("cdfast.push")) >= 2
    assert len(commands_with("cdfast.fuse")) >= 1
    assert len(blocks("python", "docs/examples.md")) == len([*ROOT.glob("examples/*.py")]) == 6


def test_recipes_in_the_docs_are_the_shipped_ones():
    from cdfast.config import recipe_files

    page = (ROOT / "docs" / "systems.md").read_text()
    assert all(f"`{name}`" in README + page for name in recipe_files())
    named = re.findall(r"^\| `(\w[\w-]*)`(?:, `([\w-]+)`)? \|", page, re.MULTILINE)
    assert {name for pair in named for name in pair if name} <= set(recipe_files())


def test_the_page_of_systems_names_every_weight():
    from cdfast.terms import WEIGHTS

    page = (ROOT / "docs" / "systems.md").read_text()
    assert all(f"`--{name.replace('_', '-')}`" in page for name in WEIGHTS)


def test_ci_runs_the_readme_test_command():
    [command] = [line for b in blocks("bash") for line in commands(b) if "-m pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text()


def test_links_point_at_files():
    for path in (*PAGES, "CONTRIBUTING.md", "kernels/README.md"):
        text = (ROOT / path).read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert ((ROOT / path).parent / target).exists(), f"{path}: {target}"
    for target in re.findall(r"^\|[^|]+\|(.*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M):
        for name in re.findall(r"`([^`]+)`", target):
            assert (ROOT / name).exists(), f"CONTRIBUTING.md: {name}"


def test_configuration_files_parse():
    yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    for line in ("[Unreleased]", "### Numerics"):
        assert line in (ROOT / "CHANGELOG.md").read_text()
