"""Tables of records, read by pyarrow, some rows at a time: CSV, Parquet and Arrow. Torch-free.

A row becomes the object that JSON would hold.
"""

import datetime
import decimal
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from litlora.data.conversation import Place
from litlora.data.files.extras import pyarrow
from litlora.data.files.json_text import Entry
from litlora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 256
"""Rows that become objects at a time."""
ROW_BYTES = 64
"""Of text that a row holds, at least, in an estimate."""
CSV_CHUNK = 2**20
"""Bytes of a CSV file that are parsed at a time."""
LONGEST_ROW = 64 * 2**20
"""Bytes of the longest row of a CSV file."""
COLUMNS = 1000
"""The most columns of a CSV file."""

Convert = Callable[[Any], Any]


def parquet_entries(file: Path, ignore: tuple[str, ...] = ()) -> Iterator[Entry]:
    """The rows of a Parquet file, without the columns in `ignore`."""
    parquet = pyarrow(file, "a Parquet file", "pyarrow.parquet")
    with _explained(file):
        # With a buffer a row group, which may be the whole file, is not read as a whole.
        with parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as opened:
            names = opened.schema_arrow.names
            _check_names(file, names)
            kept = [name for name in names if name not in ignore and "." not in name]
            # A name with a dot would be a path to a column inside another.
            columns = kept if len(kept) + sum(name in ignore for name in names) == len(names) else None
            batches = opened.iter_batches(batch_size=ROWS, columns=columns, use_threads=False)
            yield from _rows(file, batches, ignore)


def parquet_bytes(file: Path) -> int:
    """About how long the text of a Parquet file is. A row counts as ROW_BYTES at least, as a
    column that repeats a value stores it once."""
    parquet = pyarrow(file, "a Parquet file", "pyarrow.parquet")
    with _explained(file):
        facts = parquet.read_metadata(file)
        groups = (facts.row_group(number) for number in range(facts.num_row_groups))
        return max(ROW_BYTES * facts.num_rows, sum(group.total_byte_size for group in groups))


def arrow_entries(file: Path, ignore: tuple[str, ...] = ()) -> Iterator[Entry]:
    """The rows of an Arrow file (Feather too) or of a stored stream, as `datasets` writes it."""
    arrow = pyarrow(file, "an Arrow file")
    ipc = pyarrow(file, "an Arrow file", "pyarrow.ipc")
    # Not memory-mapped: pages of the map would count as memory of the process.
    with _explained(file), arrow.OSFile(str(file)) as opened:
        start = opened.read(6)
        opened.seek(0)
        if start == b"ARROW1":
            reader = ipc.open_file(opened)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            reader = ipc.open_stream(opened)
            batches = reader
        _check_names(file, reader.schema.names)
        yield from _rows(file, batches, ignore)


def csv_entries(
    file: Path, stream: BinaryIO, delimiter: str, ignore: tuple[str, ...] = ()
) -> Iterator[Entry]:
    """The rows of a CSV file as texts; an empty cell is an empty text. Rows are counted as a
    spreadsheet counts them: the header is row 1."""
    csv = pyarrow(file, "a CSV file", "pyarrow.csv")
    names: tuple[str, ...] = ()
    number = 0
    with _explained(file):
        for chunk in _whole_rows(file, stream):
            for cells in _cells(csv, file, chunk, delimiter, number):
                number += 1
                if number == 1:
                    names = cells
                    _check_names(file, names)
                    if len(names) == 1 and ";" in names[0]:
                        raise DataError(f"{file}: its columns are divided by ;, write it with commas")
                    continue
                place = Place(str(file), f"row {number}")
                if len(cells) != len(names):
                    _ragged(place, len(cells), len(names))
                record = dict(zip(names, cells, strict=True))
                yield place, {name: cell for name, cell in record.items() if name not in ignore}
    if not number:
        raise DataError(f"{file}: is empty; its first row must be the names of the columns")


