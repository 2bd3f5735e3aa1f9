"""Write the files beside this one with bitsandbytes' own code: random weights in 4 and 8 bits, and
what it dequantises them to.

bitsandbytes is an extra of litlora that its tests do not need:

    pip install -c constraints.txt -e '.[test,bitsandbytes]'
    python tests/bitsandbytes_files/make.py

stored.safetensors holds layers as transformers saves them with `load_in_4bit` and `load_in_8bit`;
expected.safetensors holds their values. Written with bitsandbytes 0.50.2.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
CASES = {
    "nf4": {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True},
    "nf4_float16": {"quant_type": "nf4", "blocksize": 128, "dtype": torch.float16},
    "nf4_in_bfloat16": {
        "quant_type": "nf4",
        "blocksize": 64,
        "compress_statistics": True,
        "quant_storage": torch.bfloat16,
    },
    "fp4": {"quant_type": "fp4", "blocksize": 64},
    "fp4_float32": {
        "quant_type": "fp4",
        "blocksize": 256,
        "compress_statistics": True,
        "dtype": torch.float32,
    },
}


def quantized_4bit(name: str, weight: Tensor, **options: object) -> dict[str, Tensor]:
    """The tensors of a layer in 4 bits, as Linear4bit saves them."""
    packed, state = bnb.quantize_4bit(weight, **options)
    return {
        f"{name}.weight": packed,
        **{f"{name}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()},
    }


def dequantized_4bit(name: str, stored: dict[str, Tensor]) -> Tensor:
    """The layer's values, computed as one long row: the CPU kernel of 0.50 is wrong where a row
    ends within a block."""
    parts = {
        key.removeprefix(f"{name}.weight."): tensor
        for key, tensor in stored.items()
        if key.startswith(f"{name}.weight.")
    }
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return bnb.dequantize_4bit(stored[f"{name}.weight"], state).reshape(shape)


def quantized_8bit(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer in 8 bits, as Linear8bitLt saves them."""
    entries, largest, _ = bnb.int8_vectorwise_quant(weight)
    return {
        f"{name}.weight": entries,
        f"{name}.SCB": largest,
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def main() -> None:
    torch.manual_seed(0)
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, options in CASES.items():
        weight = torch.randn(48, 80).to(options.pop("dtype", torch.bfloat16))
        stored |= quantized_4bit(name, weight, **options)
        expected[name] = dequantized_4bit(name, stored)
    stored |= quantized_8bit("int8", torch.randn(24, 40).half())
    expected["int8"] = bnb.int8_vectorwise_dequant(stored["int8.weight"], stored["int8.SCB"]).bfloat16()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, HERE / "stored.safetensors")
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
