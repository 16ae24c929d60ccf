import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import safetensors.torch
import torch
from support.files import tiny

from rookery.checkpoints import hub, open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.errors import BadCheckpoint
from rookery.models import save_model

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of huggingface.co as downloading a model needs."""

    repositories: dict[str, dict[str, bytes]]
    gated: set[str]
    asked: list[str]

    def log_message(self, *_args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        for name, files in self.repositories.items():
            if path.startswith(f"/api/models/{name}"):
                rest = path.removeprefix(f"/api/models/{name}").strip("/").split("/")
                revision = rest[1] if len(rest) > 1 else "main"
                if revision not in ("main", "v2", SHA):
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                if rest[0] == "tree":
                    entries = [
                        {"type": "file", "path": f, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for f, data in files.items()
                    ]
                    return self.send(200, json.dumps(entries).encode(), {})
                siblings = [{"rfilename": file} for file in files]
                content = {"id": name, "modelId": name, "sha": SHA, "siblings": siblings, "tags": []}
                return self.send(200, json.dumps(content).encode(), {"X-Repo-Commit": SHA})
            if path.startswith(f"/{name}/resolve/"):
                file = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
                if name in self.gated:
                    return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
                data = files[file]
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                return self.send(206 if start else 200, data[start:], headers, body)
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send(self, code, data, headers, body=True):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def server():
    handler = type("Handler", (Hub,), {"repositories": {}, "gated": set(), "asked": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    handler.endpoint = f"http://127.0.0.1:{httpd.server_port}"
    yield handler
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def fetch(server, tmp_path):
    def call(name, **options):
        return hub.fetch(
            name, **({"endpoint": server.endpoint, "cache": tmp_path / "cache", "offline": False} | options)
        )

    return call


@pytest.fixture
def weights(tmp_path):
    save_model(tiny(), tmp_path / "m.safetensors")
    return (tmp_path / "m.safetensors").read_bytes()


def test_a_repository_with_one_model_is_fetched_with_what_goes_with_it(server, fetch, weights):
    server.repositories["some/model"] = {
        "model.safetensors": weights,
        "config.json": b"{}",
        "vocab.txt": b"1 'a' 1\n",
        "README.md": b"no need",
        "other.gguf": b"no need",
    }
    folder = fetch("some/model")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    assert open_checkpoint(folder).fingerprint() == tiny().fingerprint()


def test_the_only_model_file_is_taken_and_a_file_can_be_named(server, fetch, weights):
    server.repositories["some/one"] = {"README.md": b"", "deep/only.safetensors": weights}
    assert fetch("some/one").name == "only.safetensors"
    server.repositories["some/two"] = {"a.safetensors": weights, "b.safetensors": weights, "b.safetensors.json": b"{}"}
    path = fetch("some/two/b.safetensors@v2")
    assert path.read_bytes() == weights
    assert sorted(file.name for file in path.parent.iterdir()) == ["b.safetensors", "b.safetensors.json"]


def test_shards_come_with_their_index(server, fetch):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    server.repositories["some/shards"] = dict.fromkeys(names, b"x") | {"model.bin": b"no need"}
    assert sorted(file.name for file in fetch("some/shards").iterdir()) == names


def test_what_is_in_the_cache_needs_no_connection(server, fetch, weights):
    server.repositories["some/model"] = {"model.safetensors": weights, "config.json": b"{}", "extra.md": b"x"}
    expected = fetch("some/model")
    asked = len(server.asked)
    assert fetch("some/model", offline=True) == expected
    assert len(server.asked) == asked
    assert fetch("some/model", endpoint="http://127.0.0.1:9") == expected


def test_a_download_is_not_repeated(server, fetch, weights):
    server.repositories["some/model"] = {"model.safetensors": weights}
    fetch("some/model")
    server.asked.clear()
    fetch("some/model")
    assert not [line for line in server.asked if line.startswith("GET /some/model/resolve")]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no/body", {}, "there is no file 'no/body', and no model of that name on the Hub that you may read"),
        ("some/two", {}, r"is not one model, it has a.pth, b.pth; name one, as 'some/two/FILE'"),
        ("some/none", {}, "is not one model, it has no model file"),
        ("some/two/c.pth", {}, "the repository has no file 'c.pth'; it has a.pth, b.pth"),
        ("some/two/a.pth@v9", {}, "'some/two' has no revision 'v9'"),
        ("some/gated", {}, "access on request only"),
        ("some/two/a.pth", {"offline": True}, "no connection is allowed .*the cache has no model of that name"),
        ("some/two/a.pth", {"endpoint": "http://127.0.0.1:9"}, "the Hub cannot be reached .*the cache has no model"),
        ("words", {}, "no model name of the Hub"),
    ],
)
def test_what_cannot_be_fetched_is_said(server, fetch, name, options, message):
    server.repositories |= {"some/two": {"a.pth": b"a", "b.pth": b"b"}, "some/none": {"README.md": b""}}
    server.repositories["some/gated"] = {"model.safetensors": b"x"}
    server.gated.add("some/gated")
    with pytest.raises(BadCheckpoint, match=message):
        fetch(name, **options)


def test_paths_are_never_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/x", "out/model.pth", "./a/b", "/a/b", "../a", "a", "a//b", "~/b", tmp_path / "a/b"):
        assert hub.address(path) is None, path
    assert hub.address("owner/name@v1") == ("owner/name", None, "v1")
    assert hub.address("owner/name/folder/m.pth") == ("owner/name", "folder/m.pth", None)


def test_adapters_and_states_come_from_the_hub_too(server, weights, tmp_path):
    from rookery.checkpoints.tuned_state import save_tuned_state

    model = tiny()
    state = model.init_state()
    save_tuned_state(tmp_path / "tuned.pth", state, model.config)
    shape = model.blocks[0].att.key.weight.shape
    pair = {
        "base_model.model.blocks.0.att.key.lora_A.weight": torch.ones(2, shape[1]),
        "base_model.model.blocks.0.att.key.lora_B.weight": torch.ones(shape[0], 2),
    }
    safetensors.torch.save_file(pair, tmp_path / "adapter_model.safetensors")
    server.repositories["some/model"] = {"model.safetensors": weights}
    server.repositories["some/adapter"] = {
        "adapter_model.safetensors": (tmp_path / "adapter_model.safetensors").read_bytes(),
        "adapter_config.json": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4}',
        "README.md": b"no need",
    }
    server.repositories["some/states"] = {"tuned.pth": (tmp_path / "tuned.pth").read_bytes(), "other.pth": b""}
    code = (
        "import rookery\n"
        "llm = rookery.LLM('some/model', adapter='some/adapter', device='cpu')\n"
        "assert llm.session('some/states/tuned.pth').tokens_seen == 0\n"
    )
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0"}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert done.returncode == 0, done.stderr


def test_a_hub_id_works_wherever_a_path_does(server, weights, tmp_path):
    server.repositories["some/model"] = {"model.safetensors": weights}
    code = (
        "import sys; from rookery.cli.main import main; from rookery.models import load\n"
        "assert main(['inspect', 'some/model']) == 0\n"
        "assert main(['convert', 'some/model@v2', sys.argv[1]]) == 0\n"
        "assert main(['generate', '--model', 'some/model', '--tokenizer', sys.argv[2], '-n', '2', 'a']) == 0\n"
        "load('some/model')"
    )
    (tmp_path / "vocab.txt").write_text("".join(f"{i} {chr(60 + i)!r} 1\n" for i in range(1, 64)))
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0"}
    argv = [sys.executable, "-c", code, str(tmp_path / "out.pth"), str(tmp_path / "vocab.txt")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert done.returncode == 0, done.stderr
    assert "rwkv7" in done.stdout
    assert open_checkpoint(tmp_path / "out.pth").fingerprint() == tiny().fingerprint()
    assert convert(tmp_path / "out.pth", tmp_path / "again.safetensors").target == "official"
