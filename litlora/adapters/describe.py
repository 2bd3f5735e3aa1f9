"""What a checkpoint is: kind, model, numbers, base and, of an adapter, how large each update is.
What is missing is said, never fatal."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora import formats
from litlora.adapters.merge import EMBEDDING, HEAD, MergedTensor, Plan, add_adapters, plan_merge
from litlora.adapters.resize import norm
from litlora.checkpoint import Chain, open_checkpoint, resolve
from litlora.config import ModelConfig
from litlora.errors import BaseMismatchError, CheckpointError
from litlora.formats import litgpt
from litlora.formats.families import HF_CONFIG_FILE, load_config, write_config
from litlora.formats.folder import weight_files
from litlora.formats.full import FullModel
from litlora.formats.lora_files import LoRAFile, read_lora
from litlora.frozen import bitsandbytes
from litlora.frozen.bitsandbytes import Quantized
from litlora.lora import Adapter, Update
from litlora.paths import checkpoint_dir
from litlora.prompts import STYLE_FILE
from litlora.storage.fingerprint import check_finite
from litlora.storage.tensors import at_least_16_bits, open_tensors, open_torch
from litlora.tokenizer import find_sidecars

Description = dict[str, Any]
"""Plain values, as `--json` prints them; "problems" lists, in words, what is missing or wrong."""


def describe(path: Path, *, base_dir: Path | None = None) -> Description:
    """Describe a checkpoint directory, or a LoRA file of another tool. Raises CheckpointError for
    what is no checkpoint."""
    if path.is_file() and path.name not in formats.NAMED_FILES:
        return _lora_file(path, read_lora(path, allow_unknown=True), [])
    directory = checkpoint_dir(path)
    try:
        found = open_checkpoint(directory, base_dir=base_dir)
    except CheckpointError as error:
        if adapter := _without_base(directory, str(error)):
            return adapter
        raise
    chain, problems = _resolve(directory, base_dir, found)
    config = chain.config if chain else found.config if isinstance(found, FullModel) else None
    files = {file.name for file in find_sidecars(chain.sources if chain else [directory])}
    described = {
        "path": str(directory),
        "kind": found.kind,
        "format": formats.detect(directory).name,
        "file": found.file.name,
        "bytes": _size(found),
        **_numbers(found.tensors),
        "fingerprint": found.fingerprint,
        "family": _family(chain.base.directory if chain else directory, config),
        "model": config.to_dict() if config else None,
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
        described["base"] = _base(found, chain)
        described["chain"] = [
            str(place) for place in (chain.directories if chain else [described["base"]["path"], directory])
        ]
        layers, misfit = _layers(found, chain)
        described["layers"], described["total"] = layers, _total(layers)
        problems += misfit + _broken(found.tensors, found.file)
    return described | {"notices": chain.notices if chain else [], "problems": problems}


def _resolve(
    directory: Path, base_dir: Path | None, found: FullModel | Adapter
) -> tuple[Chain | None, list[str]]:
    """The chain, if all its links can be opened, and what is wrong with it."""
    if isinstance(found, FullModel) and base_dir is None:
        line = bitsandbytes.notice(directory, found.tensors)
        return Chain(found, [], [line] if line else []), []
    try:
        return resolve(directory, base_dir=base_dir), []
    except BaseMismatchError as error:
        return resolve(directory, base_dir=base_dir, allow_base_mismatch=True), [str(error)]
    except CheckpointError as error:
        return None, [str(error)]


def _base(adapter: Adapter, chain: Chain | None) -> Description:
    """Where the base is, and whether it is the one: None if it is not there, or if the adapter's
    format does not tell."""
    wanted = adapter.base.fingerprint
    if chain is None:
        return {
            "path": adapter.base.absolute_path,
            "found": False,
            "wanted": wanted,
            "fingerprint": None,
            "matches": None,
        }
    base = chain.inner.top
    matches = None if wanted is None else base.answers_to(wanted)
    return {
        "path": str(base.directory),
        "found": True,
        "wanted": wanted,
        "fingerprint": base.fingerprint,
        "matches": matches,
    }


def _layers(adapter: Adapter, chain: Chain | None) -> tuple[list[Description], list[str]]:
    """Each updated tensor and how large its update is beside it; and why that cannot be told, if it
    cannot."""
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
    """What is to be said of numbers that are not finite, of which no size can be told."""
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


# ---- what cannot be opened as it should


def _without_base(directory: Path, why: str) -> Description | None:
    """An adapter of another format whose base is not there or does not fit, as far as its own files
    tell; else None."""
    problem = [f"only what its own files tell is shown: {why}"]
    if formats.peft_weights(directory) is not None:
        return _lora_file(directory, read_lora(directory, allow_unknown=True), problem)
    file = directory / formats.LITGPT_ADAPTER_FILE
    if formats.detect(directory).name != "litgpt" or not file.is_file():
        return None
    content = open_torch(file)
    content = content.get("model", content) if isinstance(content, dict) else {}
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    name, _ = litgpt.base_of(directory)
    facts = {
        "path": str(directory),
        "kind": "adapter",
        "format": "litgpt",
        "file": file.name,
        "bytes": file.stat().st_size,
    }
    return {**facts, **_numbers(tensors), "base": _unknown_base(name), "problems": problem, "notices": []}


def _lora_file(path: Path, lora: LoRAFile, problems: list[str]) -> Description:
    """A LoRA whose base is not known: the names are the file's own."""
    layers = [_of_update(name, update) for name, update in lora.updates.items()]
    others = {**lora.diffs, **lora.whole}
    ranks = sorted({update.rank for update in lora.updates.values()})
    name = (lora.config or {}).get("base_model_name_or_path")
    unknown = [f"keys that mean nothing to us: {', '.join(lora.unknown)}"] if lora.unknown else []
    return {
        "path": str(path),
        "kind": "adapter",
        "format": "PEFT"
        if lora.config is not None
        else "LoRA file (lora_A, lora_B)"
        if "lora_A" in lora.parts
        else "LoRA file (lora_down, lora_up)",
        "file": lora.path.name,
        "bytes": lora.path.stat().st_size,
        **_numbers(open_tensors(lora.path)),
        "lora": {"ranks": ranks, "alpha": lora.alpha or lora.config is not None, "differences": len(others)},
        "base": _unknown_base(name),
        "layers": layers,
        "total": _total(layers),
        "notices": [],
        "problems": problems + unknown + _broken(open_tensors(lora.path), lora.path),
    }


