"""FlexAttention (Dong et al. 2024, arXiv:2412.05496) of packed sequences on a GPU: for scores that flash
attention does not have, of a softcap (Gemma 2) or of sinks (gpt-oss)."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

if TYPE_CHECKING:
    from litlora.kernels.attention import Pack, Scores

BLOCK = 128
"""Queries, and keys, in one block of the mask."""


def flex_packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: "Pack",
    *,
    window: int | None = None,
    **scores: Unpack["Scores"],
) -> Tensor:
    """As plain_packed_attention, by FlexAttention (Dong et al. 2024, arXiv:2412.05496), compiled on
    first use."""

    sinks = scores.get("sinks")
    options = flex_options(q.device, pack, window=window, softcap=scores.get("softcap"))
    options |= {"scale": scores["scale"], "enable_gqa": q.size(1) != k.size(1)}
    if sinks is None:
        return _compiled_flex()(q, k, v, **options)
    from torch.nn.attention.flex_attention import AuxRequest

    y, aux = _compiled_flex()(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return sunk(y, aux.lse, sinks)


def sunk(y: Tensor, log_sums: Tensor, sinks: Tensor) -> Tensor:
    """Attention without sinks y (1, H, N, E), and the logarithms of the sums of each query's exponentials
    (1, H, N) -> attention with sinks (H,): these add to the sums."""
    kept = torch.sigmoid(log_sums - sinks.to(log_sums.dtype)[None, :, None])
    return (y * kept[..., None]).to(y.dtype)


def flex_options(
    device: torch.device, pack: "Pack", *, window: int | None = None, softcap: float | None = None
) -> dict[str, Any]:
    """What tells FlexAttention of the pack, the window and the softcap: score_mod and
    block_mask."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return {
        "score_mod": None if softcap is None else capped,
        "block_mask": block_mask(pack, window, device),
    }


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def block_mask(pack: "Pack", window: int | None, device: torch.device) -> Any:
    """FlexAttention's mask: a token sees the earlier ones of its own sequence, within the
    window if there is one.

    Which blocks see each other is computed from the lengths: comparing all pairs of tokens
    would take N² bytes.
    """
    if window not in pack.block_masks:
        from torch.nn.attention.flex_attention import BlockMask

        # (N,): the number of each token's sequence
        sequence = torch.repeat_interleave(torch.tensor(pack.lengths))
        parts = [
            part
            for blocks in visible_blocks(sequence, window)
            for part in _listed(blocks.to(device, non_blocking=True))
        ]
        sequence = sequence.to(device, non_blocking=True)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (sequence[query] == sequence[key]) & (query >= key)
            return seen if window is None else seen & (query - key < window)

        N = len(sequence)
        pack.block_masks[window] = BlockMask.from_kv_blocks(
            *parts, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(N, N)
        )
    return pack.block_masks[window]


def visible_blocks(sequence: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """(partly, fully): which blocks of BLOCK keys a block of queries sees in part, and which it
    sees as a whole; each (blocks of queries, blocks of keys).

    `sequence` (N,) is the number of each token's sequence, ascending. Two blocks belong to one
    sequence if the first token of one and the last of the other do.
    """
    starts = torch.arange(0, len(sequence), BLOCK)
    ends = (starts + BLOCK - 1).clamp(max=len(sequence) - 1)
    first, last = sequence[starts], sequence[ends]
    query_start, query_end, query_first, query_last = (part[:, None] for part in (starts, ends, first, last))
    seen = (starts <= query_start) & (last >= query_first)
    full = (starts < query_start) & (first == query_last) & (query_end - query_start == BLOCK - 1)
    if window is not None:
        seen &= query_start - ends < window
        full &= query_end - starts < window
    return seen & ~full, full


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row sees, (1, 1, rows), and their numbers first, (1, 1, rows,
    blocks)."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
