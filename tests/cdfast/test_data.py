"""Data files: what they may say, what is refused, and what is counted."""

import json
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from cdfast import data
from cdfast.data import (
    DataError,
    LlavaJsonDataset,
    MessagesDataset,
    VisionTextCollator,
    load_dataset,
)
from tests.cdfast.tiny_processors import IMAGE, LLAVA, llava_processor, supervised, text

PROCESSOR = llava_processor()


def picture_file(folder, name="a.png", size=(48, 40), color=(200, 10, 10), mode="RGB"):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)
    return path


def png_bomb(width, height):
    """A small PNG whose header promises width x height pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def llava(image="a.png", question="<image>\nWhat?", answer="red", **other):
    record = {
        "id": "000123",
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ],
        **other,
    }
    if image is not None:
        record["image"] = image
    return record


def write(path, records):
    path = Path(path)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records))
    else:
        path.write_text(json.dumps(records))
    return path


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    picture_file(folder)
    picture_file(folder, "sub/b.jpg", color=(10, 200, 10))
    return folder


def load(path, root, **options):
    return load_dataset(path, root, PROCESSOR, **options)


def open_one(tmp_path, root, record, **options):
    """The first sample of a file with one record."""
    return load(write(tmp_path / "d.json", [record]), root, **options)[0]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava_file(tmp_path, root, suffix):
    records = [
        llava(),
        llava(image=None, question="Say a colour", answer="blue"),
        llava(image="sub/b.jpg", question="What?\n<image>", answer="green"),
        llava(image=["a.png", "sub/b.jpg"], question="<image>\n<image>\nSame?", answer="no"),
    ]
    records[0]["conversations"] += [
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "a box"},
    ]
    records[1]["conversations"].insert(0, {"from": "system", "value": "Be short."})
    dataset = load(write(tmp_path / f"d.{suffix}", records), root)
    assert len(dataset) == 4
    assert dataset.has_image.tolist() == [True, False, True, True]
    runs = [supervised(PROCESSOR, dataset[i]) for i in range(4)]
    assert runs == [["red</s>", "a box</s>"], ["blue</s>"], ["green</s>"], ["no</s>"]]
    assert dataset.sample(0).messages[0]["content"] == [IMAGE, text("What?")]
    assert dataset.sample(2).messages[0]["content"] == [text("What?"), IMAGE]
    assert dataset.sample(3).messages[0]["content"] == [IMAGE, IMAGE, text("Same?")]
    assert dataset[1]["images"] == {}
    assert dataset[3]["images"]["pixel_values"].shape == (2, 3, 48, 48)
    line = ", ".join(["line 3"] * (suffix == "jsonl") + ["id 000123"])
    assert dataset[2]["source"] == f"d.{suffix}, record 2 ({line})"
    assert dataset[-1]["source"] == dataset[3]["source"]
    assert not dataset.skipped
    with pytest.raises(IndexError):
        dataset[4]


MESSAGES = [
    {
        "id": 1,
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [IMAGE, text("What?")]},
            {"role": "assistant", "content": [text("red")]},
        ],
        "images": ["a.png"],
    },
    {
        "id": 2,
        "messages": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "green"},
        ],
        "images": ["sub/b.jpg"],
    },
    {
        "id": 3,
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
        ],
    },
    {
        "id": 4,
        "messages": [
            {"role": "user", "content": [text("What?"), {"type": "image", "image": "a.png"}]},
            {"role": "assistant", "content": "red"},
        ],
    },
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_messages_file(tmp_path, root, suffix):
    dataset = load(write(tmp_path / f"m.{suffix}", MESSAGES), root)
    runs = [supervised(PROCESSOR, dataset[i]) for i in range(4)]
    assert runs == [["red</s>"], ["green</s>"], ["Hi</s>"], ["red</s>"]]
    assert dataset.has_image.tolist() == [True, True, False, True]


@pytest.mark.parametrize("column", ["paths", "image feature"])
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_arrow_data_set(tmp_path, root, kind, column, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    stored = {"bytes": (root / "a.png").read_bytes(), "path": "elsewhere.png"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [IMAGE | {"text": None}, text("What?")]},
                {"role": "assistant", "content": [text("red")]},
            ],
            "images": ["a.png"] if column == "paths" else [stored],
        },
        {
            "messages": [
                {"role": "user", "content": [text("Hello")]},
                {"role": "assistant", "content": [text("Hi")]},
            ],
            "images": [],
        },
    ]
    rows = datasets.Dataset.from_list(rows)
    if column == "image feature":
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
    path = tmp_path / ("d.parquet" if kind == "parquet" else "saved")
    rows.to_parquet(path) if kind == "parquet" else rows.save_to_disk(path)
    dataset = load(path, root)
    assert supervised(PROCESSOR, dataset[0]) == ["red</s>"]
    assert dataset[0]["images"]["pixel_values"].shape == (1, 3, 48, 48)
    assert dataset[1]["images"] == {}
    assert dataset[1]["source"] == f"{path.name}, record 1"


def test_several_files_layouts_and_roots(tmp_path, root):
    other = tmp_path / "other"
    picture_file(other, "c.png", color=(0, 0, 250))
    picture_file(other, "a.png", color=(0, 0, 250))
    one = write(tmp_path / "one.json", [llava(), llava("c.png", answer="blue")])
    two = write(tmp_path / "two.jsonl", MESSAGES)
    dataset = load([one, two], [root, other])
    assert len(dataset) == 6
    assert dataset[4]["source"].startswith("two.jsonl, record 2 (line 3")
    # The first root that has the file is used.
    red, blue = dataset[0]["images"]["pixel_values"], dataset[1]["images"]["pixel_values"]
    assert red[0, 0].mean() > red[0, 2].mean()
    assert blue[0, 0].mean() < blue[0, 2].mean()
    # A file's own root.
    swapped = load([one, two], {str(one): other, two: [root]})
    assert torch.equal(swapped[0]["images"]["pixel_values"], blue)
    assert not torch.equal(swapped[2]["images"]["pixel_values"], blue)
    # Without roots: the folder of the file.
    picture_file(tmp_path, "here.png")
    assert len(load_dataset(write(tmp_path / "h.json", [llava("here.png")]), None, PROCESSOR)) == 1


def test_files_of_the_same_name_are_told_apart(tmp_path, root):
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "d.json", [llava()]))
    dataset = load(paths, root)
    assert dataset[1]["source"] == f"{paths[1]}, record 0 (id 000123)"


def test_fixed_layouts(tmp_path, root):
    one = write(tmp_path / "one.json", [llava()])
    two = write(tmp_path / "two.json", MESSAGES)
    assert len(LlavaJsonDataset(one, root, PROCESSOR)) == 1
    assert len(MessagesDataset([two], [root], PROCESSOR)) == 4
    with pytest.raises(DataError, match=r"one\.json, record 0.*messages"):
        MessagesDataset(one, root, PROCESSOR)


def turn(role="human", value="hi"):
    return {"from": role, "value": value}


def talk(*turns, **other):
    return {"id": 5, "conversations": list(turns), **other}


GOOD = [turn(), turn("gpt", "ho")]
BROKEN = {
    "not an object": (["x"], "an object"),
    "no conversations": ({"id": 5}, "list of turns"),
    "conversations is a string": ({"id": 5, "conversations": "hi"}, "list of turns"),
    "no turns": (talk(), "list of turns"),
    "turn is a string": (talk("hi"), "an object"),
    "unknown role": (talk(turn("robot")), r"conversations\[0\]\.from"),
    "role is a list": (talk(turn(["human"])), r"conversations\[0\]\.from"),
    "value missing": (talk({"from": "human"}), r"conversations\[0\]\.value"),
    "value is a number": (talk(turn(), turn("gpt", 3)), r"conversations\[1\]\.value"),
    "begins with gpt": (talk(turn("gpt")), "user and assistant in turn"),
    "two questions": (talk(turn(), *GOOD), "user and assistant in turn"),
    "no answer at the end": (talk(*GOOD, turn()), "assistant last"),
    "system in the middle": (talk(*GOOD, turn("system"), *GOOD), "in turn"),
    "empty answer": (talk(turn(), turn("gpt", " ")), "says something"),
    "empty question": (talk(turn(value=""), turn("gpt")), "says something"),
    "more marks": (talk(turn(value="<image>"), turn("gpt")), "as many images"),
    "more images": (talk(*GOOD, image="a.png"), "as many images"),
    "mark in the answer": (talk(turn(), turn("gpt", "a <image>"), image="a.png"), "user's turns"),
    "image is a number": (talk(turn(value="<image>q"), turn("gpt"), image=3), r"image\[0\]"),
    "image is empty": (talk(turn(value="<image>q"), turn("gpt"), image=""), "relative"),
    "image with zero byte": (talk(turn(value="<image>q"), turn("gpt"), image="a\0"), "relative"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_record_is_named_or_skipped(tmp_path, root, name):
    record, words = BROKEN[name]
    path = write(tmp_path / "d.json", [llava(), record, llava("sub/b.jpg")])
    with pytest.raises(DataError, match=words) as error:
        load(path, root)
    assert "d.json, record 1" in str(error.value)
    assert "Remedy" in str(error.value)
    if isinstance(record, dict):
        assert "(id 5)" in str(error.value)
    with pytest.warns(UserWarning, match=r"1 records left out.*d\.json, record 1"):
        dataset = load(path, root, on_error="skip")
    assert len(dataset) == 2
    assert sum(dataset.skipped.values()) == 1
    assert dataset[1]["source"].startswith("d.json, record 2")


BROKEN_MESSAGES = {
    "role": ([{"role": "human", "content": "q"}], [], r"messages\[0\]\.role"),
    "content": ([{"role": "user", "content": 3}], [], r"messages\[0\]\.content"),
    "part": ([{"role": "user", "content": [{"type": "audio"}]}], [], r"content\[0\]"),
    "text": ([{"role": "user", "content": [{"type": "text"}]}], [], r"content\[0\]"),
    "no image": ([{"role": "user", "content": [IMAGE]}], [], "as many images"),
    "both": (
        [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}],
        ["a.png"],
        "remove one",
    ),
    "inline url": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/a"}}]}],
        [],
        "download it",
    ),
}


@pytest.mark.parametrize("name", BROKEN_MESSAGES)
def test_broken_messages_are_named(tmp_path, root, name):
    messages, images, words = BROKEN_MESSAGES[name]
    answer = {"role": "assistant", "content": "a"}
    record = {"id": "m7", "messages": [*messages, answer], "images": images}
    with pytest.raises(DataError, match=words) as error:
        load(write(tmp_path / "m.jsonl", [MESSAGES[2], record]), root)
    assert "m.jsonl, record 1 (line 2, id m7)" in str(error.value)


URLS = [
    "http://example.com/a.png",
    "HTTPS://example.com/a.png",
    "ftp://example.com/a.png",
    "file:///etc/passwd",
    "s3://bucket/a.png",
    "data:image/png;base64,AAAA",
]


@pytest.mark.parametrize("url", URLS)
def test_url_is_refused_and_nothing_is_fetched(tmp_path, root, url, monkeypatch):
    def fetch(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", fetch)
    monkeypatch.setattr("socket.getaddrinfo", fetch)
    path = write(tmp_path / "d.json", [llava(), llava(url)])
    with pytest.raises(DataError, match="download it and point image_root at it") as error:
        load(path, root)
    assert "d.json, record 1 (id 000123)" in str(error.value)
    with pytest.warns(UserWarning, match="URL"):
        dataset = load(path, root, on_error="skip")
    assert dict(dataset.skipped) == {"image is a URL": 1}


def escapes(tmp_path, root):
    outside = picture_file(tmp_path / "secret", "s.png")
    (root / "link.png").symlink_to(outside)
    (root / "dir").symlink_to(outside.parent, target_is_directory=True)
    (root / "chain.png").symlink_to(root / "link.png")
    return {
        "absolute": str(outside),
        "absolute inside": str(root / "a.png"),
        "parent": "../secret/s.png",
        "parent inside": "sub/../a.png",
        "deep parent": "sub/../../secret/s.png",
        "backslash": "..\\secret\\s.png",
        "drive": "C:\\a.png",
        "home": "~/a.png",
        "link": "link.png",
        "link to a folder": "dir/s.png",
        "link to a link": "chain.png",
    }


ESCAPES = [
    "absolute",
    "absolute inside",
    "parent",
    "parent inside",
    "deep parent",
    "backslash",
    "drive",
    "home",
    "link",
    "link to a folder",
    "link to a link",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_path_outside_its_root_is_refused(tmp_path, root, name):
    bad = escapes(tmp_path, root)[name]
    path = write(tmp_path / "d.json", [llava(), llava(bad)])
    with pytest.raises(DataError, match="inside its image root") as error:
        load(path, root)
    assert "d.json, record 1 (id 000123)" in str(error.value)
    with pytest.warns(UserWarning, match="outside its root"):
        dataset = load(path, root, on_error="skip")
    assert dict(dataset.skipped) == {"image outside its root": 1}
    # The same when nothing is looked at before the record is read.
    late = load(path, root, check_images=False)
    with pytest.raises(DataError, match="inside its image root"):
        late[1]


def test_links_inside_a_root_and_a_linked_root_are_fine(tmp_path, root):
    (root / "in.png").symlink_to(root / "a.png")
    linked = tmp_path / "linked"
    linked.symlink_to(root, target_is_directory=True)
    assert len(load(write(tmp_path / "d.json", [llava("in.png")]), linked)) == 1


def test_link_changed_after_the_check_is_refused(tmp_path, root):
    dataset = load(write(tmp_path / "d.json", [llava(), llava("sub/b.jpg")]), root)
    outside = picture_file(tmp_path / "secret", "s.png")
    (root / "a.png").unlink()
    (root / "a.png").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of"):
        dataset[0]


def make_unreadable(root, name):
    path = root / "bad.png"
    if name == "missing":
        return "image missing"
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "loop":
        path.symlink_to(path)
    elif name == "empty":
        path.write_bytes(b"")
        return "image corrupt"
    elif name == "text":
        path.write_text("<html>404</html>")
        return "image corrupt"
    elif name == "postscript":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        return "image corrupt"
    return "image unreadable"


UNREADABLE = ["missing", "folder", "pipe", "loop", "empty", "text", "postscript"]


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_image_is_named_or_skipped_at_the_start(tmp_path, root, name):
    reason = make_unreadable(root, name)
    path = write(tmp_path / "d.json", [llava(), llava("bad.png"), llava("sub/b.jpg")])
    with pytest.raises(DataError, match=r"d\.json, record 1 \(id 000123\): image.*bad\.png"):
        load(path, root)
    with pytest.warns(UserWarning, match=r"d\.json, record 1"):
        dataset = load(path, root, on_error="skip")
    assert dict(dataset.skipped) == {reason: 1}
    assert len(dataset) == 2


@pytest.mark.parametrize("side", [9_000, 30_000])
def test_pixel_bomb_is_refused_before_it_is_decoded(tmp_path, root, side, monkeypatch):
    (root / "bomb.png").write_bytes(png_bomb(side, side))

    def decode(*_args):
        raise AssertionError("decoded")

    path = write(tmp_path / "d.json", [llava(), llava("bomb.png")])
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", decode)
        with pytest.raises(DataError, match="pixels") as error:
            load(path, root, max_pixels=64_000_000)
    assert "d.json, record 1 (id 000123)" in str(error.value)
    assert "max_pixels" in str(error.value)
    with pytest.warns(UserWarning, match="max_pixels"):
        dataset = load(path, root, on_error="skip")
    assert dict(dataset.skipped) == {"image too large": 1}


def test_pixel_cap_holds_for_arrays_and_at_reading(tmp_path, root):
    image = Image.new("RGB", (100, 100))
    sample = data.Sample(
        [
            {"role": "user", "content": [IMAGE, text("q")]},
            {"role": "assistant", "content": [text("a")]},
        ],
        (image,),
        "s",
    )
    for form in (image, np.asarray(image), root / "a.png"):
        one = data.Sample(sample.messages, (form,), "s")
        with pytest.raises(DataError, match="at most 1000 pixels"):
            data.encode(PROCESSOR, one, max_pixels=1000)
        assert data.encode(PROCESSOR, one, max_pixels=None)["images"]


@pytest.fixture
def truncated(tmp_path, root):
    """Three records of which the second's JPEG has a good header and half its data."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = root / "whole.jpg"
    Image.fromarray(noise).save(whole)
    (root / "half.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return write(tmp_path / "d.json", [llava(), llava("half.jpg"), llava("sub/b.jpg")])


def test_truncated_jpeg_is_named(truncated, root):
    dataset = load(truncated, root)
    dataset[0]
    with pytest.raises(DataError, match="truncated") as error:
        dataset[1]
    assert "d.json, record 1 (id 000123)" in str(error.value)
    assert "half.jpg" in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_jpeg_is_replaced_by_the_next_and_counted(truncated, root, workers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = load(truncated, root, on_error="skip")
        assert len(dataset) == 3
        collate = VisionTextCollator(0)
        loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=collate)
        for _ in range(2):
            ids = [batch["sample_ids"][0].split(" (")[0] for batch in loader]
            assert ids == ["d.json, record 0", "d.json, record 2", "d.json, record 2"]
            assert dict(dataset.skipped) == {"image corrupt": 1}


def test_replacement_warns_once_a_reason(truncated, root):
    dataset = load(truncated, root, on_error="skip")
    with pytest.warns(UserWarning, match=r"next good record.*d\.json, record 1") as caught:
        [dataset[1] for _ in range(3)]
    assert len(caught) == 1


def test_damaged_first_record_does_not_stop_skip(tmp_path, root, truncated):
    records = json.loads(truncated.read_text())
    path = write(tmp_path / "e.json", [records[1], records[0]])
    with pytest.raises(DataError, match=r"e\.json, record 0"):
        load(path, root)
    with pytest.warns(UserWarning, match="next good record"):
        dataset = load(path, root, on_error="skip")
    assert dataset[0]["source"].startswith("e.json, record 1")
    with (
        pytest.warns(UserWarning, match="next good record"),
        pytest.raises(DataError, match=r"f\.json.*image corrupt"),
    ):
        load(write(tmp_path / "f.json", [records[1]]), root, on_error="skip")


@pytest.mark.parametrize(
    "content, name, words",
    [
        ('[{"id": 1},\n{"id": 2,,}]', "d.json", r"d\.json, line 2.*column"),
        ('[{"id": 1}', "d.json", r"d\.json, line 1"),
        ("", "d.json", r"d\.json, line 1"),
        ('{"id": 1}\n{"id": 2}', "d.json", r"d\.json, line 2.*jsonl"),
        ('{"conversations": []}', "d.json", "a list of records, got a JSON dict"),
        ("[]", "d.json", "at least one record"),
        ("\n\n", "d.jsonl", "at least one record"),
        ("[1, 2]", "d.json", "'conversations'"),
        ('[{"id": 1}]', "d.json", "'conversations'"),
        ("a,b", "d.csv", r"d\.csv.*jsonl"),
        ("not parquet", "d.parquet", r"d\.parquet.*`datasets` can open"),
        ("[" * 100_000, "d.json", r"d\.json.*(Recursion|line)"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_unusable_file_is_named(tmp_path, root, content, name, words, on_error):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=words) as error:
        load(path, root, on_error=on_error)
    assert "Remedy" in str(error.value)


def test_missing_or_binary_file_is_named(tmp_path, root):
    with pytest.raises(DataError, match=r"none\.json.*existing file"):
        load(tmp_path / "none.json", root)
    (tmp_path / "b.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(DataError, match=r"b\.json.*UTF-8"):
        load(tmp_path / "b.json", root)


def test_broken_line_is_one_broken_record(tmp_path, root):
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        b"{oops\n\n" + json.dumps(llava()).encode() + b'\n{"id": \xff}\n\xef\xbb\xbf[1, 2]\n'
    )
    with pytest.raises(DataError, match=r"d\.jsonl, record 0 \(line 1\): record: .*valid JSON"):
        load(path, root)
    with pytest.warns(UserWarning, match=r"3 records left out \(broken record\)"):
        dataset = load(path, root, on_error="skip")
    assert dict(dataset.skipped) == {"broken record": 3}
    assert dataset[0]["source"] == "d.jsonl, record 1 (line 3, id 000123)"


def test_nothing_usable_is_an_error_that_says_why(tmp_path, root):
    path = write(tmp_path / "d.json", [llava("x.png"), llava("http://x/y.png"), llava("z.png")])
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match="2 x image missing, 1 x image is a URL"),
    ):
        load(path, root, on_error="skip")


def test_template_problem_is_raised_under_skip_too(tmp_path, root):
    path = write(tmp_path / "d.json", [llava()])
    bad = llava_processor(LLAVA.replace("'ASSISTANT: '", "'BOT: '"))
    for processor in (bad, llava_processor(None)):
        with pytest.raises(DataError, match="chat template"):
            load_dataset(path, root, processor, on_error="skip")


def test_max_length_is_counted(tmp_path, root):
    long = llava(answer="red " * 50)
    records = [llava(), long, llava(question="<image>\n" + "why " * 100)]
    path = write(tmp_path / "d.json", records)
    with pytest.raises(DataError, match=r"d\.json, record 2.*max_length"):
        load(path, root, max_length=100)[2]
    dataset = load(path, root, max_length=100, on_error="skip")
    with pytest.warns(UserWarning, match="max_length"):
        assert [len(dataset[i]["input_ids"]) for i in range(3)][1] == 100
    assert dataset.truncated == 1
    assert dict(dataset.skipped) == {"nothing left within max_length": 1}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "I;16", "CMYK"])
