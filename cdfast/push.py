"""The command: `python -m cdfast.push FOLDER USER/NAME [--private] [--license ID] [--dry-run]`.

Uploads the student of a finished run, or a folder that `cdfast.export` or `cdfast.fuse` has
written, to the Hugging Face hub: weights, configuration, processor, code and model card, and of a
run results.json and report.html. Checkpoints and optimizer states are not part of it, and paths of
this machine are cut to names in what is uploaded; the files here stay as they are.
`python -m cdfast.train ... --push-to-hub true --hub-model-id USER/NAME` does it after the run.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,  # of the HTTP client that this version uses
    LocalTokenNotFoundError,
)

from cdfast.card_text import HERE
from cdfast.config import HUB_ARGUMENTS, ConfigError, Recipe
from cdfast.local_paths import names_only, paths_in, without_paths
from cdfast.model_card import (
    CARD_FILE,
    RESULTS_FILE,
    is_ours,
    model_card,
    set_license,
)
from cdfast.report import REPORT_FILE

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".py", ".txt", ".model", ".md")
# Names of a model's weights: those of an earlier upload must not stay beside new ones.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# Files whose values may name a folder they were loaded from. Never a vocabulary: "/usr" may be a
# token of it.
_CONFIGURATIONS = re.compile(r"(\w*config|alignment)\.json")
_ORIGIN_KEYS = ("_name_or_path", "name_or_path")
_FAILURES = (HfHubHTTPError, HTTPError, OSError, ValueError)


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


def hub_target(recipe: Recipe) -> Target | None:
    """Where a recipe asks its student to be uploaded when all stages are done; None: nowhere.

    Raises:
        ConfigError: options about the hub that contradict each other or are not done.
    """
    for stage in recipe.stages:
        for name in HUB_ARGUMENTS:
            if name in stage.arguments:
                raise ConfigError(
                    f"{stage.stage}.{name}: expected it for the whole run, because the student is "
                    f"uploaded when all stages are done; got it for one stage. Give "
                    f"--{name.replace('_', '-')}."
                )
    given = {name: recipe.arguments[name] for name in HUB_ARGUMENTS if name in recipe.arguments}
    wanted = given.pop("push_to_hub", False)
    if not wanted:
        if given:
            raise ConfigError(
                f"push_to_hub: expected true beside {', '.join(given)}; got none. Give "
                "--push-to-hub true, or leave them out."
            )
        return None
    if given.get("hub_always_push") or str(given.get("hub_strategy", "end")) != "end":
        raise ConfigError(
            "hub_strategy, hub_always_push: expected hub_strategy end, or neither: only the "
            "finished student is uploaded, because checkpoints hold optimizer states. Leave them "
            "out; python -m cdfast.export makes a folder of a checkpoint that can be uploaded."
        )
    repo = given.get("hub_model_id")
    return Target(_checked_repo(repo), given.get("hub_private_repo"), given.get("hub_revision"))


def _checked_repo(repo: Any) -> str:
    if not isinstance(repo, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise ConfigError(
            f"hub_model_id: expected USER/NAME or ORGANIZATION/NAME; got {repo!r}. Give "
            "--hub-model-id."
        )
    return repo


def check_upload(target: Target, card: ModelCard, api: HfApi | None = None) -> None:
    """Make sure, before a run of days, that its student can be uploaded; makes the repository.

    Raises:
        HubError: offline, not logged in, no right to write, a public repository where a private one
            is asked for, or a card that the hub refuses (a license it does not know).
    """
    api = api or HfApi()
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            "HF_HUB_OFFLINE: expected it unset or 0, because the student is to be uploaded; got 1. "
            "Unset it (and TRANSFORMERS_OFFLINE), or leave the upload out and do it later with "
            "python -m cdfast.push."
        )
    try:
        api.whoami()
    except LocalTokenNotFoundError as error:
        raise HubError(
            "hub: expected a login; found no token. Run `hf auth login`, or set HF_TOKEN."
        ) from error
    except _FAILURES as error:
        raise HubError(
            f"hub: the login cannot be checked: {_reason(error)}. Run `hf auth login` with a token "
            "that may write, and check the connection."
        ) from error
    try:
        _make_repository(api, target)
        card.validate()
    except _FAILURES as error:
        raise HubError(f"hub: {target.repo} cannot be used: {_reason(error)}.") from error


def _make_repository(api: HfApi, target: Target) -> None:
    api.create_repo(target.repo, private=target.private, exist_ok=True)
    api.auth_check(target.repo, write=True)
    if target.private and not api.model_info(target.repo).private:
        raise HubError(
            f"hub: {target.repo}: expected a private repository; it exists already and is public. "
            "Make it private in its settings, or give another name."
        )
    if target.revision:
        api.create_branch(target.repo, branch=target.revision, exist_ok=True)


def _reason(error: Exception) -> str:
    """In one line; what the server says of its request goes before its address."""
    said = getattr(error, "server_message", None) or str(error)
    return " ".join(f"{type(error).__name__}: {said}".split()).rstrip(".")


# -- what is uploaded ------------------------------------------------------------------------------


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
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix in _MODEL_FILES and not path.name.startswith("_"):
            is_text = _CONFIGURATIONS.fullmatch(path.name)
            files[path.name] = _configuration(path) if is_text else path
    files[CARD_FILE] = _card(model, source, target, license)
    results = source / RESULTS_FILE
    if model != source:
        content = json.loads(results.read_text())
        files[RESULTS_FILE] = (json.dumps(names_only(content), indent=1) + "\n").encode()
        page = source / REPORT_FILE
        if report and page.is_file():
            files[REPORT_FILE] = _report(page, content)
    return files


def _configuration(path: Path) -> bytes:
    """A configuration without the folder it was loaded from."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cleaned(v) for k, v in value.items() if k not in _ORIGIN_KEYS}
        return [cleaned(v) for v in value] if isinstance(value, list) else names_only(value)

    content = cleaned(json.loads(path.read_text()))
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _card(model: Path, source: Path, target: Target, license: str | None) -> bytes:
    """README.md, made where there is none; a card of somebody else is taken as it is."""
    path = model / CARD_FILE
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        results = json.loads((source / RESULTS_FILE).read_text()) if model != source else {}
        kind = json.loads((model / "config.json").read_text()).get("model_type", "")
        text = str(model_card(results, model_type=kind))
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


