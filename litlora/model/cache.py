"""What generation keeps of the tokens seen so far."""

import torch
from torch import Tensor

from litlora.config import ModelConfig


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, G, max_length, D) buffers a
    layer; of a layer with linear attention, its convolution's last inputs (B, W - 1, channels) and
    its state (B, H, K, V) in fp32 or better."""

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
            if config.is_linear(layer):
                self._layers.append(_empty_state(config, batch_size, dtype, device))
                continue
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

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """(last inputs of the convolution, state) of a layer with linear attention."""
        return self._layers[layer]

    def keep(self, layer: int, inputs: Tensor, state: Tensor) -> None:
        """What `past` gives from now on."""
        self._layers[layer] = (inputs, state)


def _empty_state(
    config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(dtype, torch.float32)
    width, dims = (
        config.linear_conv_kernel_dim - 1,
        (config.linear_key_head_dim, config.linear_value_head_dim),
    )
    inputs = torch.zeros(batch_size, width, config.linear_channels, dtype=dtype, device=device)
    return inputs, torch.zeros(batch_size, config.linear_num_value_heads, *dims, dtype=exact, device=device)