def test_images_of_every_mode_become_rgb(tmp_path, root, mode):
    name = f"m.{'tif' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.fromarray(np.full((20, 30), 40_000, dtype=np.uint16)).save(root / name)
    else:
        picture_file(root, name, mode=mode)
    image = data.load_image(data.ImageFile(name, (str(root),)), "s")
    assert image.mode == "RGB"
    if mode == "I;16":
        assert image.getpixel((0, 0)) == (156, 156, 156)
    assert open_one(tmp_path, root, llava(name))["images"]["pixel_values"].shape[1] == 3


def test_arrays_become_rgb():
    for shape in [(8, 9), (8, 9, 1), (8, 9, 3), (8, 9, 4)]:
        image = data.load_image(np.zeros(shape, dtype=np.uint8), "s")
        assert (image.mode, image.size) == ("RGB", (9, 8))
    for bad in (np.zeros((8, 9, 3)), np.zeros((3, 8, 9), dtype=np.uint8), 7):
        with pytest.raises(DataError, match="s: image: expected"):
            data.load_image(bad, "s")


def test_photograph(tmp_path):
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
    assert names
    record = llava(names[0])
    assert open_one(tmp_path, folder, record)["images"]["pixel_values"].shape == (1, 3, 48, 48)


def test_data_set_and_error_survive_pickling(tmp_path, root):
    dataset = load(write(tmp_path / "d.json", [llava(), llava(image=None, question="q")]), root)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0]["input_ids"], dataset[0]["input_ids"])
    error = DataError(source="f, record 1", field="x", expected="y", got=3, remedy="z")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "f, record 1: x: expected y, got 3. Remedy: z."
    assert (again.source, again.reason) == ("f, record 1", "broken record")


