"""A frozen weight that is a tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.frozen.weight import FrozenWeight


class Dense(FrozenWeight):
    """All values of W in memory, in one dtype."""

    differentiable = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        return dy @ self.weight if into is None else into.addmm_(dy, self.weight)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        return self.weight[rows]
