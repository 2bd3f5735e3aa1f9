"""A data file of a kind that is not read gets a line that says what it is and what to do."""

import pytest

from litlora.data.sources import read_dataset
from litlora.errors import DataError
from litlora.settings import JSON


def refusal(path: object) -> str:
    with pytest.raises(DataError) as raised:
        read_dataset(JSON(path=str(path)))
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.xlsx", b"PK\x03\x04", "is an Excel file; .*pandas.read_excel.*to_json"),
        ("a.zip", b"PK\x03\x04", "is an archive; .*unpack it first"),
        ("a.json", b"PK\x03\x04", "is an archive"),
        ("a.tar.gz", b"\x1f\x8b\x08", "is an archive"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00", "is a file packed by xz; .*unpack it first"),
        ("a.jsonl.bz2", b"BZh91AY", "is a file packed by bzip2"),
        ("a.yaml", b"- instruction: a", "is a YAML file; .*write it as JSON"),
        ("a.txt", b"hello", r'is a text file; .*a line \{"text": \.\.\.\} of a \.jsonl file'),
    ],
)
def test_what_a_file_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_dataset(JSON(path=str(tmp_path / name)))
    if not name.endswith(("json", "txt", "yaml")):
        with pytest.raises(DataError, match=says):
            read_dataset(JSON(path=str(tmp_path)))


def test_beside_records_other_files_stay_unread_and_that_is_said(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "b.jsonl").write_text('{"instruction": "a", "output": "b"}')
    found = read_dataset(JSON(path=str(tmp_path)))
    assert len(found.conversations) == 1
    assert found.notices[0] == f"{tmp_path}: not read: a.parquet"


def test_a_data_set_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("tatsu-lab/alpaca").endswith("on the hub: path hf://tatsu-lab/alpaca")
    assert refusal("data/records.jsonl") == "data/records.jsonl: no such file or directory"
