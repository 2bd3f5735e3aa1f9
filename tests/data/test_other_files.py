"""A data file of another kind gets a line that says what it is and how it becomes JSON lines."""

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
        ("a.parquet", b"PAR1\x15\x04", "is a Parquet file.*pandas.read_parquet"),
        ("a.json", b"PAR1\x15\x04", "is a Parquet file"),
        ("a.arrow", b"ARROW1\0\0", "is an Arrow file.*datasets.Dataset.from_file"),
        ("a.csv", b"instruction,output\n", "is a CSV file.*pandas.read_csv.*to_json"),
        ("a.tsv", b"instruction\toutput\n", "is a TSV file"),
        ("a.xlsx", b"PK\x03\x04", "is an Excel file"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "is a compressed file.*unpack it first"),
        ("a.zip", b"PK\x03\x04", "is an archive"),
        ("a.txt", b"hello", "is a text file"),
    ],
)
def test_what_a_file_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_dataset(JSON(path=str(tmp_path / name)))
    if name.endswith(("json", "txt")):
        return
    with pytest.raises(DataError, match=says):
        read_dataset(JSON(path=str(tmp_path)))


def test_beside_records_other_files_stay_unread(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "b.jsonl").write_text('{"instruction": "a", "output": "b"}')
    assert len(read_dataset(JSON(path=str(tmp_path))).conversations) == 1


def test_a_data_set_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "datasets.load_dataset('tatsu-lab/alpaca', split='train')" in refusal("tatsu-lab/alpaca")
    assert refusal("data/records.jsonl") == "data/records.jsonl: no such file or directory"
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "data-00000.arrow"):
        (tmp_path / "saved" / name).write_text("")
    assert "datasets.load_from_disk('saved')" in refusal("saved")
