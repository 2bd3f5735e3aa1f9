"""Files of data that are not read, by what they are, with the way out. Torch-free."""

from pathlib import Path

from litlora.errors import DataError

_LINES = '.to_json("data.jsonl", orient="records", lines=True)'
_UNPACK = "unpack it first"
_KINDS = (
    (
        "an Excel file",
        None,
        (".xlsx", ".xls", ".ods"),
        "write it as JSON lines: pandas.read_excel({file!r})" + _LINES,
    ),
    ("an archive", b"PK\x03\x04", (".zip", ".tar", ".tgz", ".7z"), _UNPACK),
    ("a file packed by bzip2", b"BZh", (".bz2",), _UNPACK),
    ("a file packed by xz", b"\xfd7zXZ", (".xz",), _UNPACK),
    ("an SQLite data base", b"SQLite f", (".db", ".sqlite"), "write its table as JSON lines"),
    ("a YAML file", None, (".yaml", ".yml"), "write it as JSON"),
    ("a text file", None, (".txt", ".md"), 'write each document as a line {{"text": ...}} of a .jsonl file'),
)
"""(what it is, how it begins, how its name ends, what to do)."""


def refuse_other_file(file: Path, start: bytes, suffix: str) -> None:
    """Raise DataError for a file of a kind that is known and not read. `start` is how it begins,
    `suffix` how its name ends."""
    for what, magic, suffixes, way in _KINDS:
        if (magic and start.startswith(magic)) or suffix in suffixes:
            raise DataError(
                f"{file}: is {what}; JSON, CSV, Parquet or Arrow is needed: {way.format(file=str(file))}"
            )
