"""What docs/security.md promises about pickles, code and templates in checkpoints and data sets.

A planted payload writes a file when it is executed; it must not be there afterwards.
"""

import contextlib
import json
import pickle
import shutil

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from cdfast.data import DataError, load_dataset
from cdfast.models import load_model
from cdfast.train import main
from tests.cdfast.audit import (
    connections,
    opened_below,
    read_all,
    talk,
    watched,
    write,
)
from tests.cdfast.command import arguments, refused
from tests.cdfast.tiny_processors import LLAVA, llava_processor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def processor():
    return llava_processor()


@pytest.fixture
def tree(tmp_path):
    """A root with an image."""
    root = tmp_path / "images"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "a.png")
    return root, tmp_path


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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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


@pytest.mark.slow
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
