"""Data sets on the hub, fetched by the real libraries from a hub on this machine."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import REPO

from litlora.data.files import find_files
from litlora.errors import DataError

COMMIT = "c" * 40
FILES = {
    "train.jsonl": b'{"instruction": "a", "output": "b"}\n' * 3,
    "test.jsonl": b'{"instruction": "t", "output": "b"}\n',
}
PROGRAM = """
import sys
from litlora.data.files import entries, find_files
from litlora.errors import UserError
for path in sys.argv[1:]:
    try:
        found = find_files(path)
        values = [value["instruction"] for file in found.files for _, value in entries(file)]
        print("found", *values, *found.notices, sep="|")
    except UserError as error:
        print("error", error, sep="|")
"""


class Hub(BaseHTTPRequestHandler):
    """Serves one data set, owner/name, with one commit."""

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        name = path.rpartition("/")[2]
        if path.startswith("api/datasets/owner/name/tree/"):
            listed = [
                {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": file}
                for file, data in FILES.items()
            ]
            return self.answer(200, json.dumps(listed if name == COMMIT else []).encode())
        if path.startswith("api/datasets/owner/name"):
            about = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": file} for file in FILES]}
            return self.answer(200, json.dumps(about).encode())
        if not path.startswith("datasets/owner/name/resolve/"):
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name not in FILES:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, FILES[name], headers)

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        self.close_connection = True


@pytest.fixture
def ask(tmp_path):
    """Finds paths in a process that uses this hub: a line for each."""
    pytest.importorskip("datasets")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def ask(*paths: str, **more: str) -> list[str]:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, *paths], env=env | more, capture_output=True, text=True, cwd=REPO
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    yield ask
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_data_set_on_the_hub_is_read_by_split_and_by_file(ask, tmp_path):
    whole, split, file, no_split, no_file, nothing = ask(
        "hf://owner/name",
        "hf://owner/name/test",
        "hf://owner/name/test.jsonl",
        "hf://owner/name/validation",
        "hf://owner/name/x.jsonl",
        "hf://owner/other",
    )
    kept = f"kept in {tmp_path}/datasets/owner___name/default/0.0.0/{COMMIT}"
    assert whole == f"found|a|a|a|hf://owner/name: its split train, {kept}"
    assert split == f"found|t|hf://owner/name/test: its split test, {kept}"
    assert file == "found|t"
    assert no_split.startswith('error|hf://owner/name/validation: cannot be fetched: Unknown split "valid')
    assert no_file.startswith("error|hf://owner/name/x.jsonl: cannot be fetched: 404 Client Error")
    assert nothing.startswith(
        "error|hf://owner/other: cannot be fetched: Dataset 'owner/other' doesn't exist"
    )


@pytest.mark.slow  # processes that import datasets
def test_without_a_network_the_cache_answers_and_what_is_not_there_is_one_line(ask):
    (there,) = ask("hf://owner/name")
    with socket.socket() as closed:  # a port that nobody listens at
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        nothing, found, no_file = ask(
            "hf://owner/other", "hf://owner/name", "hf://owner/other/x.jsonl", HF_ENDPOINT=endpoint
        )
    assert found == there
    assert nothing == (
        "error|hf://owner/other: cannot be fetched: 127.0.0.1 cannot be reached, and it is not in the cache; "
        "name files that are here, or try again with a network"
    )
    assert no_file.startswith("error|hf://owner/other/x.jsonl: cannot be fetched:")


@pytest.mark.parametrize("path", ["hf://", "hf://owner", "hf://owner//train", "hf://owner/name/a/b/c"])
def test_a_name_that_is_none_is_explained(path):
    with pytest.raises(DataError, match="a data set on the hub is named hf://OWNER/NAME, hf://OWNER/NAME/S"):
        find_files(path)
