"""What a file of data is, by its content and its name. Torch-free."""

from pathlib import Path
from typing import NamedTuple

from litlora.data.files.other_files import refuse_other_file
from litlora.errors import DataError

PACKED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
SUFFIXES = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
    ".csv": "csv",
    ".tsv": "tsv",
}
"""How the names of files end, and what they are called here."""
TITLES = {"json": "JSON", "parquet": "Parquet", "arrow": "Arrow", "csv": "CSV", "tsv": "CSV"}


class Kind(NamedTuple):
    """What a file is."""

    name: str
    """json, csv, tsv, parquet or arrow."""
    suffix: str
    """How its name ends, without the ending of a packed file."""
    compression: str | None
    """gzip, zstd or None."""


def kind_by_name(file: Path) -> str | None:
    """One of SUFFIXES' values, None if the name says nothing."""
    return SUFFIXES.get(_suffix(file))


def kind_of(file: Path) -> Kind:
    """What a file is. Raises DataError for one that is not read, and OSError."""
    suffix = _suffix(file)
    if not file.is_file():  # a pipe, which can be read only once
        return Kind("json", suffix, None)
    with file.open("rb") as opened:
        start = opened.read(8)
    compression = "gzip" if start[:2] == b"\x1f\x8b" else "zstd" if start[:4] == b"\x28\xb5\x2f\xfd" else None
    refuse_other_file(file, start, suffix)
    name = SUFFIXES.get(suffix, "json")
    if start[:4] == b"PAR1":
        name = "parquet"
    elif start[:6] == b"ARROW1":
        name = "arrow"
    elif name == "parquet" and not compression:
        raise DataError(f"{file}: is not a Parquet file: it does not begin with PAR1")
    if compression and name in ("parquet", "arrow"):
        raise DataError(f"{file}: is a packed {TITLES[name]} file; unpack it first")
    return Kind(name, suffix, compression)


def _suffix(file: Path) -> str:
    """The last part of a name, before that of a packed file."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in PACKED else suffix
