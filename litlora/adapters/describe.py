"""What a checkpoint is: kind, model, sizes, base and, for an adapter, how large each update is.
What is missing is reported, and is never fatal."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora import formats
from litlora.adapters.factored import norm
from litlora.adapters.merge import EMBEDDING, HEAD, MergedTensor, Plan, add_adapters, plan_merge
from litlora.checkpoint import Chain, open_checkpoint, resolve
from litlora.errors import BaseMismatchError, CheckpointError
from litlora.formats import Outline
from litlora.formats.full import FullModel
from litlora.formats.lora_files import read_lora
from litlora.frozen.few_bits import Quantized
from litlora.lora import Adapter, Update
from litlora.lora.dense import DenseUpdate
from litlora.model import shorten
from litlora.paths import checkpoint_dir, is_checkpoint, stands_for_directory
from litlora.prompts import STYLE_FILE
from litlora.storage.dtypes import dtype_name
from litlora.storage.fingerprint import check_finite
from litlora.storage.tensors import at_least_16_bits
from litlora.tokenizer import find_sidecars

Description = dict[str, Any]
"""Plain values, which JSON can hold; "problems" lists, in words, what is missing or wrong."""
_ALONE = "only what its own files tell is shown"
SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
"""Of a model, as its configuration calls them."""


def describe(
    path: Path, *, base_dir: Path | None = None, option: Callable[[str], str] = lambda name: name
) -> Description:
    """Describe a checkpoint directory, or a LoRA file of another tool. Raises CheckpointError for
    anything else. `option` spells the settings that a problem names, see `UserError`."""
    if not stands_for_directory(path):
        return _of_outline(path, read_lora(path, allow_unknown=True).outline(), [])
    directory = checkpoint_dir(path)
    try:
        found = open_checkpoint(directory, base_dir=base_dir)
    except CheckpointError as error:
        if (outline := formats.detect(directory).outline(directory)) is not None:
            problems = [f"{_ALONE}: {error.with_options(option)}"]
            return _of_outline(directory, outline, problems, _place(directory, outline.base, base_dir))
        raise
    chain, problems = _resolve(directory, base_dir, found, option)
    config = chain.config if chain else found.config if isinstance(found, FullModel) else None
    files = {file.name for file in find_sidecars(chain.sources if chain else [directory])}
    described = {
        "path": str(directory),
        "kind": found.kind,
        "format": formats.detect(directory).name,
        "file": found.file.name,
        "bytes": found.num_bytes if isinstance(found, FullModel) else found.file.stat().st_size,
        **_counts(found.tensors),
        "fingerprint": found.fingerprint,
        "family": _family(chain.base if chain else found),
        "model": config.to_dict() if config else None,
        "sizes": {name: getattr(config, name) for name in SIZES} if config else None,
        "prompt_style": (directory / STYLE_FILE).is_file(),
        "tokenizer": bool(files & {"tokenizer.json", "tokenizer.model"}),
    }
    if isinstance(found, FullModel) and (merged := found.merged):
        described["merged_from"] = {
            "chain": merged["chain"],
            "unchanged_since": merged["result"] == found.fingerprint,
        }
    if isinstance(found, Adapter):
        described["lora"] = found.settings
        if found.rows is not None:
            described["tokens"] = {"ids": [*found.rows.ids], "num_rows": found.rows.num_rows}
        described["base"] = _base(found, chain)
        described["chain"] = [
            str(place) for place in (chain.directories if chain else [described["base"]["path"], directory])
        ]
        layers, misfit = _layers(found, chain)
        described["layers"], described["total"] = layers, _total(layers)
        problems += misfit + _broken(found.tensors, found.file)
    return described | {"notices": chain.notices if chain else [], "problems": problems}


def _resolve(
    directory: Path, base_dir: Path | None, found: FullModel | Adapter, option: Callable[[str], str]
) -> tuple[Chain | None, list[str]]:
    """The chain, if all its links can be opened, and the problems with it."""
    if isinstance(found, FullModel) and base_dir is None:
        return Chain(found, [], found.notices), []
    try:
        return resolve(directory, base_dir=base_dir), []
    except BaseMismatchError as error:
        return resolve(directory, base_dir=base_dir, allow_base_mismatch=True), [error.with_options(option)]
    except CheckpointError as error:
        return None, [error.with_options(option)]


def _base(adapter: Adapter, chain: Chain | None) -> Description:
    """Where the base is, and whether it matches: None if it is missing, or if the adapter's format
    does not tell."""
    wanted, quantized = adapter.base.fingerprint, adapter.base.quantized
    described = {}
    if quantized is not None:
        how = {"name": quantized.quantizer.name, **quantized.quantizer.settings()}
        described["quantized"] = {**how, "fingerprint": quantized.fingerprint}
        if quantized.taken_out:
            described["quantized"]["taken_out_of"] = sorted(quantized.taken_out)
    if chain is None:
        return {
            "path": adapter.base.absolute_path,
            "found": False,
            "wanted": wanted,
            "fingerprint": None,
            "matches": None,
            **described,
        }
    base = chain.inner.top
    matches = None if wanted is None else base.answers_to(wanted)
    return {
        "path": str(base.directory),
        "found": True,
        "wanted": wanted,
        "fingerprint": base.fingerprint,
        "matches": matches,
        **described,
    }


def _layers(adapter: Adapter, chain: Chain | None) -> tuple[list[Description], list[str]]:
    """Each updated tensor and how large its update is relative to it; and why, if that cannot be
    told."""
    weights: Plan = {}
    problems = []
    if chain is not None:
        try:
            inner, config = plan_merge(chain.inner)
            weights = inner if HEAD in inner else inner | {HEAD: inner[EMBEDDING]}  # a tied head
            add_adapters(inner, config, [(adapter, 1.0)])
        except CheckpointError as error:
            problems.append(str(error))
    layers = []
    for module, update in adapter.updates.items():
        W = _fitting(weights.get(f"{module}.weight"), update.shape)
        layers.append(_layer(module, update.shape, norm(update), W, update.rank, update.scale))
    for name, tensor in adapter.whole.items():
        W = _fitting(weights.get(name), tuple(tensor.shape))
        size = None if W is None else _norm(tensor[rows] - W.exact(rows) for rows in W.row_slices())
        layers.append(_layer(name, tuple(tensor.shape), size, W))
    return layers, problems


def _broken(tensors: Mapping[str, Tensor], file: Path) -> list[str]:
    """The problem of values that are not finite, which have no size."""
    try:
        check_finite({name: at_least_16_bits(tensor) for name, tensor in tensors.items()}, file)
    except CheckpointError as error:
        return [str(error)]
    return []


def _fitting(W: MergedTensor | None, shape: tuple[int, ...]) -> MergedTensor | None:
    return W if W is not None and W.shape == shape else None


def _norm(blocks: Iterable[Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(block, dtype=torch.float64).item() for block in blocks))


def _layer(
    name: str,
    shape: tuple[int, ...],
    size: float | None,
    W: MergedTensor | None,
    rank: int | None = None,
    scale: float | None = None,
) -> Description:
    """`rank` is None for a tensor that the adapter holds whole."""
    weight = None if W is None else _norm(W.exact(rows) for rows in W.row_slices())
    size, weight = (value if value is not None and math.isfinite(value) else None for value in (size, weight))
    share = size / weight if size is not None and weight else None
    return {
        "name": name,
        "shape": list(shape),
        "rank": rank,
        "scale": scale,
        "delta_norm": size,
        "weight_norm": weight,
        "relative": share,
    }


def _total(layers: list[Description]) -> Description:
    """Norms over all layers together."""
    known = [layer for layer in layers if layer["relative"] is not None]
    deltas = [layer["delta_norm"] for layer in layers]
    delta = None if None in deltas else math.hypot(*deltas)
    weight = math.hypot(*(layer["weight_norm"] for layer in known))
    share = delta / weight if weight and len(known) == len(layers) else None
    return {"delta_norm": delta, "weight_norm": weight or None, "relative": share}


def _place(directory: Path, name: str | None, base_dir: Path | None) -> Path | None:
    """Where the base of an adapter is that cannot be read beside it; None if it is not there."""
    places = [base_dir] if base_dir is not None else [Path(name), directory / name] if name else []
    return next((place for place in places if place.is_dir() and is_checkpoint(place)), None)


def _of_outline(path: Path, outline: Outline, problems: list[str], base: Path | None = None) -> Description:
    """An adapter whose base is not known, or does not fit: the names are its file's own."""
    if outline.unrecognised:
        problems = [*problems, f"unrecognised keys: {shorten(outline.unrecognised)}"]
    described = {
        "path": str(path),
        "kind": "adapter",
        "format": outline.format,
        "file": outline.file.name,
        "bytes": outline.file.stat().st_size,
        **_counts(outline.tensors),
    }
    if outline.settings is not None:
        described["lora"] = outline.settings
    described["base"] = {
        "path": str(base) if base is not None else outline.base,
        "found": base is not None,
        "wanted": None,
        "fingerprint": None,
        "matches": None,
    }
    if outline.updates is not None:
        layers = [
            _layer(name, update.shape, _size(update), None, update.rank, update.scale)
            for name, update in outline.updates.items()
        ]
        described |= {"layers": layers, "total": _total(layers)}
    problems = problems + _broken(outline.tensors, outline.file)
    return described | {"notices": outline.notices, "problems": problems}


