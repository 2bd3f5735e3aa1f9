"""Known data sets: records of their exact layout, and downloads from a local server that answers
like the hub, and like GitHub."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from litlora.data.conversation import Place
from litlora.data.downloads import download_all, file_name
from litlora.data.records import RecordReader
from litlora.data.sources import READERS, read_dataset
from litlora.errors import DataError
from litlora.settings import (
    FLAN,
    LIMA,
    AlpacaGPT4,
    Deita,
    Dolly,
    KnownSet,
    LongForm,
    OpenHermes,
    UltraChat,
)

TALK = [{"content": "Hi?", "role": "user"}, {"content": "Hi.", "role": "assistant"}]
HERMES = {
    **dict.fromkeys(("custom_instruction", "topic", "model_name", "model", "views", "language", "id")),
    **dict.fromkeys(("title", "idx", "hash", "avatarUrl", "system_prompt")),
    "skip_prompt_formatting": False,
    "category": "orca",
    "source": "airoboros2.2",
    "conversations": [
        {"from": "human", "value": "Hi?", "weight": None},
        {"from": "gpt", "value": "Hi.", "weight": None},
    ],
}
LAYOUTS = {
    AlpacaGPT4: {"instruction": "Hi?", "input": "", "output": "Hi."},
    LIMA: {"conversations": ["Hi?", "Hi."], "source": "stackexchange"},
    Dolly: {"instruction": "Hi?", "context": "", "response": "Hi.", "category": "open_qa"},
    Deita: {"prompt": "Hi?", "prompt_id": "0" * 64, "messages": TALK},
    LongForm: {"input": "Hi?", "output": "Hi.", "source": "C4", "subset": "c4"},
    FLAN: {"inputs": "Hi?", "targets": "Hi.", "task": "cola_10templates"},
    OpenHermes: HERMES,
    UltraChat: {"prompt": "Hi?", "prompt_id": "0" * 64, "messages": TALK},
}


def test_there_is_a_record_of_each_set():
    assert set(LAYOUTS) == set(KnownSet.__subclasses__()) <= set(READERS)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_record_of_the_exact_layout_is_read(kind):
    reader = RecordReader(kind.FORM, kind.UNUSED, kind.COLUMNS)
    (found,) = reader.read([(Place("x", "record 0"), LAYOUTS[kind])])
    assert [(message.role, message.content, message.train) for message in found.messages] == [
        ("user", "Hi?", False),
        ("assistant", "Hi.", True),
    ]


def content(kind, name: str) -> bytes:
    """A file of two records."""
    lines = name.endswith("l")
    records = [json.dumps(LAYOUTS[kind])] * 2
    return ("\n".join(records) if lines else f"[{', '.join(records)}]").encode()


class Server(BaseHTTPRequestHandler):
    """Serves files by their path. `gated` ones need a token; `cut` ones end too soon; a redirect goes
    to another host's name."""

    files: dict[str, bytes] = {}
    gated: set[str] = set()
    cut: set[str] = set()
    redirected: dict[str, str] = {}
    asked: list[tuple[str, str | None]] = []

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        path, token = self.path.strip("/"), self.headers.get("Authorization")
        self.asked.append((path, token))
        if path in self.redirected:
            self.send_response(302)
            self.send_header("Location", self.redirected[path])
            self.end_headers()
            return
        status = 401 if path in self.gated and not token else 200 if path in self.files else 404
        data = self.files.get(path, b"") if status == 200 else b"<html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + 10 * (path in self.cut)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("files", "redirected"):
        monkeypatch.setattr(Server, name, {})
    for name in ("gated", "cut"):
        monkeypatch.setattr(Server, name, set())
    monkeypatch.setattr(Server, "asked", [])
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # no token of whoever runs this
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield address
    running.shutdown()
    running.server_close()


def on_the_hub(repo: str, **files: bytes) -> None:
    names = {name.replace("__", "/").replace("_dot_", "."): data for name, data in files.items()}
    Server.files |= {f"datasets/{repo}/resolve/main/{name}": data for name, data in names.items()}
    listing = {"id": repo, "siblings": [{"rfilename": name} for name in ["README.md", *names]]}
    Server.files[f"api/datasets/{repo}"] = json.dumps(listing).encode()


@pytest.mark.parametrize("kind", [LIMA, Dolly, OpenHermes])
def test_a_set_on_the_hub_is_downloaded_once(kind, server, tmp_path, capsys):
    (address,) = kind.ADDRESSES
    owner, repo, name = address.removeprefix("hf://datasets/").split("/")
    on_the_hub(f"{owner}/{repo}", **{name: content(kind, name)})
    source = kind(data_dir=str(tmp_path / "data" / "it"))
    for _ in range(2):
        found = read_dataset(source)
        assert len(found.conversations) == 2 and found.source == source
    assert [path for path, _ in Server.asked] == [f"datasets/{owner}/{repo}/resolve/main/{name}"]
    assert capsys.readouterr().out.count(f"downloading {server}/datasets/{owner}/{repo}") == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["it"]


