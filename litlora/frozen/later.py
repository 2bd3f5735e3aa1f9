"""A frozen weight that is computed once it is clear where it goes."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from litlora.frozen.few_bits import Quantized
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.quantize import ToQuantize
from litlora.frozen.quantized import QuantizedWeight
from litlora.frozen.weight import FrozenWeight
from litlora.storage.blocks import LazyTensor
from litlora.storage.pages import Pages


class LateWeight(FrozenWeight):
    """W that no file holds: it is quantised, or an adapter is merged into it. Whoever divides a model
    settles one block at a time, so that the whole is never in memory.

    Until then every use computes it anew.
    """

    def __init__(self, source: LazyTensor) -> None:
        self.source = source

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def is_quantised(self) -> bool:
        return isinstance(self.source, Quantized)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, self.rows().to(x.dtype), bias)

    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        W = self.rows().to(dy.dtype)
        return dy @ W if into is None else into.addmm_(dy, W)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        # A ToQuantize would keep its bits: a copy is asked instead.
        source = replace(self.source) if isinstance(self.source, ToQuantize) else self.source
        return source.rows(rows) if isinstance(source, Quantized) else source.tensor()[rows]


def settle(module: nn.Module) -> dict[str, Quantized]:
    """Compute every late weight in a module, for good; those that were quantised, by their names.
    Raises CheckpointError for values that are not finite."""
    found, pages = {}, Pages()
    for name, linear in list(module.named_modules()):
        if not (isinstance(linear, FrozenLinear) and isinstance(linear.storage, LateWeight)):
            continue
        source = linear.storage.source
        if isinstance(source, Quantized):
            matrix = source.settled()
            found[matrix.name] = matrix
            linear.storage = QuantizedWeight(matrix)
        else:
            module.set_submodule(name, _dense(source.tensor(), linear))
            pages.done_with(*source.sources())
            pages.release()
    return found


def _dense(W: Tensor, like: FrozenLinear) -> nn.Linear:
    linear = nn.Linear(like.in_features, like.out_features, bias=False, device="meta").train(like.training)
    linear.weight = nn.Parameter(W, requires_grad=False)
    linear.bias = like.bias
    return linear
