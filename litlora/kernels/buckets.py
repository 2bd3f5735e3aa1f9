"""A few sizes instead of all: for compiled blocks, and on the CPU in bf16, where torch's multiplications
keep code and buffers for every new size until the process ends.

Measured with torch 2.13: 0.6 MB for each number of rows of a matrix multiplication, 8 MB for each
length in the backward of attention. Examples of a hundred lengths would fill a gigabyte.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bucket(size: int, like: Tensor, *, least: int, parts: int) -> int:
    """The size; for bf16 on the CPU, rounded up to a bucket: a multiple of `least`, of larger steps
    for large sizes.

    At most size / parts or least - 1 is added.
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        return size
    step = max(least, 2 ** (size.bit_length() - 1) // parts)
    return -(-size // step) * step


def bucketed(
    input_ids: Tensor,
    lengths: list[int] | None,
    positions: Tensor,
    like: Tensor,
    multiple: int | None = None,
) -> tuple[Tensor, list[int] | None, Tensor]:
    """A batch for `Decoder.forward` whose sizes are buckets: sequences added to a pack, and
    positions added after the batch's own. A model has the dtype and the device of `like`; with
    `multiple`, the sizes are multiples of it, whatever these are.

    No token sees the added sequences, and none is longer than the longest of the pack, so that they
    fit into the context and the windows.
    """

    def spare_of(size: int) -> int:
        whole = (
            bucket(size, like, least=16, parts=32) if multiple is None else -(-size // multiple) * multiple
        )
        return whole - size

    if lengths is not None:
        num_tokens, longest = input_ids.size(1), max(lengths)
        spare = spare_of(num_tokens)
        input_ids = F.pad(input_ids, (0, spare))
        lengths = [*lengths, *(min(longest, spare - start) for start in range(0, spare, longest))]
    return input_ids, lengths, F.pad(positions, (0, spare_of(len(positions))))
