"""Rows of added tokens, which train while the rest of the embedding and of the output head is frozen.

An adapter stores these rows alone. Its base has a place for them at most (embeddings are often
padded); else they make the embedding larger.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.errors import CheckpointError

LEAF = "token_rows"
"""What the rows are called in a module and in a file, behind the module's name."""


@dataclass(frozen=True)
class TokenRows:
    """The rows of some tokens, in the weights that have a row for each token."""

    ids: tuple[int, ...]
    """The tokens."""
    num_rows: int
    """The rows that a weight has with them."""
    tensors: dict[str, Tensor]
    """The rows (len(ids), C), by the name of the weight that has them. A tied head has none of its
    own."""

    def named(self) -> dict[str, Tensor]:
        """The tensors by the name that a file has for them."""
        return {f"{name.removesuffix('weight')}{LEAF}": tensor for name, tensor in self.tensors.items()}

    def detached(self) -> "TokenRows":
        """The same, of which no gradient is asked for."""
        return dataclasses.replace(self, tensors={n: t.detach() for n, t in self.tensors.items()})

    def put_into(self, weights: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The weights with the rows, in the weights' dtypes. Raises CheckpointError if they do not
        fit."""
        whole = {}
        for name, rows in self.tensors.items():
            before = weights.get(name)
            if before is None:
                raise CheckpointError(f"has rows of added tokens for {name}, which the base does not have")
            known, fits = before.size(0), rows.shape == (len(self.ids), before.size(1))
            added = self.num_rows - known
            new = sum(number >= known for number in self.ids)  # each of the base's new rows is one of these
            if not fits or added < 0 or new != added:
                raise CheckpointError(
                    f"its rows {tuple(rows.shape)} of {len(self.ids)} added tokens, which make "
                    f"{self.num_rows}, do not fit {name} {tuple(before.shape)}"
                )
            after = torch.cat([before, before.new_zeros(added, before.size(1))])
            after[torch.tensor(self.ids)] = rows.to(after)
            whole[name] = after
        return whole


def new_row(weight: Tensor, known: int) -> Tensor:
    """What the row (C,) of an added token starts as: the mean of the known tokens' rows (Hewitt 2021),
    in fp32 or better. The token is then no likelier than others at first."""
    return weight[:known].mean(dim=0, dtype=torch.promote_types(weight.dtype, torch.float32))


class RowsEmbedding(nn.Module):
    """A frozen embedding in which the rows of some tokens train."""

    def __init__(self, embedding: nn.Embedding, ids: list[int]) -> None:
        super().__init__()
        self.weight = embedding.weight.requires_grad_(False)
        self.token_rows = nn.Parameter(self.weight[ids].float())
        numbers = torch.full((self.weight.size(0),), -1, device=self.weight.device)
        numbers[ids] = torch.arange(len(ids), device=numbers.device)
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        frozen, numbers = F.embedding(ids, self.weight), self.numbers[ids]
        rows = F.embedding(numbers.clamp(min=0), self.token_rows).to(frozen.dtype)
        return torch.where((numbers >= 0).unsqueeze(-1), rows, frozen)


class RowsHead(nn.Module):
    """A frozen output head in which the rows of some tokens train."""

    def __init__(self, head: nn.Linear, ids: list[int], rows: nn.Parameter | None = None) -> None:
        """`rows` are those of the embedding, if it is tied to the head."""
        super().__init__()
        self.weight = head.weight.requires_grad_(False)
        self.register_parameter("bias", head.bias)
        self.token_rows = nn.Parameter(self.weight[ids].float()) if rows is None else rows
        self.register_buffer("ids", torch.tensor(ids, device=self.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias[self.ids]
        return logits.index_copy(-1, self.ids, F.linear(x, self.token_rows.to(x.dtype), bias))


def rows_of(model: nn.Module) -> TokenRows | None:
    """The rows that train in a model; None if none do."""
    found: dict[str, Tensor] = {}
    ids: list[int] = []
    num_rows = 0
    for name, module in model.named_modules():
        if isinstance(module, RowsEmbedding):
            ids, num_rows = (module.numbers >= 0).nonzero().flatten().tolist(), module.weight.size(0)
        if isinstance(module, (RowsEmbedding, RowsHead)) and not any(
            module.token_rows is rows for rows in found.values()
        ):
            found[f"{name}.weight"] = module.token_rows
    return TokenRows(tuple(ids), num_rows, found).detached() if found else None
