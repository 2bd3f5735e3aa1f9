"""A linear layer whose weight is a `FrozenWeight`."""

from torch import Tensor, nn

from litlora.frozen.dense import Dense
from litlora.frozen.weight import FrozenWeight
from litlora.kernels import cpu
from litlora.kernels.lora import times


class FrozenLinear(nn.Module):
    """x Wᵀ + b for any storage of W, in place of an `nn.Linear`. W does not train."""

    def __init__(self, storage: FrozenWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.storage = storage
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._part: cpu.Part | None = None

    @property
    def out_features(self) -> int:
        return self.storage.shape[0]

    @property
    def in_features(self) -> int:
        return self.storage.shape[1]

    @property
    def weight(self) -> Tensor:
        """The exact values of W, (out, in), read anew each time."""
        return self.storage.rows()

    @property
    def part(self) -> cpu.Part | None:
        """The layer for compiled code; None where there is none."""
        compiled = self.storage.compiled
        if compiled is None or (self.bias is not None and self.bias.requires_grad):
            return None
        if self._part is None or self._part.weight is not compiled:
            self._part = cpu.Part(compiled, self.storage.compiled_for, self.bias)
            self._part.around = self.storage.around
        return self._part

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None and self.bias.requires_grad:  # `times` gives it no gradient
            return times(x, self.storage) + self.bias.to(x.dtype)
        return times(x, self.storage, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


LINEAR = (nn.Linear, FrozenLinear)
"""The linear layers that can have an adapter."""


def stored_weights(model: nn.Module) -> dict[str, FrozenWeight]:
    """The weights of a model that are not parameters, by their names; one that two modules share has
    the name of the first."""
    found: dict[str, FrozenWeight] = {}
    for name, module in model.named_modules():
        storage = getattr(module, "storage", None)
        if isinstance(storage, FrozenWeight) and not any(storage is other for other in found.values()):
            found[f"{name}.weight"] = storage
    return found


def frozen_weight(linear: nn.Linear | FrozenLinear) -> FrozenWeight:
    """The weight of a linear layer, seen as frozen."""
    return linear.storage if isinstance(linear, FrozenLinear) else Dense(linear.weight)