def _whole_rows(file: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Pieces of a CSV file that end where a row ends: at a line end with an even number of quotes
    before it. pyarrow itself would read 32 blocks ahead."""
    rest = b""
    while more := stream.read(CSV_CHUNK):
        rest += more
        if (end := _row_end(rest)) >= 0:
            yield rest[: end + 1]
            rest = rest[end + 1 :]
        elif len(rest) > LONGEST_ROW:
            raise DataError(
                f"{file}: a row is longer than {LONGEST_ROW:,} bytes, or a quote is never closed; within a "
                "cell in quotes write each quote twice"
            )
    if rest.count(b'"') % 2:
        line = " ".join(rest[:60].decode(errors="replace").split())
        raise DataError(
            f'{file}: a quote is never closed in what follows "{line}"; within a cell in quotes write each '
            "quote twice"
        )
    if rest:
        yield rest + b"\n"  # pyarrow does not see a single row without it


def _row_end(text: bytes) -> int:
    """The last place where a row ends; -1 if none does."""
    is_even = text.count(b'"') % 2 == 0
    end = len(text)
    while (at := text.rfind(b"\n", 0, end)) >= 0:
        is_even ^= text.count(b'"', at, end) % 2 == 1
        if is_even:
            return at
        end = at
    return -1


def _cells(
    csv: ModuleType, file: Path, chunk: bytes, delimiter: str, number: int
) -> Iterator[tuple[str, ...]]:
    """The rows of a piece of a CSV file, in which no more than `number` rows come before it."""
    import pyarrow as pa

    if not chunk.strip():
        return
    chunk.decode()  # pyarrow's error would not name the byte
    ragged = []

    def note(row: Any) -> str:
        ragged.append(row)
        return "skip"

    table = csv.read_csv(
        pa.BufferReader(chunk),
        # The header is read as a row: pyarrow would let a column replace another of the same name.
        read_options=csv.ReadOptions(
            block_size=len(chunk) + 1, use_threads=False, autogenerate_column_names=True
        ),
        parse_options=csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
        ),
        convert_options=csv.ConvertOptions(
            column_types={f"f{column}": pa.string() for column in range(COLUMNS)}, strings_can_be_null=False
        ),
    )
    if ragged:
        place = Place(str(file), f"row {number + (ragged[0].number or 1)}")
        _ragged(place, ragged[0].actual_columns, ragged[0].expected_columns)
    for batch in table.to_batches(max_chunksize=ROWS):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _ragged(place: Place, cells: int, names: int) -> NoReturn:
    raise DataError(f"{place}: has {cells} cells, and the header names {names} columns")


class _explained:
    """A context in which an error of pyarrow becomes a DataError of one line."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if kind is None or not kind.__module__.startswith("pyarrow"):
            return
        text = " ".join(str(error).split())[:300]
        raise DataError(f"{self._file}: cannot be read: {text}") from None


def _check_names(file: Path, names: Iterable[str]) -> None:
    """Raise DataError for a name that two columns have."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{file}: has the column {json.dumps(twice[0], ensure_ascii=False)} twice; keep one")


def _slices(batches: Iterable["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
    for batch in batches:
        for start in range(0, len(batch), ROWS):
            yield batch.slice(start, ROWS)


def _rows(file: Path, batches: Iterable["pa.RecordBatch"], ignore: tuple[str, ...]) -> Iterator[Entry]:
    number = 0
    for batch in _slices(batches):
        names = [name for name in batch.schema.names if name not in ignore]
        columns = [_values(batch.column(name)) for name in names]
        for index in range(len(batch)):
            record = {name: values[index] for name, values in zip(names, columns, strict=True)}
            yield Place(str(file), f"row {number}"), record
            number += 1


# ---- from Arrow's values to those of JSON


def _values(column: "pa.Array") -> list[Any]:
    """A column as values of JSON."""
    convert = _conversion(column.type)
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):  # times in nanoseconds, or after the year 9999
        return [_value_or_text(value, convert or _same) for value in column]
    if convert is None:
        return values
    return [None if value is None else convert(value) for value in values]


def _value_or_text(scalar: "pa.Scalar", convert: Convert) -> Any:
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError):
        return f"{getattr(scalar, 'value', '')} ({scalar.type})".lstrip()
    return None if value is None else convert(value)


def _conversion(kind: "pa.DataType") -> Convert | None:
    """How values of a type, as pyarrow gives them, become those of JSON; None: they are. A null in
    an object is left out: Arrow gives every object all fields that any of them has."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return json.loads if kind.extension_name == "arrow.json" else _plain
    if types.is_dictionary(kind):
        return _conversion(kind.value_type)
    if types.is_struct(kind):
        fields = {field.name: _conversion(field.type) or _same for field in kind}
        return lambda value: {name: fields[name](inner) for name, inner in value.items() if inner is not None}
    if types.is_map(kind):
        of_map = _conversion(kind.item_type) or _same
        return lambda value: {str(name): None if inner is None else of_map(inner) for name, inner in value}
    if types.is_nested(kind) and hasattr(kind, "value_type"):
        of_list = _conversion(kind.value_type)
        if of_list is None:
            return None
        return lambda value: [None if inner is None else of_list(inner) for inner in value]
    if types.is_temporal(kind) or types.is_decimal(kind) or types.is_float16(kind):
        return _plain
    return None


def _same(value: Any) -> Any:
    return value


def _plain(value: Any) -> Any:
    """A time or a decimal as text, half a float as a float."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, str | bytes | int | float | list | dict | bool):
        return value
    return float(value) if hasattr(value, "dtype") and not isinstance(value, decimal.Decimal) else str(value)