def _size(update: Update | DenseUpdate) -> float | None:
    """‖ΔW‖; None if only the base tells."""
    return update.norm() if isinstance(update, DenseUpdate) else norm(update)


# ---- facts


def _counts(tensors: Mapping[str, Tensor | Quantized]) -> Description:
    """How many tensors and values there are, and in which dtypes."""
    dtypes = Counter()
    for tensor in tensors.values():
        is_packed = isinstance(tensor, Quantized)
        dtype = tensor.kind if is_packed else dtype_name(tensor.dtype)
        dtypes[dtype] += tensor.shape.numel()
    return {"tensors": len(tensors), "numbers": sum(dtypes.values()), "dtypes": dict(dtypes)}


def _family(model: FullModel | Adapter) -> str | None:
    """The Hugging Face family; None if none can express the architecture, or that is not known."""
    try:
        return model.family() if isinstance(model, FullModel) else None
    except CheckpointError:
        return None


# ---- as a table


def table(d: Description) -> list[str]:
    """The lines of a description for a person."""
    lines = [f"{d['path']}: {d['kind']}, {d['format']}"]
    lines += [f"PROBLEM  {problem}" for problem in d["problems"]]
    lines += [f"note     {notice}" for notice in d["notices"]]
    lines.append(
        f"weights  {d['file']}: {d['bytes']:,} bytes, {d['tensors']:,} tensors, {d['numbers']:,} values in "
        f"{', '.join(d['dtypes'])}"
    )
    if d.get("fingerprint"):
        lines.append(f"         fingerprint {d['fingerprint']}")
    if sizes := d.get("sizes"):
        lines.append(
            f"model    {d['family'] or 'no Hugging Face family'}: {sizes['num_hidden_layers']} layers, "
            f"hidden {sizes['hidden_size']}, vocabulary {sizes['vocab_size']:,}, "
            f"context {sizes['max_position_embeddings']:,}"
        )
    if merged := d.get("merged_from"):
        changed = "" if merged["unchanged_since"] else ", and changed since then"
        lines.append(f"merged   from the chain {merged['chain']}{changed}")
    if lora := d.get("lora"):
        shown = (f"{name} {_plain(value)}" for name, value in lora.items() if value not in ({}, [], False))
        lines.append(f"lora     {', '.join(shown)}")
    if tokens := d.get("tokens"):
        numbers = ", ".join(map(str, tokens["ids"][:8])) + (", ..." if len(tokens["ids"]) > 8 else "")
        lines.append(f"tokens   adds {numbers}; vocabulary {tokens['num_rows']:,} with them")
    if base := d.get("base"):
        lines.append(f"base     {base['path'] or 'not named'}: {_verdict(base)}")
        if bits := base.get("quantized"):
            name, found = bits["name"], bits["fingerprint"]
            less = bits.get("taken_out_of", ())
            part = f", after a part was taken out of {len(less)} layers" if less else ""
            lines.append(f"         quantised to {name} in training (fingerprint {found}){part}")
    if len(d.get("chain", [])) > 2:
        lines.append(f"chain    {' -> '.join(d['chain'])}")
    if layers := d.get("layers"):
        lines += ["", *_layer_lines(layers, d["total"])]
    return lines


