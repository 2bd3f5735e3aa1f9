"""Merging: the weights that an adapter, a chain of adapters or a weighted sum of them stands for,
computed a block of rows at a time."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.adapters.quantised import as_trained
from litlora.checkpoint import Chain
from litlora.errors import CheckpointError
from litlora.frozen.few_bits import Quantized
from litlora.lora import Adapter, Update
from litlora.lora.adapter import names_of
from litlora.lora.update import fitting
from litlora.settings.targets import OUTPUT_HEAD
from litlora.storage.blocks import LazyTensor, Memory, one_thread, row_blocks, rows_at_a_time
from litlora.storage.dtypes import dtype_name
from litlora.transformers_config import Architecture

HEAD = f"{OUTPUT_HEAD}.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Added:
    """What one adapter adds to a tensor W: factor · (W' - W) of its update, or factor · (T - W) of
    a tensor T that it holds in W's place."""

    value: Update | Tensor
    factor: float

    def add_to(self, total: Tensor, before: Tensor, rows: slice) -> None:
        """Add these rows to `total` in place; `before` are the same rows of W."""
        if isinstance(self.value, Update):
            self.value.add_to(total, before, rows, self.factor)
        else:
            total += self.factor * (self.value[rows].to(total.dtype) - before.to(total.dtype))


@dataclass(frozen=True)
class MergedTensor(LazyTensor):
    """One tensor of a merged model, computed while it is written: W plus the updates of a chain's
    links.

    A link's updates are added in fp32 and rounded once: to W's own dtype if another link follows,
    as that one was trained on the rounded sum, and to `dtype` at the end.
    """

    name: str
    start: Tensor | Quantized
    """W: the base's tensor, or one that an adapter put in its place."""
    own: torch.dtype
    """W's dtype in the base."""
    dtype: torch.dtype
    """That of the result."""
    links: tuple[tuple[Added, ...], ...] = ()
    """The updates of each link of the chain, innermost first."""
    seed: int | None = None
    """Of random rounding, whose mean is the exact value (see `rounded`); None: to the nearest."""

    @property
    def shape(self) -> torch.Size:
        return self.start.shape

    @property
    def is_stored(self) -> bool:
        """Whether a file already holds this very tensor."""
        return not self.links and self.start.dtype == self.dtype and isinstance(self.start, Tensor)

    def sources(self) -> tuple[Tensor, ...]:
        return (self.start,) if isinstance(self.start, Tensor) else ()

    def blocks(self, memory: Memory | None = None) -> Iterator[Tensor]:
        if self.is_stored:
            yield from row_blocks(self.start)
            return
        sums, rounding = None, self.rounding()
        for rows in self.row_slices():
            sums = self.exact(rows, into=sums)
            block = (
                memory.empty(sums.shape, self.dtype) if memory else torch.empty(sums.shape, dtype=self.dtype)
            )
            block.copy_(sums if self.seed is None else rounding(sums))
            if not all(math.isfinite(bound.item()) for bound in block.aminmax()):
                raise CheckpointError(
                    f"{self.name}: merged, it holds values that are not finite in {dtype_name(self.dtype)}"
                )
            yield block

    def rounding(self) -> Callable[[Tensor], Tensor]:
        """The function that rounds exact rows to `dtype`; call it in the order of row_slices."""
        if self.seed is None:
            return lambda exact: exact.to(self.dtype)
        # A generator of its own, so that a tensor does not depend on which others are merged.
        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]))
        return lambda exact: rounded(exact, self.dtype, generator)

    def row_slices(self) -> Iterator[slice]:
        """The rows that are computed at a time."""
        step = rows_at_a_time(self.shape, torch.float32.itemsize)
        return (slice(first, first + step) for first in range(0, self.shape[0], step))

    def before(self, rows: slice) -> Tensor:
        """These rows of what the last link was trained on, in W's own dtype."""
        if not self.links:
            return self.start[rows]
        return dataclasses.replace(self, links=self.links[:-1]).exact(rows).to(self.own)

    def exact(self, rows: slice, into: Tensor | None = None) -> Tensor:
        """These rows before the last rounding, in fp32 or better; in the memory of `into`, an
        earlier result, if they fit there."""
        before = self.before(rows)
        if into is not None and len(before) <= len(into):
            total = into[: len(before)].copy_(before)
        else:
            total = before.to(torch.promote_types(before.dtype, torch.float32), copy=True)
        for added in self.links[-1] if self.links else ():
            added.add_to(total, before, rows)
        return total

    def tensor(self) -> Tensor:
        """All of it, in memory; a tensor without an update is the base's own, still
        memory-mapped."""
        if self.is_stored:
            return self.start
        whole = torch.empty(self.shape, dtype=self.dtype)
        with one_thread():  # as it is written: the same bits in memory and on the disk
            for rows, block in zip(self.row_slices(), self.blocks(), strict=True):
                whole[rows] = block
        return whole


Plan = dict[str, MergedTensor]
"""The tensors of a merged model by name: nothing is computed before it is asked for."""


