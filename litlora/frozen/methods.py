"""What a folder's config.json says about how its weights are stored in few bits
(`quantization_config`). Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litlora.errors import CheckpointError

GPTQ_BITS = (2, 3, 4, 8)
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
METHODS = ("bitsandbytes", "fp8", "fbgemm_fp8", "compressed-tensors", "gptq", "awq", "mxfp4")
"""The values of quant_method whose weights are read."""


@dataclass(frozen=True)
class Storage:
    """How weights are stored."""

    method: str
    """One of METHODS."""
    bits: tuple[int, ...] = (8,)
    """What an entry may take; of compressed-tensors, one for each group of layers."""
    group_size: int | None = None
    """Consecutive values of a row that share a scale; None: all of them."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale (fp8)."""
    zero_offset: int = 0
    """What is added to a stored zero point."""

    @classmethod
    def parse(cls, settings: Any) -> "Storage":
        """Read a quantization_config. Raises CheckpointError for a method or a setting that is not
        supported, naming it; without settings it is bitsandbytes, whose tensors tell all."""
        settings = settings if isinstance(settings, dict) else {}
        method = method_of(settings)
        if method not in METHODS:
            raise CheckpointError(
                f"quantization_config: weights quantized by {method!r} are not supported, only those of "
                f"{', '.join(METHODS)}; use the model in 16 or 32 bits"
            )
        try:
            return cls(method, **_PARSERS.get(method, lambda settings: {})(settings))
        except ValueError as error:
            raise CheckpointError(f"quantization_config: {method}: {error}") from None


def method_of(settings: Any) -> Any:
    """The quant_method of a quantization_config; without one it is that of files of 2023."""
    if not settings:
        return "bitsandbytes"
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not method and isinstance(settings, dict):
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            return "bitsandbytes"
    return method


def _fp8(settings: Mapping[str, Any]) -> dict[str, Any]:
    _only(settings, "fmt", "e4m3", "e5m2", "float8_e4m3fn")
    block = settings.get("weight_block_size")
    if block is None:
        return {}
    if type(block) not in (list, tuple) or len(block) != 2 or not all(map(_is_size, block)):
        raise ValueError(f"weight_block_size {block!r} must be the rows and columns of a block")
    return {"block": tuple(block)}


def _gptq(settings: Mapping[str, Any]) -> dict[str, Any]:
    _only(settings, "checkpoint_format", "gptq", "gptq_v2")
    _only(settings, "pack_dtype", "int32", "torch.int32")
    if settings.get("planar"):
        raise ValueError("planar packing is not supported")
    if settings.get("dynamic"):
        raise ValueError("dynamic, settings of single layers, is not supported")
    # The packers of the first version stored a zero point less 1.
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return {**_integers(settings, GPTQ_BITS), "zero_offset": offset}


def _awq(settings: Mapping[str, Any]) -> dict[str, Any]:
    _only(settings, "version", "gemm", "GEMM")
    if settings.get("zero_point", True) is not True:
        raise ValueError("zero_point must be true")
    return _integers(settings, (4,))


def _integers(settings: Mapping[str, Any], known: tuple[int, ...]) -> dict[str, Any]:
    bits = settings.get("bits", settings.get("w_bit"))
    size = settings.get("group_size", settings.get("q_group_size", -1))
    if type(bits) is not int or bits not in known:
        raise ValueError(f"bits {bits!r} is not one of {', '.join(map(str, known))}")
    if size != -1 and not _is_size(size):
        raise ValueError(f"group_size {size!r} must be a number of values, or -1")
    return {"bits": (bits,), "group_size": None if size == -1 else size}


def _compressed(settings: Mapping[str, Any]) -> dict[str, Any]:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("config_groups is missing")
    for name in ("transform_config", "sparsity_config"):
        value = settings.get(name)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise ValueError(f"{name} is not supported")
    bits, blocks = set(), set()
    for group in groups.values():
        group = group if isinstance(group, dict) else {}
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise ValueError("a group of config_groups without weights is not supported")
        _only({"format": group.get("format") or settings.get("format")}, "format", *COMPRESSED_FORMATS)
        _only(weights, "type", "int", "float")
        width, block = weights.get("num_bits"), weights.get("block_structure")
        known = (8,) if weights.get("type") == "float" else (4, 8)
        if type(width) is not int or width not in known:
            raise ValueError(f"num_bits {width!r} of type {weights.get('type')!r} is not supported")
        bits.add(width)
        if block is not None:
            blocks.add(_fp8({"weight_block_size": block})["block"])
    if len(blocks) > 1:
        raise ValueError("groups with blocks of different sizes are not supported")
    return {"bits": tuple(sorted(bits)), "block": next(iter(blocks), None)}


def _only(settings: Mapping[str, Any], name: str, *known: str) -> None:
    value = settings.get(name)
    if value is not None and value not in known:
        raise ValueError(f"{name} {value!r} is not supported, only {', '.join(known)}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


_PARSERS = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
