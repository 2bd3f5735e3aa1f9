"""Quantizes a Hugging Face folder to 4 or 8 bits in the layout of bitsandbytes, but without it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora.frozen.bitsandbytes import TABLES

Parts = tuple[dict[str, Tensor], Tensor]
"""The parts of a weight in a file, by the end of their names, and the values that they stand
for."""


def as_json(values: dict[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def four_bit(weight: Tensor, kind: str, *, nested: bool, blocksize: int = 64) -> Parts:
    """Each value becomes the nearest entry of the table, times the largest magnitude of its
    block."""
    table = torch.tensor(TABLES[kind])
    flat = weight.float().flatten()
    blocks = torch.cat([flat, flat.new_zeros(-len(flat) % blocksize)]).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts = {"quant_map": table, "absmax": absmax}
    if nested:
        offset, levels = absmax.mean().item(), torch.linspace(-1, 1, 256)
        rest = absmax - offset
        outer = torch.stack([part.abs().max() for part in rest.split(256)])
        bytes_ = ((rest / outer.repeat_interleave(256)[: len(rest)])[:, None] - levels).abs().argmin(1)
        absmax = levels[bytes_] * outer.repeat_interleave(256)[: len(rest)] + offset
        parts |= {"absmax": bytes_.to(torch.uint8), "nested_absmax": outer, "nested_quant_map": levels}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    entries = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1)
    values = (table[entries] * absmax[:, None]).flatten()[: len(flat)].view(weight.shape)
    pairs = entries.flatten()[: len(flat) + len(flat) % 2].view(-1, 2)
    found = {f".weight.{part}": tensor for part, tensor in parts.items()} | {
        f".weight.quant_state.bitsandbytes__{kind}": as_json(state)
    }
    return found | {".weight": (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None]}, values.bfloat16()


def eight_bit(weight: Tensor) -> Parts:
    largest = weight.float().abs().amax(1)
    entries = (weight.float() * 127 / largest[:, None]).round().to(torch.int8)
    values = (entries * largest[:, None] * (1 / 127)).bfloat16()
    return {
        ".weight": entries,
        ".SCB": largest,
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
    }, values


def quantize_folder(directory: Path, kind: str, *, nested: bool = False) -> dict[str, Tensor]:
    """Quantize every matrix of every layer in place. Returns the dequantised tensors in bf16."""
    file, config = directory / "model.safetensors", json.loads((directory / "config.json").read_text())
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        tensor = tensor.bfloat16()
        if tensor.ndim == 2 and (".layers." in name or ".h." in name) and "norm" not in name:
            transposed = config["model_type"] == "gpt2"  # whose Conv1D layers become Linear ones
            weight = tensor.t() if transposed else tensor
            parts, found = eight_bit(weight) if kind == "int8" else four_bit(weight, kind, nested=nested)
            stored |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
            values[name] = found.t().contiguous() if transposed else found
        else:
            stored[name] = values[name] = tensor
    save_file(stored, file, {"format": "pt"})
    by = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": kind,
    }
    (directory / "config.json").write_text(
        json.dumps(config | {"quantization_config": by, "dtype": "bfloat16"})
    )
    return values
