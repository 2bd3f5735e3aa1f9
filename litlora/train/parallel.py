"""Parallel: the devices that train together. Everything that asks for a rank, or talks to other
ranks, goes through here; one device is the case in which nothing is exchanged."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from litlora.train.fabric import Fabric

Value = TypeVar("Value")


class Parallel:
    """One device, or several with a replica of the model each (DistributedDataParallel).

    Another strategy is another class with these methods. Those that exchange something must be
    called by all ranks together.
    """

    def __init__(self, device: torch.device | str = "cpu", devices: int = 1) -> None:
        self._fabric = Fabric(
            accelerator=torch.device(device).type,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
        )

    def launch(self, seed: int) -> None:
        """Start the processes of the other devices, and seed every generator."""
        self._fabric.launch()
        self._fabric.seed_everything(seed, verbose=False)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._fabric.device

    @property
    def rank(self) -> int:
        return self._fabric.global_rank

    @property
    def world_size(self) -> int:
        """The number of processes, one for each device."""
        return self._fabric.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the user: that of rank 0."""
        return self._fabric.is_global_zero

    # ---- a training step

    def setup(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module and the optimizer to train with, on this process's device."""
        return self._fabric.setup(module, optimizer)

    def accumulating(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager:
        """A context in which gradients add up on each rank; they are exchanged in the backward that
        is outside of it."""
        return self._fabric.no_backward_sync(module, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of max_norm, if that is above 0; returns the
        norm before."""
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.clip_grad_norm_(with_gradient, max_norm or math.inf)

    # ---- between the ranks

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world_size == 1:
            return tensor
        return self._fabric.all_reduce(tensor.clone(), reduce_op="sum")

    def smallest(self, number: int) -> int:
        """The smallest of the numbers of all ranks."""
        return min(self._numbers(number))

    def largest(self, number: int) -> int:
        """The largest of the numbers of all ranks."""
        return max(self._numbers(number))

    def _numbers(self, number: int) -> list[int]:
        if self.world_size == 1:
            return [number]
        return self._fabric.all_gather(torch.tensor(number, device=self.device)).tolist()

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, on all of them."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """The value of rank 0, on all ranks."""
        return self._fabric.broadcast(value)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._fabric.barrier()
