"""What a block needs to know of the tokens that it computes."""

from typing import NamedTuple

from torch import Tensor

from litlora.kernels.attention import Pack
from litlora.kernels.rotary import Rope
from litlora.model.cache import Cache

Seen = tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]
"""Keys and values of the tokens so far, (B, G, S, D) each; of sequences apart, those of each."""


class Context(NamedTuple):
    """What a block needs to know of the tokens that it computes, beside their hidden states."""

    rope: Rope | None = None
    """The rotation of each token's queries and keys, if the layer has one."""
    mask: Tensor | None = None
    """(T, S), or (B, 1, 1, S) of a `StaticCache`: what each token sees; None if attention knows by itself."""
    cache: Cache | None = None
    """The tokens before these, if any."""
    pack: Pack | None = None
    """How the B · T tokens divide into sequences; None: each of the B rows is one."""
    positions: Tensor | None = None
    """(M,), places of the flattened B · T tokens: the others are attended to, and not computed any
    further."""
    query_scale: Tensor | None = None
    """(T, 1), or (B, 1, 1, 1) of sequences apart: factor of each token's queries, if the architecture
    has one."""
    keys: dict[bool, Seen] | None = None
    """The keys and values of the last layers that have their own, with a window (True) and without, for
    those that share them. Layers put them in."""
    per_layer: Tensor | None = None
    """(B, T, P): what each token has for this layer alone."""


def pick(x: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """x (B, T, C) at these positions (M,) of the B · T tokens: (1, M, C); x itself for None."""
    return x if positions is None or x is None else x.flatten(0, 1).index_select(0, positions)[None]
