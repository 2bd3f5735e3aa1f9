"""Files of data that are not read, by what they are, with the way to JSON lines. Torch-free."""

import re
from pathlib import Path

from litlora.errors import DataError

_LINES = '.to_json("data.jsonl", orient="records", lines=True)'
_KINDS = (
    ("a Parquet file", b"PAR1", (".parquet",), "pandas.read_parquet({file!r})" + _LINES),
    ("an Arrow file", b"ARROW1", (".arrow", ".feather"), "datasets.Dataset.from_file({file!r})" + _LINES),
    ("a CSV file", None, (".csv",), "pandas.read_csv({file!r})" + _LINES),
    ("a TSV file", None, (".tsv",), "pandas.read_csv({file!r}, sep='\\t')" + _LINES),
    ("an Excel file", None, (".xlsx", ".xls"), "pandas.read_excel({file!r})" + _LINES),
    ("a compressed file", b"\x1f\x8b", (".gz",), None),
    ("a compressed file", b"\x28\xb5\x2f\xfd", (".zst",), None),
    ("an archive", b"PK\x03\x04", (".zip",), None),
    ("a YAML file", None, (".yaml", ".yml"), None),
    ("a text file", None, (".txt", ".md"), None),
)
"""(what it is, how it begins, how its name ends, Python that writes it as JSON lines)."""


def refuse_other_files(path: Path) -> None:
    """Raise DataError for a path of a kind that is known and not read, or that is a data set's name
    on the hub."""
    if path.is_dir():
        _refuse_directory(path)
    elif path.is_file():
        _refuse_file(path)
    elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.is_dir():
        if path.suffix not in (".json", ".jsonl"):
            raise DataError(
                f"{path}: no such file or directory; for a data set of this name on the hub: "
                f"datasets.load_dataset({str(path)!r}, split='train'){_LINES}, then name data.jsonl"
            )


def _refuse_file(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(8)
    for what, magic, suffixes, python in _KINDS:
        if (magic and start.startswith(magic)) or file.suffix.lower() in suffixes:
            way = f"; write it as JSON lines: {python.format(file=str(file))}" if python else ""
            if "compressed" in what or "archive" in what:
                way = "; unpack it first"
            raise DataError(f"{file}: is {what}; a .json or .jsonl file of records is needed{way}")


def _refuse_directory(directory: Path) -> None:
    """Refuse a directory with no file that is read, if there is one of another kind."""
    if (directory / "dataset_info.json").is_file() and any(directory.glob("*.arrow")):
        raise DataError(
            f"{directory}: is a data set in Arrow files; write it as JSON lines: "
            f"datasets.load_from_disk({str(directory)!r}){_LINES}"
        )
    files = sorted(file for file in directory.iterdir() if file.is_file() and file.name[0] != ".")
    if not any(file.suffix.lower() in (".json", ".jsonl") for file in files):
        for file in files:
            if file.suffix.lower() not in (".md", ".txt", ".yaml", ".yml"):
                _refuse_file(file)
