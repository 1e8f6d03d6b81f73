"""Bad records and files, each through `load_dataset`: the file, the field and the remedy are named.

What test_data.py has already is not repeated here.
"""

import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cdfast.data import DataError, VisionTextCollator, load_dataset
from tests.cdfast.tiny_processors import llava_processor, supervised

PROCESSOR = llava_processor()


def load(path, root, **options):
    return load_dataset(path, root, PROCESSOR, **options)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for n, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(n).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def talk(question="<image>\nWhat?", answer="red", image="a.png", **other):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "good", "image": image, "conversations": turns, **other}


def asked(value, key="value", **other):
    """A record whose question turn has another value."""
    record = {**talk(), "id": "bad", **other}
    record["conversations"][0][key] = value
    return record


def said(content, role="user", **other):
    turns = [{"role": role, "content": content}, {"role": "assistant", "content": "red"}]
    return {"id": "bad", "messages": turns, **other}


def as_lines(*records):
    """JSON lines, with bytes as they are."""
    return b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records)


DEEP = b'{"id": "bad", "image": ' + b"[" * 5000 + b"]" * 5000 + b"}"
HUGE = b'{"id": ' + b"9" * 5000 + b"}"
TWICE = b'{"id": "bad", "image": "a.png", "image": "b.png", "conversations": []}'
NESTED_TWICE = b'{"id": "bad", "conversations": [{"from": "human", "from": "gpt"}]}'
# Record -> the field, what came, and the remedy that the error names.
RECORDS = {
    "value is null": (asked(None), "conversations[0].value", "None", "correct the turn"),
    "value is NaN": (asked(float("nan")), "conversations[0].value", "nan", "correct the turn"),
    "value is a list": (asked(["What?"]), "conversations[0].value", "What", "correct the turn"),
    "from is null": (asked(None, "from"), "conversations[0].from", "None", "correct the turn"),
    "from is in capitals": (asked("Human", "from"), "conversations[0].from", "Human", "correct"),
    "conversations is null": (
        talk(id="bad") | {"conversations": None},
        "conversations",
        "None",
        "remove the record",
    ),
    "turn is null": (
        talk(id="bad") | {"conversations": [None]},
        "conversations[0]",
        "None",
        "turn",
    ),
    "turn is a list": (talk(id="bad") | {"conversations": [[]]}, "conversations[0]", "[]", "turn"),
    "mark in the system turn": (
        talk(id="bad")
        | {"conversations": [{"from": "system", "value": "<image>"}, *talk()["conversations"]]},
        "conversations[0]",
        "turn of system",
        "move the image",
    ),
    "question of spaces": (asked("  \n"), "conversations[0]", "empty", "remove the turn"),
    "mark without an image": (talk(id="bad", image=None), "image", "0 images and 1", "match"),
    "image without a mark": (asked("What?"), "image", "1 images and 0", "match"),
    "two marks, one image": (asked("<image><image>"), "image", "1 images and 2", "match"),
    "empty list of images": (talk(id="bad", image=[]), "image", "0 images", "match"),
    "image is true": (talk(id="bad", image=True), "image[0]", "True", "correct or remove"),
    "image is a dict": (talk(id="bad", image={"file": "a"}), "image[0]", "file", "correct or"),
    "image is a list of numbers": (talk(id="bad", image=[1, 2]), "image[0]", "1", "correct or"),
    "image is a list in a list": (
        talk(id="bad", image=[["a.png"]]),
        "image[0]",
        "a.png",
        "correct",
    ),
    "image is null in a list": (talk(id="bad", image=[None]), "image[0]", "None", "correct or"),
    "image is spaces": (talk(id="bad", image="  "), "image[0]", "'  '", "relative path"),
    "image has a surrogate": (talk(id="bad", image="\ud800.png"), "image[0]", "ud800", "path"),
    "image has a name of 5000": (talk(id="bad", image="x" * 5000), "image[0]", "xxx", "path"),
    "image and images": (talk(id="bad", images=["b.png"]), "image", "both", "remove one"),
    "surrogate in the text": (asked("<image>\n\ud800"), "messages[0]", "ud800", "lone"),
    "too deep": (DEEP, "record", "RecursionError", "repair it"),
    "a number of 5000 digits": (HUGE, "record", "digits", "repair it"),
    "a key twice": (TWICE, "record", "'image' stands twice", "repair it"),
    "a key twice in a turn": (NESTED_TWICE, "record", "'from' stands twice", "repair it"),
    "no UTF-8": (b'{"id": "\xff"}', "record", "UnicodeDecodeError", "repair it"),
    "cut off": (as_lines(talk())[:50], "record", "JSONDecodeError", "repair it"),
    "two records in a line": (as_lines(talk()) * 2, "record", "Extra data", "repair it"),
    "a number": (b"17", "record", "17", "remove it"),
    "null": (b"null", "record", "None", "remove it"),
}
MESSAGES = {
    "messages is a dict": (said("q") | {"messages": {}}, "messages", "{}", "remove the record"),
    "messages is null": (said("q") | {"messages": None}, "messages", "None", "remove the record"),
    "role is missing": (said("q", None), "messages[0].role", "None", "correct the turn"),
    "role is tool": (said("q", "tool"), "messages[0].role", "tool", "correct the turn"),
    "content is null": (said(None), "messages[0].content", "None", "correct the turn"),
    "content is a dict": (said({}), "messages[0].content", "{}", "correct the turn"),
    "content is empty": (said([]), "messages[0]", "empty", "remove the turn"),
    "part is null": (said([None]), "messages[0].content[0]", "None", "correct the part"),
    "part is a string": (said(["q"]), "messages[0].content[0]", "q", "correct the part"),
    "part of another type": (
        said([{"type": "video"}]),
        "messages[0].content[0]",
        "video",
        "correct the part",
    ),
    "text is a number": (
        said([{"type": "text", "text": 3}]),
        "messages[0].content[0]",
        "3",
        "correct the part",
    ),
    "a mark in a text part": (
        said([{"type": "text", "text": "<image> q"}]),
        "messages[0]",
        "'<image>' in",
        "use an image part",
    ),
    "image part of a number": (
        said([{"type": "image", "image": 7}, {"type": "text", "text": "q"}]),
        "image part[0]",
        "7",
        "correct or remove",
    ),
    "image part without an image": (said([{"type": "image"}]), "image", "0 images and 1", "match"),
    "question only": (
        {"id": "bad", "messages": [{"role": "user", "content": "q"}]},
        "messages",
        "user",
        "correct or remove",
    ),
    "two questions": (
        {"id": "bad", "messages": [{"role": "user", "content": "q"}, *said("q")["messages"]]},
        "messages",
        "user user assistant",
        "correct or remove",
    ),
}


