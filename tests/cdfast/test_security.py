"""What docs/security.md promises, proven by what the process does and not by its messages alone.

An audit hook sees every file that is opened and every connection that is tried, in C code too.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import socket
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from cdfast.data import DataError, VisionTextCollator, load_dataset
from cdfast.models import load_model
from cdfast.train import main
from tests.cdfast import photo_setup
from tests.cdfast.command import arguments, refused
from tests.cdfast.tiny_processors import LLAVA, llava_processor

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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return photo_setup.make_checkpoints(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def processor():
    return llava_processor()


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


# -- pickles ---------------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (exec, (f"open({self.marker!r}, 'w').close()",))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def test_the_payload_works(marker):
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def weights_of_pickle(folder, marker):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))


def weights_of_torch(folder, marker):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, folder / "pytorch_model.bin")


def weights_of_old_torch(folder, marker):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"x": Payload(marker)}, path, _use_new_zipfile_serialization=False)


def shards_of_pickle(folder, marker):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def safetensors_of_pickle(folder, marker):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))


PICKLES = [
    weights_of_pickle,
    weights_of_torch,
    weights_of_old_torch,
    shards_of_pickle,
    safetensors_of_pickle,
]


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("plant", PICKLES)
def test_no_pickle_of_weights_is_executed(paths, tmp_path, marker, plant, role, capsys):
    folder = tmp_path / "planted"
    shutil.copytree(getattr(paths, role), folder)
    plant(folder, marker)
    line = refused(arguments(paths, tmp_path / "run", **{role: folder}), capsys)
    assert f"model '{folder}' has weights that cannot be loaded" in line
    assert "Expected model.safetensors" in line
    assert not marker.exists()


BESIDE = ["pytorch_model.bin", "model.pt", "model.ckpt", "training_args.bin", "optimizer.pt"]
BESIDE += ["scheduler.pt", "rng_state.pth", "tokenizer.pkl", "vocab.pkl", "spiece.model"]
BESIDE += ["processor.bin", "generation.pkl", "flax_model.msgpack", "tf_model.h5"]


def test_pickles_beside_the_files_of_a_model_are_left_alone(paths, tmp_path, marker):
    """A whole run on planted folders: models, tokenizer, processor, data and image root."""
    given = {}
    for role in ("teacher", "student"):
        given[role] = tmp_path / role
        shutil.copytree(getattr(paths, role), given[role])
        for name in BESIDE:
            (given[role] / name).write_bytes(pickle.dumps(Payload(marker)))
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(paths.data, data / "photos.json")
    for name in ("photos.pkl", "photos.py", "data.py", "cache.arrow", "dataset_infos.json"):
        (data / name).write_bytes(pickle.dumps(Payload(marker)))
    given["data"] = data / "photos.json"
    stages = [{"stage": "dpt", "max_steps": 1, "batch_size": 1}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": stages, "workers": 0}))
    main([str(tmp_path / "mine.yaml"), *arguments(paths, tmp_path / "run", **given)[1:]])
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert not marker.exists()


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_pickle_for_data_is_not_executed(tmp_path, tree, processor, marker, no_cache):
    for name in ("d.pkl", "d.json", "d.jsonl", "d.parquet", "d.pt", "d.npy", "d.py"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(marker)))
        with pytest.raises(DataError, match=r"^d\.\w+.*: .*Remedy"):
            load_dataset(tmp_path / name, tree[0], processor)
    assert not marker.exists()


def test_pickle_for_an_image_is_not_executed(tmp_path, tree, processor, marker):
    (tree[0] / "p.png").write_bytes(pickle.dumps(Payload(marker)))
    np.save(tree[0] / "p.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    for name in ("p.png", "p.npy"):
        with pytest.raises(DataError, match=f"{name}"):
            load_dataset(write(tmp_path / "d.jsonl", [talk(name)]), tree[0], processor)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "datasets.features.features.Array2DE"])
def test_extension_type_of_parquet_is_not_unpickled(
    tmp_path, tree, processor, marker, no_cache, name
):
    payload = pickle.dumps(Payload(marker))
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": payload}
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "red"}]
    columns = pyarrow.table({"conversations": [turns], "x": [b"1"]})
    field = pyarrow.field("x", pyarrow.binary(), metadata=metadata)
    columns = columns.set_column(1, field, columns["x"])
    pyarrow.parquet.write_table(columns, tmp_path / "d.parquet")
    with contextlib.suppress(DataError):
        read_all(load_dataset(tmp_path / "d.parquet", tree[0], processor))
    assert not marker.exists()


def test_loading_script_of_a_data_folder_is_not_run(tmp_path, tree, processor, marker, no_cache):
    saved = tmp_path / "saved"
    code = f"open({str(marker)!r}, 'w').close()"
    saved.mkdir()
    for name in ("saved.py", "dataset.py", "__init__.py"):
        (saved / name).write_text(code)
    with pytest.raises(DataError, match=r"^saved: file: .*Remedy"):
        load_dataset(saved, tree[0], processor)
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "red"}]
    datasets.Dataset.from_list([{"conversations": turns}]).save_to_disk(tmp_path / "good")
    for name in ("good.py", "dataset.py", "__init__.py", "state.pkl"):
        (tmp_path / "good" / name).write_text(code)
    assert len(read_all(load_dataset(tmp_path / "good", tree[0], processor))) == 1
    assert not marker.exists()


# -- code of models --------------------------------------------------------------------------------


def plant_code(folder, marker, file, **values):
    """A module that writes a file when it is imported, and a configuration that names it."""
    source = f"open({str(marker)!r}, 'w').close()\n"
    source += "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
    source += "class EvilConfig(Qwen2Config):\n    model_type = 'evil'\n"
    source += "class Evil(Qwen2ForCausalLM):\n    config_class = EvilConfig\n"
    (folder / "evil.py").write_text(source)
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))


AUTO = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
# Role, file and values; whether the option is named (else the class is known and loads without).
CODE = {
    "unknown model": ("student", "config.json", {"model_type": "evil", "auto_map": AUTO}, True),
    "known model": ("student", "config.json", {"auto_map": AUTO}, False),
    "known teacher": ("teacher", "config.json", {"auto_map": AUTO}, False),
    "hub model": (
        "student",
        "config.json",
        {"model_type": "evil", "auto_map": {k: f"a/b--{v}" for k, v in AUTO.items()}},
        True,
    ),
    "processor": (
        "teacher",
        "processor_config.json",
        {"processor_class": "EvilProcessor", "auto_map": {"AutoProcessor": "evil.Evil"}},
        True,
    ),
    "tokenizer": (
        "teacher",
        "tokenizer_config.json",
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        None,
    ),
    "hub attention": ("student", "config.json", {"attn_implementation": "a/b"}, True),
    "hub attention of the teacher": (
        "teacher",
        "config.json",
        {"attn_implementation": "a/b:kernel"},
        True,
    ),
}


@pytest.mark.parametrize("case", CODE)
def test_code_of_a_model_is_not_run(case, paths, tmp_path, marker, capsys):
    role, file, values, named = CODE[case]
    folder = tmp_path / "planted"
    shutil.copytree(getattr(paths, role), folder)
    plant_code(folder, marker, file, **values)
    # max_length ends a run that gets through to the data.
    given = arguments(paths, tmp_path / "run", **{role: folder, "max-length": 1})
    with watched() as events:
        line = refused(given, capsys)
    assert not marker.exists()
    assert connections(events) == []
    assert opened_below(events, HF_MODULES_CACHE) == []
    if named:
        assert f"model '{folder}'" in line
        assert "--trust-remote-code true" in line
    elif named is False:
        assert "within max_length=1" in line


def test_the_planted_code_works_where_it_is_allowed(paths, tmp_path, marker, monkeypatch):
    # The copy of the code that transformers imports goes here, and not into the user's cache.
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    folder = tmp_path / "planted"
    shutil.copytree(paths.student, folder)
    plant_code(folder, marker, "config.json", model_type="evil", auto_map=AUTO)
    load_model(folder, "float32", trust_remote_code=True)
    assert marker.exists()


TEMPLATES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "builtins": "{{ joiner.__init__.__globals__['__builtins__'].open('MARKER', 'w') }}",
    "by attr": "{{ (messages|attr('__class__'))|attr('__base__')|attr('__subclasses__')() }}",
    "by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "changed message": "{% set x = messages.append('x') %}",
    "include": "{% include '/etc/hostname' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "range": "{% for i in range(10**12) %}{% endfor %}",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_template_is_sandboxed(case, tmp_path, tree, marker):
    evil = TEMPLATES[case].replace("MARKER", str(marker))
    path = write(tmp_path / "d.jsonl", [talk("a.png")])
    with watched() as events, pytest.raises(DataError, match="chat template") as error:
        load_dataset(path, tree[0], llava_processor(evil + LLAVA), on_error="skip")
    assert error.value.reason == "chat template"
    assert "__globals__" not in str(error.value) or "Security" in str(error.value)
    assert not marker.exists()
    assert opened_below(events, "/etc") == []


# -- recipes and reports ---------------------------------------------------------------------------


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
        for path in (*folder.glob("test_bad_input*.py"), folder / "test_security.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) >= 20
    assert named - defined == set()
