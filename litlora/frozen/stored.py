"""Weights that a folder stores in few bits, whatever stored them: found among its tensors, and kept
as they are."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from litlora.frozen.awq import find_awq
from litlora.frozen.bitsandbytes import find_quantized
from litlora.frozen.compressed import find_compressed
from litlora.frozen.few_bits import Quantized
from litlora.frozen.float8 import find_float8, is_float8
from litlora.frozen.gptq import find_gptq
from litlora.frozen.methods import Storage
from litlora.frozen.mxfp4 import find_mxfp4
from litlora.frozen.stored_tensors import StoredTensors
from litlora.storage.blocks import LazyTensor
from litlora.storage.dtypes import dtype_name


def find_stored(
    tensors: Mapping[str, Tensor], where: Mapping[str, Path], storage: Storage
) -> dict[str, Tensor | Quantized]:
    """The tensors, with each weight in few bits and its parts replaced by one Quantized.

    `where` is the file of each. Raises CheckpointError, with that path in front, for parts that are
    missing or contradict each other.
    """
    if storage.method == "bitsandbytes":
        return find_quantized(tensors, where)
    parts = StoredTensors(tensors, where)
    _FIND[storage.method](parts, storage)
    return parts.tensors


def _find_fp8(parts: StoredTensors, storage: Storage) -> None:
    for name, tensor in list(parts.tensors.items()):
        if is_float8(tensor):
            parts.put(name, partial(find_float8, parts, name, storage.block))


_FIND = {
    "fp8": _find_fp8,
    "fbgemm_fp8": _find_fp8,
    "compressed-tensors": find_compressed,
    "gptq": find_gptq,
    "awq": find_awq,
    "mxfp4": find_mxfp4,
}


def notice(directory: Path, tensors: Mapping[str, Tensor | LazyTensor]) -> str | None:
    """A line about a base with weights in few bits; None for any other base."""
    quantized = [tensor for tensor in tensors.values() if isinstance(tensor, Quantized)]
    if not quantized:
        return None
    kinds = sorted({one.kind.removeprefix(f"{one.tool} ") for one in quantized})
    tools = sorted({one.tool for one in quantized} - {*kinds})
    dtypes = {dtype_name(one.dtype) for one in quantized}
    bits = " and ".join(str(bits) for bits in sorted({one.bits for one in quantized}))
    return (
        f"{directory}: weights are stored in {bits} bits ({', '.join(kinds + tools)}) and "
        f"dequantised to {', '.join(sorted(dtypes))}: the values that an adapter trained on this base "
        "(QLoRA) has seen; results hold these values, not the bits"
    )