def _layer_lines(layers: list[Description], total: Description) -> list[str]:
    """The updates in columns, and all of them together."""
    rows = [("layer", "shape", "rank", "scale", "|dW|", "|dW| / |W|")]
    rows += [_row(layer["name"], layer) for layer in layers]
    rows.append(_row("all", {"shape": [], "rank": None, "scale": None, **total}))
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]
        ).rstrip()
        for name, *cells in rows
    ]


def _verdict(base: Description) -> str:
    if not base["found"]:
        return "NOT FOUND" + (f" (fingerprint {base['wanted']})" if base["wanted"] else "")
    if base["matches"] is None:
        return "found; this format does not tell whether it is the right one"
    if base["matches"]:
        return "matches"
    return f"DOES NOT MATCH (fingerprint {base['fingerprint']}, trained on {base['wanted']})"


def _row(name: str, layer: Description) -> tuple[str, ...]:
    share = layer["relative"]
    scale, delta = (
        f"{value:.4g}" if value is not None else "" for value in (layer["scale"], layer["delta_norm"])
    )
    rank = "" if not layer["shape"] else str(layer["rank"] or "whole")
    relative = "" if share is None else f"{share:.3%}"
    return name, " x ".join(map(str, layer["shape"])), rank, scale, delta, relative


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        pairs = [f"{name}: {each}" for name, each in value.items()]
        return f"{{{shorten(pairs, most=8)}}}"
    return shorten(list(map(str, value)), most=8) if isinstance(value, list) else str(value)
