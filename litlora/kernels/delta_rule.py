"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464), and the causal
convolution in front of it: of one sequence a row, or of packed ones, each of which sees itself
alone.

Shapes: B batch, T tokens, H heads, K and V widths of a key and of a value, C channels, W width of
the convolution. A state (B, H, K, V) maps keys to values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens whose updates of the state are computed together."""


def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor, lengths: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Token by token: the state decays, what it gives for the key moves towards the value at this
    rate, and the query reads it.

    q and k (B, T, H, K), v (B, T, H, V), decay (its logarithm) and rate (B, T, H), state
    (B, H, K, V) -> (B, T, H, V) and the state behind the last token. With `lengths`, B is 1 and
    every sequence but the first begins with an empty state.
    """
    starts = _starts(lengths or [], 1)
    given = []
    for place in range(q.size(1)):
        state = torch.zeros_like(state) if place in starts else state * decay[:, place, :, None, None].exp()
        key = k[:, place, :, :, None]  # (B, H, K, 1)
        change = rate[:, place, :, None] * (v[:, place] - (state * key).sum(2))
        state = state + key * change[:, :, None]
        given.append((state * q[:, place, :, :, None]).sum(2))
    return torch.stack(given, dim=1), state


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor, lengths: list[int] | None
) -> tuple[Tensor, Tensor]:
    """As recurrent_delta_rule, CHUNK tokens at a time, by products of matrices.

    Within a chunk the values that are written depend on each other by a triangular system: section
    3 of the paper. Tokens that fill up the last chunk of a sequence write nothing.
    """
    spans = lengths or [q.size(1)]
    size = min(CHUNK, max(spans))
    q, k, v, decay, rate = (
        _in_chunks(part, spans, size) for part in (q, k, v, decay[..., None], rate[..., None])
    )  # (B, H, n, size, ...)
    since = decay.cumsum(dim=3)  # from the start of the chunk, (B, H, n, size, 1)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (since - since.transpose(3, 4)).masked_fill(later, -torch.inf).exp()  # (..., size, size)
    system = (rate * k) @ k.transpose(3, 4) * between  # its diagonal is taken as 1
    written, erased = (
        torch.linalg.solve_triangular(system, rate * part, upper=False, unitriangular=True)
        for part in (v, k * since.exp())
    )
    inside = q @ k.transpose(3, 4) * between
    reads, total = q * since.exp(), since[:, :, :, -1:]
    keys = (k * (total - since).exp()).transpose(3, 4)  # (B, H, n, K, size)
    starts, given = _starts(lengths or [], size), []
    for number in range(q.size(2)):
        if number in starts:
            state = torch.zeros_like(state)
        values = written[:, :, number] - erased[:, :, number] @ state
        given.append(reads[:, :, number] @ state + inside[:, :, number] @ values)
        state = state * total[:, :, number].exp() + keys[:, :, number] @ values
    y = torch.stack(given, dim=2).flatten(2, 3).transpose(1, 2)  # (B, n · size, H, V)
    return _without_filling(y, spans, size), state


def causal_convolution(x: Tensor, weight: Tensor, before: Tensor, lengths: list[int] | None) -> Tensor:
    """Each channel with its own filter, over the current and the last W - 1 tokens.

    x (B, T, C), weight (C, 1, W), before (B, W - 1, C): the tokens before x -> (B, T, C). With
    `lengths`, B is 1 and nothing is before any sequence but the first.
    """
    spans, width = lengths or [x.size(1)], weight.size(2)
    first, *others = x.split(spans, dim=1)
    filled = [before, first, *(F.pad(part, (0, 0, width - 1, 0)) for part in others)]
    y = F.conv1d(torch.cat(filled, dim=1).transpose(1, 2), weight, groups=weight.size(0)).transpose(1, 2)
    if len(spans) == 1:
        return y
    # Between two sequences lie W - 1 places that see both.
    sizes = [size for span in spans for size in (span, width - 1)][:-1]
    return torch.cat(y.split(sizes, dim=1)[::2], dim=1)


def _starts(lengths: list[int], size: int) -> set[int]:
    """The chunks of so many tokens with which a sequence begins, but for the first."""
    found, at = set(), 0
    for length in lengths[:-1]:
        at += -(-length // size)
        found.add(at)
    return found


def _in_chunks(x: Tensor, spans: list[int], size: int) -> Tensor:
    """(B, T, H, ...) -> (B, H, n, size, ...): every sequence filled up to whole chunks with zeros."""
    parts = [F.pad(part, (0, 0, 0, 0, 0, -part.size(1) % size)) for part in x.split(spans, dim=1)]
    return torch.cat(parts, dim=1).transpose(1, 2).unflatten(2, (-1, size))


def _without_filling(y: Tensor, spans: list[int], size: int) -> Tensor:
    """The inverse: (B, n · size, H, V) -> (B, T, H, V)."""
    parts = y.split([-(-span // size) * size for span in spans], dim=1)
    return torch.cat([part[:, :span] for part, span in zip(parts, spans, strict=True)], dim=1)