def _of_update(name: str, update: Update) -> Description:
    return _layer(name, update.shape, norm(update), None, update.rank, update.scale)


def _unknown_base(name: str | None) -> Description:
    return {"path": name or None, "found": False, "wanted": None, "fingerprint": None, "matches": None}


# ---- facts


def _size(found: FullModel | Adapter) -> int:
    """Bytes of the weights on the disk."""
    if found.file.is_file() and found.file.suffix != ".json":
        return found.file.stat().st_size
    return sum(shard.stat().st_size for shard in weight_files(found.directory)[1])


def _numbers(tensors: Mapping[str, Tensor | Quantized]) -> Description:
    dtypes = Counter()
    for tensor in tensors.values():
        dtypes[
            tensor.kind if isinstance(tensor, Quantized) else str(tensor.dtype).removeprefix("torch.")
        ] += tensor.shape.numel()
    return {"tensors": len(tensors), "numbers": sum(dtypes.values()), "dtypes": dict(dtypes)}


def _family(directory: Path, config: ModelConfig | None) -> str | None:
    """The Hugging Face family: the folder's own, else the plainest that can express the
    architecture; None if none can."""
    if config is None:
        return None
    try:
        return (
            load_config(directory)[0]
            if (directory / HF_CONFIG_FILE).is_file()
            else write_config(config)["model_type"]
        )
    except CheckpointError:
        return None


# ---- as a table


def table(d: Description) -> list[str]:
    """The lines of a description for a person."""
    lines = [f"{d['path']}: {d['kind']}, {d['format']}"]
    lines += [f"PROBLEM  {problem}" for problem in d["problems"]]
    lines += [f"note     {notice}" for notice in d["notices"]]
    dtypes = ", ".join(d["dtypes"])
    lines.append(
        f"weights  {d['file']}: {d['bytes']:,} bytes, {d['tensors']:,} tensors, {d['numbers']:,} numbers in {dtypes}"
    )
    if d.get("fingerprint"):
        lines.append(f"         fingerprint {d['fingerprint']}")
    if model := d.get("model"):
        family = d["family"] or "no family of Hugging Face's"
        lines.append(
            f"model    {family}: {model['num_hidden_layers']} layers, hidden {model['hidden_size']}, vocabulary {model['vocab_size']:,}, "
            f"context {model['max_position_embeddings']:,}"
        )
    if merged := d.get("merged_from"):
        lines.append(
            f"merged   from the chain {merged['chain']}"
            + ("" if merged["unchanged_since"] else ", and changed since then")
        )
    if lora := d.get("lora"):
        lines.append(
            "lora     "
            + ", ".join(
                f"{name} {_plain(value)}" for name, value in lora.items() if value not in ({}, [], False)
            )
        )
    if base := d.get("base"):
        lines.append(f"base     {base['path'] or 'not named'}: {_verdict(base)}")
    if len(d.get("chain", [])) > 2:
        lines.append(f"chain    {' -> '.join(d['chain'])}")
    if layers := d.get("layers"):
        rows = [("layer", "shape", "rank", "scale", "|dW|", "|dW| / |W|")]
        rows += [_row(layer["name"], layer) for layer in layers]
        rows.append(_row("all", {"shape": [], "rank": None, "scale": None, **d["total"]}))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines.append("")
        lines += [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
            for row in rows
        ]
    return lines


def _verdict(base: Description) -> str:
    if not base["found"]:
        return "NOT FOUND" + (f" (fingerprint {base['wanted']})" if base["wanted"] else "")
    if base["matches"] is None:
        return "found; this format does not tell whether it is the one"
    return (
        "matches"
        if base["matches"]
        else f"DOES NOT MATCH (fingerprint {base['fingerprint']}, trained on {base['wanted']})"
    )


def _row(name: str, layer: Description) -> tuple[str, ...]:
    share = layer["relative"]
    numbers = [f"{value:.4g}" if value is not None else "" for value in (layer["scale"], layer["delta_norm"])]
    rank = "" if not layer["shape"] else str(layer["rank"] or "whole")
    return (
        name,
        " x ".join(map(str, layer["shape"])),
        rank,
        *numbers,
        "" if share is None else f"{share:.3%}",
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