def same(a, b):
    assert a["source"].split(", ")[0] == b["source"].split(", ")[0]
    assert torch.equal(a["input_ids"], b["input_ids"])
    assert torch.equal(a["labels"], b["labels"])
    assert all(torch.equal(a["images"][k], b["images"][k]) for k in b["images"])


@pytest.mark.parametrize("name", [*RECORDS, *MESSAGES])
def test_bad_record_is_named_or_left_out_alone(tmp_path, root, name):
    record, field, got, remedy = {**RECORDS, **MESSAGES}[name]
    good, other = talk(), talk(image="b.png", answer="green")
    if name in MESSAGES:
        good, other = said("Hello", id="good"), said("And?", id="good")
    path = tmp_path / "d.jsonl"
    path.write_bytes(as_lines(good, record, other))
    with pytest.raises(DataError) as error:
        load(path, root)
    assert error.value.source.startswith("d.jsonl, record 1 (line 2")
    if isinstance(record, dict):
        assert "id bad" in error.value.source
    assert error.value.field == field
    assert got in error.value.got
    assert error.value.expected
    assert remedy in error.value.remedy
    with pytest.warns(UserWarning, match=r"1 records left out.*d\.jsonl, record 1"):
        kept = load(path, root, on_error="skip")
    assert sum(kept.skipped.values()) == 1
    path.write_bytes(as_lines(good, other))
    alone = load(path, root)
    assert len(kept) == len(alone) == 2
    for n in range(2):
        same(kept[n], alone[n])


WHOLE = json.dumps([talk(), talk(image="b.png")], indent=1).encode()
# Bytes of a .json file -> where the error is, what came, and the remedy.
FILES = {
    "cut after the first record": (WHOLE[: len(WHOLE) // 2 + 5], r", line \d+", "column", "repair"),
    "cut in the last byte": (WHOLE[:-1], ", line 30", "',' or ']'", "repair"),
    "comma at the end": (WHOLE[:-2] + b",\n]", ", line 30", "Expecting value", "repair"),
    "more behind the list": (WHOLE + b"[]", ", line 30", "Extra data", "repair"),
    "of no bytes": (b"", ", line 1", "Expecting value", "repair"),
    "UTF-16": (WHOLE.decode().encode("utf-16"), ": file", "UnicodeDecodeError", "repair"),
    "Latin-1": ('["é"]'.encode("latin-1"), ": file", "UnicodeDecodeError", "repair"),
    "a list in a list": (b"[[]]", ": file", "none of them in any record", "convert"),
    "a string": (b'"conversations"', ": file", "a JSON str", "list"),
    "NaN": (b"NaN", ": file", "a JSON float", "list"),
    "5000 digits": (b'[{"id": 1}, %s]' % HUGE, ": file", "record 1: ValueError", "correct"),
    "too deep": (b"[" + DEEP + b"]", ": file", "record 0: RecursionError", "correct"),
    "zero bytes inside": (WHOLE.replace(b"red", b"r\0d"), ", line", "control character", "repair"),
}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("name", FILES)
def test_bad_json_file_is_named_with_the_place(tmp_path, root, name, on_error):
    content, where, got, remedy = FILES[name]
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"^d\.json{where}") as error:
        load(tmp_path / "d.json", root, on_error=on_error)
    assert error.value.field == "file"
    assert got in error.value.got
    assert remedy in error.value.remedy


def make_special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to(path.parent / "absent")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "broken link"])
def test_special_file_for_data_does_not_hang(tmp_path, root, kind, suffix):
    path = tmp_path / f"d.{suffix}"
    make_special(path, kind)
    wanted = {"folder": "can open", "broken link": "existing file"}.get(kind, "regular file")
    with pytest.raises(DataError, match=rf"^d\.{suffix}: file: expected .*{wanted}.*Remedy: \w+"):
        load(path, root)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows, name="d.parquet"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name)
        return tmp_path / name

    return write


