"""Large data: what is read from the disk is what memory would have held, and nothing breaks it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, command, fails, succeeds, tune

from litlora.data import cache as caching
from litlora.data import parallel
from litlora.data.cache import DataCache
from litlora.data.choosing import Survey
from litlora.data.examples import drawn, split, tokenize
from litlora.data.files import MAX_RECORD
from litlora.data.parts import Setup
from litlora.data.records import RecordReader
from litlora.data.skipped import Skipped
from litlora.data.sources import Dataset, Records, read_dataset
from litlora.data.store import HEADER, Broken, Store
from litlora.errors import DataError, UserError
from litlora.prompts import STYLES, ChatTemplate
from litlora.settings import JSON
from litlora.tokenizer import Tokenizer
from litlora.train.objective import SFT
from litlora.train.prepare import Preparation
from litlora.train.resume import facts

LIMIT = 150
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """So that small data has many."""
    monkeypatch.setattr(parallel, "PIECE", 400)


def records(count=60):
    """Some are longer than LIMIT, some have an empty answer, some a prompt that fills LIMIT."""
    rng = random.Random(3)
    return [
        {
            "instruction": f"number {n} " + "the fox " * (200 if n % 17 == 5 else rng.randint(0, 3)),
            "input": "lazy dog \u2028 caf\u00e9" if n % 3 == 0 else "",
            "output": "" if n % 11 == 7 else "seven eight " * rng.choice([1, 2, 40]),
        }
        for n in range(count)
    ]


def written(path: Path, found: list) -> Records:
    if path.suffix == ".json":
        path.write_text(json.dumps(found))
    else:
        path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in found))
    return Records((path,), RecordReader("alpaca"))


@pytest.fixture
def tokenizer(tokenizer_dir):
    return Tokenizer(tokenizer_dir)


@pytest.fixture
def said():
    return []


@pytest.fixture
def cache(tmp_path, said):
    return DataCache(tmp_path / "cache", said.append)


def setup_of(tokenizer, template=None):
    return Setup(tokenizer, "alpaca" if template is None else "template", template, LIMIT)


def store(cache, data, setup):
    return cache.get(cache.key(data, setup), data, setup)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("with_template", [False, True])
def test_the_store_holds_what_memory_would_hold(name, with_template, cache, said, tokenizer, tmp_path):
    data = written(tmp_path / name, records())
    template = ChatTemplate(TEMPLATE, tmp_path / "t.jinja", {}) if with_template else None
    setup = setup_of(tokenizer, template)
    found = store(cache, data, setup)
    assert found.num_conversations == 60
    train, val = split(list(data), 0.2, 7)
    stored = found.split(0.2, 7, LIMIT)
    for part, conversations in zip(stored, (train, val), strict=True):
        made = tokenize(conversations, tokenizer, setup.style, LIMIT)
        assert list(part.examples) == made.examples and len(part.examples) == len(made.examples)
        assert [part.examples[index] for index in range(len(made.examples))] == made.examples
        assert part.examples[-3:] == made.examples[-3:]
        assert list(part.examples.lengths) == [len(example.ids) for example in made.examples]
        assert replace(part, examples=[]) == replace(made, examples=[])
    whole, nothing = found.split(0, 7, LIMIT)
    assert nothing is None
    assert list(whole.examples) == tokenize(list(data), tokenizer, setup.style, LIMIT).examples
    assert whole.num_cut and whole.num_left_out and whole.num_empty
    assert "tokenising 0 MB" in said[0] and "60 records tokenised" in said[1]
    again = store(cache, data, setup)
    assert list(again.split(0.2, 7, LIMIT)[1].examples) == list(stored[1].examples)
    assert said[2:] == [f"data: tokenised before, in {again.directory}"]


def test_a_run_with_the_cache_writes_the_bytes_of_one_without_and_resumes_it(base, tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    data = written(file, records())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    train = {"global_batch_size": 4, "max_steps": 4, "save_interval": 2}
    tune("lora", base, file, tmp_path / "memory", train=train)
    monkeypatch.setattr("litlora.data.dataset.LARGE", 0)
    assert isinstance(read_dataset(JSON(path=str(file))).conversations, Records)
    assert isinstance(read_dataset(JSON(path=str(file), cache=False)).conversations, list)
    tune("lora", base, file, tmp_path / "disk", train=train)
    assert len(list((tmp_path / "xdg/litlora/data").glob(f"*/{HEADER}"))) == 1
    same = [(tmp_path / name / "final/lit_model.pth").read_bytes() for name in ("memory", "disk")]
    assert same[0] == same[1]
    settings = [(tmp_path / name / "hyperparameters.yaml").read_text() for name in ("memory", "disk")]
    assert settings[0].replace(f"{tmp_path}/memory", f"{tmp_path}/disk") == settings[1]
    shutil.rmtree(tmp_path / "memory/final")
    shutil.rmtree(tmp_path / "memory/step-000004", ignore_errors=True)
    tune("lora", base, file, tmp_path / "memory", train=train, resume="auto")
    assert (tmp_path / "memory/final/lit_model.pth").read_bytes() == same[0]
    assert list(data.files) == [file]


def test_the_hash_for_resume_is_that_of_examples_in_memory_and_is_remembered(cache, tokenizer, tmp_path):
    data = written(tmp_path / "data.jsonl", records())
    setup = setup_of(tokenizer)
    train, val = (made.examples for made in store(cache, data, setup).split(0.1, 1, LIMIT))
    objective = SFT.__new__(SFT)
    objective.__dict__["facts"] = {}
    import torch

    stored = facts(objective, torch.device("cpu"), "base", train, val)
    assert stored == facts(objective, torch.device("cpu"), "base", list(train), list(val))
    kept = sorted(cache.place.glob("*/hash-*.txt"))
    assert [file.read_text() for file in kept] in (
        [stored["training data"], stored["validation data"]],
        [stored["validation data"], stored["training data"]],
    )
    kept[0].write_text("f" * 16)
    again = facts(objective, torch.device("cpu"), "base", train, val)
    assert "f" * 16 in again.values()
    other = store(cache, data, setup).split(0.1, 2, LIMIT)[0].examples
    assert facts(objective, torch.device("cpu"), "base", other, val)["training data"] not in again.values()


def test_whatever_the_examples_depend_on_is_in_the_key(cache, tokenizer, tmp_path):
    data = written(tmp_path / "a.jsonl", records(3))
    setup = setup_of(tokenizer)
    key = cache.key(data, setup)
    template = ChatTemplate(TEMPLATE, tmp_path / "t.jinja", {})
    limited = Tokenizer(REPO / "checkpoints/litlora/quickstart")
    keys = {
        key,
        cache.key(written(tmp_path / "b.jsonl", records(4)), setup),
        cache.key(replace(data, reader=RecordReader("alpaca", ("id",))), setup),
        cache.key(replace(data, files=data.files * 2), setup),
        cache.key(data, replace(setup, max_seq_length=59)),
        cache.key(data, replace(setup, style_name="plain")),
        cache.key(data, replace(setup, template=template)),
        cache.key(data, replace(setup, template=ChatTemplate(TEMPLATE + " ", tmp_path / "t.jinja", {}))),
        cache.key(data, replace(setup, template=ChatTemplate(TEMPLATE, tmp_path / "t", {"bos_token": "x"}))),
        cache.key(data, replace(setup, tokenizer=limited)),
    }
    assert len(keys) == 10
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    assert cache.key(replace(data, files=(tmp_path / "c.jsonl",)), setup) == key, "the content counts"


def test_a_file_is_read_again_only_if_it_changed(cache, tokenizer, tmp_path, monkeypatch):
    data, setup = written(tmp_path / "a.jsonl", records(3)), setup_of(tokenizer)
    monkeypatch.setattr(caching, "SETTLED", -1)
    key = cache.key(data, setup)
    (remembered,) = cache.place.glob("*.sha256")
    remembered.write_text("0" * 64)
    assert cache.key(data, setup) != key, "it was not read"
    written(tmp_path / "a.jsonl", records(4))
    changed = cache.key(data, setup)
    written(tmp_path / "a.jsonl", records(3))
    assert cache.key(data, setup) == key != changed


def _cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def _damage(path):
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


HARMS = (
    ("examples.bin", _cut),
    ("offsets.bin", _cut),
    ("events.bin", Path.unlink),
    *((f"{part}.bin", _damage) for part in ("offsets", "lengths", "conversations", "events")),
    (HEADER, lambda path: path.write_text(path.read_text().replace('"num_conversations": 9', "8"))),
    (HEADER, lambda path: path.write_text(path.read_text().replace(": 9,", ": 8,"))),
    (HEADER, lambda path: path.write_text("[]")),
    (HEADER, lambda path: path.write_bytes(b"\xff{")),
)


def test_a_broken_store_is_found_and_made_anew(cache, said, tokenizer, tmp_path):
    data, setup = written(tmp_path / "a.jsonl", records(9)), setup_of(tokenizer)
    found = store(cache, data, setup)
    before = list(found.split(0, 0, LIMIT)[0].examples)
    for number, (name, harm) in enumerate(HARMS):
        broken = tmp_path / str(number)
        shutil.copytree(found.directory, broken)
        harm(broken / name)
        with pytest.raises(Broken, match=name):
            Store(broken)
    _cut(found.directory / "examples.bin")
    again = store(cache, data, setup)
    assert list(again.split(0, 0, LIMIT)[0].examples) == before
    assert len(said) == 5 and "examples.bin" in said[2] and said[2].endswith("it is made anew")


def test_damaged_examples_are_not_learned(cache, tokenizer, tmp_path):
    found = store(cache, written(tmp_path / "a.jsonl", records(9)), setup_of(tokenizer))
    _damage(found.directory / "examples.bin")
    examples = found.split(0, 0, LIMIT)[0].examples
    for read in (lambda: examples[0], lambda: list(examples)):
        with pytest.raises(DataError, match=rf"examples\.bin: is damaged; remove {found.directory}, and"):
            read()


@pytest.mark.parametrize(
    ("name", "bad", "says"),
    [
        ("data.json", {"instruction": "x"}, 'has no "output"'),
        ("data.jsonl", {"instruction": "x", "output": 3}, '"output" must be text, not int'),
        ("data.jsonl", {"instruction": "x", "output": "y", "id": 1}, 'would not use: "id"'),
        ("data.json", {"instruction": "x", "output": "y", "system": "z"}, "has a system message, for which"),
    ],
)
def test_the_first_bad_record_is_named_as_without_the_cache(name, bad, says, cache, tokenizer, tmp_path):
    found = records(40)
    found[23] = bad
    found[35] = {"output": "later"}
    data = written(tmp_path / name, found)
    place = "line 47" if name == "data.jsonl" else "record 23"
    with pytest.raises(DataError) as raised:
        store(cache, data, setup_of(tokenizer))
    assert str(raised.value).startswith(f"{tmp_path / name}, {place}: ") and says in str(raised.value)
    assert [path.suffix for path in cache.place.iterdir()] == [".lock"], "nothing half is left"
    if "system" not in bad:
        with pytest.raises(DataError) as plain:
            list(written(tmp_path / name, found[:35]))
        assert str(plain.value) == str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"instruction": "a", "output": "b"}\n' * 30 + b'{"instruction": \n', "line 31: not valid JSON"),
        (b'{"instruction": "a", "output": "b"}\r\n' * 30 + b"\r[}", "line 32: not valid JSON"),
        (b'{"instruction": "a", "output": "b"}\n' * 30 + b'{"\xff": 1}', r"is not UTF-8 text \(byte 1082\)"),
    ],
)
def test_broken_lines_are_named_as_without_the_cache(content, says, cache, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    data = Records((path,), RecordReader("alpaca"))
    with pytest.raises(DataError, match=says) as raised:
        store(cache, data, setup_of(tokenizer))
    with pytest.raises(DataError) as plain:
        list(data)
    assert str(plain.value) == str(raised.value)
    if "UTF-8" in says:
        data = replace(data, reader=RecordReader("alpaca", on_bad="skip"))
        with pytest.raises(DataError, match=f"{says}.*never a file"):
            store(cache, data, setup_of(tokenizer))


def test_a_bom_and_a_last_line_without_an_end_are_read(cache, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    record = b'{"instruction": "a", "output": "b"}'
    path.write_bytes(b"\xef\xbb\xbf" + (record + b"\n") * 29 + record)
    assert store(cache, Records((path,), RecordReader("alpaca")), setup_of(tokenizer)).num_conversations == 30


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_repeats_are_counted_while_data_is_tokenised(name, cache, tokenizer, tmp_path):
    found = [*records(30), *records(5)]
    data = replace(written(tmp_path / name, found), survey=Survey())
    dataset = Dataset(data, JSON(path="x"))
    assert next(iter(data)) and dataset.late_notices() == ()
    store(cache, data, setup_of(tokenizer))
    number = len(found) - len({json.dumps(record) for record in found})
    assert number >= 5 and dataset.late_notices()[0].startswith(f"{number} of 35 records repeat others")


def test_data_without_an_example_says_so(cache, tokenizer, tmp_path):
    long = written(tmp_path / "a.jsonl", [{"instruction": "fox " * 200, "output": "x"}] * 3)
    with pytest.raises(DataError, match=f"no example is left: .* {LIMIT} tokens .*a.jsonl, line 1$"):
        store(cache, long, setup_of(tokenizer)).split(0, 0, LIMIT)
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="b.jsonl: holds no records"):
        store(cache, replace(long, files=(tmp_path / "b.jsonl",)), setup_of(tokenizer))


def test_a_place_that_cannot_be_written_is_named_with_its_setting(said, tokenizer, tmp_path, monkeypatch):
    data = written(tmp_path / "a.jsonl", records(9))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x: .* \(Not a directory\); .*cache_dir.*cache false"):
        store(DataCache(tmp_path / "file/x", said.append), data, setup_of(tokenizer))
    full = DataCache(tmp_path / "full", said.append)

    def add(writer, part):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("litlora.data.store.StoreWriter.add", add)
    with pytest.raises(UserError, match=r"full: tokenised data .* \(No space left on device\); .*cache_dir"):
        store(full, data, setup_of(tokenizer))
    assert [path.suffix for path in full.place.iterdir()] == [".lock"]


def test_two_at_once_make_one_store(cache, said, tokenizer_dir, tmp_path):
    data = written(tmp_path / "a.jsonl", records())
    stores = []
    threads = [
        threading.Thread(target=lambda: stores.append(store(cache, data, setup_of(Tokenizer(tokenizer_dir)))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [list(one.split(0, 0, LIMIT)[0].examples) for one in stores]
    assert found[0] == found[1] == found[2]
    assert sum("tokenising" in line and "once" in line for line in said) == 1


def test_what_was_not_used_for_a_month_is_removed_and_nothing_else(cache, tokenizer, tmp_path):
    old, setup = written(tmp_path / "old.jsonl", records(5)), setup_of(tokenizer)
    used = written(tmp_path / "used.jsonl", records(6))
    stores = [store(cache, data, setup) for data in (old, used)]
    mine = cache.place / "notes"
    mine.write_text("")
    month = time.time() - 31 * 24 * 3600
    for path in (*cache.place.iterdir(), *cache.place.glob("*/*")):
        os.utime(path, (month, month))
    store(cache, used, setup)
    before = list(stores[0].split(0, 0, LIMIT)[0].examples)
    store(cache, written(tmp_path / "new.jsonl", records(7)), setup)
    left = {path.name for path in cache.place.iterdir() if path.is_dir()}
    assert stores[1].directory.name in left and stores[0].directory.name not in left and len(left) == 2
    assert mine.exists()
    assert list(stores[0].split(0, 0, LIMIT)[0].examples) == before, "who has it open still reads it"


PROGRAM = """
import sys
from pathlib import Path
from litlora.data import parallel
from litlora.data.cache import DataCache
from litlora.data.parts import Setup
from litlora.data.records import RecordReader
from litlora.data.sources import Records
from litlora.tokenizer import Tokenizer