def rounded(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """A tensor in another dtype, rounded to the nearest value, ties to even.

    With a generator, bf16 and fp16 are rounded to one of the two neighbours at random, more often
    to the nearer one, so that the mean is the exact value: updates smaller than the distance
    between two neighbours survive in the mean of many weights.
    """
    nearest = exact.to(dtype)
    if generator is None or dtype.itemsize != 2:
        return nearest
    # Neighbours in magnitude are neighbours as integers, subnormal numbers and zero included.
    error = exact.abs() - nearest.to(exact.dtype).abs()
    neighbour = (nearest.view(torch.int16) + error.sign().to(torch.int16)).view(dtype)
    # Beyond the largest number the distance is infinite, and the chance 0.
    chance = error / (neighbour.to(exact.dtype).abs() - nearest.to(exact.dtype).abs())
    # Where the error is 0, the chance is 0 / 0 = NaN, and the comparison false.
    taken = torch.rand(exact.shape, generator=generator) < chance
    return torch.where(taken, neighbour, nearest)


def merge_chain(chain: Chain) -> tuple[dict[str, Tensor], Architecture]:
    """The weights that a chain stands for: every adapter merged, one after the other, in the base's
    dtype. Tensors without an update are the base's own, still memory-mapped."""
    plan, config = plan_merge(chain)
    return in_memory(plan), config


def in_memory(
    plan: Plan, *, as_stored: Callable[[str], bool] = lambda name: False, late: bool = False
) -> dict[str, Tensor | LazyTensor]:
    """The tensors of a plan, which is emptied on the way, computed. Those without an update are the
    base's own, still memory-mapped; a quantized one is dequantised unless its name is to stay
    `as_stored`. With `late`, those names that no file holds are still to be computed."""

    def weight(name: str, tensor: MergedTensor) -> Tensor | LazyTensor:
        if late and as_stored(name) and tensor.links:
            return tensor
        if isinstance(tensor.start, Quantized) and not tensor.links and as_stored(name):
            return tensor.start if late else tensor.start.settled()
        return tensor.tensor()

    return {name: weight(name, plan.pop(name)) for name in list(plan)}


def plan_merge(chain: Chain) -> tuple[Plan, Architecture]:
    """What `merge_chain` computes, with nothing computed yet. An adapter that was trained on its base
    in few bits is added to the values of these bits."""
    plan = {
        name: MergedTensor(name, tensor, tensor.dtype, tensor.dtype)
        for name, tensor in chain.base.tensors.items()
    }
    config = chain.config
    for adapter in chain.adapters:
        plan = as_trained(plan, config, adapter, chain)
        plan, config = add_adapters(plan, config, [(adapter, 1.0)])
    return plan, config


def plan_sum(chains: list[Chain], weights: list[float]) -> tuple[Plan, Architecture]:
    """The same for base + Σ weight · update over the outermost adapters of chains that share their
    base, which may be an adapter itself."""
    plan, config = plan_merge(chains[0].inner)
    plan = as_trained(plan, config, chains[0].top, chains[0])
    tops = [(chain.top, weight) for chain, weight in zip(chains, weights, strict=True)]
    return add_adapters(plan, config, tops)


def add_adapters(
    plan: Plan, config: Architecture, adapters: list[tuple[Adapter, float]]
) -> tuple[Plan, Architecture]:
    """A plan with one more link: W + Σ weight · (W' - W) over adapters that were trained on this
    very model.

    An adapter gives W' by an update, or as a tensor that it holds whole. An update of a tied output
    head, or of the embedding that it is tied to, unties them: the result has a head of its own, and
    its config says so. The weight below such an update serves both (`whole_of`). A whole embedding
    of more or fewer rows changes the size of the vocabulary. An adapter of weight 0 changes nothing
    at all. Raises CheckpointError for a layer that the base lacks or whose shape differs, and for
    adapters that cannot be added up.
    """
    _check_tokens(adapters)
    _check_quantised(adapters)
    adapters = [
        (dataclasses.replace(adapter, whole=whole_of(adapter, config)), weight)
        for adapter, weight in adapters
        if weight != 0
    ]
    sole = len(adapters) == 1 and adapters[0][1] == 1
    num_rows = _vocabulary(config, adapters, sole=sole)
    plan, config = _untied(plan, config, [adapter for adapter, _ in adapters], num_rows)
    merged = dict(plan)
    added: dict[str, list[Added]] = {}
    for adapter, weight in adapters:
        for name, tensor in adapter.whole.items():
            _check_whole(merged, name, tensor, adapter, (num_rows, config.hidden_size))
            if sole:
                merged[name] = dataclasses.replace(merged[name], start=tensor, links=())
            else:
                added.setdefault(name, []).append(Added(tensor, fitting(weight, f"{adapter.file}: {name}")))
    if num_rows != config.vocab_size:
        if HEAD in merged and merged[HEAD].shape[0] != num_rows:
            raise CheckpointError(
                f"{adapters[0][0].file}: has an embedding of {num_rows} rows, but no output head of that size"
            )
        config = dataclasses.replace(config, vocab_size=num_rows)
    for adapter, weight in adapters:
        for module, update in adapter.updates.items():
            name = f"{module}.weight"
            _check_update(merged, name, update, adapter)
            fitting(weight * update.scale, f"{adapter.file}: {module}")
            added.setdefault(name, []).append(Added(update, weight))
    for name, terms in added.items():
        merged[name] = dataclasses.replace(merged[name], links=(*merged[name].links, tuple(terms)))
    return merged, config


def whole_of(adapter: Adapter, config: Architecture) -> dict[str, Tensor]:
    """The tensors that an adapter of this model puts in place of others.

    Where it updates a layer and also holds its weight, that weight is the one below the update.
    A tied embedding and output head share it, so it replaces both.
    """
    whole = adapter.whole
    if config.tie_word_embeddings:
        for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
            if name in whole and name in names_of(adapter.updates) and other not in whole:
                whole = {**whole, other: whole[name]}
    return whole


def _check_tokens(adapters: list[tuple[Adapter, float]]) -> None:
    """Raises CheckpointError if one of several adapters adds tokens, or one at another weight than 1:
    the base has no values for their rows, and one number may stand for different tokens."""
    for adapter, weight in adapters:
        if adapter.rows is not None and (len(adapters) > 1 or weight != 1):
            raise CheckpointError(
                f"{adapter.file}: adds tokens; such an adapter can only be merged alone and at strength 1, "
                "and others trained on the result"
            )


def _check_quantised(adapters: list[tuple[Adapter, float]]) -> None:
    """Raises CheckpointError if one of several adapters makes up for what quantising lost, or one at
    another weight than 1: that has to be made up for once."""
    for adapter, weight in adapters:
        if adapter.needs_quantised and (len(adapters) > 1 or weight != 1):
            raise CheckpointError(
                f"{adapter.file}: was started by LoftQ; such an adapter can only be merged alone and at "
                "strength 1, and others trained on the result"
            )


def _vocabulary(config: Architecture, adapters: list[tuple[Adapter, float]], *, sole: bool) -> int:
    """The rows of the embedding with these adapters. Raises CheckpointError if they change it and
    are not merged alone and at weight 1."""
    for adapter, _ in adapters:
        found = adapter.whole.get(EMBEDDING)
        if found is None or found.size(0) == config.vocab_size:
            continue
        if sole:
            return found.size(0)
        raise CheckpointError(
            f"{adapter.file}: changes the vocabulary from {config.vocab_size} to {found.size(0)} rows; "
            "such an adapter can only be merged alone and at strength 1"
        )
    return config.vocab_size


def _untied(
    plan: Plan, config: Architecture, adapters: list[Adapter], num_rows: int
) -> tuple[Plan, Architecture]:
    """The plan with an output head of its own, if one of the adapters changes a tied one."""
    changed = {name for adapter in adapters for name in (*names_of(adapter.updates), *adapter.whole)}
    touched = {HEAD, EMBEDDING} & changed
    # An embedding that was resized keeps its tie: a head of the old size would not fit it.
    resized = touched == {EMBEDDING} and num_rows != config.vocab_size
    tied = touched == {EMBEDDING} and all(
        adapter.rows is not None and EMBEDDING in adapter.rows.tensors
        for adapter in adapters
        if EMBEDDING in adapter.whole or EMBEDDING in names_of(adapter.updates)
    )  # rows of added tokens are those of the head, too
    if not config.tie_word_embeddings or not touched or resized or tied:
        return plan, config
    head = dataclasses.replace(plan[EMBEDDING], name=HEAD)
    return {**plan, HEAD: head}, dataclasses.replace(config, tie_word_embeddings=False)


def _check_whole(plan: Plan, name: str, tensor: Tensor, adapter: Adapter, resized: tuple[int, int]) -> None:
    if name not in plan:
        raise CheckpointError(f"{adapter.file}: replaces {name}, which the base does not have")
    shape = tuple(plan[name].shape)
    may_be_resized = name in (HEAD, EMBEDDING) and tensor.shape == resized
    if shape != tensor.shape and not may_be_resized:
        raise CheckpointError(
            f"{adapter.file}: replaces {name} by {tuple(tensor.shape)}; the base has {shape}"
        )


def _check_update(plan: Plan, name: str, update: Update, adapter: Adapter) -> None:
    module = name.removesuffix(".weight")
    if name not in plan:
        raise CheckpointError(f"{adapter.file}: updates {module}, which the base does not have")
    shape = tuple(plan[name].shape)
    if shape != update.shape:
        size = " x ".join(map(str, update.shape))
        raise CheckpointError(f"{adapter.file}: updates {module} as {size}; the base has {shape}")


def retyped(plan: Plan, *, like: Plan) -> Plan:
    """The same tensors in the dtypes that another plan has, rounded to the nearest."""
    return {name: dataclasses.replace(tensor, dtype=like[name].dtype) for name, tensor in plan.items()}


def converted(plan: Plan, dtype: torch.dtype | None, *, seed: int | None = None) -> Plan:
    """The same tensors in `dtype` (None: each in its own), rounded at random if there is a seed."""
    return {
        name: dataclasses.replace(
            tensor,
            dtype=dtype if dtype is not None and tensor.own.is_floating_point else tensor.own,
            seed=seed,
        )
        for name, tensor in plan.items()
    }
