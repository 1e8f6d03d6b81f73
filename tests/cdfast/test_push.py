"""Uploading a student, to a stand-in for the hub that listens on this machine."""

import base64
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard, close_session, constants

from cdfast.config import ConfigError, load_recipe, override
from cdfast.push import again, hub_target, main, prepare_upload, push_run
from cdfast.sharing.model_card import MARKER, write_model_card
from cdfast.sharing.upload_files import Target, upload_files
from cdfast.train import main as train
from cdfast.train import run_command
from tests.cdfast.test_model_card import RESULTS

TOKEN = "hf_of_the_test"
PLACE = "https://huggingface.co/me/student"
# What transformers writes below a folder of a model.
BELOW = ("additional_chat_templates/rag.jinja", "qformer_tokenizer/tokenizer_config.json")
OPTIONS = {"push_to_hub": True, "hub_model_id": "me/student"}


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the hub that an upload uses; what it holds is in `server.state`."""

    def do_GET(self):
        state = self.server.state
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []})
        if "/auth-check" in self.path:
            return self.answer(200 if state.may_write else 403, {"error": "no right to write"})
        if "/resolve/" in self.path:
            return self.answer(200, state.files[self.path.rpartition("/")[2]], file=True)
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "1" * 40}
                for name, data in state.files.items()
            ]
            return self.answer(200, entries)
        siblings = [{"rfilename": name} for name in state.files]
        self.answer(200, {"id": "me/student", "private": state.private, "siblings": siblings})

    do_HEAD = do_GET

    def do_POST(self):
        state, size = self.server.state, int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self.chunks()
        if self.path == "/api/repos/create":
            state.created.append(json.loads(body))
            return self.answer(
                200, {"url": "https://huggingface.co/me/student", "id": "me/student"}
            )
        if self.path == "/api/validate-yaml":
            if b"license: nobody's" in body:
                return self.answer(400, {"errors": [{"message": "bad license"}]})
            return self.answer(200, {})
        if "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            asked = json.loads(body)["files"]
            return self.answer(200, {"files": [{"path": f["path"], **how} for f in asked]})
        if "/branch/" in self.path:
            state.branches.append(self.path.rpartition("/")[2])
            return self.answer(200, {})
        if state.down:
            return self.answer(500, {"error": "the hub is down"})
        self.commit([json.loads(line) for line in body.splitlines()])

    def commit(self, lines):
        state = self.server.state
        for line in lines:
            if line["key"] == "file":
                state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del state.files[line["value"]["path"]]
        state.commits.append(self.path.rpartition("/")[2])
        self.answer(
            200, {"commitUrl": "https://huggingface.co/me/student/commit/1", "commitOid": "1" * 40}
        )

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status, content, file=False):
        content = content if file else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if file:
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = SimpleNamespace(
        files={}, created=[], commits=[], branches=[], private=False, may_write=True, down=False
    )
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # one of before would keep its proxy
    yield server.state
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """The files of a finished run, and beside them what must stay."""
    folder = tmp_path / "secret place" / "mine"
    model = folder / "model"
    checkpoint = folder / "stages" / "1-dft" / "checkpoint-2"
    for place in (model, checkpoint):
        place.mkdir(parents=True)
        (place / "optimizer.pt").write_bytes(b"states")
    (model / "config.json").write_text(
        json.dumps({"model_type": "llava", "_name_or_path": f"{tmp_path}/teacher", "note": "a/b"})
    )
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer_config.json").write_text(
        json.dumps({"vocab_file": f"{tmp_path}/v.txt", "chat_template": "[/INST] /think"})
    )
    # A token that looks like a path must stay one.
    (model / "tokenizer.json").write_text(json.dumps({"vocab": {"/usr": 1}}))
    for place in BELOW:
        (model / place).parent.mkdir(exist_ok=True)
        (model / place).write_text("{}")
    for place in ("checkpoint-3/config.json", "additional_chat_templates/draft.txt"):
        (model / place).parent.mkdir(exist_ok=True)
        (model / place).write_text("to stay")
    command = f"python -m cdfast.train --data {tmp_path}/data.json --output-dir '{folder}'"
    recipe = {**RESULTS["recipe"], "data": [f"{tmp_path}/data.json"], "output_dir": str(folder)}
    results = {**RESULTS, "recipe": recipe, "environment": {"command": command}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "report.html").write_text(
        f"<p>{folder}</p><td>{tmp_path}/data.json</td><p>tokens/s</p>"
    )
    write_model_card(model, results)
    return folder


def content(files):
    return {k: v if isinstance(v, bytes) else v.read_bytes() for k, v in files.items()}


def test_the_finished_student_is_uploaded(run, hub, tmp_path, capsys):
    main([str(run), "me/student", "--private", "--license", "apache-2.0", "--dry-run"])
    listed = capsys.readouterr().out
    assert not hub.created
    hub.private = True
    main([str(run), "me/student", "--private", "--license", "apache-2.0"])
    assert "me/student" in capsys.readouterr().out
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names |= {*BELOW}
    assert set(hub.files) == names | {"README.md", "results.json", "report.html"}
    assert all(name in listed for name in hub.files)
    assert hub.created[0]["visibility"] == "private"
    assert len(hub.commits) == 1
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert 'source = "me/student"' in card.text
    for name, data in hub.files.items():
        assert str(tmp_path).encode() not in data, name
        assert b"secret place" not in data, name
        assert TOKEN.encode() not in data, name
    config = {"model_type": "llava", "_name_or_path": "teacher", "note": "a/b"}
    assert json.loads(hub.files["config.json"]) == config
    tokenizer = {"vocab_file": "v.txt", "chat_template": "[/INST] /think"}
    assert json.loads(hub.files["tokenizer_config.json"]) == tokenizer
    assert json.loads(hub.files["tokenizer.json"]) == {"vocab": {"/usr": 1}}
    assert b"tokens/s</p>" in hub.files["report.html"]
    assert json.loads(hub.files["results.json"])["recipe"]["data"] == ["data.json"]
    # What is here is as it was.
    assert json.loads((run / "results.json").read_text())["recipe"]["output_dir"] == str(run)


def test_a_second_upload_replaces_weights_and_keeps_what_others_wrote(run, hub, capsys):
    hub.files |= {"model-00001-of-00002.safetensors": b"old", "README.md": b"# My own words"}
    hub.files |= {"model.safetensors": b"old", "lora.safetensors": b"another's"}
    recipe = override(load_recipe("miniature"), {**OPTIONS, "hub_revision": "v2"})
    prepare_upload(recipe)
    push_run(recipe, run)
    assert hub.files["model.safetensors"] == b"weights"
    assert "model-00001-of-00002.safetensors" not in hub.files
    assert hub.files["lora.safetensors"] == b"another's"
    assert hub.files["README.md"] == b"# My own words"
    assert "keeps its own README.md" in capsys.readouterr().out
    assert hub.branches == hub.commits == ["v2"]


def test_a_card_of_the_user_is_uploaded_as_it_is(run):
    (run / "model" / "README.md").write_text("# Mine")
    assert content(upload_files(run, Target("me/student")))["README.md"] == b"# Mine"
    assert MARKER in write_model_card(run / "model", RESULTS).read_text()
    assert (run / "model" / "README.md").read_text() == "# Mine"


def test_a_model_without_a_run_is_uploaded_with_a_card_that_says_so(run):
    shutil.copytree(run / "model", run.parent / "exported")
    (run.parent / "exported" / "README.md").unlink()
    files = content(upload_files(run.parent / "exported", Target("me/student")))
    here = {p.name for p in (run / "model").iterdir() if p.is_file()} - {"optimizer.pt"}
    assert set(files) == here | {*BELOW}
    assert b"Nothing is known about its training" in files["README.md"]
    assert not (run.parent / "exported" / "README.md").exists()


def test_a_failed_upload_names_the_command_that_repeats_it(run, hub, capsys):
    hub.down = hub.private = True
    with pytest.raises(SystemExit):
        main([str(run), "me/student", "--private"])
    error = capsys.readouterr().err
    assert re.search(r"python -m cdfast.push '.*secret place/mine' me/student --private\n$", error)
    assert TOKEN not in error
    assert hub.files == {}


@pytest.mark.parametrize("down", [False, True])
def test_a_run_uploads_when_it_is_done(run, hub, tmp_path, monkeypatch, capsys, down):
    """The command around a run that trains nothing."""

    def run_recipe(recipe, folder, resume=False):
        assert hub.created, "the hub is asked before step 1"
        assert not hub.commits
        shutil.copytree(run, folder, dirs_exist_ok=True)
        hub.down = down
        return {}

    monkeypatch.setattr("cdfast.train.run_recipe", run_recipe)
    monkeypatch.setattr("cdfast.train.report", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    options = ["--push-to-hub", "true", "--hub-model-id", "me/student", "--output-dir", "out"]
    if not down:
        train(["miniature", *options])
        assert "model.safetensors" in hub.files
        return
    with pytest.raises(SystemExit) as end:
        train(["miniature", *options])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("python -m cdfast.push out me/student\n")
    assert Path("out/model/model.safetensors").is_file()


def test_other_ranks_leave_the_hub_alone(hub, monkeypatch):
    monkeypatch.setattr("cdfast.train.broadcast_object_list", lambda objects: [Path("out")])
    monkeypatch.setattr("cdfast.train.run_recipe", lambda *args: {})
    recipe = override(load_recipe("miniature"), OPTIONS)
    flags = SimpleNamespace(compare=None, resume=False)
    run_command(recipe, flags, SimpleNamespace(is_main_process=False))
    assert not hub.created
    assert not hub.commits


REFUSED = {
    "offline": ({}, {"HF_HUB_OFFLINE": True}, "HF_HUB_OFFLINE: expected it unset"),
    "wrong token": ({}, {"HF_TOKEN": "hf_wrong"}, "the login cannot be checked"),
    "no token": ({}, {"HF_TOKEN": ""}, "expected a login; found no token"),
    "no right": ({"may_write": False}, {}, "me/student cannot be used"),
    "public": ({}, {}, "expected a private repository"),
    "license": ({"private": True}, {}, "bad license"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_fail_at_the_end_of_a_run_is_refused_before_it_starts(
    name, hub, tmp_path, monkeypatch, capsys
):
    state, settings, expected = REFUSED[name]
    vars(hub).update(state)
    for key, value in settings.items():
        if key == "HF_TOKEN":
            monkeypatch.setenv(key, value)
        else:
            monkeypatch.setattr(constants, key, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    options = ["--push-to-hub", "true", "--hub-model-id", "me/student", "--license", "nobody's"]
    with pytest.raises(SystemExit):
        train(["miniature", *options, "--hub-private-repo", "true", "--output-dir", "mine"])
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not Path("mine").exists()


CONTRADICTIONS = {
    "no name": ({"push_to_hub": True}, "hub_model_id: expected USER/NAME"),
    "name alone": (
        {"hub_model_id": "me/student"},
        "push_to_hub: expected true beside hub_model",
    ),
    "no owner": ({"push_to_hub": True, "hub_model_id": "student"}, "expected USER/NAME"),
    "checkpoints": ({**OPTIONS, "hub_strategy": "checkpoint"}, "only the finished student"),
    "one stage": ({"dft.push_to_hub": True}, "dft.push_to_hub: expected it for the whole run"),
    "a variant": ({"compare": {"sft": {"push_to_hub": True}}}, "compare.sft.push_to_hub: expected"),
    "token": ({**OPTIONS, "hub_token": TOKEN}, "arguments.hub_token: expected none"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_options_about_the_hub_that_cannot_be_met_are_refused(name):
    options, expected = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=re.escape(expected)) as refusal:
        hub_target(override(load_recipe("miniature"), options))
    assert TOKEN not in str(refusal.value)


def test_nothing_of_the_hub_reaches_the_trainer(tmp_path, monkeypatch):
    """Which would upload checkpoints; and a run may be resumed with an upload it had not."""
    from cdfast.stages.arguments import stage_arguments
    from cdfast.stages.run import Run
    from cdfast.train import _options

    recipe = override(load_recipe("miniature"), OPTIONS)
    state = SimpleNamespace(num_processes=1, is_main_process=True)
    arguments = stage_arguments(Run(recipe, tmp_path, None, state), 1)
    assert (arguments.push_to_hub, arguments.hub_model_id) == (False, None)
    assert _options(recipe) == _options(load_recipe("miniature"))


def test_what_is_no_finished_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "me/student", "--dry-run"])
    assert "expected a finished run" in capsys.readouterr().err


def test_the_command_that_repeats_an_upload_leaves_out_what_was_left_out():
    words = again(Path("runs/mine"), Target("me/s", True, "old"), license="mit", report=False)
    assert words == (
        "python -m cdfast.push runs/mine me/s --private --revision old --license mit --no-report"
    )
