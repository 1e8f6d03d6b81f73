"""The model card, README.md beside the weights: what results.json of a run says, and no more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cdfast.config import ConfigError
from cdfast.report import STUDENT
from cdfast.sharing.card_text import Results, card_text, license_text, markdown
from cdfast.sharing.local_paths import names_only
from cdfast.storage import write_text
from cdfast.yaml_file import parse_yaml

CARD_FILE = "README.md"
# Where the folder has a README.md that somebody else wrote.
BESIDE_FILE = "MODEL_CARD.md"
RESULTS_FILE = "results.json"
MARKER = (
    "<!-- Written by cdfast, which writes it anew: remove this line to keep what you change. -->"
)
# What a model made of another one keeps of that model's card, where no results are known.
_TAKEN_OVER = (
    *("license", "license_name", "license_link", "base_model", "tags", "datasets", "language"),
)
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---\s*?(?:\n|$)", re.DOTALL)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def write_model_card(
    folder: Path,
    results: Results | None,
    *,
    license: str | None = None,
    fused: bool = False,
    front_matter: Mapping[str, Any] | None = None,
) -> Path:
    """Write the card of the model in a folder.

    Args:
        folder: with config.json and weights.
        results: what results.json of its run holds, or a part of it, such as `name` and `recipe`
            alone; what is missing is named as not measured.
        license: to state; None: that of the recipe.
        fused: `cdfast.fuse` has made it of the student that the results are of.
        front_matter: of the card of the model that it was made of, see `model_card`.

    Returns:
        The file: README.md, or MODEL_CARD.md where there is a README.md that cdfast did not write.
    """
    config = json.loads((folder / "config.json").read_text())
    card = model_card(results or {}, config, fused=fused, front_matter=front_matter)
    if license:
        set_license(card, license)
    path = folder / CARD_FILE
    if path.exists() and not is_ours(path.read_text(encoding="utf-8")):
        path = folder / BESIDE_FILE
    write_text(path, str(card))
    return path


def write_card_of(source: Path, folder: Path, *, fused: bool = False) -> Path:
    """Write the card of a model made of `source`.

    It is of the results of the run that `source` is in; anywhere else, such as in a folder that
    `cdfast.export` has written, it has the front matter of the card there.

    Raises:
        ConfigError: that front matter cannot be read.
    """
    found = source.resolve().parent / RESULTS_FILE
    if source.resolve().name == "model" and found.is_file():
        return write_model_card(folder, json.loads(found.read_text()), fused=fused)
    return write_model_card(
        folder, None, fused=fused, front_matter=_front_matter(source / CARD_FILE)
    )


def _front_matter(path: Path) -> dict[str, Any]:
    """Of a model card; empty where there is no card, or none in it."""
    found = _FRONT_MATTER.match(path.read_text(encoding="utf-8-sig")) if path.is_file() else None
    if found is None:
        return {}
    try:
        values = parse_yaml(found.group(1)) or {}
    except ValueError as error:
        raise ConfigError(f"{path}: front matter: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected front matter of names and values, as the hub reads it; got "
            f"{type(values).__name__}. Correct or remove it."
        )
    return values


def is_ours(text: str) -> bool:
    """Whether a README.md is a card that may be replaced."""
    return MARKER in text


def model_card(
    results: Results,
    config: Mapping[str, Any],
    *,
    fused: bool = False,
    front_matter: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card as huggingface_hub reads and writes it.

    Args:
        results: see `write_model_card`; paths of this machine are cut to names.
        config: of the model's config.json, whose `auto_map` says what code loading runs.
        fused: see `write_model_card`.
        front_matter: of the card of the model that it was made of, for where there are no results:
            license, base models, tags, data sets and languages are taken over.
    """
    recipe = results.get("recipe", {})
    base_models = [
        source for source in map(recipe.get, ("student", "teacher")) if source and on_hub(source)
    ]
    results = {**names_only(results), "recipe": _named(recipe)}
    name = str(results.get("name") or "student")
    found = list(_eval_results(results))
    distilled = ["compodistill", "distillation"] if recipe.get("teacher") else []
    kept = names_only({k: v for k, v in (front_matter or {}).items() if k in _TAKEN_OVER and v})
    tags = kept.pop("tags", [])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["cdfast", *distilled, *([tags] if isinstance(tags, str) else tags)],
        model_name=name if found else None,
        eval_results=found or None,
        **{"license": recipe.get("license"), "base_model": base_models or None, **kept},
    )
    # A name with two dashes is that of another repository on the hub.
    modules = {str(place).split("--")[-1].rpartition(".")[0] for place in _code(config)}
    text = card_text(
        results,
        code=[f"{module}.py" for module in sorted(modules)],
        fused=fused,
        license=data.get("license"),
        taken_over=bool(kept or tags),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{MARKER}\n\n# {markdown(name)}\n\n{text}\n")


def set_license(card: ModelCard, license: str) -> None:
    """State a license in a card that was written without one, or with another."""
    card.data["license"] = license
    for name in ("license_name", "license_link"):  # of the other one
        card.data.pop(name, None)
    card.text = re.sub(
        r"(?<=\n## License\n\n).*", lambda _: license_text(license), card.text, count=1
    )


def on_hub(source: str) -> bool:
    """Whether a model was named by its hub name: no folder here, and no embedded part."""
    return bool(_HUB_NAME.fullmatch(source)) and not Path(source).exists()


def _code(config: Mapping[str, Any]) -> list[Any]:
    return list((config.get("auto_map") or {}).values())


def _named(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with models and data by name, whether their paths are absolute or not."""
    named = names_only(dict(recipe))
    for role in ("teacher", "student", "vision_tower"):
        if recipe.get(role) and not on_hub(recipe[role]):
            named[role] = Path(recipe[role]).name
    return named


def _eval_results(results: Results) -> Iterator[EvalResult]:
    evaluation = results.get("evaluation") or {}
    student = evaluation.get("models", {}).get(STUDENT)
    if not student:
        return
    suite = str(evaluation["suite"])
    common: dict[str, Any] = {
        "task_type": "image-text-to-text",
        "dataset_type": suite,
        "dataset_name": f"{suite} (scenes of cdfast)",
        "dataset_split": evaluation.get("split"),
        "metric_type": "accuracy",
    }
    for group, value in student["averages"].items():
        yield EvalResult(
            **common, dataset_config=group, metric_value=value, metric_name=f"{group} mean accuracy"
        )
    for kind, entry in student["kinds"].items():
        yield EvalResult(
            **common,
            dataset_config=kind,
            metric_value=entry["accuracy"],
            metric_name=f"{kind} accuracy",
            metric_args={"questions": entry["n"], "ci95": list(entry["ci95"])},
        )
