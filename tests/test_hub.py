"""Downloads from a local server that answers like the hub."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Forked, fails, succeeds

from litlora.hub import needed_files, origin

COMMIT = "0123456789" * 4
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "max_position_embeddings": 64,
}
WEIGHTS = bytes(range(256)) * 50_000
"""Larger than the chunks of 10 MB in which the library writes."""


class Hub(BaseHTTPRequestHandler):
    """Serves repositories with one commit each; gated ones need a token. `break_after`: the number
    of bytes after which the first transfer of a file breaks off."""

    repositories: dict[str, dict[str, bytes]] = {}
    break_after: dict[str, int] = {}
    ranges: list[str | None] = []

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            repo_id, _, revision = path.removeprefix("api/models/").partition("/revision/")
            if repo_id not in self.repositories:
                return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            if revision not in ("", "main", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in self.repositories[repo_id]]
            return self.answer(200, json.dumps({"id": repo_id, "sha": COMMIT, "siblings": siblings}).encode())
        repo_id, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if self.headers.get("Authorization") == "Bearer wrong":
            return self.answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if "gated" in repo_id and not self.headers.get("Authorization"):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        data = self.repositories.get(repo_id, {}).get(name)
        if data is None:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": revision,
            "Accept-Ranges": "bytes",
        }
        start = int(asked.removeprefix("bytes=").split("-")[0]) if (asked := self.headers.get("Range")) else 0
        if self.command == "GET":
            self.ranges.append(asked)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        most = self.break_after.pop(name, None) if self.command == "GET" else None
        return self.answer(206 if start else 200, data[start:], headers, most)

    def answer(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, most: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:most])
        self.close_connection = True


@pytest.fixture
def hub(tmp_path):
    """The environment variables that make a command use this hub."""
    pytest.importorskip("huggingface_hub")
    files = {
        "config.json": json.dumps(LLAMA).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"not needed",
        "README.md": b"---\nlicense: mit\n---\n",
    }
    Hub.repositories = {name: files for name in ("someone/llama", "someone/gated", "someone/other")}
    Hub.repositories["someone/t5"] = {
        **files,
        "config.json": b'{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}',
    }
    Hub.repositories["someone/data"] = {"README.md": b"no model"}
    Hub.break_after, Hub.ranges = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    thread.join()
    server.server_close()


def get(directory: Path, repo_id: str, *words: object) -> list[str]:
    return ["scripts/download.py", f"--repo_id={repo_id}", "--out_dir", str(directory), *map(str, words)]


NOT_NAMES = ("", "a/b/c", "../x", "a/..", "a\\b/c", "a b/c", "-a/b", "a--b", "x.git", "ä/b")


def test_only_what_a_checkpoint_needs_is_downloaded(hub, tmp_path):
    out = succeeds(*get(tmp_path / "model", "someone/llama"), **hub).stdout
    assert {file.name for file in (tmp_path / "model").iterdir() if file.is_file()} == {
        *("README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    }
    assert (tmp_path / "model/model.safetensors").read_bytes() == WEIGHTS
    assert "next: python finetune/lora.py" in out
    before = len(Hub.ranges)
    succeeds(*get(tmp_path / "model", "someone/llama"), **hub)
    assert len(Hub.ranges) == before  # nothing is downloaded twice


def test_a_broken_connection_is_resumed(hub, tmp_path):
    Hub.break_after["model.safetensors"] = 11_000_000
    words = get(tmp_path / "model", "someone/llama")
    succeeds(*words, **hub)  # the library itself asks for the rest
    assert (tmp_path / "model/model.safetensors").read_bytes() == WEIGHTS
    assert any(asked and asked.startswith("bytes=") and asked != "bytes=0-" for asked in Hub.ranges)


def test_a_gated_model_says_what_to_do(hub, tmp_path):
    message = fails(*get(tmp_path / "model", "someone/gated"), **hub)
    assert f"{hub['HF_ENDPOINT']}/someone/gated" in message and "--access_token" in message
    succeeds(*get(tmp_path / "model", "someone/gated", "--access_token", "hf_x"), **hub)


def test_what_cannot_be_downloaded_is_named(hub, tmp_path):
    light = Forked("cli", "hub", **hub)
    try:
        for repo_id, words, message in (
            ("someone/nothing", [], "no such model"),
            ("someone/llama", ["--revision", "v9"], "--revision v9"),
            (
                "someone/llama",
                ["--access_token", "wrong"],
                "the hub does not accept the token.*--access_token",
            ),
            ("someone/llama", ["--access_token", "hf x"], "--access_token: holds a space"),
            ("someone/data", [], "choose another repository"),
            *((name, [], "--repo_id .*must be OWNER/NAME") for name in NOT_NAMES),
            ("someone/t5", [], "no causal decoder of this type.*weights were not downloaded"),
        ):
            done = light.run(*get(tmp_path / "model", repo_id, *words), cwd=tmp_path)
            assert done["status"] == 2 and re.fullmatch(f"error: .*{message}.*\n", done["stderr"]), done
            assert not (tmp_path / "model/model.safetensors").exists() and "hf x" not in done["stderr"]
        # One directory, one model: files of the same names would be replaced.
        words = get(tmp_path / "llama", "someone/llama")
        left = tmp_path / "llama/.cache/huggingface/download/x.incomplete"
        left.parent.mkdir(parents=True)
        left.touch()
        assert (done := light.run(*words, cwd=tmp_path))["status"] == 0, done
        assert origin(tmp_path / "llama") == "someone/llama" and not left.exists()
        done = light.run(*get(tmp_path / "llama", "someone/other"), cwd=tmp_path)
        assert "llama: already holds someone/llama, whose files would be replaced" in done["stderr"]
    finally:
        light.close()


def test_an_unreachable_hub_is_one_line(hub, tmp_path):
    message = fails(*get(tmp_path / "model", "someone/llama"), **{**hub, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "run the same command again to resume it" in message


def test_a_directory_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/thesis.txt").write_text("mine")
    assert "thesis.txt" in fails("scripts/download.py", "--repo_id", "a/b", "--out_dir", tmp_path / "model")


def test_safetensors_are_preferred_and_the_index_comes_first():
    shards = [
        f"{stem}-0000{n}-of-00002.{kind}"
        for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin"))
        for n in (1, 2)
    ]
    names = [
        "README.md",
        "consolidated.safetensors",
        *shards,
        "model.safetensors.index.json",
        "config.json",
        "onnx/model.onnx",
    ]
    assert needed_files(names) == ["README.md", "config.json", "model.safetensors.index.json", *shards[:2]]
    assert needed_files(["pytorch_model.bin", "tf_model.h5"]) == ["pytorch_model.bin"]
    assert needed_files(["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"]) == [
        *("adapter_config.json", "adapter_model.safetensors")
    ]


def test_a_name_that_is_left_out_is_asked_for_with_an_example():
    said = fails("scripts/download.py")
    assert said.startswith("error: --repo_id: required, as in: python scripts/download.py --repo_id Eleuther")
