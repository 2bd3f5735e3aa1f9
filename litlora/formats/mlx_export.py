"""Adapter folders of mlx-lm, written from what a PEFT folder would hold; see mlx.py."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats import MLX_WEIGHTS_FILE, PEFT_CONFIG_FILE
from litlora.formats.peft import PREFIX
from litlora.lora.update import scale_of
from litlora.storage.tensors import write_safetensors

_LAYER = re.compile(r"model\.layers\.\d+\.(?P<inside>.+)")


def to_mlx(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], num_layers: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by mlx-lm's keys, adapter_config.json) of an adapter that `to_peft` gave.

    mlx-lm has one rank and one scale: a smaller rank is filled up with zeros, and another scale
    goes into lora_b. Raises CheckpointError for what it cannot hold.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(PREFIX))
        name = found[1] if found else key.removeprefix(PREFIX)
        if not found or ".experts" in name or not (name == "lm_head" or _LAYER.fullmatch(name)):
            raise CheckpointError(
                f"{name}: an MLX folder holds only LoRA of linear layers of model.layers and of the output "
                "head; merge the adapter and convert the merged model with mlx_lm.convert"
            )
        factors.setdefault(name, {})[found[2]] = tensor
    ranks = {name: pair["A"].size(0) for name, pair in factors.items()}
    alphas = {name: _alpha(name, config) for name in factors}
    scales = {name: scale_of(alphas[name], ranks[name], rslora=config["use_rslora"]) for name in factors}
    rank, scale = max(ranks.values()), Counter(scales.values()).most_common(1)[0][0]
    stored = {}
    for name, pair in factors.items():
        share = scales[name] / scale
        B = pair["B"] if share == 1 else (pair["B"].double() * share).to(pair["B"].dtype)
        stored[f"{name}.lora_a"] = _filled(pair["A"], rank).T.contiguous()
        stored[f"{name}.lora_b"] = _filled(B.T, rank).contiguous()
    found = [_LAYER.fullmatch(name) for name in factors]
    keys = sorted({match["inside"] if match else "lm_head" for match in found})
    parameters = {"rank": rank, "scale": scale, "dropout": config["lora_dropout"], "keys": keys}
    return stored, {
        "model": config["base_model_name_or_path"],
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters,
    }


def _alpha(name: str, config: Mapping[str, Any]) -> float:
    """The alpha of a layer, which `to_peft` may have named by its weight."""
    pattern = config["alpha_pattern"]
    return pattern.get(name, pattern.get(f"{name}.weight", config["lora_alpha"]))


def _filled(rows: Tensor, rank: int) -> Tensor:
    """(r, n) with zeros below, up to `rank` rows."""
    return torch.cat([rows, rows.new_zeros(rank - rows.size(0), rows.size(1))])


def write_mlx(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the two files of an MLX folder."""
    write_safetensors(directory / MLX_WEIGHTS_FILE, tensors)
    (directory / PEFT_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
