"""Causal attention: of one sequence or of several that lie one behind the other, each seeing itself alone.

Shapes: B batch, T tokens, S tokens seen, H heads, G key/value heads, D head_dim; N tokens of all sequences of a pack.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.kernels.sizes import few


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D).

    mask (T, S) is True where a token sees; without one and with T > 1, T = S and each sees what came before. With a softcap
    the scores are cap · tanh(scores / cap) (Gemma 2).
    """
    if softcap is None:
        causal = mask is None and q.size(2) > 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
    k, v = (part.repeat_interleave(q.size(1) // part.size(1), dim=1) for part in (k, v))  # (B, G, S, D) -> (B, H, S, D)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))  # (B, H, T, S)
    T = q.size(2)
    if mask is None and T > 1:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype) @ v


def causal_mask(T: int, start: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of start + T tokens each of the last T sees, (T, start + T); None where attention needs no mask to know.

    Without a past and within the window it is SDPA's own triangle; a single token sees all that attention hands it.
    """
    if T == 1 or (start == 0 and (window is None or T <= window)):
        return None
    mask = torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)
    return mask if window is None else mask.triu(start - window + 1)


class Pack:
    """Several sequences one behind the other, of these lengths; what the layers share of a micro-batch."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._block_masks: dict[int | None, Any] = {}

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """FlexAttention's mask: a token sees those of its own sequence that came before, `window` of them if there is one."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            lengths = torch.tensor(self.lengths)
            sequence = torch.repeat_interleave(lengths).to(device, non_blocking=True)  # (N,): which sequence a token is of

            def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                seen = (sequence[query] == sequence[key]) & (query >= key)
                return seen if window is None else seen & (query - key < window)

            N = len(sequence)
            self._block_masks[window] = create_block_mask(sees, None, None, N, N, device=device)
        return self._block_masks[window]


def plain_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Attention of several sequences one behind the other, each by itself: q (1, H, N, D), k and v (1, G, N, D) -> (1, H, N, D)."""
    parts = zip(*(part.split(pack.lengths, dim=2) for part in (q, k, v)), strict=True)
    outputs = []
    for part, T in zip(parts, pack.lengths, strict=True):
        size = few(T, q, least=32, parts=8)
        if size != T:  # nobody sees what is behind
            part = [F.pad(tensor, (0, 0, 0, size - T)) for tensor in part]
        outputs.append(attend(*part, causal_mask(size, 0, window, q.device), scale=scale, softcap=softcap)[:, :, :T])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """As plain_packed_attention; on a CUDA device in one FlexAttention kernel for all sequences."""
    if q.device.type == "cuda" and len(pack.lengths) > 1:
        return flex_packed_attention(q, k, v, pack, scale=scale, window=window, softcap=softcap)
    return plain_packed_attention(q, k, v, pack, scale=scale, window=window, softcap=softcap)


def flex_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """As plain_packed_attention, by FlexAttention (Dong et al. 2024, arXiv:2412.05496), compiled at its first use."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    score_mod, mask = None if softcap is None else capped, pack.block_mask(window, q.device)
    return _compiled_flex()(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