def test_a_pattern_is_every_file_of_that_name(server, tmp_path):
    names = [f"train__{task}_10templates_train_dot_jsonl" for task in ("rte", "cola")]
    other = "test__cola_10templates_test_dot_jsonl"
    on_the_hub("Muennighoff/flan", **dict.fromkeys([*names, other], content(FLAN, ".jsonl")))
    assert len(read_dataset(FLAN(data_dir=str(tmp_path / "all"))).conversations) == 4
    some = "hf://datasets/Muennighoff/flan/train/rte_10templates_train.jsonl"
    assert len(read_dataset(FLAN(data_dir=str(tmp_path / "some"), urls=(some,))).conversations) == 2
    assert len(read_dataset(FLAN(data_dir=str(tmp_path / "all"), urls=(some,))).conversations) == 2, (
        "of files that are there, those that are asked for"
    )


@pytest.mark.parametrize("kind", [AlpacaGPT4, LongForm])
def test_a_set_elsewhere_is_downloaded(kind, server, tmp_path):
    name = file_name(kind.ADDRESSES[0])
    Server.files[f"some/{name}"] = content(kind, name)
    source = kind(data_dir=str(tmp_path / "it"), urls=(f"{server}/some/{name}",))
    assert len(read_dataset(source).conversations) == 2


@pytest.mark.parametrize("kind", [Deita, UltraChat])
def test_the_files_of_a_table_arrive_whole_or_not_at_all(kind, server, tmp_path, capsys):
    (address,) = kind.ADDRESSES
    owner, repo, _ = address.removeprefix("hf://datasets/").split("/", 2)
    parts = {f"data__train_sft-0000{n}-of-00003-abc_dot_parquet": b"PAR1" + bytes([n]) * 9 for n in range(3)}
    on_the_hub(f"{owner}/{repo}", **parts, data__test_sft_dot_parquet=b"PAR1")
    last = "data/train_sft-00002-of-00003-abc.parquet"
    Server.cut.add(f"datasets/{owner}/{repo}/resolve/main/{last}")
    directory = tmp_path / "it"
    with pytest.raises(OSError, match="ended after 13 of 23 bytes|IncompleteRead"):
        download_all([address], directory, print)
    assert not list(tmp_path.iterdir()), "two of three files would be taken for all"
    Server.cut.clear()
    download_all([address], directory, print)
    assert [file.read_bytes() for file in sorted(directory.iterdir())] == list(parts.values())
    assert "13 bytes" in capsys.readouterr().out


def test_a_token_is_for_the_hub_alone(server, tmp_path, monkeypatch):
    on_the_hub("GAIR/lima", **{"train.jsonl": content(LIMA, ".jsonl")})
    (path,) = [path for path in Server.files if path.endswith("train.jsonl")]
    Server.gated.add(path)
    source = LIMA(data_dir=str(tmp_path / "it"))
    with pytest.raises(
        DataError, match="terms must be accepted first, .* GAIR/lima; then log in .* HF_TOKEN"
    ):
        read_dataset(source)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(read_dataset(source).conversations) == 2
    Server.files["elsewhere"] = Server.files[path]
    Server.redirected[path] = f"{server}/elsewhere"
    assert len(read_dataset(LIMA(data_dir=str(tmp_path / "again"))).conversations) == 2
    assert Server.asked[-2:] == [(path, "Bearer hf_secret"), ("elsewhere", None)]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "HTTP status 404"),
        (b"<html>sign in</html>", "the answer is not a jsonl file"),
        (b"", "the answer is not a jsonl file"),
    ],
)
def test_what_is_no_file_of_records_leaves_nothing(answer, says, server, tmp_path):
    if answer is not None:
        on_the_hub("databricks/databricks-dolly-15k", **{"databricks-dolly-15k.jsonl": answer})
    with pytest.raises(
        DataError, match=rf"^hf://\S+: could not be downloaded \({says}\); put its files into \S+it"
    ):
        read_dataset(Dolly(data_dir=str(tmp_path / "it")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "address", ["nonsense", "http://", "http://127.0.0.1:9/x.json", "hf://datasets/a/b/*.json"]
)
def test_an_address_that_does_not_answer_is_one_line(address, server, tmp_path):
    with pytest.raises(DataError, match="could not be downloaded"):
        read_dataset(Dolly(data_dir=str(tmp_path / "it"), urls=(address,)))
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "dolly").mkdir(parents=True)
    file = tmp_path / "data" / "dolly" / "databricks-dolly-15k.jsonl"
    file.write_bytes(content(Dolly, ".jsonl"))
    found = read_dataset(Dolly(system="Be brief.", ignore=("category",)))
    assert [c.messages[0].content for c in found.conversations] == ["Be brief."] * 2
    assert found.source == Dolly(system="Be brief.", ignore=("category",)), "what is stored is what was set"
