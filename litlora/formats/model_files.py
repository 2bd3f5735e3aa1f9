"""Any model as files of tensors: one file, or a folder of them. The tensors are memory-mapped."""

import glob
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from litlora.errors import CheckpointError, UserError, setting
from litlora.formats.folder import INDEX_SUFFIX, indexed_shards
from litlora.formats.lora_header import HASHES
from litlora.formats.scaled import QUANTIZATION_METADATA, with_scales
from litlora.storage.atomic import replacing_file
from litlora.storage.dtypes import dtype_name
from litlora.storage.tensors import (
    SAFETENSORS_SUFFIXES,
    SafetensorsWriter,
    named_tensors,
    open_safetensors,
    open_torch,
    read_metadata,
)
from litlora.storage.torch_file import TorchFile, Written

FileKind = Literal["safetensors", "pytorch"]
NESTED = ("state_dict", "model")
"""Where a torch file may keep its tensors, if not at the top level."""
READABLE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
}
"""The dtypes that a model's tensors may have."""

ARCHITECTURE = "modelspec.architecture"
_OF_THE_ARCHITECTURE = (
    *(ARCHITECTURE, "modelspec.sai_model_spec", "modelspec.implementation", "modelspec.prediction_type"),
    *("modelspec.resolution", "ss_base_model_version", "ss_v2"),
)

# ---- reading


def open_model(path: Path, files: list[Path]) -> Mapping[str, Tensor]:
    """The tensors of the model at `path`, which consists of these files; one in 8 bits with a scale
    is multiplied by it when it is read. Raises CheckpointError for a tensor with different values
    in two files."""
    tensors: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    for file in files:
        for name, tensor in _open(file).items():
            if tensor.dtype not in READABLE:
                raise CheckpointError(f"{file}: {name} is {dtype_name(tensor.dtype)}, which is not supported")
            tensor = tensor.detach()  # a torch file may hold Parameters
            if name in tensors and not _equal(tensors[name], tensor):
                raise CheckpointError(
                    f"{file}: {name} is also in {where[name].name}, with other values; keep only one of the "
                    "two files"
                )
            tensors[name], where[name] = tensor, file
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if path.is_dir():
        _check_indexes(files, tensors)
    return with_scales(tensors, where)


def carried_metadata(files: Iterable[Path], *, dequantised: bool) -> tuple[dict[str, str], list[str]]:
    """(what the headers of a model's files say that still holds with updates added, the entries that
    do not: hashes, what two files tell differently, and, if it is `dequantised`, how it was stored
    in 8 bits)."""
    kept: dict[str, str] = {}
    dropped: dict[str, None] = {}
    stale = (*HASHES, QUANTIZATION_METADATA) if dequantised else HASHES
    for file in files:
        for name, value in read_metadata(file).items():
            if name in stale or kept.setdefault(name, value) != value:
                dropped[name] = None
    return {name: value for name, value in kept.items() if name not in dropped}, list(dropped)


def extracted_metadata(files: Iterable[Path]) -> dict[str, str]:
    """What the headers of a model's files say that holds for a LoRA on it, too: which model it is.
    The model specification calls the architecture of a LoRA MODEL/lora."""
    kept, _ = carried_metadata(files, dequantised=True)
    found = {name: value for name, value in kept.items() if name in _OF_THE_ARCHITECTURE}
    if architecture := found.get(ARCHITECTURE):
        found[ARCHITECTURE] = f"{architecture.removesuffix('/lora')}/lora"
    return found


