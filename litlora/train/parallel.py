"""Parallel: the devices that train together. Everything that asks for a rank, or talks to other
ranks, goes through here; one device is the case in which nothing is exchanged."""

import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from litlora.errors import UserError, setting
from litlora.ram import return_freed_memory
from litlora.train.fabric import Fabric

Value = TypeVar("Value")

JOIN = 300.0
"""Seconds that the processes of a run wait for each other at its start."""
EXCHANGE = timedelta(minutes=30)
"""How long a rank waits for another one in an exchange: the longest time that one computes alone."""


class Parallel:
    """One device, or several: with a replica of the model each (Fabric's DDPStrategy), or with a
    share of it each (Fabric's ModelParallelStrategy, with FSDP2).

    The methods that exchange something must be called by all ranks together.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        devices: int = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        *,
        join: float = JOIN,
    ) -> None:
        """`devices` of each of `num_nodes` machines; `join` seconds to find each other. Raises
        UserError if this machine has not as many devices."""
        kind = torch.device(device).type
        there = torch.get_device_module(kind).device_count() if kind in ("cuda", "mps") else devices
        if devices > there:
            raise UserError(
                f"{setting('devices')} {devices}: this machine has {there} of kind {kind}; lower it, "
                f"or choose another {setting('accelerator')}"
            )
        self.is_sharded = strategy == "fsdp"
        """Whether each rank holds a share of the model only."""
        self._fabric = Fabric(
            accelerator=kind,
            devices=devices,
            num_nodes=num_nodes,
            strategy=_strategy(devices * num_nodes, self.is_sharded, join),
        )
        self._join = join

    def launch(self, seed: int) -> None:
        """Start the processes of the other devices, and seed every generator. Raises UserError if
        the processes do not find each other."""
        if self.world_size > 1:  # of processes to be started: torch's own words on a lost connection
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        try:
            self._reach_first_node()
            self._fabric.launch()
        except (RuntimeError, ValueError) as error:
            for process in self.children:
                process.kill()
            raise self._not_together(error) from None
        if self.world_size > 1:
            # The strategy's timeout was that of the start.
            torch.distributed.distributed_c10d._set_pg_timeout(EXCHANGE)
        self._fabric.seed_everything(seed, verbose=False)

    def _reach_first_node(self) -> None:
        """Where the user has started a machine by hand: wait until the first one can be reached."""
        by_hand = "LOCAL_RANK" not in os.environ and int(os.environ.get("NODE_RANK", 0)) > 0
        deadline = time.monotonic() + self._join
        while by_hand and self.world_size > 1:
            try:
                place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                return socket.create_connection(place, timeout=self._join).close()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(error.strerror or str(error)) from None
                time.sleep(1)

    def _not_together(self, error: Exception) -> UserError:
        place = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return UserError(
            f"the {self.world_size} processes of the run did not find each other at {place} "
            f"in {self._join:g} seconds ({reason}); check that every machine can reach this address, "
            f"and that {setting('num_nodes')} machines were started"
        )

    @property
    def children(self) -> Sequence[Any]:
        """The processes (Popen) that this one has started, of local ranks 1, 2, ..."""
        return getattr(self._fabric.strategy.launcher, "procs", ())

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
        is outside of it. Where the model is divided, each backward exchanges those of the base: they
        would be whole on every rank."""
        if self.is_sharded:
            return nullcontext()
        return self._fabric.no_backward_sync(module, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average over the ranks what no strategy has averaged, once a step: the gradients of an
        adapter whose base is divided."""
        if not self.is_sharded:
            return
        from torch.distributed.tensor import DTensor

        whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        for dtype in sorted({grad.dtype for grad in whole}, key=str):
            grads = [grad for grad in whole if grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in grads])  # one exchange for all
            torch.distributed.all_reduce(flat)
            flat /= self.world_size
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of max_norm, if that is above 0; returns the
        norm before."""
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(with_gradient, max_norm or math.inf)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def shared(self, micro_batches: Iterable[list[int]]) -> Iterator[tuple[list[int], bool]]:
        """Without a gradient: this rank's micro-batches, and whether each counts. Where the model is
        divided, all ranks compute equally many, so some compute one that is another rank's."""
        turn: list[list[int]] = []
        for micro in micro_batches:
            turn.append(micro)
            if len(turn) == self.world_size:
                yield turn[self.rank], True
                turn = []
        if self.rank < len(turn):
            yield turn[self.rank], True
        elif turn and self.is_sharded:
            yield turn[0], False

    def shard(
        self, objective: nn.Module, stored: list[nn.Parameter], dtype: torch.dtype, *, trains_base: bool
    ) -> dict[str, str]:
        """Divide the base among the devices, and convert it to this dtype, if the strategy says so:
        see `litlora.train.sharding`. Returns the fingerprints of what was quantised on the way."""
        if not self.is_sharded:
            return {}
        from litlora.train.sharding import shard_base

        if self.device.type == "cpu":
            return_freed_memory()
        mesh = self._fabric.strategy.device_mesh["data_parallel"]
        return shard_base(objective, stored, mesh, self.device, dtype, trains_base=trains_base)

    # ---- between the ranks

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on the device of this process if there are several."""
        if self.world_size > 1:
            tensor = tensor.to(self.device, copy=True)
            torch.distributed.all_reduce(tensor)
        return tensor

    def smallest(self, number: int) -> int:
        """The smallest of the numbers of all ranks."""
        return min(self._numbers(number))

    def largest(self, number: int) -> int:
        """The largest of the numbers of all ranks."""
        return max(self._numbers(number))

    @property
    def reads_late(self) -> bool:
        """Whether this process can queue work on the device while `read` is on its way."""
        return self.device.type == "cuda" and not self.is_sharded

    def read(self, numbers: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to copy these numbers from the device to the host, all at once. What is returned
        waits for the copy, and gives each as a tensor of its own dtype."""
        numbers = [number.detach() for number in numbers]
        if self.device.type == "cpu":
            return lambda: numbers
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # mps has no float64
        stacked = torch.stack([number.to(exact) for number in numbers])
        host, done = stacked.to("cpu", non_blocking=self.reads_late), None
        if self.reads_late:
            done = torch.cuda.Event()
            done.record()

        def values() -> list[Tensor]:
            if done is not None:
                done.synchronize()
            return [value.to(number.dtype) for value, number in zip(host, numbers, strict=True)]

        return values

    def _numbers(self, number: int) -> list[int]:
        if self.world_size == 1:
            return [number]  # reading it from the device would wait for all that is queued there
        numbers = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        numbers[self.rank] = number
        return self.sum(numbers).tolist()

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

    def check_same(self, what: str, value: Any) -> None:
        """Raise UserError unless all ranks have the same value, as where they see the same files."""
        others = self.gather(value)
        rank = next((rank for rank, other in enumerate(others) if other != others[0]), None)
        if rank is not None:
            raise UserError(
                f"rank {rank} of {self.world_size} has another {what} than rank 0 ({others[rank]}, not "
                f"{others[0]}): all machines must see the same files at the same paths"
            )

    @contextmanager
    def gathering(self, value: Value) -> Iterator[Value | None]:
        """On rank 0: the value, in which every divided tensor is a lazy one that is gathered when it
        is read; on the others None, once rank 0 has left its block."""
        if not self.is_sharded:
            yield value if self.is_main else None
            return
        from litlora.train.sharding import asked_for, divided, serve

        tensors = list(divided(value))
        if not self.is_main:
            serve(tensors, lambda: self.broadcast(None))
            yield None
            return
        try:
            yield asked_for(value, iter(enumerate(tensors)), self.broadcast)
        finally:
            self.broadcast(None)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._fabric.barrier()


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor; all of it if it is not divided."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of `whole`, divided as the tensor `like` is."""
    if local(like) is like:
        return whole.clone(memory_format=torch.contiguous_format)
    from litlora.train.sharding import share_of

    return share_of(whole, like)


def _strategy(world_size: int, is_sharded: bool, join: float) -> Any:
    """Fabric's strategy for so many processes."""
    if world_size == 1:
        return "auto"
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    timeout = timedelta(seconds=join)
    if not is_sharded:
        return DDPStrategy(timeout=timeout)
    return ModelParallelStrategy(
        lambda module, mesh: module,  # `Parallel.shard` has divided it
        data_parallel_size=world_size,
        tensor_parallel_size=1,
        timeout=timeout,
    )
