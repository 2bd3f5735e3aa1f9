"""The names of dtypes: those that options take, and the one that is shown."""

import torch

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
"""What an option for a number format may say."""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as files and messages name it: bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