def _open(file: Path) -> dict[str, Tensor]:
    if file.suffix in SAFETENSORS_SUFFIXES:
        return open_safetensors(file)
    content = open_torch(file)
    while isinstance(content, dict):
        inner = next((name for name in NESTED if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = content[inner]
    return named_tensors(file, content)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _check_indexes(files: list[Path], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a tensor that an index lists in one of these files is missing."""
    for index in sorted({index for file in files for index in file.parent.glob(f"*{INDEX_SUFFIX}")}):
        for shard, names in indexed_shards(index).items():
            if shard in files and (missing := sorted(names - tensors.keys())):
                raise CheckpointError(
                    f"{shard}: lacks {missing[0]}, though {index.name} lists it there; copy the folder again"
                )


# ---- writing


@contextmanager
def writing(
    file: Path, kind: FileKind, names: Iterable[str], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Tensor], None]]:
    """A function that adds a tensor to a new file. The file gets its name when the block succeeds.

    `names` are all that may be added; `metadata` goes into the header of a safetensors file.
    """
    written: dict[str, Written | None] = {}

    def add(name: str, tensor: Tensor) -> None:
        if name in written:
            raise CheckpointError(
                f"{file}: two of its tensors would be called {name}; choose another {setting('format')}"
            )
        written[name] = writer.add(name, tensor) if kind == "safetensors" else writer.add(tensor)

    with ExitStack() as stack:
        staging = stack.enter_context(replacing_file(file))
        new = SafetensorsWriter(staging, names, metadata) if kind == "safetensors" else TorchFile(staging)
        writer = stack.enter_context(new)
        yield add
        if kind == "pytorch":
            writer.finish(written)


def write_model(
    output: Path,
    kind: FileKind,
    sizes: Mapping[str, tuple[int, int]],
    tensor_of: Callable[[str], Tensor],
    largest: int | None = None,
    *,
    inputs: Iterable[Path] = (),
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write tensors, one in memory at a time, as one file, or as shards with an index.

    `sizes`: the bytes of each tensor and of one of its items. `largest`: the most bytes of a shard
    that holds more than one tensor. All files appear at the end, or none. Returns them, the index
    first. Raises UserError if one of them would replace one of `inputs`, or if files that exist
    would be taken for a part of the model.
    """
    shards = _shards(sizes, largest)
    files, index = _file_names(output, len(shards)), output.with_name(f"{output.name}{INDEX_SUFFIX}")
    made = [index, *files] if len(shards) > 1 else files
    _check_output(output, index, made, inputs)
    with ExitStack() as unfinished:  # which is left in reverse order: the index appears last
        if len(shards) > 1:
            listed = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
            total = {"total_size": sum(size for size, _ in sizes.values())}
            text = json.dumps({"metadata": total, "weight_map": listed}, indent=2) + "\n"
            unfinished.enter_context(replacing_file(index)).write_text(text, encoding="utf-8")
        for file, names in zip(files, shards, strict=True):
            add = unfinished.enter_context(writing(file, kind, names, metadata))
            for name in names:
                add(name, tensor_of(name))
    return made


def _shards(sizes: Mapping[str, tuple[int, int]], largest: int | None) -> list[list[str]]:
    """The names of the tensors in each shard, those with larger items first, as SafetensorsWriter
    needs them."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes, key=lambda name: -sizes[name][1]):
        if largest is not None and shards[-1] and filled + sizes[name][0] > largest:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name][0]
    return shards


def _file_names(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    stem = output.name.removesuffix(output.suffix)
    return [output.with_name(f"{stem}-{n:05}-of-{count:05}{output.suffix}") for n in range(1, count + 1)]


def _check_output(output: Path, index: Path, made: list[Path], inputs: Iterable[Path]) -> None:
    """Raise UserError if one of the files to be made is an input, or if others exist that a reader
    would take for a part of the result."""
    where = f"{setting('output')} {output}"
    if read := sorted({file.resolve() for file in made} & {file.resolve() for file in inputs}):
        raise UserError(
            f"{where}: {read[0].name} would be a part of it, and is an input; choose another name"
        )
    stem = output.name.removesuffix(output.suffix)
    others = [output, index, *output.parent.glob(f"{glob.escape(stem)}-*-of-*{output.suffix}")]
    if stale := sorted(file for file in others if file.exists() and file not in made):
        raise UserError(
            f"{where}: {stale[0].name} exists and would be taken for a part of it; remove it, or choose "
            "another name"
        )
