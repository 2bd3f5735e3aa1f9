"""Names of number formats."""

import torch

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
"""The names that a setting may give a number format."""


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without its prefix: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
