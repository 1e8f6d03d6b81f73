"""Random damage to a LLaVA file: it loads, or a DataError names the file; never anything else."""

import copy
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from cdfast.data import DataError, load_dataset
from tests.cdfast.tiny_processors import llava_processor

PROCESSOR = llava_processor()
# What a value of a record is replaced by.
STRANGE = [None, True, -1, 10**40, 1e308, float("nan"), "", " ", "\0", "\ud800", "<image>", "</s>"]
STRANGE += ["a.png", "../a.png", "/", "http://x/a.png", "x" * 3000, [], {}, [[]], [None], {"": ""}]
STRANGE += [{"bytes": "x"}, {"path": "a.png"}, ["a.png", "a.png"], "human", "gpt", "system"]


def records():
    made = []
    for n in range(3):
        turns = [("human", "<image>\nWhat?" if n else "Hello"), ("gpt", "red")] * (1 + n // 2)
        turns = [{"from": role, "value": v.replace("<image>", "") if k else v}
                 for k, (role, v) in enumerate(turns)]  # fmt: skip
        made.append({"id": n, "conversations": turns, **({"image": "a.png"} if n else {})})
    return made


def places(value, found):
    """Every (container, key) below a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in list(pairs):
        found.append((value, key))
        if isinstance(below, (dict, list)):
            places(below, found)
    return found


def mutated_values(rng):
    made = records()
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(made, []))
        kind = rng.randrange(4)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == 2 and isinstance(container, dict):
            container[rng.choice(("image", "images", "messages", "from", "x"))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(STRANGE))
        if not made:
            break
    return json.dumps(made).encode()


def mutated_bytes(rng):
    out = bytearray(json.dumps(records(), indent=rng.choice((None, 1))).encode())
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(out)), rng.choice((1, 1, 2, 8, 60))
        kind = rng.randrange(4)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + size]
        elif kind == 2:
            out[at:at] = out[at : at + size]
        else:
            out[at:at] = rng.choice((b'"', b"[", b"{", b"}", b",", b"\\u", b"\\", b"\n", b"1e9999"))
        out = out or bytearray(b" ")
    return bytes(out)


def fuzz(folder, seeds):
    image = np.zeros((24, 24, 3), np.uint8)
    Image.fromarray(image).save(folder / "a.png")
    read = unnamed = 0
    for seed in seeds:
        rng = random.Random(seed)
        make, suffix = rng.choice((mutated_values, mutated_bytes)), rng.choice(("json", "jsonl"))
        content = make(rng)
        if suffix == "jsonl" and make is mutated_values:
            content = b"\n".join(json.dumps(r).encode() for r in json.loads(content))
        path = folder / f"d.{suffix}"
        path.write_bytes(content)
        for on_error in ("raise", "skip"):
            try:
                dataset = load_dataset(path, folder, PROCESSOR, on_error=on_error, max_length=300)
                encoded = [dataset[n] for n in range(len(dataset))]
            except DataError as error:
                named = re.match(rf"d\.{suffix}[,:].*expected .*Remedy: ", str(error), re.DOTALL)
                unnamed += named is None
            else:
                read += 1
                assert all((e["labels"] != -100).any() for e in encoded), seed
    assert unnamed == 0
    return read


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_load_or_are_named(tmp_path):
    assert 50 < fuzz(tmp_path, range(300)) < 550


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files_load_or_are_named(tmp_path):
    fuzz(tmp_path, range(300, 10_000))
