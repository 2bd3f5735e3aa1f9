"""Uploads to a local server that takes what the hub takes."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Forked, fails, succeeds

from litlora.errors import UserError
from litlora.upload import uploaded_files

SHA = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """Takes repositories, as the hub's API does. Large files go to an address of their own."""

    repositories: dict[str, dict] = {}
    requests: list[str] = []

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        self.requests.append(f"GET {self.path}")
        self.answer(404, {"error": "no such thing"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self.body()
        path = self.path.split("?")[0]
        self.requests.append(f"PUT {path}")
        if path.startswith("/storage/"):
            self.stored[path.removeprefix("/storage/")] = body
            return self.answer(200, {})
        repo_id = path.removeprefix("/api/models/").removesuffix("/settings")
        self.repositories[repo_id] |= json.loads(body)
        return self.answer(200, {})

    stored: dict[str, bytes] = {}

    def do_POST(self) -> None:
        body = self.body()
        path = self.path.split("?")[0]
        self.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            if owner != "me":
                return self.answer(403, {"error": f"You may not create a model for {owner}."})
            repo_id = f"{owner}/{asked['name']}"
            if repo_id in self.repositories:
                return self.answer(409, {"error": "exists", "url": f"{self.address}/{repo_id}"})
            self.repositories[repo_id] = {
                "files": {},
                "visibility": asked.get("visibility") or asked.get("private"),
            }
            return self.answer(200, {"url": f"{self.address}/{repo_id}", "id": repo_id})
        if path == "/api/validate-yaml":
            errors = [{"message": '"license" is not known'}] if b"license: odd" in body else []
            return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(200, self.batch(json.loads(body)))
        repo_id, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            return self.answer(200, {"files": [self.mode(one) for one in json.loads(body)["files"]]})
        assert action == "commit"
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[repo_id]["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[repo_id]["files"][value["path"]] = self.stored[value["oid"]]
        return self.answer(
            200, {"success": True, "commitOid": SHA, "commitUrl": f"{self.address}/{repo_id}/commit/{SHA}"}
        )

    def mode(self, asked: dict) -> dict:
        kind = "lfs" if asked["path"].endswith((".safetensors", ".gguf")) else "regular"
        return {"path": asked["path"], "uploadMode": kind, "shouldIgnore": False, "oid": None}

    def batch(self, asked: dict) -> dict:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.address}/storage/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    """The environment variables that make a command use this hub."""
    pytest.importorskip("huggingface_hub")
    Hub.repositories, Hub.requests, Hub.stored = {}, [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "good",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path) -> Path:
    """As an export leaves it, in names and kinds."""
    place = tmp_path / "hf"
    place.mkdir()
    (place / "README.md").write_text("---\nlibrary_name: transformers\n---\n# x\n")
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return place


def test_what_is_listed_is_what_is_uploaded(folder, hub):
    words = ("scripts/upload.py", "--folder", folder, "--repo_id", "me/poet")
    assert "say --yes true to upload" in fails(*words, **hub)
    assert Hub.requests == []  # nothing left this machine
    said = succeeds(*words, "--yes", "true", "--gated", "manual", **hub).stdout
    assert "to: me/poet, private if it is new, gated (manual)" in said
    assert "  model.safetensors (256,000 bytes)" in said and "3 files, 256,041 bytes" in said
    assert f"result: {hub['HF_ENDPOINT']}/me/poet" in said
    repository = Hub.repositories["me/poet"]
    assert repository["files"] == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert repository["visibility"] in ("private", True) and repository["gated"] == "manual"
    oid = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert list(Hub.stored) == [oid]


def test_what_the_hub_says_is_passed_on(folder, hub, tmp_path):
    bad, good = (Forked("cli", "upload", **{**hub, "HF_TOKEN": token}) for token in ("bad", "good"))
    words = ("scripts/upload.py", "--folder", str(folder), "--yes", "true", "--repo_id")
    try:
        said = bad.run(*words, "me/poet", cwd=tmp_path)["stderr"]
        assert "me/poet: the hub does not let you write there (401)" in said and ": log in with" in said
        said = good.run(*words, "they/poet", cwd=tmp_path)["stderr"]
        assert "(403) (the hub says: You may not create a model for they.): log in with" in said
        assert Hub.repositories == {}
        card = (folder / "README.md").read_text()
        (folder / "README.md").write_text(card.replace("---\n# x", "license: odd\n---\n# x"))
        said = good.run(*words, "me/poet", cwd=tmp_path)["stderr"]
        assert 'the hub refuses the card: Invalid metadata in README.md. - "license" is not known\n' in said
        (folder / "README.md").write_text(card)
        (folder / "model[1].safetensors").touch()  # not a pattern
        # A name alone is one of whoever is logged in.
        said = good.run(*words, "poet", cwd=tmp_path)
        assert said["status"] == 0, said
        assert Hub.repositories["me/poet"]["files"].keys() == {file.name for file in folder.iterdir()}
    finally:
        bad.close()
        good.close()


def test_a_folder_that_no_export_wrote_is_refused(folder, monkeypatch):
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            uploaded_files(folder)

    (folder / "state.pth").touch()
    refused("holds state.pth, which no export wrote")
    (folder / "state.pth").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/jane/base"}')
    refused("names its base as /home/jane/base, a directory of this machine; .*base_model OWNER/NAME")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    assert len(uploaded_files(folder)) == 4
    monkeypatch.setenv("HOME", "/data/jöhn")
    for file, text, place in (
        ("config.json", '{"_name_or_path": "/data/j\\u00f6hn/llama"}', r"/data/j.u00f6hn/"),
        ("evaluation.json", '[{"data": "/data/jöhn/secret.jsonl"}]', "/data/jöhn/"),
        ("Modelfile", "FROM /srv/base.gguf\nADAPTER ./adapter.gguf\n", "/srv/base.gguf"),
    ):
        (folder / file).write_text(text)
        refused(f"{file}: names {place}, a place of this machine")
        (folder / file).write_text("FROM llama3.2\n" if file == "Modelfile" else "{}")
    assert len(uploaded_files(folder)) == 6
    (folder / "vocab.json").mkdir()
    refused("vocab.json: cannot be read: it is a directory")
    (folder / "vocab.json").rmdir()
    (folder / "README.md").unlink()
    refused("holds no README.md")
    (folder / "model.safetensors").unlink()
    refused("holds no weights of an exported folder")
