"""Text to ids and back, and a stream that shows whole characters only."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, SHARED

from litlora.errors import CheckpointError
from litlora.tokenizer import TextStream, Tokenizer

STRANGE = "naïve 😀👩‍👩‍👧 东京 ünï\u0301 \x07 \u200f العربية end"


@pytest.fixture
def tokenizer(tokenizer_dir):
    return Tokenizer(tokenizer_dir)


def test_a_stream_shows_whole_characters_and_loses_none(tokenizer):
    ids = tokenizer.encode(STRANGE)
    assert len(ids) > len(STRANGE), "the test needs characters that are spread over several tokens"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == STRANGE
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 20, "text must come as soon as it can"


def test_a_stream_that_ends_inside_a_character_ends(tokenizer):
    stream = TextStream(tokenizer)
    shown = "".join(stream.push(token) for token in tokenizer.encode("ab😀")[:-1])
    assert shown == "ab"
    assert stream.finish() == "\ufffd"


def test_an_invalid_byte_does_not_hold_back_what_follows(tokenizer):
    broken = tokenizer.encode("😀")[:1]
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token) for token in [*broken, *tokenizer.encode("hello there")])
    assert text.endswith("hello there")


def test_the_real_tokenizer_streams_chinese_and_emoji(tmp_path):
    file = SHARED / "tokenizers/gpt_neox_20b_tokenizer.json"
    if not file.is_file():
        pytest.skip(f"{file} is not at hand")
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    tokenizer = Tokenizer(tmp_path)
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(STRANGE)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)


def test_the_end_of_text_is_found_or_asked_for(tmp_path, tokenizer_dir):
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    settings = tmp_path / "t/tokenizer_config.json"
    expected = Tokenizer(tokenizer_dir).eos_id
    settings.write_text(json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False}}))
    assert Tokenizer(tmp_path / "t").eos_id == expected
    settings.unlink()
    assert Tokenizer(tmp_path / "t").eos_id == expected, "a well-known name needs no settings"
    settings.write_text(json.dumps({"eos_token": "</nowhere>"}))
    with pytest.raises(CheckpointError, match="lacks the token '</nowhere>'"):
        Tokenizer(tmp_path / "t")
    settings.write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        Tokenizer(tmp_path / "t")


def test_generation_stops_where_the_model_says(tmp_path, tokenizer_dir):
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    eos = Tokenizer(tokenizer_dir).eos_id
    (tmp_path / "t/generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Tokenizer(tmp_path / "t").stop_ids == {eos, 7, 9}
    (tmp_path / "t/generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer(tmp_path / "t").stop_ids == {eos, 7}


def test_begin_of_text_is_added_when_the_tokenizer_uses_one(tmp_path, tokenizer_dir):
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    plain = Tokenizer(tokenizer_dir).encode("fox")
    assert Tokenizer(tokenizer_dir).encode("fox", begin=True) == plain
    settings = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path / "t")
    assert tokenizer.encode("fox", begin=True) == [tokenizer.eos_id, *plain]
    assert tokenizer.encode("fox") == plain


TALK = """
import sys, threading
from pathlib import Path
from litlora.errors import CheckpointError
from litlora.tokenizer import Tokenizer

tokenizer = Tokenizer(Path(sys.argv[1]))
ids = tokenizer.encode("the fox")
refused = []

def encode():
    for _ in range(5):
        try:
            tokenizer.encode("a" * 60 + "c")
        except CheckpointError as error:
            refused.append(str(error))

def decode():
    for _ in range(2000):
        assert tokenizer.decode(ids) == "the fox"

threads = [threading.Thread(target=work) for work in (encode, decode, encode, decode)]
for thread in threads:
    thread.start()
for number in range(200):
    print(number, file=sys.stderr, flush=True)
for thread in threads:
    thread.join()
assert len(refused) == 10 and all("cannot encode this text" in line for line in refused), refused
print("end", file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a thread with its own file table is Linux's")
def test_threads_that_encode_and_decode_leave_stderr_alone(tmp_path, tokenizer_dir):
    """With a tokenizer that makes the library panic and print that: nothing of it, and all of ours,
    is on stderr."""
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    file = tmp_path / "t/tokenizer.json"
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a|aa)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = json.loads(file.read_text())["pre_tokenizer"]
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": steps}))
    done = subprocess.run(
        [sys.executable, "-c", TALK, str(tmp_path / "t")],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == [*map(str, range(200)), "end"]
