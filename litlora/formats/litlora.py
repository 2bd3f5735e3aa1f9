"""Our own format: `lit_model.pth`, a torch file of one dict.

    full      {"model": {name: tensor},
               "litlora": {"format": 1, "kind": "full", "merged": {"chain", "result"},
                           "experts": "apart"}}
    adapter   {"model": {name: tensor that was trained},
               "litlora": {"format": 1, "kind": "adapter", "lora": {settings},
                           "base": {"path", "absolute_path", "fingerprint"},
                           "taught": {"tokenizer", "prompt_style"},
                           "tokens": {"ids", "num_rows"}}}

"merged" stands in merged models only, "experts" where `FullModel.apart` is true, "tokens" in adapters
that add some. An adapter whose base was quantised for the training has format 2, and in its base
"quantized": {"quantizer": {settings}, "fingerprint"}. If LoftQ started it in more than one iteration,
"model" has LAYER.loftq_A (r, in) and LAYER.loftq_B (out, r) in bf16 as well: what was quantised is
W - B A, as `LowRank` computes it. Versions that know format 1 alone refuse format 2: they would use the
base in 16 bits.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from litlora.config import CONFIG_FILE
from litlora.errors import CheckpointError, UserError
from litlora.formats import WEIGHTS_FILE
from litlora.formats.full import DTYPES, FullModel
from litlora.formats.parts import kept_parts
from litlora.frozen.quantize import QuantizedBase, Quantizer
from litlora.lora.adapter import (
    TAKEN_A,
    TAKEN_B,
    Adapter,
    BaseReference,
    parse_settings,
    parse_taken_out,
    parse_tensors,
)
from litlora.lora.rows import LEAF, TokenRows
from litlora.storage.dtypes import dtype_name
from litlora.storage.tensors import open_torch
from litlora.transformers_config import load_architecture

FORMAT, QUANTIZED_FORMAT = 1, 2
"""Versions of the layout, one of which is stored in every file; any other one is refused. The second
is that of an adapter whose base was quantised for the training."""

_FIELDS = {
    "lora": {"rank": int, "alpha": float},
    "base": {"path": str, "absolute_path": str, "fingerprint": str},
}
"""What an adapter must state, by entry."""


_UNUSABLE = (UserError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What settings of unexpected types raise."""


# ---- reading


