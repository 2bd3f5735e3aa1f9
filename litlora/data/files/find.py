"""Which files of records a path means. Torch-free."""

import glob
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from litlora.data.files.hub import HUB, hub_files
from litlora.data.files.kinds import PACKED, SUFFIXES, TITLES, kind_by_name, kind_of
from litlora.errors import DataError, setting

ENDINGS = ", ".join(SUFFIXES)
NOT_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What describes data sets, in files beside them."""
SPLIT = "train"
"""The part of a saved data set that is read, where none is named."""
PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Found:
    """The files that a path means."""

    files: tuple[Path, ...]
    notices: tuple[str, ...] = ()
    """What was left out, and what was chosen."""


def find_files(path: str) -> Found:
    """The files of records that a path means: itself; those in a directory, of a saved data set or
    of one on the hub (hf://owner/name); or those that fit a pattern, in the order of their names.
    Raises DataError if there are none, and MissingExtraError."""
    if path.startswith(HUB):
        return Found(*hub_files(path))
    here = Path(path)
    if here.is_dir():
        return _in_directory(here)
    if here.exists():
        if _is_apple_double(here):
            raise DataError(
                f"{path}: holds what macOS stores about a file, not records; "
                f"{setting('path')} {here.with_name(here.name[2:])} is the file itself"
            )
        return Found((here,))
    if PATTERN.search(path):
        return _matching(path)
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not here.parent.is_dir() and not kind_by_name(here):
        hint = f"; for a data set of this name on the hub: {setting('path')} {HUB}{path}"
    raise DataError(f"{path}: no such file or directory{hint}")


def _matching(pattern: str) -> Found:
    """The files that fit a pattern."""
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = tuple(file for file in found if file.is_file() and not _is_apple_double(file))
    if not files:
        raise DataError(f"{pattern}: no file fits this pattern")
    return Found(files)


def _in_directory(directory: Path) -> Found:
    if (directory / "dataset_dict.json").is_file():
        return _in_splits(directory)
    if (directory / "dataset_info.json").is_file() and (directory / "state.json").is_file():
        return Found(_saved_files(directory))
    names = [file for file in sorted(directory.iterdir()) if file.is_file() and not _is_apple_double(file)]
    kinds: dict[str, list[Path]] = {}
    others: list[Path] = []
    for file in names:
        kind = kind_by_name(file)
        if kind is None or file.name in NOT_RECORDS:
            others.append(file)
        else:
            kinds.setdefault(TITLES[kind], []).append(file)
    if not kinds:
        _refuse_directory(directory, others)
    title = "JSON" if "JSON" in kinds else next(iter(kinds))
    rest = [kind for kind in kinds if kind != title]
    if rest and title != "JSON":
        raise DataError(
            f"{directory}: holds {title} and {rest[0]} files; name those to read by a pattern: "
            f"{setting('path')} '{directory}/*{kinds[title][0].suffix}'"
        )
    files, doubled = _unpacked_only(kinds[title])
    unread = sorted([*doubled, *others, *(file for kind in rest for file in kinds[kind])])
    unread = [file for file in unread if not file.name.startswith(".")]
    return Found(tuple(files), _unread(directory, unread) if unread else ())


def _unpacked_only(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files without those that are there packed and unpacked; and the packed ones of them."""
    there = set(files)
    doubled = [file for file in files if file.suffix.lower() in PACKED and file.with_suffix("") in there]
    return [file for file in files if file not in doubled], doubled


def _unread(directory: Path, files: list[Path]) -> tuple[str, ...]:
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    names = ", ".join(file.name for file in files[:3])
    return (f"{directory}: not read: {names}{more}",)


def _refuse_directory(directory: Path, others: list[Path]) -> None:
    """Raise DataError for a directory without files that are read, and say what it has instead."""
    for file in others:
        if file.name not in NOT_RECORDS and file.suffix.lower() not in (".md", ".txt", ".yaml", ".yml"):
            kind_of(file)  # raises for the kinds that are known
    inner = next((file for file in sorted(directory.glob("*/*")) if kind_by_name(file)), None)
    hint = f"; there are some in {inner.parent}" if inner else ""
    raise DataError(f"{directory}: holds no file of records ({ENDINGS}, or packed as .gz or .zst){hint}")


# ---- data sets that `datasets` saved


def _in_splits(directory: Path) -> Found:
    """A DatasetDict: a directory for each split."""
    splits = _stored(directory / "dataset_dict.json", "splits")
    if SPLIT not in splits:
        there = ", ".join(map(str, splits)) or "nothing"
        raise DataError(
            f"{directory}: is a saved data set without a split {SPLIT}; it has {there}: name one as "
            f"{setting('path')} {directory}/{splits[0] if splits else 'SPLIT'}"
        )
    found = _in_directory(directory / SPLIT)
    others = [str(split) for split in splits if split != SPLIT]
    notice = f"{directory}: the split {SPLIT} is read, not {', '.join(others)}"
    return replace(found, notices=(*found.notices, notice)) if others else found


def _saved_files(directory: Path) -> tuple[Path, ...]:
    entries = _stored(directory / "state.json", "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise DataError(f"{directory}: is a saved data set whose file {name} is missing; save it again")
    return tuple(directory / name for name in names)


def _stored(file: Path, key: str) -> list:
    """A list in one of the small files that describe a saved data set."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        found = value[key]
    except (ValueError, LookupError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise DataError(f"{file}: is not what the library datasets writes; save the data set again")
    return found


def _is_apple_double(file: Path) -> bool:
    """Whether this is `._NAME`, which macOS writes beside NAME on disks of other systems: the
    Finder's notes, none of the content."""
    if not file.name.startswith("._") or not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"\x00\x05\x16\x07"
