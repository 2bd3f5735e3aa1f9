"""Adapters of mlx-lm, read: `adapters.safetensors` beside `adapter_config.json`.

    <module>.lora_a (in, r), .lora_b (r, out);   W' = W + scale · (lora_a lora_b)^T

The modules have the names of the Hugging Face model. The scale stands in the config as it is used,
not divided by the rank. Here the adapter becomes what PEFT would store for it.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats import MLX_WEIGHTS_FILE, PEFT_CONFIG_FILE
from litlora.formats.peft import PREFIX
from litlora.storage.patterns import ByPattern
from litlora.storage.tensors import open_tensors
from litlora.storage.untrusted import read_json_object

_ANOTHER_WAY = "fuse it with mlx_lm.fuse, and use the model that it writes"


def base_of(directory: Path) -> tuple[str, Path | None]:
    """What the adapter calls its base, and the directory of that name if there is one."""
    name = read_json_object(directory / PEFT_CONFIG_FILE).get("model")
    name = name if isinstance(name, str) else ""
    places = [Path(name), directory / name] if name else []
    return name, next((place for place in places if place.is_dir()), None)


def as_peft(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by PEFT's keys, the settings that decide what they mean). Raises CheckpointError
    for anything but LoRA of linear layers."""
    scale, rank, dropout = _settings(directory / PEFT_CONFIG_FILE)
    file = directory / MLX_WEIGHTS_FILE
    tensors = {}
    for key, tensor in open_tensors(file).items():
        module, _, part = key.rpartition(".")
        if part not in ("lora_a", "lora_b") or not module:
            raise CheckpointError(f"{file}: {key}: only lora_a and lora_b are supported; {_ANOTHER_WAY}")
        if tensor.ndim != 2 or "embed" in module.rpartition(".")[2] or module.endswith(".wte"):
            raise CheckpointError(
                f"{file}: {key}: only adapters of linear layers are supported, not those of embeddings and "
                f"experts; {_ANOTHER_WAY}"
            )
        if tensor.size(1 if part == "lora_a" else 0) != rank:
            raise CheckpointError(
                f"{file}: {key} is {tuple(tensor.shape)}; {PEFT_CONFIG_FILE} says rank {rank}"
            )
        # mlx-lm computes x @ lora_a @ lora_b: its factors are PEFT's, transposed
        tensors[f"{PREFIX}{module}.lora_{part[-1].upper()}.weight"] = tensor.T
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "lora_dropout": dropout}
    config |= {"base_model_name_or_path": base_of(directory)[0] or None}
    config |= {"rank_pattern": ByPattern({}), "alpha_pattern": ByPattern({})}
    switches = ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
    return tensors, config | dict.fromkeys(switches, False)


def _settings(path: Path) -> tuple[float, int, float]:
    """The scale, the rank and the dropout that the config states."""
    config = read_json_object(path)
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise CheckpointError(f"{path}: fine_tune_type {kind!r} is not supported, lora is; {_ANOTHER_WAY}")
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
    return float(scale), rank, float(dropout) if type(dropout) in (int, float) and 0 <= dropout < 1 else 0.0