def test_parquet_of_other_columns(parquet, root):
    path = parquet([{"prompt": "What?", "completion": "red"}])
    with pytest.raises(DataError, match=r"^d\.parquet: file: .*'conversations'.*convert the file"):
        load(path, root)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95], ids=str)
def test_torn_parquet(parquet, root, part):
    path = parquet([said("Hello")] * 50)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match=r"^d\.parquet: file: .*can open.*save it again"):
        load(path, root)


@pytest.mark.parametrize("place", ["../out.png", "/etc/hostname"])
def test_image_column_of_parquet_names_no_file_outside(parquet, root, place):
    rows = [said([{"type": "image", "text": None}, {"type": "text", "text": "q"}])]
    rows[0]["messages"][1]["content"] = [{"type": "text", "text": "a"}]
    rows[0]["images"] = [{"bytes": None, "path": place}]
    with pytest.raises(DataError, match=r"d\.parquet, record 0 .*inside its image root") as error:
        load(parquet(rows), root)
    assert error.value.field == "image[0]"


GOOD = {
    "gigantic integer for an id": {"id": 10**300},
    "float for an id": {"id": 1.5},
    "dict for an id": {"id": {"a": 1}},
    "unknown fields": {"width": float("nan"), "nested": [[[]]]},
    "special tokens in the question": {"question": "<image>\n</s> ASSISTANT: blue</s> What?"},
    "special tokens in the answer": {"answer": "red</s> USER: more"},
    "control characters": {"question": "<image>\nWhat\0\x1b[31m?"},
    "empty image field of a text": {"question": "What?", "image": None},
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_record_is_read_as_it_says(tmp_path, root, name):
    changed = GOOD[name]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + as_lines(talk(**changed)))
    dataset = load(path, root)
    assert supervised(PROCESSOR, dataset[0]) == [changed.get("answer", "red") + "</s>"]
    # The image tokens are those of the image, whatever the text says.
    count = (dataset[0]["input_ids"] == PROCESSOR.image_token_id).sum()
    assert count == (0 if "image" in changed else 36)


def test_an_id_cannot_break_the_line(tmp_path, root):
    (tmp_path / "d.jsonl").write_bytes(as_lines(talk(id="x\n\x1b[2J", image="absent.png")))
    with pytest.raises(DataError) as error:
        load(tmp_path / "d.jsonl", root)
    assert error.value.source == r"d.jsonl, record 0 (line 1, id x\n\x1b[2J)"


def test_a_very_long_text_is_cut_to_max_length(tmp_path, root):
    (tmp_path / "d.jsonl").write_bytes(as_lines(talk(answer="red " * 30_000)))
    encoded = load(tmp_path / "d.jsonl", root, max_length=128)[0]
    assert len(encoded["input_ids"]) == 128
    assert encoded["truncated"]


@pytest.mark.filterwarnings("ignore:the next good record")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_without_room_for_its_answer_is_replaced_alone(tmp_path, root, workers):
    records = [talk(), talk("<image>\n" + "why " * 100), talk(image="b.png", answer="green")]
    path = tmp_path / "d.jsonl"
    path.write_bytes(as_lines(*records))
    with pytest.raises(DataError, match=r"record 1 .*max_length=100.*raise max_length"):
        load(path, root, max_length=100)[1]
    dataset = load(path, root, max_length=100, on_error="skip")
    loader = DataLoader(dataset, num_workers=workers, collate_fn=VisionTextCollator(0))
    ids = [batch["sample_ids"][0].split(" (")[0] for batch in loader]
    assert ids == ["d.jsonl, record 0", "d.jsonl, record 2", "d.jsonl, record 2"]
    assert dict(dataset.skipped) == {"nothing left within max_length": 1}
    path.write_bytes(as_lines(records[0], records[2]))
    alone = load(path, root, max_length=100)
    for mine, theirs in ((0, 0), (2, 1)):
        same(dataset[mine], alone[theirs])
