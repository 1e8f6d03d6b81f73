"""What docs/security.md promises, proven by what the process does and not by its messages alone.

An audit hook sees every file that is opened and every connection that is tried, in C code too.
"""

import contextlib
import json
import os
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cdfast.data import DataError, load_dataset
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.audit import (
    connections,
    inline,
    opened_below,
    read_all,
    read_past,
    talk,
    watched,
    write,
)
from tests.cdfast.command import arguments, refused
from tests.cdfast.tiny_processors import llava_processor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def processor():
    return llava_processor()


# -- paths -----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """images/ is the root; secret/ beside it holds an image that nothing may open."""
    root, secret = tmp_path / "images", tmp_path / "secret"
    for folder in (root / "sub", secret):
        folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    for path in (root / "a.png", root / "sub" / "b.png", secret / "s.png"):
        Image.fromarray(pixels).save(path)
    (root / "link.png").symlink_to(secret / "s.png")
    (root / "relative.png").symlink_to("../secret/s.png")
    (root / "chain.png").symlink_to("link.png")
    (root / "folder").symlink_to(secret, target_is_directory=True)
    (root / "up").symlink_to("..", target_is_directory=True)
    (root / "root").symlink_to("/", target_is_directory=True)
    (root / "self").symlink_to("/proc/self", target_is_directory=True)
    return root, secret


# {secret}: its absolute path.
ESCAPES = [
    "../secret/s.png",
    "sub/../../secret/s.png",
    "./../secret/s.png",
    ".//..//secret//s.png",
    "a.png/../../secret/s.png",
    "sub/../../images/../secret/s.png",
    "..\\secret\\s.png",
    "sub\\..\\..\\secret\\s.png",
    "C:\\secret\\s.png",
    "\\\\host\\share\\s.png",
    "//host/share/s.png",
    "{secret}/s.png",
    "/{secret}/s.png",
    "/proc/self/root{secret}/s.png",
    "~/s.png",
    "~root/s.png",
    "link.png",
    "relative.png",
    "chain.png",
    "folder/s.png",
    "folder/../secret/s.png",
    "up/secret/s.png",
    "sub/../up/secret/s.png",
    "root{secret}/s.png",
    "self/root{secret}/s.png",
    "self/cwd/s.png",
    "../secret/s.png\0.png",
    "a.png\0/../../secret/s.png",
    "\uff0e\uff0e/secret/s.png",
    "\u2025/secret/s.png",
    "%2e%2e/secret/s.png",
    "..%2fsecret%2fs.png",
    " ../secret/s.png",
    "../secret/s.png ",
    "file://{secret}/s.png",
]


@pytest.mark.parametrize("early", [True, False], ids=["checked", "read"])
@pytest.mark.parametrize("name", ESCAPES)
def test_no_file_outside_its_root_is_opened(tmp_path, tree, processor, name, early):
    root, secret = tree
    name = name.replace("{secret}", str(secret))
    path = write(tmp_path / "d.jsonl", [talk("a.png"), talk(name), talk("sub/b.png")])
    with watched() as events:
        with pytest.raises(DataError, match=r"^d\.jsonl, record 1 .*: images?\[0\]: .*Remedy"):
            load_dataset(path, root, processor, check_images=early)[1]
        with pytest.warns(UserWarning, match="record 1"):
            kept = read_past(path, root, processor, check_images=early)
        messages = write(tmp_path / "m.jsonl", [inline({"path": name})])
        with pytest.raises(DataError, match=r"^m\.jsonl, record 0 "):
            load_dataset(messages, root, processor, check_images=early)
    assert sum(kept.skipped.values()) == 1
    assert opened_below(events, secret) == []
    assert opened_below(events, root)  # the hook does see what is allowed
    assert sum(map(len, kept.skipped_records().values())) == 1


def test_the_hook_sees_what_a_plain_join_would_open(tree):
    root, secret = tree
    with watched() as events:
        Image.open(os.path.join(root, "../secret/s.png")).load()
    assert len(opened_below(events, secret)) == 1


ALLOWED = ["a.png", "./a.png", "sub//b.png", "sub/./b.png", "sub/b.png"]


@pytest.mark.parametrize("name", ALLOWED)
def test_odd_spellings_inside_the_root_are_read(tmp_path, tree, processor, name):
    root, _ = tree
    assert len(read_all(load_dataset(write(tmp_path / "d.jsonl", [talk(name)]), root, processor)))


# -- URLs ------------------------------------------------------------------------------------------

