"""All blocks of a model, for the next token of each of a few sequences, by one call of compiled code.

What a block does beside its products is little, and takes longer to call, operation by operation, than to
compute: the more so as the weights that are read leave nothing of the caller in the processor's cache.
"""

import torch
from torch import Tensor, nn

from litlora.kernels import cpu, cpu_block
from litlora.kernels.attention import first_seen
from litlora.kernels.cpu import Part
from litlora.model.attention import Attention
from litlora.model.block import Block
from litlora.model.cache import CacheBatch, KVCache
from litlora.model.context import Context
from litlora.model.mlp import MLP
from litlora.model.norms import RMSNorm, RMSNormPlusOne

_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_NORMS = {RMSNorm: 0.0, RMSNormPlusOne: 1.0}
"""By what they add to their weight."""


class CompiledBlocks:
    """Blocks of attention and a gated MLP. Hooks of what lies in a block do not run."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._known: list[nn.Module] = []
        """The blocks, when they were looked at,"""
        self._shapes: list[cpu_block.Shape] = []
        """what they compute, if there is code for all of them,"""
        self._last: list[cpu_block.Block | None] = []
        """and what the last token needed of them."""

    def __call__(self, x: Tensor, contexts: list[Context]) -> Tensor | None:
        """x (B, 1, C) of B sequences -> (B, 1, C), whose keys and values the cache then has; each block has
        its context. None where this does not suit."""
        cache, positions = contexts[0].cache, contexts[-1].positions
        caches = cache.caches if isinstance(cache, CacheBatch) else [cache]
        if len(caches) != x.size(0) or not all(isinstance(one, KVCache) for one in caches):
            return None
        if contexts[0].query_scale is not None or positions is not None or not cpu_block.suits(x):
            return None
        if self._known != (blocks := [*self._layers._modules.values()]):
            shapes = [_shape(block) for block in blocks]
            self._known, self._shapes = blocks, [] if None in shapes else shapes
            self._last = [None for _ in self._shapes]
        found = [self._block(number, x.dtype, len(caches)) for number in range(len(self._shapes))]
        if not found or None in found:
            return None
        held = [_held(block.self_attn, one) for block in blocks for one in caches]
        return cpu_block.through(x, found, held, [context.rope for context in contexts])

    def _block(self, number: int, dtype: torch.dtype, B: int) -> cpu_block.Block | None:
        """A block for x of this dtype and B sequences, made anew only if a layer or a norm is another."""
        block, last = self._known[number], self._last[number]
        attention, mlp = block.self_attn, block.mlp
        own = ((attention, _LAYERS[0]), (mlp, _LAYERS[1]))
        parts = [getattr(module._modules[name], "part", None) for module, names in own for name in names]
        if not all(isinstance(part, Part) and not part.around for part in parts):
            return None
        if not all(dtype in part.dtypes and part.serves(B) for part in parts):
            return None
        entry, *others = block.norms
        norms = [_norm(norm) for norm in (entry, attention.q_norm, attention.k_norm, *others)]
        if any(norm is _UNKNOWN for norm in norms) or block._forward_hooks or block._forward_pre_hooks:
            return None
        if last is None or not last.is_of(parts, norms, dtype):
            last = self._last[number] = cpu_block.Block(self._shapes[number], parts, norms, dtype)
        return last


def _held(attention: Attention, cache: KVCache) -> cpu_block.Held:
    S = cache.length + 1
    first = first_seen(S, attention.window, attention.chunk)
    return cpu_block.Held(*cache.memory(attention.layer, S), cache.length, first)


def _shape(block: Block) -> cpu_block.Shape | None:
    """None for a block that the code does not know."""
    attention, mlp = getattr(block, "self_attn", None), block.mlp
    if type(attention) is not Attention or type(mlp) is not MLP or not block.is_plain:
        return None
    if not _are_known(attention, mlp):
        return None
    shape = cpu_block.Shape(
        heads=attention.heads,
        groups=attention.groups,
        head_size=attention.head_dim,
        scale=attention.scale,
        softcap=attention.softcap,
        multiplier=block.multiplier,
        interleaved=attention.interleaved_dim is not None,
        together=attention.norm_all_heads,
        activation=mlp.activation,
    )
    return shape if shape.is_known else None


def _are_known(attention: Attention, mlp: MLP) -> bool:
    """Whether they compute nothing that the code does not know."""
    others = (
        attention.gated,
        attention.clip is not None,
        attention.shares_keys,
        attention.values_are_keys,
        attention.sinks is not None,
        attention.v_norm is not None,
        attention.q_norm is not None and attention.norm_rotated,
        mlp.gate_proj is None,
        mlp.cutoff is not None,
        mlp.clamp[1] is not None,
    )
    return not any(others)


_UNKNOWN = cpu_block.Norm(torch.empty(0), 0.0)


def _norm(module: nn.Module | None) -> cpu_block.Norm | None:
    if module is None or type(module) is nn.Identity:
        return None
    more, weight = _NORMS.get(type(module)), module._parameters.get("weight")
    known = more is not None and weight.dtype in cpu.DTYPES and weight.is_contiguous()
    return cpu_block.Norm(weight, module.eps, more) if known else _UNKNOWN
