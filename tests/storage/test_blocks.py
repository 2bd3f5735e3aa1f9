"""Tensors in blocks of rows."""

import math

import torch

from litlora.storage import blocks
from litlora.storage.blocks import row_blocks


def test_a_tensor_is_cut_into_blocks_of_limited_size(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    for tensor in (torch.randn(100), torch.randn(50, 3), torch.randn(3, 50).t(), torch.randn(4, 40, 2)):
        found = list(row_blocks(tensor))
        assert torch.equal(torch.cat([block.reshape(-1) for block in found]), tensor.reshape(-1))
        assert max(math.prod(block.shape) for block in found) <= 16
