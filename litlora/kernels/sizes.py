"""Few sizes instead of all: on the CPU, torch's bf16 multiplications keep code and buffers for
every new size, for good.

Measured with torch 2.13: 0.6 MB for each number of rows of a matrix multiplication, 8 MB for each
length that attention's backward meets. Examples of a hundred lengths would fill a gigabyte.
"""

import torch
from torch import Tensor


def few(size: int, like: Tensor, *, least: int, parts: int) -> int:
    """The size, or for bf16 on the CPU the next of a few above it: multiples of `least`, of a
    growing step for large ones.

    At most size / parts or least - 1 is added.
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        return size
    step = max(least, 2 ** (size.bit_length() - 1) // parts)
    return -(-size // step) * step
