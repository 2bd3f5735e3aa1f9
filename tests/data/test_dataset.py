"""What is taken of the data: validation data, mixtures, max_examples, repeats, streams."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest

from litlora.data.dataset import LARGE, Mixture, Records
from litlora.data.sources import read_dataset
from litlora.errors import DataError, UserError, setting
from litlora.settings import JSON, Alpaca, Files, Mix, MixedSource


def write(file: Path, *names: str, **more: str) -> str:
    records = [{"instruction": name, "output": "x", **more} for name in names]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def asked(conversations) -> list[str]:
    return [conversation.messages[0].content for conversation in conversations]


def said(found) -> tuple[str, ...]:
    """What is said but for the form of the records."""
    return tuple(notice for notice in found.notices if "are of the form" not in notice)


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


# ---- validation data of one's own


def test_validation_data_of_its_own(tmp_path):
    train, val = write(tmp_path / "a.jsonl", "a", "b", "c"), write(tmp_path / "v.jsonl", "c", "d", "c")
    found = read_dataset(JSON(path=train, val_path=val))
    assert (asked(found.conversations), asked(found.validation)) == (["a", "b", "c"], ["c", "d", "c"])
    [notice] = said(found)
    assert notice.startswith("2 of 3 validation records are in the training data too, so that the valid")
    found = read_dataset(JSON(path=train, val_path=val, drop_duplicates=True))
    assert (asked(found.conversations), asked(found.validation)) == (["a", "b"], ["c", "d", "c"])
    assert said(found) == ("1 records that are validation data are left out",)
    assert read_dataset(JSON(path=train)).validation is None


def test_validation_data_is_read_with_the_same_settings(tmp_path):
    train = write(tmp_path / "a.jsonl", "a", id="1")
    val = write(tmp_path / "v.jsonl", "a", id="2")
    found = read_dataset(JSON(path=train, val_path=val, ignore=("id",)))
    assert "1 of 1 validation records" in said(found)[0], "what is ignored makes no difference"
    with pytest.raises(DataError, match="nowhere: no such file"):
        read_dataset(JSON(path=train, val_path="nowhere", ignore=("id",)))
    (tmp_path / "v.jsonl").write_text("")
    with pytest.raises(DataError, match=r"v\.jsonl: holds no records; there is nothing to validate on"):
        read_dataset(JSON(path=train, val_path=val, ignore=("id",)))
    for source in (Alpaca(source="sample", val_path=val), JSON(path=train, val_path=val, val_fraction=0.0)):
        assert source.val_path == val
    with pytest.raises(UserError, match=r"val_fraction 0\.1: val_path names the validation data already"):
        JSON(path=train, val_path=val, val_fraction=0.1)


def test_records_in_another_kind_of_file_are_the_same(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet

    train = write(tmp_path / "a.jsonl", "a", "b")
    rows = {"output": ["x", "y"], "instruction": ["a", "z"], "input": [None, "more"]}
    pa.parquet.write_table(pa.table(rows), tmp_path / "v.parquet")
    found = read_dataset(JSON(path=train, val_path=str(tmp_path / "v.parquet")))
    assert asked(found.validation) == ["a", "z"]
    assert said(found)[0].startswith("1 of 2 validation records are in the training data too")


# ---- repeats, and how many records


def test_repeats_are_counted_and_left_out_when_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", "a", "b", "a", "c", "b", "a")
    found = read_dataset(JSON(path=path))
    assert asked(found.conversations) == ["a", "b", "a", "c", "b", "a"]
    assert said(found) == (
        f"3 of 6 records repeat others exactly; the first: {path}, line 3, as {path}, line 1 "
        f"({setting('drop_duplicates')} true leaves them out)",
    )
    found = read_dataset(JSON(path=path, drop_duplicates=True))
    assert asked(found.conversations) == ["a", "b", "c"]
    assert said(found) == ("3 records that repeat others exactly are left out",)
    assert said(read_dataset(JSON(path=write(tmp_path / "b.jsonl", "a", "b")))) == ()


def test_the_order_of_fields_makes_no_record_another_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "a", "output": "b"}\n{"output": "b", "input": null,  "instruction": "a"}\n'
        '{"instruction": "a", "output": "b", "input": ""}'
    )
    [notice] = said(read_dataset(JSON(path=str(tmp_path / "a.jsonl"))))
    assert notice.startswith("1 of 3 records repeat others")


def test_max_examples_takes_the_first_ones_or_any(tmp_path):
    path = write(tmp_path / "a.jsonl", *numbered("", 20))
    assert asked(read_dataset(JSON(path=path, max_examples=5)).conversations) == numbered("", 5)
    assert len(read_dataset(JSON(path=path, max_examples=50)).conversations) == 20
    some = asked(read_dataset(JSON(path=path, max_examples=5, shuffle=True)).conversations)
    assert len(set(some)) == 5 and some == sorted(some, key=int) != numbered("", 5)
    assert some == asked(read_dataset(JSON(path=path, max_examples=5, shuffle=True)).conversations)
    other = read_dataset(JSON(path=path, max_examples=5, shuffle=True, split_seed=1))
    assert asked(other.conversations) != some
    assert said(other) == ("5 of 20 records, chosen by the seed 1",)
    with pytest.raises(UserError, match="shuffle: chooses the records that max_examples takes, and has no"):
        JSON(path=path, shuffle=True)


def test_what_max_examples_leaves_out_is_not_read(tmp_path):
    path = write(tmp_path / "a.jsonl", "a", "b")
    with open(path, "a") as file:
        file.write("{oops}")
    assert asked(read_dataset(JSON(path=path, max_examples=2)).conversations) == ["a", "b"]
    with pytest.raises(DataError, match="line 3: not valid JSON"):
        read_dataset(JSON(path=path, max_examples=3))


def test_max_examples_counts_after_repeats_are_gone(tmp_path):
    path = write(tmp_path / "a.jsonl", "a", "a", "b", "c")
    found = read_dataset(JSON(path=path, max_examples=2, drop_duplicates=True))
    assert asked(found.conversations) == ["a", "b"]


# ---- mixtures


@pytest.fixture
def pair(tmp_path):
    """20 records a0, a1 ... and 40 records b0, b1 ..."""
    return write(tmp_path / "a.jsonl", *numbered("a", 20)), write(tmp_path / "b.jsonl", *numbered("b", 40))


def test_a_weight_is_how_often_records_are_taken(pair):
    sources = [MixedSource(path=pair[0], weight=2.25), MixedSource(path=pair[1], weight=0.5)]
    found = read_dataset(Mix(sources=sources, val_fraction=0.0))
    counts = Counter(asked(found.conversations))
    of_a = [counts[name] for name in numbered("a", 20)]
    of_b = [counts[name] for name in numbered("b", 40)]
    assert Counter(of_a) == {2: 15, 3: 5} and Counter(of_b) == {1: 20, 0: 20}
    assert found.validation is None
    assert said(found) == (
        f"{pair[0]}: 45 examples of 20 records to train on, 0 to validate",
        f"{pair[1]}: 20 examples of 40 records to train on, 0 to validate",
    )
    again = read_dataset(Mix(sources=sources, val_fraction=0.0))
    assert asked(again.conversations) == asked(found.conversations)
    other = read_dataset(Mix(sources=sources, val_fraction=0.0, split_seed=1))
    assert asked(other.conversations) != asked(found.conversations)


def test_what_is_held_out_of_a_mixture_is_not_trained_on(pair):
    sources = [MixedSource(path=pair[0], weight=3), MixedSource(path=pair[1])]
    found = read_dataset(Mix(sources=sources, val_fraction=0.25))
    train, val = asked(found.conversations), asked(found.validation)
    assert len(val) == len(set(val)) == 15 and not set(train) & set(val)
    assert len(set(train)) == 45 and Counter(train).most_common(1)[0][1] == 3


def test_a_mixture_has_validation_data_and_a_size_of_its_own(pair, tmp_path):
    val = write(tmp_path / "v.jsonl", "v", "a1")
    sources = [MixedSource(path=pair[0], weight=2), MixedSource(path=pair[1])]
    found = read_dataset(Mix(sources=sources, val_path=val, max_examples=40))
    assert asked(found.validation) == ["v", "a1"] and len(found.conversations) == 40
    share = sum(name[0] == "a" for name in asked(found.conversations))
    assert 10 <= share <= 30, "taken from all of them"
    assert said(found)[-1].startswith("1 of 2 validation records are in the training data too")


def test_sources_of_a_mixture_differ_in_how_they_are_read(pair, tmp_path):
    other = write(tmp_path / "c.jsonl", "c", id="5")
    with pytest.raises(DataError, match=r'c\.jsonl, line 1: has a field .* "id"'):
        read_dataset(Mix(sources=[MixedSource(path=pair[0]), MixedSource(path=other)]))
    sources = [MixedSource(path=pair[0]), MixedSource(path=other, ignore=("id",))]
    found = read_dataset(Mix(sources=sources, val_fraction=0.0))
    assert asked(found.conversations) == [*numbered("a", 20), "c"]
    assert found.notices[:2] == tuple(
        f"{path}: the records are of the form alpaca" for path in (pair[0], other)
    )
    named = Mix(sources=[MixedSource(source="Alpaca", weight=0.01), *sources])
    assert [type(part) for part in named.parts()] == [Alpaca, Files, Files]


def test_a_weight_that_takes_nothing_is_an_error(pair):
    with pytest.raises(DataError, match=r"sources: a weight of 0\.01 takes none of 20 records"):
        read_dataset(Mix(sources=[MixedSource(path=pair[0], weight=0.01), MixedSource(path=pair[1])]))


# ---- more data than is kept in memory


@pytest.fixture(scope="module")
def much(tmp_path_factory):
    """A file that is too large to be read into a list: 40 records, the last of which repeats one."""
    names = [f"{number % 39} " + "x" * (LARGE // 39) for number in range(40)]
    return write(tmp_path_factory.mktemp("much") / "a.jsonl", *names)


def test_much_data_is_a_stream(much, tmp_path):
    found = read_dataset(JSON(path=much, val_path=write(tmp_path / "v.jsonl", "a")))
    assert isinstance(found.conversations, Records) and isinstance(found.validation, Records)
    for _ in range(2):
        numbers = [name.split()[0] for name in asked(found.conversations)]
        assert numbers == [*numbered("", 39), "0"]
    again = pickle.loads(pickle.dumps(found.conversations))
    assert [place.record for place, _ in again.entries()] == [f"line {n}" for n in range(1, 41)]
    assert [part.reader for part in found.conversations.parts] == [found.conversations.reader]


def test_repeats_in_a_stream_are_known_once_it_was_read(much):
    found = read_dataset(JSON(path=much))
    assert said(found) == () == found.late_notices()
    assert sum(1 for _ in found.conversations) == 40
    assert found.late_notices()[0].startswith("1 of 40 records repeat others exactly; the first: ")
    found = read_dataset(JSON(path=much, drop_duplicates=True))
    assert sum(1 for _ in found.conversations) == 39 and found.late_notices() == ()


def test_a_mixture_of_much_data_is_a_stream(much, tmp_path):
    own = write(tmp_path / "a.jsonl", *numbered("a", 3))
    found = read_dataset(
        Mix(sources=[MixedSource(path=much, weight=0.5), MixedSource(path=own)], val_fraction=0.1)
    )
    assert isinstance(found.conversations, Mixture)
    assert len(found.conversations.parts) == 2
    assert sum(1 for _ in found.conversations) == 21 and sum(1 for _ in found.validation) == 2


def test_the_first_bad_record_of_much_data_is_told_at_once(much, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": 5, "output": "b"}\n' + Path(much).read_text())
    with pytest.raises(DataError, match=r'line 1: "instruction" must be text, not int'):
        read_dataset(JSON(path=str(path)))


# ---- records in several forms, and bad ones


def test_a_broken_line_is_left_out_like_a_bad_record(tmp_path):
    path = write(tmp_path / "a.jsonl", "a", "b")
    with open(path, "a") as file:
        file.write('{oops}\n{"instruction": "c"}\n{"instruction": "d", "output": "x"}\n')
    found = read_dataset(JSON(path=path, on_bad="skip", val_fraction=0.0))
    assert asked(found.conversations) == ["a", "b", "d"]
    [notice] = said(found)
    assert notice.startswith("2 records were left out: ") and "line 3: not valid JSON" in notice
    with pytest.raises(DataError, match="line 3: not valid JSON"):
        read_dataset(JSON(path=path))


def test_sources_of_a_mixture_may_have_different_forms(tmp_path):
    own = write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").write_text('{"question": "b", "completion": "x"}\n')
    talk = [{"from": "human", "value": "c"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"conversations": talk}))
    sources = [
        MixedSource(path=own),
        MixedSource(path=str(tmp_path / "b.jsonl"), columns={"prompt": "question"}),
        MixedSource(path=str(tmp_path / "c.jsonl"), format="sharegpt"),
    ]
    talk = [{"role": "CUSTOMER", "content": "d"}, {"role": "AGENT", "content": "x"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": talk}))
    roles = {"CUSTOMER": "user", "AGENT": "assistant"}
    sources.append(MixedSource(path=str(tmp_path / "d.jsonl"), roles=roles))
    found = read_dataset(Mix(sources=sources, val_fraction=0.0))
    assert asked(found.conversations) == ["a", "b", "c", "d"]


def test_a_pipe_is_read_once(tmp_path):
    import os

    reading, writing = os.pipe()
    os.write(writing, Path(write(tmp_path / "a.jsonl", "a", "b")).read_bytes())
    os.close(writing)
    try:
        found = read_dataset(JSON(path=f"/dev/fd/{reading}", drop_duplicates=True))
    finally:
        os.close(reading)
    assert asked(found.conversations) == ["a", "b"]
