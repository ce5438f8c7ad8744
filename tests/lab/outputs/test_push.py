"""A weights folder on the hub: a stand-in that speaks its protocol takes it, or refuses."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants

import export
from conftest import make_config
from lab.config.loading import checkpoint_folder
from lab.study.cli import run_cli
from train_ast import train

REPOSITORY = "somebody/small"
TOKEN = "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """Takes one repository. What it has got is in `server.files`, by path."""

    def do_HEAD(self):
        self.answer({})

    def do_GET(self):
        if "repos" in self.server.refuses:
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer({"id": REPOSITORY, "sha": "0" * 40, "siblings": []})

    def do_PUT(self):
        self.server.blobs[self.path] = self.body()
        self.answer({})

    def do_POST(self):
        body = self.body()
        self.server.asked.append(self.path)
        if refusal := self.server.refuses.get(self.path.rpartition("/")[0].rpartition("/")[2]):
            return self.answer({"error": refusal[1]}, refusal[0])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "validate" not in self.path:
            return self.answer({"error": "Invalid credentials"}, 401)
        return self.answer(self.of_path(body))

    def of_path(self, body):
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return {"url": f"{address}/{REPOSITORY}", "id": REPOSITORY}
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                "lfs" if each["path"].endswith(".safetensors") else "regular" for each in files
            ]
            paths = [each["path"] for each in files]
            rows = zip(paths, modes, strict=True)
            return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in rows]}
        if self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{address}/blobs/{each['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        if self.path.endswith("/commit/main"):
            self.take(body)
            return {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{address}/{REPOSITORY}/commit/{'1' * 40}",
            }
        if self.path.endswith("validate-yaml"):
            self.server.validated = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return {"errors": [], "warnings": []}
        raise AssertionError(self.path)

    def take(self, body):
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[f"/blobs/{value['oid']}"]

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    server.blobs = {}
    server.asked = []
    server.refuses = {}
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    more = ["model.name=test_resnet", "training.epochs=1", "ast.mode=dense"]
    more += ["dataset.max_train_samples=32", "dataset.max_val_samples=32"]
    config = make_config(*more, f"logging.output_dir={tmp_path_factory.mktemp('out')}")
    train(config)
    return checkpoint_folder(config) / "weights"


def pushed(capsys, weights, repository=REPOSITORY):
    capsys.readouterr()
    code = run_cli(lambda: export.main(["--weights", str(weights), "--push", repository]))
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    return code, captured.out, captured.err


def test_the_three_files_arrive_as_they_are(hub, weights, capsys):
    (weights / "notes.txt").write_text("not of the run")
    code, out, err = pushed(capsys, weights)
    assert (code, err) == (0, "")
    assert out == f"pushed     {constants.ENDPOINT}/{REPOSITORY}\n"
    names = {"model.safetensors", "config.json", "README.md"}
    assert hub.files == {name: (weights / name).read_bytes() for name in names}
    made = hub.created  # older libraries say private
    assert made.get("visibility", "private" if made.get("private") else "") == "private"
    assert hub.validated["library_name"] == "timm"


@pytest.mark.parametrize(
    ("part", "code", "why"),
    [
        ("repos", 403, "You have no rights to somebody's repositories"),
        ("repos", 401, "Invalid credentials"),
        ("preupload", 403, "Storage is full"),
        ("commit", 412, "A commit has happened since"),
    ],
)
def test_a_hub_that_refuses_is_one_line_and_takes_nothing(part, code, why, hub, weights, capsys):
    hub.refuses[part] = (code, why)
    left = sorted(weights.iterdir())
    exit_code, out, err = pushed(capsys, weights)
    assert (exit_code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: --push: {REPOSITORY}: ")
    assert why in err
    assert hub.files == {}
    assert sorted(weights.iterdir()) == left


def test_what_is_missing_is_named(hub, weights, tmp_path, capsys, monkeypatch):
    (tmp_path / "bare").mkdir()
    code, _, err = pushed(capsys, tmp_path / "bare")
    assert (code, "no model.safetensors in it" in err) == (2, True)
    code, _, err = pushed(capsys, weights, "two/many/parts")
    assert (code, err.count("\n")) == (2, 1)
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = pushed(capsys, weights)
    assert (code, err) == (
        2,
        "error: --push: HF_TOKEN is not set; .env.example says where it goes\n",
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub does not answer, or HF_HUB_OFFLINE is set" in pushed(capsys, weights)[2]
    assert hub.asked == [path for path in hub.asked if "commit" not in path]
