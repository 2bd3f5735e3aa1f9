"""Tensors that hold one part of all experts of a layer, as gpt-oss and others have them in their files."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.frozen.bitsandbytes import Quantized


@dataclass(frozen=True)
class FusedExperts:
    """One tensor of theirs, and the tensors of ours that it consists of. `{}` stands for the number of
    the layer."""

    theirs: str
    """The name of the tensor, (experts, rows, ...)."""
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

    def fill(self, numbers: Iterable[str]) -> "FusedExperts":
        """That of one layer."""
        numbers = list(numbers)
        theirs, experts = self.theirs.format(*numbers), self.experts.format(*numbers)
        return dataclasses.replace(self, theirs=theirs, experts=experts)

    @property
    def ours(self) -> list[str]:
        """The names here, in the order of `split`."""
        return [f"{self.experts}.{n}.{part}" for n in range(self.count) for part in self.parts]

    def split(self, tensor: Tensor | Quantized) -> list[Tensor | Quantized]:
        """Their tensor, as one for each of ours: views. A quantized one is (experts · out, in). Raises
        CheckpointError if its shape does not fit the experts and parts."""
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
        """The inverse of `split`."""
        n = len(self.parts)
        parts = [torch.stack(tensors[part::n]) for part in range(n)]
        joined = torch.stack(parts, dim=2).flatten(1, 2) if self.interleaved else torch.cat(parts, dim=1)
        return joined.transpose(1, 2) if self.transposed and joined.ndim == 3 else joined
