"""Adapter folders of mlx-lm, written; see mlx.py.

mlx-lm has one rank and one scale: a smaller rank is filled up with zeros, and another scale goes into
lora_b. What has an adapter there has one in whole: an expert without an update gets zeros.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats import MLX_WEIGHTS_FILE, PEFT_CONFIG_FILE
from litlora.formats.layout import Layout, layout
from litlora.formats.mlx import MIXTRALS, SWITCH
from litlora.formats.peft_export import join, magnitude
from litlora.lora import Adapter
from litlora.lora.variants import MAGNITUDE, variant_named
from litlora.storage.tensors import write_safetensors

_LAYER = re.compile(r"model\.layers\.\d+\.(?P<inside>.+)")
_EXPERT = re.compile(r"(?P<place>.+)\.experts\.(?P<number>\d+)\.(?P<leaf>\w+)")
_FROM_MIXTRAL = {theirs: leaf for leaf, theirs in MIXTRALS.items()}
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_ANOTHER_WAY = "merge the adapter and convert the merged model with mlx_lm.convert"

Factors = tuple[int, float, Tensor, Tensor]
"""Rank, scale, A and B of one module, as `join` returns them."""


def to_mlx(
    adapter: Adapter, model_type: str, model: ModelConfig, base: Mapping[str, Tensor], base_name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by mlx-lm's keys, adapter_config.json) of an adapter.

    `model_type` is the Hugging Face family of the base, which `model` and `base` describe and the
    folder will call `base_name`. Raises CheckpointError for what mlx-lm cannot hold.
    """
    names = layout(model_type, model)
    _check(adapter, model, names)
    updates = dict(adapter.updates)
    if model.tie_word_embeddings:
        updates.pop(_HEAD, None)  # there, the embedding's update is the head's, too
    rules = {rule.theirs: rule for rule in map(names.to_theirs, updates)}
    found = {name: join(rule, adapter, base) for name, rule in rules.items()}
    rank = max(factors[0] for factors in found.values())
    scale = Counter(factors[1] for factors in found.values()).most_common(1)[0][0]
    stored: dict[str, Tensor] = {}
    experts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for name, factors in found.items():
        A, B = _brought_to(factors, rank, scale)
        if expert := _EXPERT.fullmatch(name):
            leaf = _FROM_MIXTRAL.get(expert["leaf"], expert["leaf"])
            experts.setdefault(f"{expert['place']}{SWITCH}{leaf}", {})[int(expert["number"])] = A, B
        elif name == _EMBEDDING:
            stored |= {f"{name}.lora_a": B.contiguous(), f"{name}.lora_b": A.contiguous()}
        else:
            stored |= {f"{name}.lora_a": A.T.contiguous(), f"{name}.lora_b": B.T.contiguous()}
        if adapter.config.variant == "dora":
            stored[f"{name}.m"] = magnitude(rules[name], adapter, base)
    for name, pairs in experts.items():
        for part, tensors in zip(("lora_a", "lora_b"), zip(*pairs.values(), strict=True), strict=True):
            stored[f"{name}.{part}"] = _stacked(dict(zip(pairs, tensors, strict=True)), model.num_experts)
    modules = {key.rpartition(".")[0] for key in stored}
    keys = sorted({match["inside"] if (match := _LAYER.fullmatch(name)) else name for name in modules})
    parameters = {"rank": rank, "scale": scale, "dropout": adapter.config.dropout, "keys": keys}
    return stored, {
        "model": base_name,
        "fine_tune_type": adapter.config.variant,
        "num_layers": model.num_hidden_layers,
        "lora_parameters": parameters,
    }


def _check(adapter: Adapter, model: ModelConfig, names: Layout) -> None:
    """Raise CheckpointError for what an MLX folder cannot hold."""
    variant = adapter.config.variant
    if not (variant_named(variant).is_plain or variant == "dora"):
        raise CheckpointError(f"an MLX folder cannot hold the variant {variant}; {_ANOTHER_WAY}")
    for name in [*adapter.whole, *adapter.updates]:
        theirs = names.to_theirs(name).theirs
        held = theirs in (_EMBEDDING, _HEAD) or _LAYER.fullmatch(theirs)
        if name in adapter.whole or not held or adapter.updates[name].extra.keys() - {MAGNITUDE}:
            raise CheckpointError(
                f"{name}: an MLX folder holds only LoRA and DoRA of the layers of model.layers, of the "
                f"embedding and of the output head; {_ANOTHER_WAY}"
            )
        if name.endswith(".kv_b_proj") or (names.fused and _EXPERT.fullmatch(name)):
            raise CheckpointError(f"{name}: what mlx-lm calls it is not known here; {_ANOTHER_WAY}")
        if variant == "dora" and _EXPERT.fullmatch(name):
            raise CheckpointError(f"{name}: mlx-lm has no DoRA of experts; {_ANOTHER_WAY}")
    if model.tie_word_embeddings:
        ends = [adapter.updates.get(name) for name in (_EMBEDDING, _HEAD)]
        if any(ends) and not (all(ends) and _are_same(*ends)):
            raise CheckpointError(
                f"{_EMBEDDING if ends[0] else _HEAD}: with mlx-lm, the output head of this base has the "
                f"embedding's update, which here is another; {_ANOTHER_WAY}"
            )


def _are_same(*updates: Any) -> bool:
    one, other = (update.tensors() for update in updates)
    return (
        updates[0].scale == updates[1].scale
        and one.keys() == other.keys()
        and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    )


def _brought_to(factors: Factors, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) that mean the same at this rank and scale."""
    own_rank, own_scale, A, B = factors
    B = B if own_scale == scale else (B.double() * (own_scale / scale)).to(B.dtype)
    more = rank - own_rank
    return torch.cat([A, A.new_zeros(more, A.size(1))]), torch.cat([B, B.new_zeros(B.size(0), more)], 1)


def _stacked(parts: dict[int, Tensor], count: int) -> Tensor:
    """(experts, ...), with zeros for those that have no part."""
    nothing = torch.zeros_like(next(iter(parts.values())))
    return torch.stack([parts.get(expert, nothing) for expert in range(count)])


def write_mlx(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the two files of an MLX folder."""
    write_safetensors(directory / MLX_WEIGHTS_FILE, tensors)
    (directory / PEFT_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
