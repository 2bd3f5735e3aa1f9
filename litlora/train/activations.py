"""Which activations the forward keeps for the backward, and where: checkpointing and offloading."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from litlora.model import LanguageModel
from litlora.train.arena import Arena, Kept, aligned

ROWS = 8192
"""Tokens that the feed-forward half of a block computes at a time where activations are offloaded:
enough for products at full speed."""


def checkpoint_activations(model: LanguageModel, how: str, rows: int | None = None) -> None:
    """Recompute parts of the forward in the backward instead of keeping their activations.

    full: every block, from its input, and with `rows` its feed-forward half for so many tokens at a
    time, so that its wide activations exist for no more; selective: the feed-forward half of every
    block, which has the widest activations and takes a part of the arithmetic; none: nothing. Random
    numbers (dropout) are the same the second time.
    """
    for block in model.blocks:
        parts = [(block, how == "full"), (getattr(block, "mlp", None), how == "selective")]
        for module, chosen in parts[: 2 if model.packs else 1]:
            module.__dict__.pop("forward", None)
            if chosen:
                module.forward = computed_again(module.forward)
        if how == "full" and rows is not None and model.packs:
            block.mlp.forward = in_chunks(block.mlp.forward, rows)


def computed_again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward that keeps only its inputs, and is recomputed in the backward."""

    def run(*inputs: object, **options: object) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


def in_chunks(forward: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    """A forward (B, T, C) -> (B, T, C), which treats each token by itself, for so many tokens at a time;
    each part is recomputed in the backward."""
    part = computed_again(forward)

    def run(x: Tensor) -> Tensor:
        if x.shape[:-1].numel() <= rows:
            return forward(x)
        pieces = x.reshape(1, -1, x.size(-1)).split(rows, dim=1)
        return torch.cat([part(piece) for piece in pieces], dim=1).view_as(x)

    return run


def block_inputs(model: LanguageModel, tokens: int) -> int:
    """Bytes of an arena for the input of each block, of the last norm and of the output head."""
    streams = getattr(model.config, "altup_num_inputs", None) or 1
    width = model.config.hidden_size * streams * model.like.dtype.itemsize
    return (len(model.blocks) + 2) * aligned(tokens * width)


@contextmanager
def offloading(module: nn.Module, arena: Arena | None = None) -> Iterator[None]:
    """A context for the forward, in which activations move to pinned host memory until the backward
    needs them: to the arena, as long as that has room. Weights stay on the device.

    Other copies than the arena's run in the order of the device's stream, so the host does not wait
    for them. A part of which every device holds a share (FSDP2) has other weights in each forward:
    those that it has fetched when its turn comes.
    """
    weights, fetched = storages(module), set()

    def pack(tensor: Tensor) -> Kept | tuple[torch.device, Tensor]:
        address = tensor.untyped_storage().data_ptr()
        if address in weights or address in fetched:
            return tensor.device, tensor
        kept = None if arena is None else arena.keep(tensor)
        return (tensor.device, to_host(tensor)) if kept is None else kept

    def unpack(packed: Kept | tuple[torch.device, Tensor]) -> Tensor:
        return packed.fetched() if isinstance(packed, Kept) else packed[1].to(packed[0], non_blocking=True)

    hooks = []
    for part in module.modules():
        if isinstance(part, FSDPModule):  # whose own hooks, which fetch and give back, come first
            hooks.append(part.register_forward_pre_hook(lambda part, _: fetched.update(storages(part))))
            hooks.append(part.register_forward_hook(lambda *_: fetched.clear()))
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def storages(module: nn.Module) -> set[int]:
    """The addresses of a module's weights, of those that are whole on this device."""
    weights = (parameter for parameter in module.parameters() if not isinstance(parameter, DTensor))
    return {weight.untyped_storage().data_ptr() for weight in weights}
