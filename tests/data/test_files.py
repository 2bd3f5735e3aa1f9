"""Files of data: each kind gives the records that the libraries give that write it, as a stream; a
broken or foreign file is named, with the place and the way out."""

import csv
import gzip
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from litlora.data.files import MAX_RECORD, bytes_in_memory, entries, find_files
from litlora.data.records import RecordReader
from litlora.data.sources import read_dataset
from litlora.errors import DataError, MissingExtraError
from litlora.settings import Files

FILES = Path(__file__).with_name("files")
RECORD = {"instruction": "Say hi.", "output": "Hi."}


def records(path: object) -> list:
    return [value for file in find_files(str(path)).files for _, value in entries(file)]


def places(path: object) -> list[str]:
    return [place.record for place, _ in entries(Path(str(path)))]


def lines(name: str) -> list:
    return [json.loads(line) for line in (FILES / name).read_text("utf-8").split("\n") if line]


def refusal(path: object) -> str:
    with pytest.raises(DataError) as raised:
        records(path)
    return str(raised.value)


def without_nulls(value: object) -> object:
    """What other libraries read, without the nulls of fields that a record does not have."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


# ---- each kind gives the same records


@pytest.mark.parametrize(
    "name", ["csv", "tsv", "csv.gz", "parquet", "feather", "jsonl.zst"], ids=lambda name: name
)
def test_every_kind_of_table_gives_the_same_texts(name):
    pytest.importorskip("pyarrow")
    assert records(FILES / f"texts.{name}") == lines("texts.jsonl")


def test_messages_in_parquet_are_those_of_json():
    pytest.importorskip("pyarrow")
    first, second = records(FILES / "conversations.parquet")
    assert [{"messages": first["messages"]}, second] == lines("conversations.jsonl")
    assert first["tools"] is None, "a column of the table, in which this record has nothing"


@pytest.mark.parametrize("name", ["free.parquet", "saved_free"])
def test_json_within_arrow_is_parsed(name):
    pytest.importorskip("pyarrow")
    assert records(FILES / name) == lines("free.jsonl")


def test_a_saved_data_set_is_read_by_its_split():
    pytest.importorskip("pyarrow")
    texts = lines("texts.jsonl")
    assert records(FILES / "saved") == records(FILES / "saved/train") == texts
    assert records(FILES / "saved/test") == texts[:1]
    assert find_files(str(FILES / "saved")).notices == (f"{FILES}/saved: the split train is read, not test",)


def test_values_of_every_type_are_read():
    pytest.importorskip("pyarrow")
    first, second = records(FILES / "everything.parquet")
    assert first["map"] == {"k": 1} and first["kind"] == "x" and first["fixed"] == [1, 2]
    assert first["half"] == 1.5 and first["decimal"] == "1.10" and first["bytes"] == b"\xff\x00"
    assert first["day"] == "2020-01-02" and first["large"] == "l" and first["a.b"] == 1
    assert first["ns"] and first["far"] and first["span"]
    assert second["map"] is second["bytes"] is second["decimal"] is second["far"] is None
    few = [value for _, value in entries(FILES / "everything.parquet", ignore=("ns", "far", "bytes"))]
    assert few[0] == {name: value for name, value in first.items() if name not in ("ns", "far", "bytes")}


@pytest.mark.parametrize("name", ["conversations.parquet", "texts.parquet", "texts.feather"])
def test_pandas_reads_the_same(name):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    read = pandas.read_parquet if name.endswith("parquet") else pandas.read_feather
    expected = json.loads(read(FILES / name).to_json(orient="records"))
    assert without_nulls(records(FILES / name)) == without_nulls(expected)


@pytest.mark.parametrize("name", ["texts.csv", "texts.tsv"])
def test_pandas_reads_the_same_texts(name):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(
        FILES / name, sep="\t" if name.endswith("tsv") else ",", dtype=str, keep_default_na=False
    )
    assert records(FILES / name) == frame.to_dict("records")


@pytest.mark.parametrize("name", ["saved/train", "saved_free", "free.parquet", "conversations.parquet"])
def test_datasets_reads_the_same(name):
    datasets = pytest.importorskip("datasets")
    path = str(FILES / name)
    read = datasets.Dataset.from_parquet if name.endswith("parquet") else datasets.load_from_disk
    assert without_nulls(records(path)) == without_nulls(read(path).to_list())


def test_packed_json_is_that_of_the_file(tmp_path):
    content = (FILES / "conversations.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content) * 2)
    assert records(tmp_path / "a.jsonl.gz") == lines("conversations.jsonl") * 2
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([RECORD]).encode()))
    assert records(tmp_path / "b.json.gz") == [RECORD]
    (tmp_path / "c.jsonl.gz").write_bytes(content)
    assert records(tmp_path / "c.jsonl.gz") == lines("conversations.jsonl"), "the content decides"
    (tmp_path / "d.ndjson").write_text(json.dumps(RECORD))
    assert records(tmp_path / "d.ndjson") == [RECORD]
    shutil.copy(FILES / "texts.parquet", tmp_path / "e.json")
    pytest.importorskip("pyarrow")
    assert records(tmp_path / "e.json") == lines("texts.jsonl")


def test_places_are_lines_records_and_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(RECORD) + "\n\n" + json.dumps(RECORD))
    assert places(tmp_path / "a.jsonl") == ["line 2", "line 4"]
    (tmp_path / "a.json").write_text(json.dumps([RECORD] * 2))
    assert places(tmp_path / "a.json") == ["record 0", "record 1"]
    pytest.importorskip("pyarrow")
    assert places(FILES / "texts.csv") == ["row 2", "row 3", "row 4"], "as a spreadsheet counts them"
    assert places(FILES / "texts.parquet") == ["row 0", "row 1", "row 2"], "as pandas counts them"


# ---- JSON as a stream


def test_a_list_is_parsed_across_the_pieces_that_are_read(tmp_path):
    rng = random.Random(0)
    values = [
        rng.choice([rng.randrange(10**12), -1.5e-7, 'é\u2028\\"' * rng.randrange(50), {"a": [None, True]}])
        for _ in range(40_000)
    ]
    for indent in (None, 1):
        (tmp_path / "x.json").write_text(json.dumps(values, indent=indent, ensure_ascii=False), "utf-8")
        assert (tmp_path / "x.json").stat().st_size > 2 * 2**20
        assert records(tmp_path / "x.json") == values


def test_broken_lists_are_told_as_the_json_module_tells_them(tmp_path):
    rng = random.Random(1)
    whole = ['[{"a": "x\\u00e9\\n", "b": [1, 2.5, -3e7, true, null]},\n {"a": {}},\n 5, "s" ]\n', "[]"]
    checked = 0
    for _ in range(400):
        text = list(rng.choice(whole))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(text)) if text else 0
            text[at : at + rng.randrange(2)] = rng.choice([*'[]{},:"\\ 1-e\n', ""])
        text = "".join(text)
        if not text.lstrip().startswith("["):
            continue
        (tmp_path / "x.json").write_text(text, "utf-8")
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            assert refusal(tmp_path / "x.json").endswith(
                f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"
            ), text
            checked += 1
        else:
            assert records(tmp_path / "x.json") == expected
    assert checked > 100


def test_an_error_late_in_a_long_list_names_its_line(tmp_path):
    rows = [json.dumps(RECORD) for _ in range(60_000)]
    rows[50_000] = "{oops}"
    (tmp_path / "x.json").write_text("[\n" + ",\n".join(rows) + "\n]")
    says = "not valid JSON: Expecting property name enclosed in double quotes at line 50002, column 2"
    assert refusal(tmp_path / "x.json") == f"{tmp_path}/x.json: {says}"


@pytest.mark.parametrize(("name", "before"), [("x.jsonl", "{}\n"), ("x.json", "[1, ")])
def test_a_record_that_is_too_long_is_refused(tmp_path, name, before):
    (tmp_path / name).write_text(f'{before}{{"a": "{"x" * (MAX_RECORD + 10)}"}}\n')
    if name == "x.jsonl":
        (_, first), (place, value) = entries(tmp_path / name)
        assert first == {} and place.record == "line 2"
        assert f"{name}, line 2: is longer than 67,108,864 characters" in str(value)
    else:
        assert f"{name}, record 1: is longer than 67,108,864 characters" in refusal(tmp_path / name)


def test_a_broken_line_can_be_left_out(tmp_path):
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(RECORD)}\n{{oops}}\n{json.dumps(RECORD)}")
    skipped: list[DataError] = []
    found = RecordReader("alpaca", on_bad="skip").read(entries(tmp_path / "x.jsonl"), skipped)
    assert len(list(found)) == 2
    (error,) = skipped
    assert "x.jsonl, line 2: not valid JSON" in str(error)


MEASURE = """
import resource, sys
from pathlib import Path
from litlora.data.files import entries
{imports}
def peak(file):
    assert sum(1 for _ in entries(Path(file)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(-peak(sys.argv[1]) + peak(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "csv", "parquet", "arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    """Reading 20 MB after 2 MB takes at most 10 MB more."""
    table = ending in ("csv", "parquet", "arrow")
    if table:
        pytest.importorskip("pyarrow")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ijklm", k=2000)) for _ in range(200)]
    for name, number in (("small", 1_000), ("large", 10_000)):
        rows = [{"instruction": f"{n} {texts[n % 200]}", "output": "x"} for n in range(number)]
        write(tmp_path / f"{name}.{ending}", rows)
    run = subprocess.run(
        [
            *(sys.executable, "-c", MEASURE.format(imports="import pyarrow.parquet" if table else "")),
            *(tmp_path / f"small.{ending}", tmp_path / f"large.{ending}"),
        ],
        **{"capture_output": True, "text": True, "cwd": REPO, "check": True},
    )
    assert int(run.stdout) < 10 * 1024


def write(file: Path, rows: list[dict]) -> None:
    kind = file.name.partition(".")[2]
    if kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1))
    else:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        table = pa.Table.from_pylist(rows)
        if kind == "csv":
            pa.csv.write_csv(table, file)
        elif kind == "parquet":
            pa.parquet.write_table(table, file, use_dictionary=False)  # one row group
        else:
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table, max_chunksize=1000)


# ---- CSV


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,b\n1,2\n1,2,3\n", ", row 3: has 3 cells, and the header names 2 columns"),
        (b"a,b\n1,2\n\n1\n", ", row 3: has 1 cells, and the header names 2 columns"),
        (b"a,b\n" + b"1,222222222222\n" * 90_000 + b"1\n", ", row 90002: has 1 cells"),
        (b'a,b\n1,2\n3,"4\n5,6\n', ': a quote is never closed in what follows "3,"4 5,6"'),
        (b"a,b,a\n1,2,3\n", ': has the column "a" twice; keep one'),
        (b"", ": is empty; its first row must be the names of the columns"),
        (b"\n\n", ": is empty; its first row"),
        (b"a,b\n1,2\n3,\xff\n", ": is not UTF-8 text (byte 10); save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), ": is not UTF-8 text but UTF-16 ("),
        (b"a;b\n1;2\n", ": its columns are divided by ;, write it with commas"),
    ],
)
def test_a_broken_csv_file_names_the_row(tmp_path, content, says):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.csv").write_bytes(content)
    assert refusal(tmp_path / "x.csv").startswith(f"{tmp_path}/x.csv{says}")


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'\xef\xbb\xbfa,b\r\n1,"x\r\ny"\r\n', [{"a": "1", "b": "x\r\ny"}]),
        (b"a,b\n1,\x00\n", [{"a": "1", "b": "\0"}]),
        (b"a,b\n", []),
        (b'a,b\n1,5" pipe\n2,6" pipe', [{"a": "1", "b": '5" pipe'}, {"a": "2", "b": '6" pipe'}]),
        (b'a\n"' + b"x\n" * 2**20 + b'"\n', [{"a": "x\n" * 2**20}]),
    ],
    ids=["bom and line ends", "zero", "header only", "inches", "a cell longer than a piece"],
)
def test_unusual_csv_files_are_read(tmp_path, content, rows):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.csv").write_bytes(content)
    assert records(tmp_path / "x.csv") == rows


# ---- broken files


def test_utf_16_is_refused_by_name(tmp_path):
    for encoding in ("utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        text, name = json.dumps([RECORD]), encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        (tmp_path / "x.json").write_text(text, encoding)  # the first two begin with a mark
        assert f"is not UTF-8 text but {name} (" in refusal(tmp_path / "x.json")
        assert f"iconv -f {name} -t UTF-8" in refusal(tmp_path / "x.json")
        (tmp_path / "x.json").write_text("\ufeff" + text, encoding)
        assert f"is not UTF-8 text but {name[:6]} (" in refusal(tmp_path / "x.json")
        with pytest.raises(DataError, match=r"NEW_FILE \(on_bad skip leaves out records of .*, never a file"):
            read_dataset(Files(path=str(tmp_path / "x.json"), on_bad="skip"))


@pytest.mark.parametrize("at", [0, 2**20 - 1, 2 * 2**20 + 7])
def test_the_byte_that_is_not_text_is_named(tmp_path, at):
    line = b'{"a": "' + "é".encode() * 10 + b'"}\n'
    content = bytearray(line * (3 * 2**20 // len(line)))
    content[at] = 0xFF
    with pytest.raises(UnicodeDecodeError) as raised:
        content.decode()
    (tmp_path / "x.jsonl").write_bytes(content)
    expected = f"{tmp_path}/x.jsonl: is not UTF-8 text (byte {raised.value.start}); save it as UTF-8"
    assert refusal(tmp_path / "x.jsonl") == expected


@pytest.mark.parametrize("name", ["texts.csv.gz", "texts.jsonl.zst", "texts.parquet", "texts.feather"])
def test_a_file_that_was_cut_off_is_an_error(tmp_path, name):
    pytest.importorskip("pyarrow")
    content = (FILES / name).read_bytes()
    for end in (len(content) // 2, len(content) - 5):
        (tmp_path / name).write_bytes(content[:end])
        said = refusal(tmp_path / name)
        assert said.startswith(f"{tmp_path / name}: cannot be ") and "\n" not in said


def test_a_file_that_is_not_what_its_name_says(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    assert "x.parquet: is not a Parquet file: it does not begin with PAR1" in refusal(tmp_path / "x.parquet")
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    assert "x.parquet.gz: is a packed Parquet file; unpack it first" in refusal(tmp_path / "x.parquet.gz")
    pytest.importorskip("pyarrow")
    (tmp_path / "x.arrow").write_text("no")
    assert "x.arrow: cannot be read: " in refusal(tmp_path / "x.arrow")
    (tmp_path / "x.arrow").write_bytes(b"")
    assert "x.arrow: cannot be read: " in refusal(tmp_path / "x.arrow")


@pytest.mark.parametrize("name", ["texts.parquet", "texts.csv", "texts.feather", "texts.jsonl.zst"])
def test_without_pyarrow_the_extra_is_named(name, monkeypatch):
    for module in ("pyarrow", "pyarrow.csv", "pyarrow.parquet", "pyarrow.ipc"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"texts\.\S+: is an? .*pip install 'litlora\[data\]'"):
        records(FILES / name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"hf://a/b: .*pip install 'litlora\[datasets\]'"):
        find_files("hf://a/b")


# ---- folders and patterns


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(RECORD))


def found(path: object) -> tuple[list[str], tuple[str, ...]]:
    result = find_files(str(path))
    return [file.name for file in result.files], result.notices


def test_a_folder_says_what_it_does_not_read(tmp_path):
    fill(tmp_path, "b.jsonl", "a.json", "c.ndjson", ".hidden.txt")
    assert found(tmp_path) == (["a.json", "b.jsonl", "c.ndjson"], ())
    fill(tmp_path, "README.md", "dataset_info.json", "z.csv", "b.jsonl.gz", "d.jsonl.gz")
    names, [notice] = found(tmp_path)
    assert names == ["a.json", "b.jsonl", "c.ndjson", "d.jsonl.gz"], "b.jsonl is there unpacked"
    assert notice == f"{tmp_path}: not read: README.md, b.jsonl.gz, dataset_info.json and 1 more"


def test_a_folder_of_other_kinds(tmp_path):
    fill(tmp_path, "b.parquet", "a.parquet")
    assert found(tmp_path) == (["a.parquet", "b.parquet"], ())
    fill(tmp_path, "a.csv")
    with pytest.raises(DataError, match=r"holds CSV and Parquet files; name those .*path '.*/\*\.csv'"):
        find_files(str(tmp_path))
    fill(tmp_path, "outer/inner/a.jsonl")
    with pytest.raises(DataError, match=r"outer: holds no file of records .*some in .*outer/inner$"):
        find_files(str(tmp_path / "outer"))


def test_a_pattern_names_files(tmp_path):
    fill(tmp_path, "b.jsonl", "a.jsonl", "sub/c.jsonl", "d.csv", ".e.jsonl")
    assert found(tmp_path / "*.jsonl") == (["a.jsonl", "b.jsonl"], ())
    assert found(tmp_path / "**/*.jsonl") == (["a.jsonl", "b.jsonl", "c.jsonl"], ())
    assert found(tmp_path / "[ab].jsonl")[0] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="no file fits this pattern"):
        find_files(str(tmp_path / "*.parquet"))
    fill(tmp_path, "[x].jsonl")
    assert found(tmp_path / "[x].jsonl")[0] == ["[x].jsonl"], "a file of that very name comes first"


def test_a_saved_data_set_that_is_not_whole(tmp_path):
    shutil.copytree(FILES / "saved", tmp_path / "saved")
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["test", "validation"]}')
    assert refusal(tmp_path / "saved").endswith(
        f"without a split train; it has test, validation: name one as path {tmp_path}/saved/test"
    )
    (tmp_path / "saved/dataset_dict.json").write_text("{}")
    assert "dataset_dict.json: is not what the library datasets writes" in refusal(tmp_path / "saved")
    next((tmp_path / "saved/test").glob("*.arrow")).unlink()
    assert "whose file data-00000-of-00001.arrow is missing" in refusal(tmp_path / "saved/test")
    state = {"_data_files": [{"filename": "../../secret.arrow"}]}
    (tmp_path / "saved/test/state.json").write_text(json.dumps(state))
    assert "whose file ../../secret.arrow is missing" in refusal(tmp_path / "saved/test")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet"])
def test_what_a_small_file_unpacks_to_counts(tmp_path, name):
    file, text = tmp_path / name, "lazy dog " * 20
    if name == "x.parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": [text] * 200_000}), file)
    else:
        file.write_bytes(gzip.compress(f'{{"text": "{text}"}}\n'.encode() * 200_000))
    assert file.stat().st_size < 200_000
    assert bytes_in_memory(file, 10**7) > 10**7
    assert bytes_in_memory(file, 10**9) >= (64 if name == "x.parquet" else 180) * 200_000
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"{}" * 9)[:-9])  # which is said when it is read
    assert bytes_in_memory(tmp_path / "x.gz", 10**7) <= 18


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("rows", [[["a", "b"]], [["a", "b"], ["c\nd", "e"], ["f", ""]]])
def test_a_table_may_end_without_a_line_end(tmp_path, end, last, rows):
    pytest.importorskip("pyarrow")
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["prompt", "completion"], *rows])
    whole = text.getvalue() if last else text.getvalue().removesuffix(end)
    (tmp_path / "x.csv").write_bytes(whole.encode())
    assert [list(row.values()) for _, row in entries(tmp_path / "x.csv")] == rows
