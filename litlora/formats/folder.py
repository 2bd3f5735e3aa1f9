"""Which files hold the weights of a model: of a Hugging Face folder, or of any file or folder of
tensors. Torch-free, so that a missing shard is reported at once."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from litlora.errors import CheckpointError, setting
from litlora.formats.families import HF_CONFIG_FILE
from litlora.storage.untrusted import read_json

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
PARTS_FILE = "other_modalities.safetensors"
"""Where a litlora directory keeps what a multimodal model has beside its language model."""
INDEX_SUFFIX = ".index.json"
GENERIC_SUFFIXES = {"safetensors": (".safetensors", ".sft"), "pytorch": (".pt", ".pth", ".bin", ".ckpt")}
"""The suffixes of files of tensors that are read."""
WRITTEN_SUFFIXES = {"safetensors": (".safetensors", ".sft"), "pytorch": (".pt", ".pth")}
"""The suffixes of files of tensors that are written."""


def is_model_folder(directory: Path) -> bool:
    """Whether a directory has a config.json and weights beside it. Opens nothing."""
    return (directory / HF_CONFIG_FILE).is_file() and any(_names(directory))


def weight_files(directory: Path) -> tuple[Path, dict[Path, set[str]]]:
    """(the file that leads to the weights, {file of weights: the names that the index lists in
    it}).

    Where both kinds exist, safetensors are preferred, and a single file over shards, as in
    transformers; `notice` says so. Raises CheckpointError for a missing shard.
    """
    name = next(iter(_names(directory)), None)
    if name is None:
        raise CheckpointError(
            f"{directory}: has a {HF_CONFIG_FILE} but no weights (*.safetensors or pytorch_model*.bin); "
            "copy them too"
        )
    file = directory / name
    if name.endswith(INDEX_SUFFIX):
        return file, indexed_shards(file)
    counted = re.fullmatch(r"(.+)-\d+-of-(\d+)(\.\w+)", name)
    if counted is None:
        return file, {file: set()}
    stem, count, suffix = counted[1], counted[2], counted[3]
    shards: dict[Path, set[str]] = {}
    for number in range(1, int(count) + 1):
        shard = directory / f"{stem}-{number:0{len(count)}}-of-{count}{suffix}"
        if not shard.is_file():
            raise CheckpointError(
                f"{shard}: missing, though {name} is one of {int(count)} shards; copy the folder again"
            )
        shards[shard] = set()
    return directory, shards


def notice(file: Path) -> str | None:
    """A line about a single file of weights that has shards beside it, which are not read."""
    stem = file.name.rpartition(".")[0]
    ignored = [name for name in _names(file.parent) if name != file.name and name.startswith(stem)]
    if file.name not in SINGLE_FILES or not ignored:
        return None
    return f"{file}: is read, as transformers does, and not {ignored[0]} beside it; remove the outdated one"


def _names(directory: Path) -> list[str]:
    """The names of files that lead to the weights, in transformers' order of preference: a single
    file, an index, a shard without an index."""
    patterns = []
    for single in SINGLE_FILES:
        stem, _, suffix = single.rpartition(".")
        patterns += [single, single + INDEX_SUFFIX, f"{stem}-*-of-*.{suffix}"]
    return [path.name for pattern in patterns for path in sorted(directory.glob(pattern)) if path.is_file()]


def indexed_shards(file: Path) -> dict[Path, set[str]]:
    """{shard: the names that the index lists in it}. Raises CheckpointError for a missing shard."""
    index = read_json(file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'{file}: not a usable index: it lacks "weight_map", which names the file of each weight'
        )
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        is_text = isinstance(shard, str) and "\0" not in shard
        if not is_text or shard in ("", ".", "..") or Path(shard).name != shard:
            raise CheckpointError(f"{file}: {shard!r} is not the name of a file in this folder")
        shards.setdefault(file.parent / shard, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard}: missing, though {file.name} lists it; copy the folder again")
    return shards


def model_files(path: Path, kind: Literal["safetensors", "pytorch"], option: str) -> list[Path]:
    """The files of the model at `path`: itself; in a folder the files of that kind that its index
    lists, or without an index all of them. Opens only indexes.

    Raises CheckpointError for a folder with two copies of the weights.

    `option` is the name of the setting that gave the path, such as source_model; source_type is
    then the setting of the kind.
    """
    where, suffixes = f"{setting(option)} {path}", GENERIC_SUFFIXES[kind]
    if not path.exists():
        raise CheckpointError(f"{where}: no such file or directory")
    if path.is_file():
        if path.suffix not in suffixes:
            hint = _kind_hint(path, suffixes, option.replace("_model", "_type"))
            raise CheckpointError(f"{where}: is not a {kind} file by its name; {hint}")
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{where}: is neither a file nor a directory")
    files = _all_files(path, kind)
    if not files:
        raise CheckpointError(f"{where}: is a directory without {kind} files ({', '.join(suffixes)})")
    indexes = [
        index
        for index in sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if Path(index.name.removesuffix(INDEX_SUFFIX)).suffix in suffixes
    ]
    if not indexes:
        _check_one_copy(where, files)
        return files
    usual = [index for index in indexes if index.name.removesuffix(INDEX_SUFFIX) in SINGLE_FILES]
    index, *others = usual or indexes
    if others:
        raise CheckpointError(f"{where}: {_two_copies(index.name, others[0].name)}")
    shards = indexed_shards(index)
    single = index.with_name(index.name.removesuffix(INDEX_SUFFIX))
    if single.is_file() and single not in shards:
        raise CheckpointError(f"{where}: {_two_copies(single.name, index.name)}")
    return sorted(shards)


def files_beside(path: Path, kind: Literal["safetensors", "pytorch"], files: Iterable[Path]) -> list[Path]:
    """Files of that kind in the folder of a model that are not among `files`, which it consists
    of, as its index does not list them."""
    return sorted(set(_all_files(path, kind)) - set(files)) if path.is_dir() else []


def _all_files(path: Path, kind: str) -> list[Path]:
    files = (file for file in path.iterdir() if file.is_file() and file.name != PARTS_FILE)
    return sorted(file for file in files if file.suffix in GENERIC_SUFFIXES[kind])


def _check_one_copy(where: str, files: list[Path]) -> None:
    """Raise CheckpointError if some of these files, of a folder without an index, are by their names
    another copy of the others: Meta's and Mistral's own, two sets of shards, or shards beside a
    whole file."""
    sets: dict[str, Path] = {}
    singles: dict[str, Path] = {}
    for file in files:
        if file.name.startswith("consolidated"):
            sets.setdefault("consolidated", file)
        elif shard := re.fullmatch(r"(.+)-\d+-of-\d+", file.stem):
            sets.setdefault(shard[1], file)
        else:
            singles[file.stem] = file
    # Beside a whole set of shards, a file of another name may be a part of the model.
    beside = [file for stem, file in singles.items() if {stem, "consolidated"} & sets.keys()]
    copies = [*sets.values(), *beside]
    if len(copies) > 1:
        raise CheckpointError(f"{where}: {_two_copies(copies[0].name, copies[1].name)}")


def _two_copies(one: str, other: str) -> str:
    return f"{one} and {other} are two sets of weights; keep one of them in the folder"


def _kind_hint(path: Path, suffixes: tuple[str, ...], option: str) -> str:
    """What to do about a file whose name has none of these suffixes."""
    other = next((kind for kind, ends in GENERIC_SUFFIXES.items() if path.suffix in ends), None)
    return f"set {setting(option)} {other}" if other else f"its suffix must be {' or '.join(suffixes)}"
