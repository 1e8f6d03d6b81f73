"""What stored targets are of: what can be stored, and what must agree later.

A teacher's targets hold for the teacher, the processor, the data, the vocabulary and the matched
layers that they were made with. All of this is written beside them and compared before a run that
reads them begins; the tokens and labels of each sample are compared when it is read. Pictures are
not: a record whose picture was replaced under the same name is not noticed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from cdfast.aligner import PRESETS, VisualAttentionAligner
from cdfast.config import ConfigError, Recipe, StageRecipe
from cdfast.engine import unsharded_loading
from cdfast.manifest import describe
from cdfast.models import load_config, teacher_source
from cdfast.stored_targets.files import ALIGNMENT, KL, ShardPlan, StoredTargets, read_index
from cdfast.stored_targets.pooled_vectors import STORED_OBJECTIVE
from cdfast.stored_targets.sizes import map_bytes
from cdfast.terms import TEACHER_WEIGHTS

_STORABLE = {"kl_weight": KL, "alignment_weight": ALIGNMENT}
_PICTURE_OPTIONS = (
    *("size", "crop_size", "image_mean", "image_std", "rescale_factor", "patch_size", "resample"),
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "image_grid_pinpoints"),
    *("min_pixels", "max_pixels"),
)


# -- what can be stored ----------------------------------------------------------------------------


def parts_of(stage: StageRecipe) -> frozenset[str]:
    """What a stage's losses need of stored targets."""
    return frozenset(part for name, part in _STORABLE.items() if getattr(stage, name))


def check_storable(recipe: Recipe) -> None:
    """Refuse what needs more of a teacher than targets that can be stored.

    Raises:
        ConfigError: a loss, an objective, a matching or an option; the message names it.
    """
    for number, stage in enumerate(recipe.stages, 1):
        where = f"stage {number} ({stage.stage})"
        others = [n for n in TEACHER_WEIGHTS if n not in _STORABLE and getattr(stage, n)]
        if others:
            options = " ".join(f"--{name.replace('_', '-')} 0" for name in others)
            raise ConfigError(
                f"teacher targets: {where}: expected no other loss with a teacher than kl_weight "
                f"and alignment_weight, because only what these need is stored; got "
                f"{', '.join(others)} above 0. Give {options}, or train with the teacher."
            )
    if any(ALIGNMENT in parts_of(stage) for stage in recipe.stages):
        _check_alignment(recipe)
    for option in ("packing", "streaming", "share_images"):
        if getattr(recipe, option):
            raise ConfigError(
                f"{option}: expected false with stored targets, which are found by the number of a "
                f"record and belong to one sample per row; got true. Give "
                f"--{option.replace('_', '-')} false, or train with the teacher."
            )
    if recipe.teacher_placement != "replicated":
        raise ConfigError(
            "teacher_placement: expected the default with stored targets, because no teacher is "
            f"placed; got {recipe.teacher_placement!r}. Leave --teacher-placement out."
        )


def _check_alignment(recipe: Recipe) -> None:
    objective = recipe.objective or PRESETS[recipe.preset]["objective"]
    if objective != STORED_OBJECTIVE:
        raise ConfigError(
            f"objective: expected {STORED_OBJECTIVE!r} with stored targets; got {objective!r}, "
            f"which needs the teacher's whole maps{_size_of_maps(recipe)}. Give --objective "
            f"{STORED_OBJECTIVE}, which is close to 'pooled' and not equal to it, or train with "
            "the teacher."
        )
    if recipe.matching == "adaptive":
        raise ConfigError(
            "matching: expected group or simple with stored targets, because 'adaptive' compares "
            "teacher and student when training begins; got 'adaptive'. Give --matching group, or "
            "train with the teacher."
        )


def _size_of_maps(recipe: Recipe) -> str:
    """How large the maps of one sample would be, where the sizes are known."""
    if not recipe.teacher:
        return ""
    visual = getattr(teacher_config(recipe), "image_seq_length", None)
    if not visual:
        return ""
    size = map_bytes(recipe.max_length, visual, layers=1) / 2**20
    return (
        f": up to {size:.1f} MiB in float16 for each matched layer of a sample of {visual} visual "
        f"and at most {recipe.max_length} tokens"
    )


# -- what must agree -------------------------------------------------------------------------------


def kl_rows(recipe: Recipe) -> str:
    """The rows of the logit loss: answer, or unshifted."""
    return "unshifted" if recipe.unshifted_kl_mask else "answer"


def common_facts(recipe: Recipe, processor: Any) -> dict[str, Any]:
    """What every part of the targets depends on, by name; hashes shortened."""
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    pictures = getattr(processor, "image_processor", None)
    options = {n: _plain(getattr(pictures, n, None)) for n in _PICTURE_OPTIONS}
    return {
        "teacher weights": weights_hash(recipe),
        "teacher dtype": recipe.teacher_dtype,
        "tokenizer": _hash(sorted(tokenizer.get_vocab().items())),
        "chat template": _hash(template),
        "image processor": {n: value for n, value in options.items() if value is not None},
    }


def _plain(value: Any) -> Any:
    """Sizes, tuples and enumerations as JSON has them."""
    if is_dataclass(value):
        value = vars(value)
    if hasattr(value, "items"):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return getattr(value, "value", value)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def weights_hash(recipe: Recipe) -> str:
    """Of the teacher's configuration and weights: all of their bytes, or the hub's commit.

    Raises:
        ConfigError: a folder without weights, or a hub name of which no commit is known.
    """
    source = Path(teacher_source(recipe))
    if source.is_dir():
        files = sorted([*source.glob("*.safetensors"), *source.glob("*.bin")])
        if files:
            return _hash([_file_hash(path) for path in (source / "config.json", *files)])
    else:
        commit = getattr(teacher_config(recipe), "_commit_hash", None)
        if commit:
            return str(commit)
    raise ConfigError(
        f"teacher: expected a folder with safetensors, or a model of the hub, whose weights the "
        f"stored targets are compared with; got {str(source)!r}. Give --teacher PATH."
    )