def open_directory(directory: Path) -> FullModel | Adapter:
    """What a litlora directory holds. Raises CheckpointError for anything but a sound file."""
    file = directory / WEIGHTS_FILE
    content = open_torch(file)
    entries = [content.get(name) for name in ("model", "litlora")] if isinstance(content, dict) else []
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f'{file}: not written by litlora: it lacks the entries "model" and "litlora"')
    tensors, described = entries
    kind, version = described.get("kind"), described.get("format")
    if version != FORMAT and not (kind == "adapter" and version == QUANTIZED_FORMAT):
        known = f"{FORMAT} and, of an adapter, {QUANTIZED_FORMAT}"
        raise CheckpointError(f"{file}: has format {version!r}; this version of litlora reads format {known}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f'{file}: the entry {name!r} of "model" is not a tensor')
    if kind == "adapter":
        return _adapter(file, tensors, described)
    if kind != "full":
        raise CheckpointError(f"{file}: kind is {kind!r}; it must be full or adapter")
    config = load_architecture(directory / CONFIG_FILE)
    beside = {"parts": kept_parts(directory), "apart": described.get("experts") == "apart"}
    return FullModel(directory, file, tensors, config, _merged(file, described), **beside).checked()


def _merged(file: Path, described: dict[str, Any]) -> dict[str, str] | None:
    merged = described.get("merged")
    if "merged" not in described:
        return None
    kinds = {name: type(value) for name, value in merged.items()} if isinstance(merged, dict) else {}
    if kinds != {"chain": str, "result": str}:
        raise CheckpointError(f"{file}: merged is {merged!r}; it must state the chain and the result")
    return merged


def _adapter(file: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> Adapter:
    for entry, fields in _FIELDS.items():
        for name, kind in fields.items():
            found = described.get(entry)
            value = found.get(name) if isinstance(found, dict) else None
            if type(value) is not kind:
                raise CheckpointError(
                    f"{file}: its {entry}.{name} is {value!r}; an adapter needs a {kind.__name__} there"
                )
    lora, base = described["lora"], described["base"]
    try:
        config = parse_settings(lora)
    except _UNUSABLE as error:
        raise CheckpointError(f"{file}: its settings are not usable: {error}") from None
    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        dtype = dtype_name(tensors[odd[0]].dtype)
        raise CheckpointError(
            f"{file}: {odd[0]} is {dtype}; the tensors of an adapter must be in float32, bfloat16, "
            "float16 or float64"
        )
    try:
        taken_out, rest = parse_taken_out(tensors)
        rows, rest = _rows(described.get("tokens"), rest)
        updates, whole = parse_tensors(rest, config)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    quantized = _quantized(file, described)
    if config.loftq_iterations and quantized is None:
        raise CheckpointError(f"{file}: was started by LoftQ, and its base.quantized is missing")
    if bool(taken_out) != (config.loftq_iterations > 1):
        what = "holds" if taken_out else "lacks"
        raise CheckpointError(f"{file}: its init is {config.init}, and it {what} {TAKEN_A} and {TAKEN_B}")
    quantized = quantized and dataclasses.replace(quantized, taken_out=taken_out)
    reference = BaseReference(base["path"], base["absolute_path"], base["fingerprint"], quantized)
    taught = described.get("taught")
    facts = taught if isinstance(taught, dict) else None  # the first versions stored none
    return Adapter(config, updates, whole, reference, file, lora, facts, rows)


def _rows(stated: Any, tensors: dict[str, Tensor]) -> tuple[TokenRows | None, dict[str, Tensor]]:
    """The rows of added tokens that a file states, and its other tensors."""
    if stated is None:
        return None, tensors  # `parse_tensors` refuses rows that nothing states
    ids, num_rows = (stated.get(name) if isinstance(stated, dict) else None for name in ("ids", "num_rows"))
    usable = isinstance(ids, list) and type(num_rows) is int and num_rows > 0
    if not usable or not all(type(i) is int and 0 <= i < num_rows for i in ids) or len({*ids}) < len(ids):
        raise CheckpointError(f"its tokens are {stated!r}; they must state different ids and num_rows")
    found = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] == LEAF}
    if not found or not ids or any(rows.ndim != 2 or len(rows) != len(ids) for rows in found.values()):
        raise CheckpointError(f"it states {len(ids)} added tokens, and does not hold a row for each")
    rows = {f"{name.removesuffix(LEAF)}weight": tensor for name, tensor in found.items()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in found}
    return TokenRows(tuple(ids), num_rows, rows), rest


def _quantized(file: Path, described: dict[str, Any]) -> QuantizedBase | None:
    """In what few bits the base was. Raises CheckpointError unless that fits the format."""
    stored = described["base"].get("quantized")
    if (stored is None) == (described["format"] == QUANTIZED_FORMAT):
        raise CheckpointError(f"{file}: has format {described['format']}, and base.quantized is {stored!r}")
    if stored is None:
        return None
    try:
        if stored.keys() != {"quantizer", "fingerprint"} or not isinstance(stored["fingerprint"], str):
            raise ValueError(f"it states {stored!r}")
        return QuantizedBase(Quantizer.parse(stored["quantizer"]), stored["fingerprint"])
    except _UNUSABLE as error:
        raise CheckpointError(f"{file}: its base.quantized is not usable: {error}") from None


# ---- writing


def full_entry(merged: dict[str, str] | None = None, *, apart: bool = False) -> dict[str, Any]:
    """The "litlora" entry of a full model; `apart` as `FullModel.apart`."""
    entry = {"format": FORMAT, "kind": "full", **({"experts": "apart"} if apart else {})}
    return entry if merged is None else {**entry, "merged": merged}


def adapter_entry(adapter: Adapter, facts: dict[str, str]) -> dict[str, Any]:
    """The "litlora" entry of an adapter; `facts` are the `text_facts` of its directory."""
    base, rows, quantized = adapter.base, adapter.rows, adapter.base.quantized
    tokens = {"tokens": {"ids": list(rows.ids), "num_rows": rows.num_rows}} if rows else {}
    reference = {
        "path": base.path,
        "absolute_path": base.absolute_path,
        "fingerprint": base.fingerprint,
    }
    if quantized is not None:
        reference["quantized"] = {
            "quantizer": quantized.quantizer.settings(),
            "fingerprint": quantized.fingerprint,
        }
    return {
        "format": FORMAT if quantized is None else QUANTIZED_FORMAT,
        "kind": "adapter",
        "lora": adapter.settings,
        "base": reference,
        "taught": facts,
        **tokens,
    }
