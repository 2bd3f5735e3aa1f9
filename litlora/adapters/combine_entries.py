"""How adapters are combined, and the part of it that is done entry by entry."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

ELECTING = ("ties", "dare_ties")


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined."""

    weights: list[float]
    """A factor for each adapter, of any sign; one of weight 0 is left out."""
    mode: str = "linear"
    """One of those in `combine.py`."""
    density: float = 1.0
    """Share of an update's entries that magnitude_prune, ties and the dare modes keep."""
    rank: int | None = None
    """Rank of the result; with max_error, the largest that a layer may get."""
    max_error: float | None = None
    """Largest share of an update's norm (Frobenius) that may be lost in a layer."""
    seed: int = 0

    @property
    def elects(self) -> bool:
        """Whether the adapters vote on the sign of each entry."""
        return self.mode in ELECTING


def combine_dense(deltas: list[Tensor], recipe: Recipe, generator: Generator) -> Tensor:
    """The combination of weighted changes of one tensor, entry by entry; equal shapes, fp32 or
    better."""
    density, random = recipe.density, recipe.mode.startswith("dare")
    if density < 1:
        deltas = [
            drop_random(delta, density, generator) if random else trim(delta, density) for delta in deltas
        ]
    total = torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]
    if not recipe.elects:
        return total
    elected, agreed, count = total.sign(), torch.zeros_like(total), torch.zeros_like(total)
    for delta in deltas:
        agrees = delta.sign() == elected
        agreed += delta * agrees
        count += agrees
    return agreed / count.clamp(min=1)


def trim(delta: Tensor, density: float) -> Tensor:
    """The entries of the largest magnitude, a share `density` of them (and any as large as the
    last), the others zero."""
    size = delta.abs()
    keep = max(1, int(density * size.numel()))
    least = size.flatten().kthvalue(size.numel() - keep + 1).values
    return delta * (size >= least)


def drop_random(delta: Tensor, density: float, generator: Generator) -> Tensor:
    """Random entries, each kept with probability `density` and divided by it: the mean over all
    draws is delta."""
    return delta * torch.empty_like(delta).bernoulli_(density, generator=generator) / density