def teacher_config(recipe: Recipe) -> Any:
    return load_config(teacher_source(recipe), recipe.trust_remote_code)


def shared_vocabulary(recipe: Recipe, student_rows: int) -> int:
    """Tokens that teacher and student share, of a student with so many output embeddings."""
    config = teacher_config(recipe).get_text_config(decoder=True)
    return min(int(config.vocab_size), student_rows)


def data_facts(recipe: Recipe, number: int, data_set: Any) -> dict[str, Any]:
    """What the samples of a stage are made from; not where files lie, nor how many are used."""
    scenes = getattr(data_set, "scenes", None)
    if scenes is not None:
        return {
            "scenes": scenes.world.name,
            "split": scenes.split,
            "seed of the scenes": scenes.seed,
            "turns_mix": dict(scenes.turns_mix),
        }
    files = recipe.stages[number - 1].data or recipe.data
    return {
        "files": [{Path(f).name: _file_hash(Path(f))} for f in files],
        "max_length": recipe.max_length,
        "turns": recipe.turns,
    }


def require_length(data_set: Any, number: int) -> None:
    """Refuse streamed data of a stage: targets belong to samples that can be asked for by number.

    Raises:
        ConfigError: the data set has no length.
    """
    if not hasattr(data_set, "__len__"):
        raise ConfigError(
            f"data: stage {number}: expected files of known length with stored targets; got "
            f"streamed data ({type(data_set).__name__}). Copy the records into files, or train "
            "with the teacher."
        )


@functools.cache
def _file_hash(path: Path) -> str:
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return _hash([[p.name, describe(p)["sha256"]] for p in inside])


def matches_as_json(aligner: VisualAttentionAligner | None) -> dict[str, list[int]]:
    """Student layer -> teacher layers."""
    matches = (aligner.matches if aligner else None) or {}
    return {str(s): list(t) for s, t in sorted(matches.items())}


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of `wanted` differs, in words; of nested facts the innermost, on either side."""
    found = []
    for name, value in wanted.items():
        there = stored.get(name)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            both = {**dict.fromkeys(there), **value}
            found += [f"{name}, {text}" for text in differences(there, both)]
        elif there != value:
            found.append(f"{name}: {there!r} there, {value!r} here")
    return found


# -- for a run that reads them ---------------------------------------------------------------------


def stored_aligner(recipe: Recipe, student: PreTrainedModel) -> VisualAttentionAligner:
    """The aligner of a stage that reads targets: its teacher has no weights."""
    with unsharded_loading(), torch.device("meta"):
        teacher = AutoModelForImageTextToText.from_config(teacher_config(recipe))
    return recipe_aligner(recipe, teacher, student)


def recipe_aligner(
    recipe: Recipe, teacher: PreTrainedModel, student: PreTrainedModel
) -> VisualAttentionAligner:
    """The aligner that a recipe asks for."""
    return VisualAttentionAligner(
        teacher,
        student,
        preset=recipe.preset,
        matching=recipe.matching,
        layers=recipe.layers,
        objective=recipe.objective,
        layer_reduction=recipe.layer_reduction,
        backend=recipe.backend,
    )


def open_targets(
    recipe: Recipe,
    number: int,
    data_set: Any,
    processor: Any,
    student: PreTrainedModel | None = None,
    aligner: VisualAttentionAligner | None = None,
) -> StoredTargets:
    """The stored targets of a stage, after everything that they depend on has been compared.

    Args:
        number: of the stage, from 1.
        data_set: its encoded samples.
        student: as it is trained; None, before there is one, leaves out the shared vocabulary.
        aligner: of the run, None where no stage aligns attention; it too is left out before.

    Raises:
        ConfigError: what differs, by name; or targets that are missing or not whole.
    """
    assert recipe.teacher_targets is not None
    require_length(data_set, number)
    folder = Path(recipe.teacher_targets)
    index, stage = read_index(folder), recipe.stages[number - 1]
    parts, where = parts_of(stage), f"stage {number} ({stage.stage})"
    wanted = common_facts(recipe, processor)
    if KL in parts:
        wanted["kl rows"] = kl_rows(recipe)
    if KL in parts and student is not None:
        head: Any = student.get_output_embeddings()
        wanted["vocabulary"] = shared_vocabulary(recipe, head.weight.shape[0])
    if aligner is not None:
        wanted["matched layers"] = matches_as_json(aligner)
    facts = json.loads(json.dumps(data_facts(recipe, number, data_set)))
    near = min(index["data"], key=lambda entry: len(differences(entry["facts"], facts)))
    found = differences(index["facts"], wanted) + differences(near["facts"], facts)
    if not found and not parts <= {*near["parts"]}:
        found = [f"losses: targets of {' and '.join(near['parts'])} there, {where} has more"]
    if not found and near["samples"] < len(data_set):
        found = [f"samples: {near['samples']} there, {len(data_set)} in {where}"]
    if found:
        raise ConfigError(
            f"teacher_targets: {where}: the targets in {folder} are of something else: "
            f"{'; '.join(found)}. Give the options that they were made with, or make others with "
            "cdfast.targets in another folder."
        )
    plan = ShardPlan(near["number"], near["samples"], index["facts"]["samples per shard"])
    layers = [int(layer) for layer in index["facts"]["matched layers"]]
    return StoredTargets(folder, plan, parts, index["facts"]["vocabulary"], layers)