def test_worker_raises_the_data_error_itself(truncated, root):
    dataset = load(truncated, root)
    loader = DataLoader(dataset, num_workers=1, collate_fn=VisionTextCollator(0))
    with pytest.raises(DataError, match=r"d\.json, record 1"):
        list(loader)


def test_independent_turns_of_a_file(tmp_path, root):
    record = llava()
    record["conversations"] += [turn(value="And?"), turn("gpt", "a box")]
    path = write(tmp_path / "d.json", [record])
    encoded = load(path, root, turns="independent")[0]
    assert encoded["segment_ids"].max() == 2
    second = llava(question="What?\n<image>")
    second["conversations"] += record["conversations"][2:]
    with pytest.raises(DataError, match=r"e\.json, record 0"):
        load(write(tmp_path / "e.json", [second]), root, turns="independent")[0]


def test_options_are_checked(tmp_path, root):
    path = write(tmp_path / "d.json", [llava()])
    for options, word in [
        ({"on_error": "ignore"}, "on_error"),
        ({"turns": "some"}, "turns"),
        ({"max_length": 0}, "max_length"),
    ]:
        with pytest.raises(ValueError, match=word):
            load(path, root, **options)
    with pytest.raises(ValueError, match="folders that exist"):
        load(path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"image_roots.*keys"):
        load(path, {"other.json": root})
    with pytest.raises(ValueError, match="paths"):
        load([], root)
