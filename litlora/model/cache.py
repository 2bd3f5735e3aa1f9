"""What generation keeps of the tokens seen so far."""

import torch
from torch import Tensor

from litlora.config import ModelConfig


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, G, max_length, D) buffers a
    layer."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.length = 0
        """Tokens held; the next one gets this position."""
        self._layers = []
        for layer in range(config.num_hidden_layers):
            heads, key_dim, value_dim = config.cached(layer)
            pair = ((batch_size, heads, max_length, dim) for dim in (key_dim, value_dim))
            self._layers.append(tuple(torch.empty(shape, dtype=dtype, device=device) for shape in pair))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, D) of new tokens after those held; returns all, (B, G, length + T,
        D)."""
        end = self.length + k.size(2)
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]
