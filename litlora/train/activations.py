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


def checkpoint_activations(model: LanguageModel, how: str) -> None:
    """Recompute parts of the forward in the backward instead of keeping their activations.

    full: every block, from its input; selective: the feed-forward half of every block, which has
    the widest activations and takes a part of the arithmetic; none: nothing. Random numbers
    (dropout) are the same the second time.
    """
    for block in model.blocks:
        parts = [(block, how == "full"), (getattr(block, "mlp", None), how == "selective")]
        for module, chosen in parts[: 2 if model.packs else 1]:
            module.__dict__.pop("forward", None)
            if chosen:
                module.forward = computed_again(module.forward)


def computed_again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward that keeps only its inputs, and is recomputed in the backward."""

    def run(*inputs: object, **options: object) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


@contextmanager
def offloading(module: nn.Module) -> Iterator[None]:
    """A context for the forward, in which activations move to pinned host memory until the backward
    needs them; weights stay on the device.

    Copies run in the order of the device's stream, so the host does not wait for them. A part of
    which every device holds a share (FSDP2) has other weights in each forward: those that it has
    fetched when its turn comes.
    """
    weights, fetched = storages(module), set()

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        address = tensor.untyped_storage().data_ptr()
        is_weight = address in weights or address in fetched
        return tensor.device, tensor if is_weight else to_host(tensor)

    hooks = []
    for part in module.modules():
        if isinstance(part, FSDPModule):  # whose own hooks, which fetch and give back, come first
            hooks.append(part.register_forward_pre_hook(lambda part, _: fetched.update(storages(part))))
            hooks.append(part.register_forward_hook(lambda *_: fetched.clear()))
    try:
        with saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0], non_blocking=True)):
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
