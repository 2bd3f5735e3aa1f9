"""Adapters of mlx-lm, read: `adapters.safetensors` beside `adapter_config.json`.

    <module>.lora_a (in, r), .lora_b (r, out)      W' = W + scale · (lora_a lora_b)^T
    of an embedding (tokens, r) and (r, width)     W' = W + scale · lora_a lora_b
    of a layer's E experts, <...>.switch_mlp.<module>: (E, r, in) and (E, out, r)
                                                   W' = W + scale · lora_b lora_a of each expert
    <module>.m                                     DoRA: a magnitude for each row of W'

A tied output head computes with the embedding's update, too. The modules have the names of the
Hugging Face model. The scale stands in the config as it is used, not divided by the rank. Here the
adapter becomes what PEFT would store for it.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats import MLX_WEIGHTS_FILE, PEFT_CONFIG_FILE
from litlora.formats.peft import PREFIX
from litlora.lora.variants import MAGNITUDE
from litlora.storage.patterns import ByPattern
from litlora.storage.tensors import open_tensors
from litlora.storage.untrusted import read_json_object

SWITCH = ".switch_mlp."
MIXTRALS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""What mlx-lm calls Mixtral's layers, and what PEFT does."""
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings")
_ANOTHER_WAY = "fuse it with mlx_lm.fuse, and use the model that it writes"


def base_of(directory: Path) -> tuple[str, Path | None]:
    """What the adapter calls its base, and the directory of that name if there is one."""
    name = read_json_object(directory / PEFT_CONFIG_FILE).get("model")
    name = name if isinstance(name, str) else ""
    places = [Path(name), directory / name] if name else []
    return name, next((place for place in places if place.is_dir()), None)


def as_peft(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by PEFT's keys, the settings that decide what they mean). Raises CheckpointError
    for anything but LoRA and DoRA."""
    scale, rank, dropout, is_dora = _settings(directory / PEFT_CONFIG_FILE)
    file = directory / MLX_WEIGHTS_FILE
    tensors: dict[str, Tensor] = {}
    parts = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"} | ({"m": MAGNITUDE} if is_dora else {})
    for key, tensor in open_tensors(file).items():
        module, _, part = key.rpartition(".")
        if part not in parts or not module:
            raise CheckpointError(f"{file}: {key}: only {', '.join(parts)} are supported; {_ANOTHER_WAY}")
        if part == "m":
            tensors[f"{PREFIX}{module}.{MAGNITUDE}"] = tensor
            continue
        is_expert = SWITCH in module and tensor.ndim == 3
        axis = 1 if part == "lora_a" else 2 if is_expert else 0
        if (tensor.ndim != 2 and not is_expert) or tensor.size(axis) != rank:
            raise CheckpointError(
                f"{file}: {key} is {tuple(tensor.shape)}; {PEFT_CONFIG_FILE} says rank {rank}"
            )
        if is_expert:
            tensors |= {
                f"{PREFIX}{name}.{parts[part]}": own
                for name, own in zip(_experts(module, len(tensor)), tensor, strict=True)
            }
        elif module.rpartition(".")[2] in _EMBEDDINGS:  # it is W, not W^T, that it adds lora_a lora_b to
            other = "lora_b" if part == "lora_a" else "lora_a"
            tensors[f"{PREFIX}{module}.{parts[other]}"] = tensor
        else:  # mlx-lm computes x @ lora_a @ lora_b: its factors are PEFT's, transposed
            tensors[f"{PREFIX}{module}.{parts[part]}"] = tensor.T
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "lora_dropout": dropout}
    config |= {"base_model_name_or_path": base_of(directory)[0] or None}
    config |= {"rank_pattern": ByPattern({}), "alpha_pattern": ByPattern({})}
    switches = {"use_rslora": False, "use_dora": is_dora, "lora_bias": False, "ensure_weight_tying": True}
    return tensors, config | switches


def _experts(module: str, count: int) -> list[str]:
    """What PEFT calls the layers of single experts that `switch_mlp` holds as one."""
    place, _, leaf = module.partition(SWITCH)
    leaf = MIXTRALS.get(leaf, leaf) if place.endswith("block_sparse_moe") else leaf
    return [f"{place}.experts.{expert}.{leaf}" for expert in range(count)]


def _settings(path: Path) -> tuple[float, int, float, bool]:
    """The scale, the rank and the dropout that the config states, and whether it is DoRA."""
    config = read_json_object(path)
    if (kind := config.get("fine_tune_type", "lora")) not in ("lora", "dora"):
        raise CheckpointError(
            f"{path}: fine_tune_type {kind!r} is not supported, lora and dora are; {_ANOTHER_WAY}"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{path}: lacks lora_parameters, which state the scale; {_ANOTHER_WAY}")
    if "alpha" in parameters:
        raise CheckpointError(
            f"{path}: lora_parameters states alpha, by which early versions of mlx-lm multiplied the "
            f"scale and later ones do not; {_ANOTHER_WAY}"
        )
    scale, rank, dropout = (parameters.get(name) for name in ("scale", "rank", "dropout"))
    if type(scale) not in (int, float) or not math.isfinite(scale) or scale == 0:
        raise CheckpointError(f"{path}: scale is {scale!r}; it must be a finite number other than 0")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: rank is {rank!r}; it must be a number from 1")
    dropout = float(dropout) if type(dropout) in (int, float) and 0 <= dropout < 1 else 0.0
    return float(scale), rank, dropout, kind == "dora"
