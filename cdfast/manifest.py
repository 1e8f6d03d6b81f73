"""The manifest of a checkpoint: size and SHA-256 of every file in it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
FORMAT = 1
PREFIX = "checkpoint-"
_CHUNK = 1 << 20


def checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, the newest (highest step) first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(rf"{PREFIX}\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def manifest_text(content: dict[str, Any]) -> str:
    content = {"format": FORMAT, **content}
    content["sha256"] = _content_hash(content)
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _content_hash(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    path = checkpoint / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"it has no {MANIFEST_FILE}"
    except (OSError, ValueError) as error:
        return {}, f"{MANIFEST_FILE} cannot be read: {error}"
    if not isinstance(manifest, dict) or manifest.get("sha256") != _content_hash(manifest):
        return {}, f"{MANIFEST_FILE} is damaged"
    if manifest["format"] != FORMAT:
        return {}, f"{MANIFEST_FILE} has format {manifest['format']}; this version reads {FORMAT}"
    return manifest, None


def is_complete(checkpoint: Path) -> bool:
    """A quick look, without hashes: for a message, not for resuming."""
    manifest, problem = read_manifest(checkpoint)
    files = {} if problem else manifest["files"]
    paths = {checkpoint / name: entry["size"] for name, entry in files.items()}
    return bool(paths) and all(p.is_file() and p.stat().st_size == s for p, s in paths.items())