# -- the upload ------------------------------------------------------------------------------------


def push(source: Path, target: Target, *, api: HfApi | None = None, **options: Any) -> str:
    """Upload in one commit; one process.

    A README.md in the repository that cdfast did not write is kept. Weights of an earlier upload
    that have no successor of their name are deleted.

    Args:
        source, target, options: see `upload_files`.

    Returns:
        The address of the repository.

    Raises:
        HubError: something is missing here, or the hub refuses; the message has the command that
            repeats the upload.
    """
    api = api or HfApi()
    files = upload_files(source, target, **options)
    try:
        there = api.list_repo_files(target.repo, revision=target.revision)
        if CARD_FILE in there and not is_ours(_remote_card(api, target)):
            print(f"{target.repo}: keeps its own {CARD_FILE}, which cdfast did not write")
            del files[CARD_FILE]
        stale = [n for n in there if _WEIGHTS.fullmatch(n) and n not in files]
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(
            target.repo,
            operations,
            commit_message=f"Upload of {source.resolve().name} by cdfast",
            revision=target.revision,
        )
    except _FAILURES as error:
        raise HubError(
            f"hub: upload to {target.repo} failed: {_reason(error)}. Nothing is lost: the files "
            f"are in {source}. Repeat it with: {again(source, target)}"
        ) from error
    return str(done.repo_url)


def _remote_card(api: HfApi, target: Target) -> str:
    try:
        path = api.hf_hub_download(target.repo, CARD_FILE, revision=target.revision)
    except EntryNotFoundError:  # deleted since it was listed
        return ""
    return Path(path).read_text(encoding="utf-8")


def again(source: Path, target: Target) -> str:
    """The command that uploads a finished run."""
    words = ["python", "-m", "cdfast.push", str(source), target.repo]
    words += ["--private"] if target.private else []
    words += ["--revision", target.revision] if target.revision else []
    return shlex.join(words)


def prepare_upload(recipe: Recipe) -> None:
    """Before step 1 of a run; one process. Nothing where the recipe asks for no upload.

    Raises:
        HubError: see `check_upload`.
    """
    target = hub_target(recipe)
    if target is not None:
        values = {"name": recipe.name, "recipe": {"license": recipe.license}}
        check_upload(target, model_card(values, model_type=""))


def push_run(recipe: Recipe, folder: Path) -> None:
    """After a run; one process. Nothing where the recipe asks for no upload.

    Raises:
        HubError: see `push`.
    """
    target = hub_target(recipe)
    if target is not None:
        print(f"uploading {folder} to {target.repo}", flush=True)
        print(f"hub      {push(folder, target)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m cdfast.push`."""
    parser = argparse.ArgumentParser(
        prog="python -m cdfast.push",
        description="Upload the student of a finished run, or a model's folder, to the hub.",
    )
    parser.add_argument("folder", type=Path, help="of the run (runs/mine), or of a model")
    parser.add_argument("repo", metavar="USER/NAME", help="where to; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="for chosen people only")
    parser.add_argument("--revision", help="branch (main)")
    parser.add_argument("--license", help="for the card, as the hub names it, such as apache-2.0")
    parser.add_argument(
        "--no-report", action="store_true", help="without report.html, which shows pictures"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the files and stop")
    options = parser.parse_args(argv)
    try:
        target = Target(_checked_repo(options.repo), options.private or None, options.revision)
        chosen = {"license": options.license, "report": not options.no_report}
        if options.dry_run:
            for name, content in upload_files(options.folder, target, **chosen).items():
                size = content.stat().st_size if isinstance(content, Path) else len(content)
                print(f"{size:>14,}  {name}")
            return
        values = {"name": target.repo, "recipe": {"license": options.license}}
        check_upload(target, model_card(values, model_type=""))
        print(push(options.folder, target, **chosen))
    except (ConfigError, HubError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
