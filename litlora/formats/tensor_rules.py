"""Rules for single tensors of Hugging Face's files, where a rule for a module (layout.py) does not do:
a tensor that holds one part of all experts of a layer, and one that has an axis more than ours.

`{}` stands for the number of a layer, and of an expert.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.frozen.few_bits import Quantized


class TensorRule(ABC):
    """One tensor of theirs, and the tensors of ours that it consists of."""

    theirs: str
    """The name of the tensor."""
    is_optional = False

    @property
    @abstractmethod
    def forms(self) -> list[str]:
        """The forms of our names."""

    @abstractmethod
    def fill(self, numbers: Iterable[str]) -> "TensorRule":
        """The rule of one layer."""

    @property
    @abstractmethod
    def ours(self) -> list[str]:
        """The names here, in the order of `split`."""

    @abstractmethod
    def split(self, tensor: Tensor | Quantized) -> list[Tensor | Quantized]:
        """Their tensor, as one for each of ours: views. Raises CheckpointError if its shape does not
        fit."""

    @abstractmethod
    def join(self, tensors: list[Tensor]) -> Tensor:
        """The inverse of `split`."""


@dataclass(frozen=True)
class Row(TensorRule):
    """A tensor (1, n) of theirs, here (n,)."""

    theirs: str
    name: str

    @property
    def forms(self) -> list[str]:
        return [self.name]

    def fill(self, numbers: Iterable[str]) -> "Row":
        numbers = list(numbers)
        return Row(self.theirs.format(*numbers), self.name.format(*numbers))

    @property
    def ours(self) -> list[str]:
        return [self.name]

    def split(self, tensor: Tensor | Quantized) -> list[Tensor | Quantized]:
        if isinstance(tensor, Quantized) or tensor.ndim != 2 or tensor.size(0) != 1:
            raise CheckpointError(f"{self.theirs} has shape {tuple(tensor.shape)}; it must be one row")
        return [tensor[0]]

    def join(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0][None]


@dataclass(frozen=True)
class FusedExperts(TensorRule):
    """A tensor (experts, rows, ...) that holds one part of all experts of a layer."""

    theirs: str
    experts: str
    """What the layer's experts are called here."""
    parts: tuple[str, ...]
    """The tensors of one expert that share the rows, equally: `gate_proj.weight`."""
    count: int
    """Of experts."""
    interleaved: bool = False
    """The rows of the parts take turns. Otherwise they are concatenated."""
    transposed: bool = False
    """A matrix is stored as (in, out)."""
    is_marked: bool = True
    """transformers says so of the class. PEFT takes a tensor of another class for (out, in), as it
    lies: A and B change places in its files."""
    is_optional: bool = False
    """Files may have the layers of each expert by themselves instead, as transformers writes them."""

    @property
    def forms(self) -> list[str]:
        return [f"{self.experts}.{{}}.{part}" for part in self.parts]

    def fill(self, numbers: Iterable[str]) -> "FusedExperts":
        numbers = list(numbers)
        theirs, experts = self.theirs.format(*numbers), self.experts.format(*numbers)
        return dataclasses.replace(self, theirs=theirs, experts=experts)

    @property
    def ours(self) -> list[str]:
        return [f"{self.experts}.{n}.{part}" for n in range(self.count) for part in self.parts]

    def split(self, tensor: Tensor | Quantized) -> list[Tensor | Quantized]:
        # A quantized one is (experts · out, in).
        if isinstance(tensor, Quantized):
            return [tensor.take(rows) for rows in self._split(torch.arange(tensor.size(0)))]
        return self._split(tensor.transpose(1, 2) if self.transposed and tensor.ndim == 3 else tensor)

    def _split(self, tensor: Tensor) -> list[Tensor]:
        """As `split`, of rows (experts, rows, ...), or of the numbers of all rows."""
        share = self.count * len(self.parts)
        rows = tensor.numel() if tensor.ndim == 1 else tensor.shape[:2].numel()
        if rows == 0 or rows % share or (tensor.ndim > 1 and tensor.size(0) != self.count):
            raise CheckpointError(
                f"{self.theirs} has shape {tuple(tensor.shape)}, which does not divide into {self.count} "
                f"experts of {len(self.parts)} parts"
            )
        each = tensor.view(self.count, -1) if tensor.ndim == 1 else tensor
        n = len(self.parts)
        parts = [each[:, part::n] for part in range(n)] if self.interleaved else each.chunk(n, dim=1)
        return [part[expert] for expert in range(self.count) for part in parts]

    def join(self, tensors: list[Tensor]) -> Tensor:
        n = len(self.parts)
        parts = [torch.stack(tensors[part::n]) for part in range(n)]
        joined = torch.stack(parts, dim=2).flatten(1, 2) if self.interleaved else torch.cat(parts, dim=1)
        return joined.transpose(1, 2) if self.transposed and joined.ndim == 3 else joined
