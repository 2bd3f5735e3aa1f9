"""A model of which every device holds a share (FSDP2, `torch.distributed.fsdp.fully_shard`): made so
while it is loaded, gathered a tensor at a time when it is written.

What is divided is a `DTensor`. A block fetches its weights before its forward and again before its
backward, and gives them back after; what is outside of the blocks (embedding, last norm, output
head) is fetched for a whole forward, and a whole backward.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from litlora.frozen.later import settle
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantized import QuantizedWeight
from litlora.storage.blocks import LazyTensor, row_blocks
from litlora.storage.fingerprint import fingerprint
from litlora.storage.pages import mapped, release
from litlora.train.objective import Objective


def shard_base(
    objective: Objective,
    stored: list[nn.Parameter],
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trains_base: bool,
) -> dict[str, str]:
    """Divide the `stored` weights of an objective among the devices of `mesh`, a block at a time, each
    first converted to `dtype`, and those in few bits as they are. Only that block is ever whole on a
    device: the weights may be mapped from a file, of which each process then keeps its share, or be
    late ones.

    What an adapter trains is small: it stays whole on every device. Returns the fingerprints of the
    weights that were quantised here, by their names.
    """
    fingerprints: dict[str, str] = {}
    known = {id(parameter) for parameter in stored}
    whole = set() if trains_base else set(objective.trainable().values())
    for parameter in whole:
        parameter.data = parameter.data.to(device, dtype if id(parameter) in known else parameter.dtype)
    for unit in (*objective.model.blocks, objective):
        quantised = settle(unit)
        fingerprints |= {name: fingerprint(matrix.stored()) for name, matrix in quantised.items()}
        del quantised
        for weight in stored_weights(unit).values():
            if isinstance(weight, QuantizedWeight) and weight.stored_bytes is None:
                weight.as_one_parameter()
        undivided = [p for p in unit.parameters() if p not in whole and not isinstance(p, DTensor)]
        read = mapped([parameter.data for parameter in undivided])
        for parameter in undivided:
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        # Divided again after the forward, the outermost too: between two calls all is divided.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        for tensor in read:
            release(tensor)
        for parameter in undivided:  # whoever still has it must not keep the whole weight
            parameter.data = parameter.data.new_empty(0)
    return fingerprints


def share_of(whole: Tensor, like: DTensor) -> DTensor:
    """A copy of what the divided tensor `like` would hold of `whole` on this device."""
    mesh, mine = like.device_mesh, like.to_local()
    start = sum(len(part) for part in whole.chunk(mesh.size())[: mesh.get_local_rank()])
    part = whole[start : start + len(mine)].to(mine.device, copy=True)
    return DTensor.from_local(
        part.contiguous(), mesh, like.placements, run_check=False, shape=whole.shape, stride=like.stride()
    )


def unsharded_bytes(objective: Objective) -> int:
    """The memory of what a device fetches from the others: two blocks, as one is fetched while
    another computes, and what is outside of the blocks."""
    blocks = [_divided_bytes(block) for block in objective.model.blocks]
    return 2 * max(blocks) + _divided_bytes(objective) - sum(blocks)


def _divided_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters() if isinstance(p, DTensor))


# ---- written by one, gathered by all


class Gathered(LazyTensor):
    """A divided tensor that rank 0 asks the others for when it is written."""

    def __init__(self, number: int, divided: DTensor, ask: Callable[[int], None]) -> None:
        self.shape, self.dtype = divided.shape, divided.dtype
        self._number, self._divided, self._ask = number, divided, ask

    def blocks(self, memory: Any = None) -> Iterator[Tensor]:
        self._ask(self._number)
        yield from row_blocks(self._divided.full_tensor().cpu())


def divided(value: Any) -> Iterator[DTensor]:
    """The divided tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, DTensor):
        yield value.detach()
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from divided(entry)


def asked_for(value: Any, tensors: Iterator[tuple[int, DTensor]], ask: Callable[[int], None]) -> Any:
    """The value with a `Gathered` in place of each divided tensor."""
    if isinstance(value, DTensor):
        return Gathered(*next(tensors), ask)
    if isinstance(value, dict):
        return {name: asked_for(entry, tensors, ask) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(asked_for(entry, tensors, ask) for entry in value)
    return value


def serve(tensors: Iterable[DTensor], asked: Callable[[], int | None]) -> None:
    """Take part in gathering the tensors that rank 0 asks for, until it asks for None."""
    known = list(tensors)
    while (number := asked()) is not None:
        known[number].full_tensor()
