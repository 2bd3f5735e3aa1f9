"""Which merge of an adapter fits the model that was trained best: the one into its base as it was
quantised for the training, or the one into the base as it is stored?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litlora.adapters.merge import MergedTensor, Plan
from litlora.adapters.unmerged import Unmerged
from litlora.adapters.verify import compared, live_model, logits
from litlora.transformers_config import Architecture


@dataclass(frozen=True)
class Fit:
    """How a merged model differs from the one that was trained, its adapters live."""

    max_difference: float
    """Of two logits."""
    kl: float
    """Of the merged predictions from the live ones, nats a token."""
    agreement: float
    """Share of positions at which both put the same token first."""


@dataclass(frozen=True)
class Rounded:
    """The values of a tensor of a plan, as a file would hold them, some rows at a time."""

    tensor: MergedTensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor.exact(rows).to(self.dtype)


def fits(
    trained: Plan, candidates: Mapping[str, Plan], config: Architecture, ids: Tensor, unmerged: Unmerged
) -> dict[str, Fit]:
    """How each of the merges, rounded to the nearest, fits the model that was trained: the logits of
    ids (1, T). `config` is that of the merges; `unmerged` as for `verify`."""
    live = logits(*live_model(trained, config, unmerged), ids)
    found = {}
    for name, plan in candidates.items():
        merged = {
            key: replace(tensor, start=Rounded(tensor), own=tensor.dtype, links=())
            for key, tensor in plan.items()
        }
        columns = zip(*map(compared, live, logits(*live_model(merged, config), ids)), strict=True)
        _, _, largest, kl, agreement = (torch.tensor(column, dtype=torch.float64) for column in columns)
        found[name] = Fit(largest.max().item(), max(0.0, kl.mean().item()), agreement.mean().item())
    return found


def lines_of(found: Mapping[str, Fit], written: str) -> list[str]:
    """A line for each merge, and which fits better."""
    best = min(found, key=lambda name: (found[name].kl, found[name].max_difference))
    shown = [
        f"onto {name}{' (written)' if name == written else ''}: beside the model that was trained, largest "
        f"difference of two logits {fit.max_difference:.2g}, KL {fit.kl:.1e} nats, same first choice "
        f"{fit.agreement:.1%}"
        for name, fit in found.items()
    ]
    return [*shown, f"the merge onto {best} fits the model that was trained better"]
