"""What a process opens and connects to, and records that try to make it do so."""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from cdfast.data import VisionTextCollator, load_dataset

_events: list | None = None


def _listen(event, details):
    if _events is not None and event in ("open", "socket.connect", "socket.getaddrinfo"):
        _events.append((event, details[0] if event == "open" else details[:2]))


sys.addaudithook(_listen)  # for good: hooks cannot be removed


@contextlib.contextmanager
def watched():
    """The events inside the block."""
    global _events
    _events = []
    try:
        yield _events
    finally:
        _events = None


def opened_below(events, folder):
    paths = [os.fsdecode(p) for e, p in events if e == "open" and isinstance(p, (str, bytes, Path))]
    return [p for p in paths if Path(os.path.realpath(p)).is_relative_to(folder)]


def connections(events):
    """Look-ups and connections over a network; loader workers speak over local sockets."""
    return [
        (event, details)
        for event, details in events
        if event == "socket.getaddrinfo"
        or (event == "socket.connect" and details[0].family != socket.AF_UNIX)
    ]


def talk(image, **other):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    return {"id": "x", "image": image, "conversations": turns, **other}


def inline(part):
    content = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return {"id": "x", "messages": turns}


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def read_all(dataset, workers=0):
    return list(DataLoader(dataset, num_workers=workers, collate_fn=VisionTextCollator(0)))


def read_past(path, root, processor, **options):
    """The data set after all its records were read, bad ones skipped."""
    dataset = load_dataset(path, root, processor, on_error="skip", **options)
    read_all(dataset)
    return dataset
