"""Reading data sources: real files, strange files, downloads from a local server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import SHARED

from litlora.data.conversation import Message
from litlora.data.sources import SAMPLE_FILE, read_dataset
from litlora.errors import DataError, UserError
from litlora.settings import JSON, Alpaca

RECORD = {"instruction": "Say hi.", "output": "Hi."}


def read(path):
    return read_dataset(JSON(path=str(path))).conversations


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json"])
def test_the_real_files_are_read_whole(name):
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"{path} is not at hand")
    expected = json.loads(path.read_text())
    assert [c.messages for c in read(path)] == [
        (
            Message("user", r["instruction"], input=r["input"]),
            Message("assistant", r["output"], train=True),
        )
        for r in expected
    ]


def test_json_jsonl_and_directories_agree(tmp_path):
    records = [{**RECORD, "input": f"line\u2028{n}", "extra": None} for n in range(3)]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\r\n", encoding="utf-8"
    )
    (tmp_path / "readme.txt").write_text("not data")
    once = [c.messages[0].input for c in read(tmp_path / "a.json")]
    assert once == [c.messages[0].input for c in read(tmp_path / "b.jsonl")] == [r["input"] for r in records]
    assert [c.messages[0].input for c in read(tmp_path)] == once * 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", "", r"x\.json: not valid JSON"),
        ("x.json", "[", r"x\.json: not valid JSON"),
        ("x.json", "{}", "must hold a JSON list"),
        ("x.json", "[]", "holds no records"),
        ("x.jsonl", "\n\n", "holds no records"),
        ("x.json", json.dumps([RECORD, 5]), r"x\.json, record 1: must be an object"),
        (
            "x.json",
            json.dumps([RECORD, {"prompt": "a", "output": "b"}]),
            r'x\.json, record 1: has no "instruction"; it has "prompt"',
        ),
        ("x.json", json.dumps([{"instruction": "a"}]), r'record 0: has no "output"'),
        (
            "x.json",
            json.dumps([{"instruction": "a", "output": None}]),
            r'"output" must be text, not NoneType',
        ),
        (
            "x.json",
            json.dumps([{"instruction": ["a"], "output": "b"}]),
            r'"instruction" must be text, not list',
        ),
        ("x.json", '[{"instruction": "\\ud800", "output": "b"}]', "lone surrogate"),
        ("x.jsonl", json.dumps(RECORD) + "\n{oops}\n", r"x\.jsonl, line 2: not valid JSON"),
        ("x.json", "[" * 100_000, "nested too deeply|not valid JSON"),
        ("x.json", b"\xff\xfe\x00", r"x\.json: is not UTF-8 text"),
    ],
)
def test_a_bad_file_names_itself_and_the_place(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        read(tmp_path / name)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no file of records .\\.json, "):
        read(tmp_path)


# ---- Alpaca: the full file, the download, the sample


def test_system_and_history_are_messages(tmp_path):
    record = {**RECORD, "system": "Be kind.", "history": [["a", "b"], ["c", ""]]}
    empty = {**RECORD, "input": None, "system": "", "history": []}
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, (record, empty, {**empty, "history": None}))))
    whole, *others = read(tmp_path / "x.jsonl")
    exchange = (Message("user", "Say hi."), Message("assistant", "Hi.", train=True))
    assert whole.messages == (
        Message("system", "Be kind."),
        Message("user", "a"),
        Message("assistant", "b", train=True),
        Message("user", "c"),
        Message("assistant", "", train=True),
        *exchange,
    )
    assert [other.messages for other in others] == [exchange] * 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"system": ["Be kind."]}, '"system" must be text, not list'),
        ({"system": "\ud800"}, "lone surrogate"),
        ({"history": "a"}, '"history" must be a list of .question, answer. pairs, not str'),
        ({"history": [["a", "b"], ["c"]]}, "its entry 1 is a list of 1"),
        ({"history": [{"user": "a"}]}, "its entry 0 is dict"),
        ({"history": [["a", None]]}, '"history", entry 0 must be text, not NoneType'),
        ({"id": 5}, r"""has a field that .*: "id"; .* not needed: ignore '\[id\]'$"""),
        (
            {"id": 5, "Input": "x", "no": 1, "a b": 2},
            r"""fields .*: "id", "Input", "no", "a b"; .*: ignore '\[id, Input, "no", "a b"\]'$""",
        ),
        ({f"f{n}": n for n in range(30)}, r'"f4", "f5" and 24 more; .*: ignore \'\[NAME, ...\]\'$'),
    ],
)
def test_a_field_that_training_would_drop_or_cannot_use_is_an_error(tmp_path, fields, says):
    (tmp_path / "x.json").write_text(json.dumps([RECORD, {**RECORD, **fields}]))
    with pytest.raises(DataError, match=rf"^\S*x\.json, record 1: .*{says}"):
        read(tmp_path / "x.json")


def test_unknown_fields_of_all_files_are_told_at_once_and_ignored_when_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([RECORD, {**RECORD, "id": 5}]))
    (tmp_path / "b.jsonl").write_text(json.dumps({**RECORD, "system": "x", "source": "web"}))
    with pytest.raises(DataError, match=r"a\.json, record 1: .*ignore '\[id, source\]'"):
        read(tmp_path)
    told = read_dataset(JSON(path=str(tmp_path), ignore=("id", "source", "system"))).conversations
    assert [len(conversation.messages) for conversation in told] == [2, 2, 2]
    with pytest.raises(UserError, match="ignore output: a record cannot be trained on without it"):
        read_dataset(JSON(path=str(tmp_path), ignore=("output",)))


def test_a_key_that_comes_twice_is_refused(tmp_path):
    twice = '{"instruction": "a", "output": "b", "output": "c"}'
    (tmp_path / "x.json").write_text(f"[{json.dumps(RECORD)}, {twice}]")
    with pytest.raises(DataError, match=r'x\.json, record 1: has "output" twice; keep one'):
        read(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(RECORD)}\n{twice}\n")
    with pytest.raises(DataError, match=r'x\.jsonl, line 2: has "output" twice'):
        read(tmp_path / "x.jsonl")


def test_the_content_of_a_file_decides_not_its_suffix(tmp_path):
    lines, as_list = "\n".join([json.dumps(RECORD)] * 3) + "\n", json.dumps([RECORD] * 3, indent=1)
    for name, content in (("a.JSONL", lines), ("b.json", lines), ("c.JSON", as_list), ("d.jsonl", as_list)):
        (tmp_path / name).write_text(content)
        assert len(read(tmp_path / name)) == 3, name
    assert len(read(tmp_path)) == 12
    (tmp_path / "one.json").write_text(json.dumps(RECORD, indent=1))
    with pytest.raises(DataError, match="must hold a JSON list of records, or one record a line; it is"):
        read(tmp_path / "one.json")
    (tmp_path / "b.json").write_text(lines + "{oops}")
    with pytest.raises(DataError, match=r"b\.json, line 4: not valid JSON"):
        read(tmp_path / "b.json")


def test_the_notes_of_macos_beside_a_file_are_not_data(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORD))
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(100))
    assert len(read(tmp_path)) == 1
    with pytest.raises(DataError, match=r"_a\.jsonl: holds what macOS stores .* path \S*/a\.jsonl is"):
        read(tmp_path / "._a.jsonl")
    (tmp_path / "._b.jsonl").write_text(json.dumps(RECORD))
    assert len(read(tmp_path)) == 2, "a name alone leaves nothing out"


class Server:
    """A web server on this machine that answers every request the same way."""

    def __init__(self, status: int, content: bytes) -> None:
        outer = self
        self.requests = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests += 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/alpaca_data.json"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def test_the_full_file_is_downloaded_once(tmp_path):
    with Server(200, json.dumps([RECORD] * 3).encode()) as server:
        source = Alpaca(url=server.url, download_dir=str(tmp_path / "data"))
        for _ in range(2):
            found = read_dataset(source)
            assert len(found.conversations) == 3 and found.source.source == "full" and found.notice is None
        assert server.requests == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["alpaca_data.json"]


@pytest.mark.parametrize(
    ("status", "content"), [(404, b"gone"), (200, b"<html>"), (200, b'{"not": "a list"}')]
)
def test_auto_falls_back_to_the_sample_and_says_so(tmp_path, status, content):
    with Server(status, content) as server:
        found = read_dataset(Alpaca(source="auto", url=server.url, download_dir=str(tmp_path / "data")))
        assert found.source.source == "sample"
        assert "built-in sample, not the full Alpaca data" in found.notice and server.url in found.notice
        assert len(found.conversations) == len(json.loads(SAMPLE_FILE.read_text()))
        with pytest.raises(DataError, match="could not be downloaded.*with source sample"):
            read_dataset(Alpaca(source="full", url=server.url, download_dir=str(tmp_path / "data")))
    assert not (tmp_path / "data").exists(), "a download that fails leaves nothing"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.json", "nonsense", "http://"])
def test_an_unreachable_address_is_no_crash(tmp_path, url):
    assert read_dataset(Alpaca(source="auto", url=url, download_dir=str(tmp_path))).source.source == "sample"


def test_sample_never_asks_the_network(tmp_path):
    with Server(200, b"[]") as server:
        assert read_dataset(Alpaca(source="sample", url=server.url, download_dir=str(tmp_path))).conversations
        assert server.requests == 0
