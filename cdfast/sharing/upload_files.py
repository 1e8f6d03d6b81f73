"""What an upload to the hub consists of: files as they are, and those without paths of here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from cdfast.report import REPORT_FILE
from cdfast.sharing.card_text import HERE
from cdfast.sharing.local_paths import names_only, paths_in, without_paths
from cdfast.sharing.model_card import CARD_FILE, RESULTS_FILE, is_ours, model_card, set_license

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".py", ".txt", ".model", ".md")
# Where transformers writes files of a model: beside the weights, and below them the chat templates
# beyond the first, and the tokenizers of a processor that has several (`qformer_tokenizer`).
_MODEL_PLACES = ("*", "additional_chat_templates/*.jinja", "*_tokenizer/*")
_CONFIGURATIONS = re.compile(r"\w*config\.json")
# No other field is touched: what looks like a path may be a token, such as "[/INST]".
_IS_PATH = re.compile(r"\w*(name_or_path|_path|_file|_dir|_folder)").fullmatch


class HubError(RuntimeError):
    """The hub cannot be used as asked; says why and what to do."""


@dataclass(frozen=True)
class Target:
    """Where to upload.

    Attributes:
        repo: user or organization, and name.
        private: of a repository that is made; None: as the account has it.
        revision: a branch; None: main.
    """

    repo: str
    private: bool | None = None
    revision: str | None = None


def upload_files(
    source: Path, target: Target, *, license: str | None = None, report: bool = True
) -> dict[str, Path | bytes]:
    """Name in the repository -> file here, or content where it differs from the file.

    Args:
        source: folder of a finished run, or of a model.
        target: its name goes into the card.
        license: for the card; None: what it states already.
        report: upload report.html too, where there is one.

    Raises:
        HubError: there is no finished run and no model in the folder.
    """
    is_run = (source / RESULTS_FILE).is_file() and (source / "model" / "config.json").is_file()
    model = source / "model" if is_run else source
    if not (model / "config.json").is_file():
        raise HubError(
            f"{source}: expected a finished run (model/ and {RESULTS_FILE}), or a folder with "
            "config.json; found neither. A run that was stopped goes on with --resume; a "
            "checkpoint is written as a model by python -m cdfast.export."
        )
    if not any(model.glob("*.safetensors")):
        raise HubError(f"{model}: expected weights (*.safetensors); found none.")
    files: dict[str, Path | bytes] = {}
    for path in sorted(path for place in _MODEL_PLACES for path in model.glob(place)):
        if path.is_file() and path.suffix in _MODEL_FILES and not path.name.startswith("_"):
            files[path.relative_to(model).as_posix()] = _without_origin(path)
    files[CARD_FILE] = _card(model, source, target, license)
    results = source / RESULTS_FILE
    if model != source:
        content = json.loads(results.read_text())
        files[RESULTS_FILE] = (json.dumps(names_only(content), indent=1) + "\n").encode()
        page = source / REPORT_FILE
        if report and page.is_file():
            files[REPORT_FILE] = _report(page, content)
    return files


def _without_origin(path: Path) -> Path | bytes:
    """A configuration whose fields for paths have names instead; every other file as it is."""
    if not _CONFIGURATIONS.fullmatch(path.name):
        return path

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: names_only(v) if _IS_PATH(k) else cleaned(v) for k, v in value.items()}
        return [cleaned(v) for v in value] if isinstance(value, list) else value

    content = json.loads(path.read_text(encoding="utf-8"))
    if (changed := cleaned(content)) == content:
        return path
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _card(model: Path, source: Path, target: Target, license: str | None) -> bytes:
    """README.md, made where there is none; a card of somebody else is taken as it is."""
    path = model / CARD_FILE
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        results = json.loads((source / RESULTS_FILE).read_text()) if model != source else {}
        text = str(model_card(results, json.loads((model / "config.json").read_text())))
    if not is_ours(text):
        if license:
            raise HubError(
                f"{path}: it was not written by cdfast, so --license is not put into it. State the "
                "license there, and leave --license out."
            )
        return text.encode()
    card = ModelCard(text)
    if license:
        set_license(card, license)
    return str(card).replace(HERE, target.repo).encode()


def _report(page: Path, results: Mapping[str, Any]) -> bytes:
    """report.html without paths: those of every file of the run that it is made of."""
    paths = paths_in(results) | {str(page.parent.resolve()), str(Path.home())} - {"/"}
    for name in ("analysis/analysis.json", "analysis/explorer.json", "compare.json"):
        if (page.parent / name).is_file():
            paths |= paths_in(json.loads((page.parent / name).read_text()))
    for path in page.parent.glob("compare/*/analysis/analysis.json"):
        paths |= paths_in(json.loads(path.read_text()))
    return without_paths(page.read_text(encoding="utf-8"), paths).encode()
