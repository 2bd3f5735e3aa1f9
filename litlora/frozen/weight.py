"""The frozen weight of a linear layer, whatever it is stored in."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from litlora.kernels import cpu


class FrozenWeight(ABC):
    """W (out, in). Whatever trains an adapter reads W through these methods and in no other way.

    To add a storage, subclass this in a file of its own and put it into a model:
    `model.set_submodule(name, FrozenLinear(storage, bias))`. A storage that holds tensors is an
    `nn.Module` with buffers as well, so that they follow the model to its device and into its
    `state_dict`.
    """

    compiled: "cpu.Compiled | None" = None
    """The code that reads it as it is stored, on a CPU; None where there is none."""

    around: "tuple[Callable[[], None], Callable[[], None]] | None" = None
    """What that code must call before and after it reads the weight."""

    differentiable = False
    """Whether autograd can follow `times` to x by itself, and cheaply. Otherwise it uses `back`."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(out, in)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the exact values."""

    @property
    def compiled_for(self) -> tuple[torch.dtype, ...]:
        """The dtypes of x for which `compiled` computes what `times` does."""
        return (self.dtype,)

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b for x (..., in): a new tensor (..., out), contiguous, of the dtype of x."""

    def times_shared(self, x: Tensor, bias: Tensor | None, made: dict[str, Any]) -> Tensor:
        """As `times`, for one of several weights that x is multiplied by: `made`, empty at first, keeps
        for the others what was computed of x alone. It belongs to this x."""
        return self.times(x, bias)

    @abstractmethod
    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        """dy W for dy (N, out): (N, in), of the dtype of dy. Added in place to `into`, if given."""

    @abstractmethod
    def rows(self, rows: slice = slice(None)) -> Tensor:
        """The exact values of these rows of W, (n, in)."""
