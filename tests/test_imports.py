"""Imports go one way: trainer -> cdfast_kernels -> torch; and nothing heavy comes along unasked."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "cdfast_kernels"
TRAINER = ROOT / "cdfast"
# What cdfast_kernels may import: its three dependencies, and attention backends where installed.
KERNEL_DEPENDENCIES = {"torch", "triton", "numpy", "flash_attn", "xformers"}
# The only modules that may know DeepSpeed.
DEEPSPEED_MODULES = {"engine", "checkpoint"}


def imported(path):
    """Full names of all modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from cdfast import trainer` imports cdfast.trainer, if there is such a module.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def files(folder):
    found = sorted(folder.rglob("*.py"))
    assert found
    return found


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=170
    )


def loaded_after(statement, names):
    """Those of `names` that a fresh process has loaded after the statement."""
    result = run(f"import sys\n{statement}\nprint([n for n in {names!r} if n in sys.modules])")
    assert result.returncode == 0, result.stderr
    return ast.literal_eval(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda p: p.stem)
def test_kernels_import_their_three_dependencies_only(path):
    top = {name.partition(".")[0] for name in imported(path)}
    foreign = top - set(sys.stdlib_module_names) - KERNEL_DEPENDENCIES - {"cdfast_kernels"}
    assert foreign == set()


def test_importing_the_kernels_loads_no_trainer():
    foreign = ("cdfast", "transformers", "deepspeed", "accelerate", "peft", "liger_kernel", "yaml")
    assert loaded_after("import cdfast_kernels", foreign) == []


@pytest.mark.parametrize("path", files(TRAINER), ids=lambda p: str(p.relative_to(TRAINER)))
def test_trainer_uses_the_kernels_public_names_only(path):
    import cdfast_kernels

    used = {n.partition(".")[2] for n in imported(path) if n.startswith("cdfast_kernels.")}
    assert used <= set(cdfast_kernels.__all__)


def trainer_graph():
    """Module of cdfast, as "analysis.plots" -> modules of cdfast that it imports."""
    modules = {
        ".".join(path.relative_to(TRAINER).with_suffix("").parts): path
        for path in files(TRAINER)
        if path.stem != "__init__"
    }
    return {
        name: {n.removeprefix("cdfast.") for n in imported(path)} & set(modules)
        for name, path in modules.items()
    }


def test_trainer_modules_import_in_one_direction():
    order = list(graphlib.TopologicalSorter(trainer_graph()).static_order())  # raises on a cycle
    chain = ["attention", "aligner", "distill", "trainer", "train"]
    assert [name for name in order if name in chain] == chain


@pytest.mark.parametrize("package", sorted(p.parent.name for p in TRAINER.glob("*/__init__.py")))
def test_packages_are_named_and_empty(package):
    """Importing one module of a package loads no other: `__init__.py` holds a sentence."""
    [node] = ast.parse((TRAINER / package / "__init__.py").read_text()).body
    assert isinstance(node.value, ast.Constant)


@pytest.mark.parametrize("name", ["matching", "losses", "modeling_cdfast_llava", "config", "terms"])
def test_leaves_import_nothing_of_the_trainer(name):
    assert trainer_graph()[name] <= {"yaml_file", "terms"}


def test_the_file_that_travels_with_checkpoints_needs_torch_and_transformers_only():
    names = imported(TRAINER / "modeling_cdfast_llava.py")
    top = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert top == {"torch", "transformers"}


def test_deepspeed_stays_in_its_modules():
    users = {p.stem for p in files(TRAINER) if any("deepspeed" in n for n in imported(p))}
    assert users <= DEEPSPEED_MODULES


def test_no_plots_are_loaded_before_a_report_is_written():
    statement = "import cdfast.config, cdfast.models, cdfast.aligner, cdfast.trainer"
    assert loaded_after(statement, ("matplotlib", "cdfast.plots", "cdfast.train")) == []


def test_loading_a_checkpoint_needs_no_trainer():
    """`import cdfast` is what a user of a TAF student writes: it brings the student's classes."""
    heavy = ("cdfast.trainer", "cdfast.aligner", "datasets", "peft", "liger_kernel")
    assert loaded_after("import cdfast", (*heavy, "cdfast.modeling_cdfast_llava")) == [
        "cdfast.modeling_cdfast_llava"
    ]


def test_public_names_of_the_trainer():
    import cdfast

    names = ["DistillationConfig", "DistillationTrainer", "VisualAttentionAligner"]
    assert cdfast.__all__ == names
    assert [getattr(cdfast, name).__name__ for name in names] == names
    with pytest.raises(AttributeError, match="module 'cdfast' has no attribute 'Aligner'"):
        cdfast.Aligner  # noqa: B018


def test_the_package_kernels_of_pypi_stays_importable_from_the_repository():
    """transformers imports it; a package kernels/ of our own would hide it here."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    result = run("import kernels, transformers\nprint(kernels.__file__, bool(kernels.get_kernel))")
    assert result.returncode == 0, result.stderr
    where, has_get_kernel = result.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    assert has_get_kernel == "True"
    assert not Path(where).is_relative_to(ROOT / "kernels")


def test_no_module_is_named_utils():
    named = [
        p for p in [*files(TRAINER), *files(KERNELS)] if p.stem in ("utils", "helpers", "misc")
    ]
    assert named == []