parallel.PIECE = 2000
data = Records((Path(sys.argv[1]),), RecordReader("alpaca"))
setup = Setup(Tokenizer(Path(sys.argv[3])), "alpaca", None, 60)
cache = DataCache(Path(sys.argv[2]), lambda line: print(line, flush=True))
try:
    cache.get(cache.key(data, setup), data, setup)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_every_process_and_leaves_no_store(number, tokenizer_dir, tmp_path):
    file = tmp_path / "data.jsonl"
    written(file, records(30) * 400)
    words = [sys.executable, "-c", PROGRAM, file, tmp_path / "cache", tokenizer_dir]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO)
    assert "tokenising" in process.stdout.readline()
    deadline = time.monotonic() + 30
    while not (children := descendants(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    children |= descendants(process.pid)
    assert children and process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=20) == (130 if number == signal.SIGINT else -number)
    assert process.stderr.read() == ""
    process.stdout.close()
    process.stderr.close()
    while any(Path(f"/proc/{pid}/stat").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in children)
    assert not list((tmp_path / "cache").glob(f"*/{HEADER}"))
    if number == signal.SIGINT:
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def descendants(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return set(map(int, children)).union(*(descendants(int(child)) for child in children))


def test_validation_data_of_its_own_takes_the_place_of_the_split(tokenizer, tmp_path, said):
    train, own = written(tmp_path / "a.jsonl", records(9)), written(tmp_path / "b.jsonl", records(4))
    source = JSON(path="x", cache_dir=str(tmp_path / "cache"), val_fraction=0.5)
    prepare = Preparation(source, tokenizer, STYLES["alpaca"], LIMIT, said.append)
    on_disk = prepare.examples(Dataset(train, source, validation=own))
    in_memory = prepare.examples(Dataset(list(train), source, validation=list(own)))
    for stored, made in zip(on_disk, in_memory, strict=True):
        assert list(stored.examples) == made.examples


SKIPPING = """
from litlora.data.records import RecordReader
from litlora.errors import DataError

class Skipping(RecordReader):
    def read(self, entries, skipped=None):
        for conversation in super().read(entries):
            line = conversation.place.record
            if skipped is not None and int(line.split()[1]) % 4 == 1:
                skipped.append(DataError(line))
            elif int(line.split()[1]) % 4 != 1:
                yield conversation
"""


def test_records_that_are_left_out_are_counted(tokenizer, tmp_path, said, monkeypatch):
    (tmp_path / "skipping.py").write_text(SKIPPING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from skipping import Skipping

    data = replace(written(tmp_path / "a.jsonl", records(9)), reader=Skipping("alpaca"))
    source = JSON(path="x", cache_dir=str(tmp_path / "cache"), val_fraction=0)
    prepare = Preparation(source, tokenizer, STYLES["alpaca"], LIMIT, said.append)
    made, _ = prepare.examples(Dataset(data, source))
    assert list(made.examples) == tokenize(list(data), tokenizer, STYLES["alpaca"], LIMIT).examples
    assert prepare.notices == ["5 records were left out: line 1 | line 5 | line 9 | and 2 more"]


REFUSING = (
    "{% for m in messages %}{% if m.role == messages[loop.index0 - 1].role and loop.index0 %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TEMPLATE
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_a_template_refuses_is_left_out_the_same_in_memory_and_on_the_disk(name, tokenizer, tmp_path):
    answer = {"role": "assistant", "content": "dog"}
    users = [{"role": "user", "content": f"fox {n}"} for n in range(40)]
    found = [{"messages": [users[n]] * (1 + (n % 4 == 1)) + [answer] * (n % 9 != 2)} for n in range(40)]
    refused = [n for n in range(40) if n % 4 == 1 or n % 9 == 2]
    path = tmp_path / name
    path.write_text(json.dumps(found) if name == "a.json" else "\n".join(map(json.dumps, found)))
    style = ChatTemplate(REFUSING, tmp_path / "t.jinja", {}).style
    made = []
    for on_disk in (False, True):
        source = JSON(path=str(path), cache_dir=str(tmp_path / "cache"), on_bad="skip", val_fraction=0.2)
        data = read_dataset(source)
        if on_disk:
            reader = RecordReader("messages", on_bad="skip")
            data = replace(data, conversations=Records((path,), reader), notices=())
        prepare = Preparation(source, tokenizer, style, LIMIT, lambda _: None)
        parts = prepare.examples(data)
        left_out = sum(int(text.split()[0]) for text in (*data.notices[1:], *prepare.notices))
        assert left_out == len(refused)
        made.append([list(part.examples) for part in parts])
        assert sum(map(len, made[-1])) == 40 - len(refused)
    assert any("roles must alternate" in text for text in prepare.notices)
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", ["refused", "too long"])
def test_what_is_held_out_for_validation_is_not_only_what_is_left_out(kind, tokenizer, tmp_path):
    """Five good records, and the one that the seed would hold out, which is bad."""
    (bad,) = drawn(6, 0.05, 42)
    style = ChatTemplate(REFUSING, tmp_path / "t.jinja", {}).style
    users = [[{"role": "user", "content": f"fox {n}"}] for n in range(6)]
    users[bad] = users[bad] * 2 if kind == "refused" else [{"role": "user", "content": "fox " * 500}]
    path = tmp_path / "a.jsonl"
    answer = {"role": "assistant", "content": "dog"}
    path.write_text("\n".join(json.dumps({"messages": [*asked, answer]}) for asked in users))
    on_bad = "skip" if kind == "refused" else "error"
    source = JSON(path=str(path), cache_dir=str(tmp_path / "cache"), on_bad=on_bad)
    data = read_dataset(source)
    stream = replace(data, conversations=Records((path,), RecordReader("messages", on_bad=on_bad)))
    made = []
    for each in (data, stream):
        prepare = Preparation(source, tokenizer, style, LIMIT, lambda _: None)
        train, val = prepare.examples(each)
        assert [len(train.examples), len(val.examples)] == [4, 1]
        assert [train.num_left_out, len(prepare.notices)] == ([0, 1] if kind == "refused" else [1, 0])
        made.append([list(train.examples), list(val.examples)])
    assert made[0] == made[1]


@pytest.mark.parametrize("depth", [300, 900])
def test_deep_nesting_does_not_stop_the_processes(depth, cache, tokenizer, tmp_path):
    deep = json.dumps(records(9))[:-1] + ', {"instruction": "a", "output": "b", "x": ' + "[" * depth
    (tmp_path / "a.json").write_text(deep + "]" * depth + "}]")
    data = Records((tmp_path / "a.json",), RecordReader("alpaca", ignore=("x",), on_bad="skip"))
    setup = Setup(tokenizer, "alpaca", None, LIMIT)
    store = cache.get(cache.key(data, setup), data, setup)
    assert store.num_conversations + store.num_skipped == 10
    assert store.num_skipped == (depth == 900)  # more than pickle can send
    assert not store.skipped or "record 9: is nested too deeply" in store.skipped[0]


@pytest.mark.slow
def test_a_line_without_an_end_is_not_read_into_memory(cache, tokenizer, tmp_path):
    good = json.dumps(records(1)[0]).encode() + b"\n"
    file = tmp_path / "a.jsonl"
    with file.open("wb") as opened:
        opened.write(good * 150)
        opened.truncate(len(good) * 150 + 5 * MAX_RECORD)  # all zeros
        opened.seek(0, os.SEEK_END)
        opened.write(b"\n" + good * 2 + b"{oops}\n" + good)
    sizes = [
        piece.question["stop"] - piece.question["start"]
        for piece in parallel.pieces(Records((file,), RecordReader("alpaca", on_bad="skip")))
    ]
    assert max(sizes) < 4 * MAX_RECORD + 1000
    for on_bad in ("skip", "error"):
        data = Records((file,), RecordReader("alpaca", on_bad=on_bad))
        setup = Setup(tokenizer, "alpaca", None, LIMIT)
        if on_bad == "error":
            with pytest.raises(DataError, match="line 151: is longer than 67,108,864 characters"):
                cache.get(cache.key(data, setup), data, setup)
            continue
        store = cache.get(cache.key(data, setup), data, setup)
        assert store.num_conversations == 153
        assert [text.partition(": ")[0] for text in store.skipped] == [
            f"{file}, line 151",
            f"{file}, line 154",
        ]
        skipped = Skipped()
        assert len(list(data.read(skipped))) == 153
        assert list(map(str, skipped.first)) == store.skipped


def test_data_that_changes_between_its_key_and_its_reading_makes_no_store(cache, tokenizer, tmp_path):
    data, setup = written(tmp_path / "a.jsonl", records(9)), Setup(tokenizer, "alpaca", None, LIMIT)
    key = cache.key(data, setup)
    written(tmp_path / "a.jsonl", records(12))
    with pytest.raises(DataError, match=r"a\.jsonl: the data was changed while it was read; start again"):
        cache.get(key, data, setup)
    assert cache.get(cache.key(data, setup), data, setup).num_conversations == 12


def test_the_number_of_processes_is_bounded(monkeypatch):
    monkeypatch.setattr(parallel, "PIECE", 2**20)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(parallel, "free_ram", lambda: 2**40)
    assert [parallel.num_processes(size) for size in (1, 3 * 2**20, 2**40)] == [1, 3, 8]
    monkeypatch.setattr(parallel, "free_ram", lambda: 5 * 2**29)
    assert parallel.num_processes(2**40) == 2
    monkeypatch.setattr(parallel, "free_ram", lambda: 0)
    assert parallel.num_processes(2**40) == 1


def test_progress_is_said_now_and_then_where_there_is_no_terminal(monkeypatch):
    said = []
    progress = parallel.Progress(10**7, said.append)
    progress.add(10**6, 5)
    assert said == []
    monkeypatch.setattr(parallel, "SECONDS_A_LINE", 0)
    progress.add(4 * 10**6, 1000)
    progress.add(10**8, 5)
    assert [line.rpartition("; ")[0] for line in said] == [
        "data: 50% tokenised, 5 of 10 MB, 1,005 records",
        "data: 100% tokenised, 10 of 10 MB, 1,010 records",
    ]
    assert np.array_equal([line.endswith(" left") for line in said], [True, True])


TWO_DEVICES = """
import importlib.util

from litlora import cli
from litlora.data import dataset
from litlora.settings import FinetuneLoRA

dataset.LARGE = 0
spec = importlib.util.spec_from_file_location("command", {script!r})
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)
cli.run(command.main, FinetuneLoRA)
"""


@pytest.mark.slow
def test_of_two_devices_one_tokenises_and_both_learn_or_fail_together(base, tmp_path):
    file, script = tmp_path / "data.jsonl", tmp_path / "two.py"
    written(file, records())
    script.write_text(TWO_DEVICES.format(script=str(REPO / "finetune/lora.py")))
    words = ["--checkpoint_dir", base, "--data", file, "--devices", 2, "--accelerator", "cpu"]
    words += ["--prompt_style", "plain", "--train.max_steps", 2, "--precision", "32-true"]
    on_disk = [script, *words, "--data.cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "disk"]
    done = succeeds(*on_disk)
    assert done.stdout.count("data: tokenising") == 1
    succeeds("finetune/lora.py", *words, "--out_dir", tmp_path / "memory")
    same = [(tmp_path / name / "final/lit_model.pth").read_bytes() for name in ("memory", "disk")]
    assert same[0] == same[1]
    written(file, [*records(), {"instruction": "x"}])
    failed = command(*on_disk, "--overwrite")
    assert failed.returncode == 2 and failed.stderr.count("error: ") == 1
    assert 'data.jsonl, line 121: has no "output"' in failed.stderr.splitlines()[-1]


@pytest.mark.slow
def test_two_devices_refuse_a_pipe(base, tmp_path):
    words = ["--checkpoint_dir", base, "--data", "/dev/stdin", "--out_dir", tmp_path / "out"]
    lines = "".join(json.dumps(record) + "\n" for record in records(9))
    says = fails("finetune/lora.py", *words, "--accelerator", "cpu", "--devices", 2, input=lines)
    assert "/dev/stdin: can be read only once, and each of 2 devices reads the data" in says


@pytest.mark.parametrize("harm", [lambda found: [*found, found[0]], lambda found: found[:-1]])
def test_data_that_changes_after_it_was_counted_is_refused(harm, tmp_path):
    found = records(9)
    data = written(tmp_path / "a.json", found)
    data = replace(data, times=array("B", [2] * 9))
    assert len(list(data)) == 18
    written(tmp_path / "a.json", harm(found))
    with pytest.raises(DataError, match=r"a\.json: the data was changed while it was read"):
        list(data)
