"""Which files of a Hugging Face folder hold its weights. Torch-free, so that a missing shard is
named at once."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from litlora.errors import CheckpointError
from litlora.formats.families import HF_CONFIG_FILE
from litlora.storage.untrusted import read_json

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"
GENERIC_SUFFIXES = {"safetensors": (".safetensors",), "pytorch": (".pt", ".pth", ".bin", ".ckpt")}
"""What files of tensors are called, whatever they are tensors of."""
WRITTEN_SUFFIXES = {"safetensors": (".safetensors",), "pytorch": (".pt", ".pth")}
"""The same, for those that we write."""


def is_model_folder(directory: Path) -> bool:
    """Whether a directory has a config.json and weights beside it. Opens nothing."""
    return (directory / HF_CONFIG_FILE).is_file() and any(_names(directory))


def weight_files(directory: Path) -> tuple[Path, dict[Path, set[str]]]:
    """(the file that tells what there is, {shard: the names that an index says it holds}).

    Safetensors come first where there are both kinds. Raises CheckpointError for a missing shard.
    """
    name = next(iter(_names(directory)), None)
    if name is None:
        raise CheckpointError(
            f"{directory}: has a {HF_CONFIG_FILE} but no weights (*.safetensors or pytorch_model*.bin); copy them too"
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
                f"{shard}: missing, though {name} says that there are {int(count)} shards; copy the folder again"
            )
        shards[shard] = set()
    return directory, shards


def _names(directory: Path) -> Iterator[str]:
    """The names of the file that leads to the weights, the best first: an index, a single file, a
    shard without an index."""
    for single in SINGLE_FILES:
        stem, _, suffix = single.rpartition(".")
        patterns = (single + INDEX_SUFFIX, single, f"{stem}-*-of-*.{suffix}")
        yield from (
            path.name for pattern in patterns for path in sorted(directory.glob(pattern)) if path.is_file()
        )


def indexed_shards(file: Path) -> dict[Path, set[str]]:
    """{shard: the names that an index says it holds}. Raises CheckpointError for a missing
    shard."""
    index = read_json(file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'{file}: not a usable index: it lacks "weight_map", which names the file of each weight'
        )
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or "\0" in shard
            or shard in ("", ".", "..")
            or Path(shard).name != shard
        ):
            raise CheckpointError(f"{file}: {shard!r} is not the name of a file in this folder")
        shards.setdefault(file.parent / shard, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard}: missing, though {file.name} lists it; copy the folder again")
    return shards


def model_files(path: Path, kind: Literal["safetensors", "pytorch"], option: str) -> list[Path]:
    """The files of the model at `path`: itself, or all those of that kind in a folder. `option`
    names it in errors. Opens indexes only."""
    flag = option.replace("-model", "-type")
    if not path.exists():
        raise CheckpointError(f"{option} {path}: no such file or directory")
    suffixes = GENERIC_SUFFIXES[kind]
    if not path.is_dir() and not path.is_file():
        raise CheckpointError(f"{option} {path}: is no ordinary file")
    if not path.is_dir():
        if path.suffix not in suffixes:
            other = next((name for name, ends in GENERIC_SUFFIXES.items() if path.suffix in ends), None)
            hint = f"; say {flag} {other}" if other else f"; {' or '.join(suffixes)} is"
            raise CheckpointError(f"{option} {path}: is no {kind} file by its name{hint}")
        return [path]
    for index in sorted(path.glob(f"*.safetensors{INDEX_SUFFIX}")) if kind == "safetensors" else []:
        indexed_shards(index)  # names a missing one
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in suffixes)
    if not files:
        raise CheckpointError(f"{option} {path}: is a directory without {kind} files ({', '.join(suffixes)})")
    return files
