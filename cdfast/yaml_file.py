"""YAML of strangers: plain values only, no key twice, and no aliases that grow without bound.

`yaml.safe_load` runs no code, but it keeps the last of two equal keys without a word, and the
aliases of a file of a few lines ("billion laughs") become gigabytes as soon as they are copied or
printed. So the node graph is measured, with every alias counted as often as it is used, before
values are made of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_NODES = 100_000


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        ValueError: no valid YAML, a Python tag, a key that stands twice, an alias of itself, or
            aliases that stand for more than `MAX_NODES` values; the message has the position.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"no valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError("no valid YAML: nested too deeply; flatten it") from error
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML file.

    Raises:
        ValueError: as `parse_yaml`; or the file cannot be read, is no UTF-8, or is too large.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(
                f"expected a recipe of at most {MAX_BYTES:,} bytes; got {size:,}. Check that it is "
                "the file you meant."
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no valid YAML: expected UTF-8; got {error}. Save it again.") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error}. Check the path and its permissions.") from error
    return parse_yaml(text)


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values below a node, each alias counted wherever it is used."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(f"no valid YAML: an alias of itself{node.start_mark}; remove it")
        return sizes[id(node)]
    sizes[id(node)] = 0  # not measured yet: meeting it again below itself is a cycle
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node)
        below = [child for pair in node.value for child in pair]
    else:
        below = node.value
    size = 1 + sum(_expanded_size(child, sizes) for child in below)
    if size > MAX_NODES:
        raise ValueError(
            f"expected at most {MAX_NODES:,} values with aliases written out; got {size:,}"
            f"{node.start_mark}. Write them out, or remove the aliases."
        )
    sizes[id(node)] = size
    return size


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        # `<<` merges mappings and may stand several times.
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise ValueError(
                    f"no valid YAML: the key {key.value!r} stands twice{key.start_mark}. Keep one."
                )
            seen.add(key.value)
