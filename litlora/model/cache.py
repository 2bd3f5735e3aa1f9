"""What generation keeps of the tokens seen so far."""

from collections.abc import Sequence

import torch
from torch import Tensor

from litlora.config import ModelConfig

LEAST_ROOM = 256
"""Tokens for which a cache takes memory at first, if it may hold so many."""


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, G, S, D) buffers a layer, which grow
    up to max_length; of a layer with linear attention, its convolution's last inputs
    (B, W - 1, channels) and its state (B, H, K, V) in fp32 or better."""

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
        self.max_length = max_length
        self._layers = []
        for layer in range(config.num_hidden_layers):
            if config.is_linear(layer):
                self._layers.append(_empty_state(config, batch_size, dtype, device))
                continue
            heads, key_dim, value_dim = config.cached(layer)
            pair = ((batch_size, heads, 0, dim) for dim in (key_dim, value_dim))
            self._layers.append(tuple(torch.empty(shape, dtype=dtype, device=device) for shape in pair))

    @property
    def room(self) -> int:
        """Tokens that it has taken memory for; 0 of a model without any attention but the linear."""
        return max((part[0].size(2) for part in self._layers if part[0].ndim == 4), default=0)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, D) of new tokens after those held; returns all, (B, G, length + T,
        D)."""
        end = self.length + k.size(2)
        keys, values = self.memory(layer, end)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def memory(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Where the keys and values of a layer lie, (B, G, S, D), with room for `end` tokens."""
        if end > self._layers[layer][0].size(2):
            self._grow(layer, end)
        return self._layers[layer]

    def _grow(self, layer: int, end: int) -> None:
        room = min(self.max_length, max(end, 2 * self._layers[layer][0].size(2), LEAST_ROOM))
        assert end <= room, f"{end} tokens in a cache for {self.max_length}"
        self._layers[layer] = tuple(_held(part, self.length, room) for part in self._layers[layer])

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """(last inputs of the convolution, state) of a layer with linear attention."""
        return self._layers[layer]

    def keep(self, layer: int, inputs: Tensor, state: Tensor) -> None:
        """What `past` gives from now on."""
        self._layers[layer] = (inputs, state)

    def advance(self, count: int) -> None:
        """All layers have got so many more tokens."""
        self.length += count

    def beginning(self, length: int, max_length: int) -> "KVCache":
        """A cache of its own with the first `length` tokens of this one, for up to max_length; not of
        a model with linear attention, whose state cannot go back."""
        begun = object.__new__(KVCache)
        begun.length, begun.max_length = length, max_length
        room = min(max_length, length + LEAST_ROOM)
        # A layer that shares another's keys holds none.
        begun._layers = [
            tuple(_held(part, length, room) if part.size(2) else part for part in pair)
            for pair in self._layers
        ]
        return begun


class CacheBatch:
    """The caches of several sequences, each of which gets one more token: B sequences, T = 1."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = caches

    @property
    def lengths(self) -> list[int]:
        """Tokens held of each sequence; its next one gets this position."""
        return [cache.length for cache in self.caches]

    def append(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Store k, v (B, G, 1, D), one token a sequence; returns all of each, (1, G, length + 1, D)."""
        rows = zip(self.caches, k.split(1), v.split(1), strict=True)
        return [cache.append(layer, *row) for cache, *row in rows]

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """As `KVCache.past`."""
        inputs, states = zip(*(cache.past(layer) for cache in self.caches), strict=True)
        return torch.cat(inputs), torch.cat(states)

    def keep(self, layer: int, inputs: Tensor, state: Tensor) -> None:
        """As `KVCache.keep`."""
        for cache, *row in zip(self.caches, inputs.split(1), state.split(1), strict=True):
            cache.keep(layer, *row)

    def advance(self, count: int) -> None:
        """As `KVCache.advance`."""
        for cache in self.caches:
            cache.advance(count)


class StaticCache:
    """Keys and values of B sequences in memory that never moves, each of which gets one more token at a
    time: B rows of S tokens, and on the device how many each holds. Nothing that a step computes with
    it depends on a number that the host must know, so that a device can be given steps ahead, and a
    compiled step recorded once (CUDA graphs). Not for linear attention."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        room: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.room = room
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """(B,): tokens held of each sequence; its next one gets this position."""
        self._active = torch.zeros_like(self.lengths)
        self._rows = torch.arange(batch_size, device=device) * room
        self._places = torch.arange(room, device=device)
        self._layers = []
        for layer in range(config.num_hidden_layers):
            heads, *dims = config.cached(layer)
            shapes = [(batch_size, room, heads, dim) for dim in dims]
            self._layers.append(tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    def tensors(self) -> list[Tensor]:
        """All whose memory stays."""
        return [
            self.lengths,
            self._active,
            self._rows,
            self._places,
            *(part for pair in self._layers for part in pair),
        ]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, 1, D), one token a sequence; returns all rows whole, (B, G, S, D)."""
        index = self._rows + self.lengths
        for part, new in zip(self._layers[layer], (k, v), strict=True):
            part.flatten(0, 1).index_copy_(0, index, new[:, :, 0])
        keys, values = self._layers[layer]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def mask(self, window: int | None, chunk: int | None) -> Tensor:
        """(B, 1, 1, S): what the next token of each sequence sees, itself included: all, those in the
        window, or those of its chunk."""
        last = self.lengths[:, None]
        seen = self._places <= last
        if window is not None:
            seen = seen & (self._places > last - window)
        if chunk is not None:
            seen = seen & (self._places >= last // chunk * chunk)
        return seen[:, None, None]

    def advance(self, count: int) -> None:
        """As `KVCache.advance`; the rows of no sequence stay."""
        self.lengths += count * self._active

    def take(self, row: int, cache: KVCache) -> None:
        """Let a row hold what a cache does."""
        self.lengths[row], self._active[row] = cache.length, 1
        for pair, held in zip(self._layers, cache._layers, strict=True):
            for part, tokens in zip(pair, held, strict=True):
                if part.numel():  # a layer may share the keys of another one, or keep no values
                    part[row, : cache.length] = tokens[0, :, : cache.length].transpose(0, 1)
                    # What is not seen is multiplied by 0: it must not be an earlier sequence's NaN.
                    part[row, cache.length :] = 0

    def free(self, row: int) -> None:
        """A row is no sequence's any more."""
        self.lengths[row] = self._active[row] = 0

    def give(self, row: int, cache: KVCache, length: int) -> None:
        """Let a cache hold the first `length` tokens of a row, of which it has the beginning."""
        first, layers = cache.length, self._layers
        for layer, pair in enumerate(layers):
            if length > first and pair[0].size(2):
                cache.append(layer, *(part[row, first:length].transpose(0, 1)[None] for part in pair))
        cache.length = max(first, length)


Cache = KVCache | CacheBatch | StaticCache


def _held(part: Tensor, length: int, room: int) -> Tensor:
    """The first `length` tokens of keys or values, with room for so many in all."""
    grown = part.new_empty(*part.shape[:2], room, part.size(3))
    grown[:, :, :length] = part[:, :, :length]
    return grown


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