URLS = [
    "http://{host}/a.png",
    "https://{host}/a.png",
    "HTTP://{host}/a.png",
    " http://{host}/a.png",
    "ftp://{host}/a.png",
    "file:///etc/hostname",
    "file:/etc/hostname",
    "s3://{host}/a.png",
    "gs://{host}/a.png",
    "hf://{host}/a.png",
    "data:image/png;base64,iVBORw0KGgo=",
    "http:{host}/a.png",
    "//{host}/a.png",
    "zip://a.png::http://{host}/x.zip",
]


@pytest.fixture
def server():
    """A listener that counts who connects."""
    listener = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def accept():
        with contextlib.suppress(OSError):
            while True:
                accepted.append(listener.accept())

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}", accepted
    listener.close()


@pytest.mark.parametrize("url", URLS)
def test_no_url_is_fetched(tmp_path, tree, processor, url, server):
    host, accepted = server
    url = url.format(host=host)
    given = [talk(url), inline({"image": url}), inline({"url": url}), inline({"path": url})]
    given += [inline({"type": "image_url", "image_url": {"url": url}})]
    for record in given:
        path = write(tmp_path / "d.jsonl", [record])
        with watched() as events:
            with pytest.raises(DataError) as error:
                load_dataset(path, tree[0], processor, check_images=False)
            with (
                pytest.warns(UserWarning, match="record 0"),
                pytest.raises(DataError, match="at least one that can be"),
            ):
                load_dataset(path, tree[0], processor, on_error="skip")
        assert connections(events) == []
        assert error.value.source.startswith("d.jsonl, record 0")
        if not url.startswith("//"):
            assert "download it and point image_root at it" in error.value.remedy
    assert accepted == []


def test_the_hook_sees_a_connection(server):
    host, port = server[0].split(":")
    with watched() as events, socket.create_connection((host, int(port))):
        pass
    assert connections(events)


# -- recipes and reports ---------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def test_python_beside_a_recipe_is_not_imported(tmp_path, marker, capsys):
    for name in ("mine.py", "yaml.py", "sitecustomize.py", "__init__.py", "cdfast.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w').close()")
    tag = f"!!python/object/apply:builtins.exec [\"open('{marker}', 'w')\"]"
    for text in ("student: mine.Student", f"name: {tag}", f"stages: [{{stage: {tag}}}]"):
        (tmp_path / "mine.yaml").write_text(text)
        line = refused([tmp_path / "mine.yaml"], capsys)
        assert "expected" in line or "no valid YAML" in line
    assert not marker.exists()


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_skipped_records_are_named_and_the_report_is_escaped(paths, tmp_path, workers):
    """Bad records of every kind in one run: none is fatal, all are counted and named."""
    images = tmp_path / "images"
    images.mkdir()
    whole = (photo_setup.PHOTO_FOLDER / "rocket.jpg").read_bytes()
    (images / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    turns = photo_setup.conversation([("What is it?", "A rocket.")], "<image>\n")
    bad = {
        "image is a URL": {"image": "http://127.0.0.1:9/a.png"},
        "image outside its root": {"image": "/etc/passwd"},
        "image missing": {"image": f"{EVIL}.png"},
        "image corrupt": {"image": "torn.jpg"},
        "broken record": {"image": 3},
    }
    made = photo_setup.records()
    made += [{"id": f"{EVIL} {n}", "conversations": turns, **r} for n, r in enumerate(bad.values())]
    data = photo_setup.write_records(tmp_path / "mine.json", made)
    values = {"name": EVIL, "description": EVIL, "on_error": "skip", "workers": int(workers)}
    values["stages"] = [{"stage": "dpt", "max_steps": 1, "batch_size": len(made)}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    given = arguments(paths, tmp_path / "run", data=data)[1:]
    with watched() as events:
        main([str(tmp_path / "mine.yaml"), *given, "--image-root", str(paths.images), str(images)])
    assert connections(events) == []
    assert opened_below(events, "/etc/passwd") == []
    [stage] = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
    assert stage["skipped"] == dict.fromkeys(bad, 1)
    first = len(photo_setup.records())
    for n, reason in enumerate(bad):
        assert stage["skipped_records"][reason] == [
            f"mine.json, record {first + n} (id {EVIL} {n})"
        ]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in report
    assert "<img" not in report
    assert "&lt;script&gt;alert(1)" in report


# -- the page --------------------------------------------------------------------------------------


def test_every_promise_names_a_test_that_exists():
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    named = set(re.findall(r"\btest_\w+(?=`)", page))
    folder = Path(__file__).parent
    defined = {
        name
        for kind in ("test_bad_input*.py", "test_security*.py", "test_streaming.py")
        for path in folder.glob(kind)
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) >= 20
    assert named - defined == set()
