"""Which activations the forward keeps for the backward, and where: checkpointing and offloading."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
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


def offloading(module: nn.Module) -> AbstractContextManager:
    """A context for the forward, in which activations move to pinned host memory until the backward
    needs them; weights stay on the device.

    Copies run in the order of the device's stream, so the host does not wait for them.
    """
    weights = storages(module)

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    return saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0], non_blocking=True))


def storages(module: nn.Module) -> set[int]:
    """The addresses of a module's weights."""
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
