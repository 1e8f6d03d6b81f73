"""What each stage trains on, and what is held out."""

from __future__ import annotations

import itertools
from typing import Any

from cdfast.config import EMBEDDED_SCENES, ConfigError, Recipe
from cdfast.data import load_dataset
from cdfast.probes import PROBE_SAMPLES
from cdfast.stages.run import Run


def uses_scenes(recipe: Recipe, number: int) -> bool:
    """Whether a stage trains on the embedded scenes."""
    data = recipe.stages[number - 1].data or recipe.data
    return len(data) == 1 and data[0] in EMBEDDED_SCENES


def stage_dataset(run: Run, number: int) -> Any:
    """The encoded training samples of a stage: of a preference stage, pairs of answers."""
    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    data = stage.data or recipe.data
    if uses_scenes(recipe, number):
        from cdfast.miniature.worlds import WORLDS
        from cdfast.synthetic import SceneDataset

        steps = stage.max_steps
        if steps < 1:
            raise ConfigError(
                f"max_steps: expected at least 1, because embedded scenes are generated step by "
                f"step; got {steps} in stage {number} ({stage.stage}). Give --max-steps N."
            )
        per_step = stage.batch_size * stage.gradient_accumulation_steps * run.state.num_processes
        mix: dict[str, Any] = {"turns_mix": stage.turns_mix} if stage.turns_mix else {}
        scenes = SceneDataset(
            "train",
            seed=recipe.seed * 100 + number,
            size=steps * per_step,
            world=WORLDS[data[0]],
            **mix,
        )
        return _encoded_scenes(scenes, run.processor, stage.pairs)
    roots = stage.image_root or recipe.image_root
    if recipe.streaming:
        return _stream(run, number, data, roots)
    opened = _opened(run, data, roots, stage.pairs)
    return _with_shared_images(run, opened) if recipe.share_images else opened


def _stream(run: Run, number: int, data: list[str], roots: list[str]) -> Any:
    """The samples of a stage's files, read as they are needed."""
    from cdfast.streaming import StreamedDataset

    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    return StreamedDataset(
        data,
        roots,
        run.processor,
        batch_size=stage.batch_size,
        workers=recipe.workers,
        rank=run.state.process_index,
        world_size=run.state.num_processes,
        seed=recipe.seed * 100 + number,
        window=recipe.shuffle_window,
        max_length=recipe.max_length,
        turns=recipe.turns,
        on_error=recipe.on_error,
        max_pixels=recipe.max_pixels,
        pairs=stage.pairs,
    )


def _with_shared_images(run: Run, opened: Any) -> Any:
    """The samples of files, in which records that show the same image are one; made once."""
    from cdfast.shared_images import SharedImages

    key = id(opened)
    if key not in run.datasets:
        run.datasets[key] = SharedImages(opened)
        run.say(run.datasets[key].describe())
    return run.datasets[key]


def _encoded_scenes(scenes: Any, processor: Any, pairs: bool) -> Any:
    from cdfast.miniature.preference_scenes import PreferenceScenes
    from cdfast.synthetic import EncodedScenes

    return (PreferenceScenes if pairs else EncodedScenes)(scenes, processor)


def _opened(run: Run, data: list[str], roots: list[str], pairs: bool = False) -> Any:
    """The samples of files, opened once in a run."""
    recipe, key = run.recipe, (*data, pairs, *roots)
    if key not in run.datasets:
        run.datasets[key] = load_dataset(
            data,
            roots,
            run.processor,
            max_length=recipe.max_length,
            turns=recipe.turns,
            on_error=recipe.on_error,
            max_pixels=recipe.max_pixels,
            pairs=pairs,
        )
    return run.datasets[key]


def held_out(run: Run, pairs: bool = False) -> Any:
    """Samples that no stage trains on: of eval_data, or fresh scenes; None where there are none."""
    recipe, number = run.recipe, len(run.recipe.stages)
    if recipe.eval_data:
        return _opened(run, recipe.eval_data, recipe.eval_image_root or recipe.image_root, pairs)
    if uses_scenes(recipe, number):
        from cdfast.synthetic import SceneDataset

        trained = stage_dataset(run, number).scenes
        size = max(64, recipe.eval_samples)
        fresh = SceneDataset(
            "validation", size=size, turns_mix=trained.turns_mix, world=trained.world
        )
        return _encoded_scenes(fresh, run.processor, pairs)
    return None


def probe_samples(run: Run) -> Any:
    """Samples to compare attention on at the end: held out where there are any, else trained on."""
    samples = held_out(run)
    if samples is None:
        numbers = range(1, len(run.recipe.stages) + 1)
        single = [n for n in numbers if not run.recipe.stages[n - 1].pairs]
        samples = stage_dataset(run, (single or numbers)[-1])
        if hasattr(samples, "first"):  # a stream, which has no end
            shown = (sample for sample in samples.first() if sample["images"])
            samples = list(itertools.islice(shown, PROBE_SAMPLES))
    return samples


def trained_scenes(run: Run) -> set[Any]:
    """Keys of the embedded scenes that the stages train on; empty for other data."""
    numbers = range(1, len(run.recipe.stages) + 1)
    scenes = [stage_dataset(run, n).scenes for n in numbers if uses_scenes(run.recipe, n)]
    return {key for dataset in scenes for key in dataset.scene_keys()}
