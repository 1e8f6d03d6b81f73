"""The command: `python -m cdfast.push FOLDER USER/NAME [--private] [--license ID] [--dry-run]`.

Uploads the student of a finished run, or a folder that `cdfast.export` or `cdfast.fuse` has
written, to the Hugging Face hub: weights, configuration, processor, code and model card, and of a
run results.json and report.html. Checkpoints and optimizer states are not part of it, and paths of
this machine are cut to names in what is uploaded; the files here stay as they are.
`python -m cdfast.train ... --push-to-hub true --hub-model-id USER/NAME` does it after the run.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
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
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from cdfast.config import HUB_ARGUMENTS, ConfigError, Recipe
from cdfast.sharing.model_card import CARD_FILE, is_ours, model_card
from cdfast.sharing.upload_files import HubError, Target, upload_files

# Names of a model's weights: those of an earlier upload must not stay beside new ones.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_FAILURES = (HfHubHTTPError, HTTPError, OSError, ValueError)


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
    for variant, changed in recipe.compare.items():
        for name in HUB_ARGUMENTS:
            if name in changed or name in changed.get("arguments", {}):
                raise ConfigError(
                    f"compare.{variant}.{name}: expected it for the whole run, of which the main "
                    f"student is uploaded; got it for a variant. Give --{name.replace('_', '-')}."
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
        _validate(api, card)
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


def _validate(api: HfApi, card: ModelCard) -> None:
    # Not card.validate(): before huggingface_hub 2 it knows no other endpoint than its own.
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": str(card), "repoType": "model"},
        headers=build_hf_headers(),
    )
    if response.status_code == 400:
        said = "; ".join(str(e.get("message")) for e in response.json().get("errors", []))
        raise HubError(
            f"hub: license {card.data.get('license')!r}: expected a model card that the hub takes; "
            f"it says: {said}. Give another --license, or none."
        )
    hf_raise_for_status(response)


def _reason(error: Exception) -> str:
    """In one line; what the server says of its request goes before its address."""
    said = getattr(error, "server_message", None) or str(error)
    return " ".join(f"{type(error).__name__}: {said}".split()).rstrip(".")


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
            f"are in {source}. Repeat it with: {again(source, target, **options)}"
        ) from error
    return str(done.repo_url)


def _remote_card(api: HfApi, target: Target) -> str:
    try:
        path = api.hf_hub_download(target.repo, CARD_FILE, revision=target.revision)
    except EntryNotFoundError:  # deleted since it was listed
        return ""
    return Path(path).read_text(encoding="utf-8")


def again(source: Path, target: Target, *, license: str | None = None, report: bool = True) -> str:
    """The command that uploads a finished run as it was asked for."""
    words = ["python", "-m", "cdfast.push", str(source), target.repo]
    words += ["--private"] if target.private else []
    words += ["--revision", target.revision] if target.revision else []
    words += ["--license", license] if license else []
    words += [] if report else ["--no-report"]
    return shlex.join(words)


def prepare_upload(recipe: Recipe) -> None:
    """Before step 1 of a run; one process. Nothing where the recipe asks for no upload.

    Raises:
        HubError: see `check_upload`.
    """
    target = hub_target(recipe)
    if target is not None:
        values = {"name": recipe.name, "recipe": {"license": recipe.license}}
        check_upload(target, model_card(values, {}))


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
        check_upload(target, model_card(values, {}))
        print(push(options.folder, target, **chosen))
    except (ConfigError, HubError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
