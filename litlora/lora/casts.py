"""A and B in the dtype of the computation, cast once for all their uses in a step.

They train in fp32, and a model in bf16 would cast them for each product: in the forward of every
layer, in its backward, and again for each micro-batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litlora.kernels.lora import Cast
from litlora.lora.layer import LoRALinear

ALIGNMENT = 64
"""Values at a multiple of which each cast begins: products read aligned matrices faster."""


@contextmanager
def cast_ahead(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A context in which no A or B may change, for a model that computes in this dtype: casts of them
    are made at its start, all in one go, and gradients still go to A and B themselves.

    Without effect on those that have this dtype already, and on those that are divided among devices.
    """
    layers = [module for module in model.modules() if type(module) is LoRALinear and _gains(module, dtype)]
    _cast(layers, dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None


def _gains(layer: LoRALinear, dtype: torch.dtype) -> bool:
    divided = isinstance(layer.lora_A, DTensor)
    return layer.variant.is_plain and not layer.merged and not divided and layer.lora_A.dtype != dtype


@torch.no_grad()
def _cast(layers: list[LoRALinear], dtype: torch.dtype) -> None:
    """Give each of these layers its cast, in memory that all of them share."""
    if not layers:
        return
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B.t())]
    sizes = [-(-factor.numel() // ALIGNMENT) * ALIGNMENT for factor in factors]
    parts = layers[0].lora_A.new_empty(sum(sizes), dtype=dtype).split(sizes)
    casts = [_shaped(part[: factor.numel()], factor) for part, factor in zip(parts, factors, strict=True)]
    torch._foreach_copy_(casts, factors)
    for layer, A, Bt in zip(layers, casts[::2], casts[1::2], strict=True):
        layer.cast = Cast(A, Bt)


def _shaped(memory: Tensor, factor: Tensor) -> Tensor:
    """The memory with the shape of this factor: on the CPU with long rows, which are faster there, else
    with the factor's own strides, as a copy of many tensors in one kernel asks for."""
    if factor.device.type == "cpu" or factor.is_contiguous():
        return memory.view(factor.shape)
    return memory.view(factor.t().shape).t()
