"""Models as files of tensors, whatever they are models of: one file, or a folder of them. The
tensors are memory-mapped."""

import ctypes
import glob
import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from litlora.errors import CheckpointError, UserError
from litlora.formats.folder import INDEX_SUFFIX, indexed_shards
from litlora.storage.atomic import replacing_file
from litlora.storage.tensors import SafetensorsWriter, open_tensors, open_torch
from litlora.storage.torch_file import TorchFile, Written

NESTED = ("state_dict", "model")
"""Where a torch file may keep its tensors, if not at the top."""
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
"""What an option for a number format may say."""
READ = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
    ),
}
"""What a model's tensors may be."""
_HELD = 128 << 20
"""Bytes of mapped tensors that may have been read before their memory is given back."""


def open_model(path: Path, files: list[Path]) -> dict[str, Tensor]:
    """The tensors of the model at `path` which these files make up. Raises CheckpointError for a
    tensor that two files hold differently."""
    tensors: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    for file in files:
        for name, tensor in _open(file).items():
            if tensor.dtype not in READ:
                raise CheckpointError(
                    f"{file}: {name} is {str(tensor.dtype).removeprefix('torch.')}, which is not read"
                )
            tensor = tensor.detach()  # a Parameter in a torch file
            if name in tensors and not (
                tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
            ):
                raise CheckpointError(
                    f"{file}: {name} is also in {where[name].name}, and not the same; keep one of the two files there"
                )
            tensors[name], where[name] = tensor, file
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    for index in sorted(
        {place for file in files for place in file.parent.glob(f"*{INDEX_SUFFIX}")} if path.is_dir() else ()
    ):
        for shard, names in indexed_shards(index).items():
            if shard in files and (missing := sorted(names - tensors.keys())):
                raise CheckpointError(
                    f"{shard}: lacks {missing[0]}, though {index.name} lists it there; copy the folder again"
                )
    return tensors


def _open(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return open_tensors(file)
    content = open_torch(file)
    while isinstance(content, dict) and (
        inner := next((name for name in NESTED if isinstance(content.get(name), dict)), None)
    ):
        content = content[inner]
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a mapping of names to tensors")
    if odd := [
        name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]:
        raise CheckpointError(f"{file}: the entry {odd[0]!r} is not a tensor")
    return content


@contextmanager
def writing(
    file: Path, kind: Literal["safetensors", "pytorch"], names: Iterable[str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """A function that adds a tensor to a new file, which takes the name `file` when the block ends
    well; `names` are all there may be."""
    written: dict[str, Written | None] = {}

    def add(name: str, tensor: Tensor) -> None:
        if name in written:
            raise CheckpointError(
                f"{file}: two tensors would be called {name} in it; choose another --format"
            )
        written[name] = writer.add(name, tensor) if kind == "safetensors" else writer.add(tensor)

    with (
        replacing_file(file) as staging,
        SafetensorsWriter(staging, names) if kind == "safetensors" else TorchFile(staging) as writer,
    ):
        yield add
        if kind == "pytorch":
            writer.finish(written)


def write_model(
    output: Path,
    kind: Literal["safetensors", "pytorch"],
    sizes: Mapping[str, tuple[int, int]],
    tensor_of: Callable[[str], Tensor],
    largest: int | None = None,
    *,
    inputs: Iterable[Path] = (),
) -> list[Path]:
    """Write tensors, one in memory at a time, as one file, or as shards of at most `largest` bytes
    (or one tensor) with an index.

    `sizes`: the bytes of each tensor and of its items. All files appear at the end, or none.
    Returns them, the index first. Raises UserError if one of them would take the place of one of
    `inputs`, or if older shards would be taken for parts of it.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(
        sizes, key=lambda name: -sizes[name][1]
    ):  # larger items first, as SafetensorsWriter wants them
        if largest is not None and shards[-1] and filled + sizes[name][0] > largest:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name][0]
    count, stem = len(shards), output.name.removesuffix(output.suffix)
    files = (
        [output]
        if count == 1
        else [output.with_name(f"{stem}-{n:05}-of-{count:05}{output.suffix}") for n in range(1, count + 1)]
    )
    index = output.with_name(f"{output.name}.index.json")
    made = {*files, *([index] if count > 1 else [])}
    if read := sorted({file.resolve() for file in made} & {file.resolve() for file in inputs}):
        raise UserError(f"--output {output}: {read[0].name} would be a part of it, and is read; name another")
    others = [output, index, *output.parent.glob(f"{glob.escape(stem)}-*-of-*{output.suffix}")]
    if stale := sorted(file for file in others if file.exists() and file not in made):
        raise UserError(
            f"--output {output}: {stale[0].name} is there and would be taken for a part of it; remove it, or name another"
        )
    with ExitStack() as unfinished:  # which is left in the opposite order: the index appears last
        if count > 1:
            listed = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
            staging = unfinished.enter_context(replacing_file(index))
            total = {"total_size": sum(size for size, _ in sizes.values())}
            staging.write_text(
                json.dumps({"metadata": total, "weight_map": listed}, indent=2) + "\n", encoding="utf-8"
            )
        for file, names in zip(files, shards, strict=True):
            add = unfinished.enter_context(writing(file, kind, names))
            for name in names:
                add(name, tensor_of(name))
    return [index, *files] if count > 1 else files


@dataclass
class Pages:
    """Keeps small what memory-mapped tensors take of it: pages that were read count as the
    process's until they are given back.

    They are read again from the file (or its cache) when they are needed. Only Linux tells what is
    mapped; elsewhere nothing is done.
    """

    _read: list[Tensor] = field(default_factory=list)
    _held: int = 0

    def done_with(self, *tensors: Tensor) -> None:
        """These have been read and are not needed soon."""
        self._read += tensors
        self._held += sum(tensor.nbytes for tensor in tensors)
        if self._held > _HELD:
            self.release()

    def release(self) -> None:
        """Give back the pages of all tensors that were read, as far as they are of a mapped
        file."""
        mapped = _file_mappings()
        for tensor in self._read:
            first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if (
                tensor.is_contiguous()
                and first < last
                and any(start <= first and last <= end for start, end in mapped)
            ):
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
                )
        self._read.clear()
        self._held = 0


def _file_mappings() -> list[tuple[int, int]]:
    """The addresses at which this process has mapped files of tensors."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = [re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s+(/.*)?", line) for line in lines]
    return [
        (int(one[1], 16), int(one[2], 16))
        for one in found
        if one and one[3] != "0" and ".so" not in (one[4] or "")
    ]
