"""Is a merged model the model that was tested? Compares its file with the base and its live
adapters, on real tokens and value by value."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litlora.adapters.merge import Added, MergedTensor, Plan
from litlora.adapters.unmerged import Unmerged
from litlora.checkpoint import open_checkpoint
from litlora.errors import CheckpointError
from litlora.lora import LoRALinear, Update
from litlora.lora.variants import variant_named
from litlora.model import LanguageModel, kind_of
from litlora.storage.blocks import row_blocks, rows_at_a_time
from litlora.storage.pages import MAX_HELD, Pages
from litlora.tokenizer import Tokenizer
from litlora.transformers_config import Architecture

PROBE = """\
The merged model must be the model that was tested. Question: what is the capital of France, \
and how many people live there?
Answer: Paris; about 2.1 million. 17 + 25 = 42. def add(a, b): return a + b. \
Der Fuchs springt über den Hund. ¿Qué hora es? 你好。
"""
PROBE_TOKENS = 96
NOISE = 64
"""Live and merged logits may differ by this many roundings of their own size (root of the mean
square; see `tolerance`)."""
MUCH = 0.2
"""A loss of this share of an update to rounding is worth a word."""


@dataclass(frozen=True)
class Report:
    """What a comparison of live and merged found."""

    tokens: int
    max_difference: float
    """Of two logits."""
    rms_difference: float
    """Root of the mean square over the vocabulary, of the median position: a router that picks
    another expert at a tie is not an error."""
    rms_logit: float
    """Of the live logits around their mean, a position at a time."""
    kl: float
    """Of the merged predictions from the live ones, nats a token."""
    agreement: float
    """Share of positions at which both put the same token first."""
    lost: float
    """What rounding took of all updates: |W' - (W + ΔW)| / |ΔW|, Frobenius norms over all updated
    layers."""
    worst: tuple[str, float] | None
    """The layer that lost the largest share, and the share; None if no layer was updated."""

    @property
    def loses_much(self) -> bool:
        """Whether a finer dtype or another rounding is worth thinking of."""
        return self.worst is not None and self.lost > MUCH

    def lines(self) -> list[str]:
        """The comparison, and last what rounding took."""
        rounding = "no weight was updated"
        if self.worst is not None:
            layer, share = self.worst
            rounding = f"rounding took {self.lost:.2%} of the update; most in {layer}: {share:.2%}"
        return [
            f"verified on {self.tokens} tokens, merged beside live: largest difference of two logits "
            f"{self.max_difference:.2g} (they spread by {self.rms_logit:.2g}), KL {self.kl:.1e} nats, "
            f"same first choice {self.agreement:.1%}",
            rounding,
        ]


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference of live and merged logits that is due to rounding, relative to how far
    logits spread.

    A weight that is rounded to `dtype` is off by up to u = eps / 2 of itself (bf16: 2^-9, fp16:
    2^-12, fp32: 2^-25), so that each layer's output is off by about u of its size, at random.
    Dozens of layers add up to a few u; NOISE leaves an order of magnitude. Both models compute in
    fp32, whose own roundings set the limit for fp32.
    """
    return NOISE * max(torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps)


def bytes_needed(plan: Plan, config: Architecture) -> int:
    """Memory for parts of the base and of the merged model, which are mapped and given back once they
    were read, and for the largest layer in fp32. A model of transformers is in memory whole."""
    sizes = [tensor.shape.numel() for tensor in plan.values()]
    mapped = sum(
        tensor.shape.numel() * (tensor.own.itemsize + tensor.dtype.itemsize) for tensor in plan.values()
    )
    if not kind_of(config).packs:  # the live and the merged one, each whole
        return 2 * sum(sizes) * torch.float32.itemsize + mapped
    return max(sizes) * torch.float32.itemsize + min(mapped, 4 * MAX_HELD)


def probe_ids(sources: list[Path], config: Architecture) -> tuple[Tensor, str | None]:
    """Token ids (1, T) of a text that most tokenizers cut into many kinds of tokens, and a notice
    if there was no tokenizer."""
    limit = min(PROBE_TOKENS, config.max_position_embeddings)
    try:
        ids = [i for i in Tokenizer(sources).encode(PROBE) if i < config.vocab_size][:limit]
        why = "its ids have no row in the embedding"
    except CheckpointError as error:
        ids, why = [], str(error)
    if ids:
        return torch.tensor([ids]), None
    notice = f"the probe's tokens are spread over the vocabulary, as no text can be encoded: {why}"
    return torch.linspace(0, config.vocab_size - 1, limit).long()[None], notice


@torch.inference_mode()
def verify(
    plan: Plan, config: Architecture, directory: Path, ids: Tensor, unmerged: Unmerged | None = None
) -> Report:
    """Compare the checkpoint in `directory` with the plan that it was written from.

    Every value must be the exact sum rounded once, and the logits those of the base with live
    adapters, up to `tolerance`. Raises CheckpointError where they are not. `unmerged` is what a
    merge that unties the output head is compared with.
    """
    written = open_checkpoint(directory)
    lost, worst = _rounding_losses(plan, written.tensors)
    models = (
        live_model(plan, config, unmerged),
        (kind_of(written.config).from_tensors(written.config, written.tensors), {}),
    )
    # Side by side: threads that share one small product wait for each other, and for a long time
    # where other programs use the processor.
    with _workers(2, threads=max(1, torch.get_num_threads() // 2)) as pool:
        live, merged = pool.map(lambda model: logits(*model, ids), models)
    # A position at a time: the logits of a large vocabulary are large in float64.
    columns = zip(*map(compared, live, merged), strict=True)
    squared_spread, squared_difference, largest, kl, agreement = (
        torch.tensor(column, dtype=torch.float64) for column in columns
    )
    report = Report(
        tokens=ids.numel(),
        max_difference=largest.max().item(),
        rms_difference=squared_difference.median().sqrt().item(),
        rms_logit=squared_spread.mean().sqrt().item(),
        kl=max(0.0, kl.mean().item()),
        agreement=agreement.mean().item(),
        lost=lost,
        worst=worst,
    )
    dtypes = {tensor.dtype for tensor in plan.values() if tensor.dtype.is_floating_point}
    limit = max(map(tolerance, dtypes)) * report.rms_logit
    if not report.rms_difference <= limit:  # NaN must fail too
        raise CheckpointError(
            "the merge is not kept: the merged model is not the live one: their logits differ by "
            f"{report.rms_difference:.2g} in the root of the mean square, where rounding explains "
            f"{limit:.2g} (KL {report.kl:.1e}, same first choice {report.agreement:.1%})"
        )
    return report


@contextmanager
def _workers(count: int, *, threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` workers, each of which computes with so many threads of torch's.

    A worker that sets its number also sets that of threads which start later; it is restored on
    every path.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


# ---- the live model


Computed = dict[nn.Parameter, Callable[[slice], Tensor]]
"""Weights of which only some rows are in memory, when they are asked for."""


def live_model(
    plan: Plan, config: Architecture, unmerged: Unmerged | None = None
) -> tuple[LanguageModel, Computed]:
    """The model before its last merge, adapters live, all other weights as exact as they can be.

    Where the merge unties the output head, the head and the embedding are those of `unmerged`, and
    not what the plan made of them.

    Weights that are not mapped from a file (below the last link of a chain, put in another's place,
    or stored in a few bits) may be most of the model: those of linear layers and embeddings have no
    memory of their own, but where a variant such as DoRA reads them itself.
    """
    if unmerged is not None and unmerged.is_untied_by(config):
        model, computed = live_model({**plan, **unmerged.ends()}, config)
        unmerged.add_live(model)
        return model, computed
    tensors, links, parts = {}, {}, {}
    kinds = kind_of(config)
    layers = dict(kinds.without_weights(config).named_modules())
    for name, tensor in plan.items():
        layer, _, leaf = name.rpartition(".")
        kind = layers.get(layer)
        live = isinstance(kind, nn.Linear) and bool(tensor.links) and _can_be_live(tensor.links[-1])
        if live:
            links[layer] = tensor.links[-1]
        part = tensor.before if live or not tensor.links else tensor.exact
        is_read = live and not all(variant_named(one.value.variant).is_plain for one in tensor.links[-1])
        if _is_mapped(tensor, live):
            tensors[name] = tensor.start
        elif kinds.packs and isinstance(kind, (nn.Linear, nn.Embedding)) and leaf == "weight" and not is_read:
            tensors[name], parts[name] = torch.empty(1, dtype=tensor.own).expand(tensor.shape), part
        else:
            tensors[name] = torch.cat([part(rows) for rows in tensor.row_slices()])
    model = kinds.from_tensors(config, tensors)
    computed = {model.get_parameter(name): part for name, part in parts.items()}
    for layer, link in links.items():
        model.set_submodule(layer, _live_layer(model.get_submodule(layer), link))
    return model, computed


def _is_mapped(tensor: MergedTensor, live: bool) -> bool:
    """Whether the live model's weight is W itself, the base's own tensor, still memory-mapped."""
    only_live = len(tensor.links) == live
    return isinstance(tensor.start, Tensor) and only_live and tensor.start.dtype == tensor.own


def _can_be_live(link: tuple[Added, ...]) -> bool:
    """Whether one LoRALinear can compute what a link adds: plain updates, or a single update of
    another variant at factor 1."""
    if not all(isinstance(added.value, Update) for added in link):
        return False
    plain = all(variant_named(added.value.variant).is_plain for added in link)
    return plain or (len(link) == 1 and link[0].factor == 1)


def _live_layer(linear: nn.Linear, link: tuple[Added, ...]) -> LoRALinear:
    """The layer with a link's updates, live."""
    first = link[0].value
    if not variant_named(first.variant).is_plain:
        layer = LoRALinear(linear, first.rank, first.rank, variant=first.variant)
        layer.scale = first.scale
        layer.load_update(first)
        return layer
    rank = sum(added.value.rank for added in link)
    layer = LoRALinear(linear, rank, float(rank))  # a scale of 1: each factor goes into its B
    scaled = [added.value.B.float() * (added.factor * added.value.scale) for added in link]
    layer.lora_A = nn.Parameter(torch.cat([added.value.A.float() for added in link]))
    layer.lora_B = nn.Parameter(torch.cat(scaled, dim=1))
    return layer


@torch.inference_mode()
def logits(model: LanguageModel, computed: Computed, ids: Tensor) -> Tensor:
    """(T, V) of ids (1, T), in fp32 throughout. A model of transformers reads its layers' weights in
    ways of its own, so all of it becomes fp32 first."""
    if not model.packs:
        return model.in_fp32().eval()(ids)[0]
    with _computing_in_fp32(model, computed):
        return model.eval()(ids)[0]


def compared(live: Tensor, merged: Tensor) -> tuple[float, float, float, float, bool]:
    """Of two vectors of logits (V,): mean squares of live around its mean and of their difference,
    the largest difference, KL, and whether both put the same token first."""
    live, merged = live.double(), merged.double()
    difference, log_p, log_q = merged - live, live.log_softmax(dim=-1), merged.log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum().item()
    squares = ((live - live.mean()).square().mean().item(), difference.square().mean().item())
    return *squares, difference.abs().max().item(), kl, bool(live.argmax() == merged.argmax())


@contextmanager
def _computing_in_fp32(model: nn.Module, computed: Computed) -> Iterator[None]:
    """Keep the stored weights, but do not round activations: a layer's weights become fp32 while it
    computes."""
    kept: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            kept[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept.pop(parameter)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # convert the rows that are looked up, not the table
            handles.append(module.register_forward_hook(lambda module, ids, rows: rows.float()))
        elif not isinstance(module, nn.Linear):
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        with _RowsAtATime(computed):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _RowsAtATime(TorchFunctionMode):
    """F.linear converts a weight that is not fp32 a block of rows at a time: an output head may
    take gigabytes."""

    def __init__(self, computed: Computed) -> None:
        super().__init__()
        self._computed, self._pages = computed, Pages()

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._call(func, args, kwargs or {})
        if func is F.linear and args[1] not in self._computed:
            self._pages.done_with(args[1].detach())
        return result

    def _call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is F.embedding and args[1] in self._computed:
            part = self._computed[args[1]]
            rows = [part(slice(i, i + 1)) for i in args[0].flatten().tolist()]
            return torch.cat(rows).view(*args[0].shape, -1)
        if func is not F.linear or (args[1].dtype == torch.float32 and args[1] not in self._computed):
            return func(*args, **kwargs)
        x, weight, bias = (*args, None)[:3]
        part = self._computed.get(weight, weight.__getitem__)
        step = rows_at_a_time(weight.shape, torch.float32.itemsize)
        # One block of memory for all rows: fresh memory costs more than the product.
        wide = torch.empty(min(step, weight.size(0)), weight.size(1))
        result = x.new_empty(*x.shape[:-1], weight.size(0))
        for first in range(0, weight.size(0), step):
            block = part(slice(first, first + step))
            result[..., first : first + step] = func(x, wide[: len(block)].copy_(block))
        return result if bias is None else result.add_(bias)


# ---- value by value


def _rounding_losses(plan: Plan, written: dict[str, Tensor]) -> tuple[float, tuple[str, float] | None]:
    """The share that rounding took of all updates, and the layer that lost most with its own share.
    Raises CheckpointError for what rounding does not explain."""
    if plan.keys() != written.keys():
        raise CheckpointError("the merge is not kept: the file holds other tensors than were merged")
    losses, updates, shares = 0.0, 0.0, {}
    for name, (lost, update) in _squares(plan, written).items():
        if update:
            shares[name.removesuffix(".weight")] = (lost / update) ** 0.5
            losses, updates = losses + lost, updates + update
    share = (losses / updates) ** 0.5 if updates else 0.0
    return share, max(shares.items(), key=lambda item: item[1], default=None)


def _squares(plan: Plan, written: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Of every tensor the squares of what rounding took and of its updates. Raises CheckpointError
    for one that is not the sum, rounded."""
    squares, pages = {}, Pages()
    with _workers(torch.get_num_threads(), threads=1) as pool:  # one thread, as the sums were made
        found = pool.map(_compare, plan.values(), [written[name] for name in plan])
        for name, (fits, lost, update) in zip(plan, found, strict=True):
            if not fits:
                pool.shutdown(cancel_futures=True)
                raise CheckpointError(
                    f"the merge is not kept: {name} is not the sum that was to be written; "
                    "try again, or check the disk"
                )
            squares[name] = lost, update
            pages.done_with(*plan[name].sources(), written[name])
    return squares


@torch.inference_mode()
def _compare(tensor: MergedTensor, found: Tensor) -> tuple[bool, float, float]:
    """Whether `found` is the tensor, rounded; the squares of what rounding took and of its
    updates."""
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        return False, 0.0, 0.0
    if tensor.is_stored:
        pairs = zip(row_blocks(tensor.start), row_blocks(found), strict=True)
        same = (a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in pairs)
        return (tensor.start.is_contiguous() and all(same)) or torch.equal(tensor.start, found), 0.0, 0.0
    fits, lost, update = True, 0.0, 0.0
    exact, scratch, rounding = None, torch.empty(0), tensor.rounding()
    for rows in tensor.row_slices():
        exact, before = tensor.exact(rows, into=exact), tensor.before(rows)
        if exact.shape != scratch.shape:  # only twice: fresh memory costs more than the sums
            scratch = torch.empty_like(exact)
        same = torch.equal(rounding(exact), found[rows])
        fits = fits and (same or _is_rounded(found[rows], exact, before, tensor))
        lost += _square(scratch.copy_(found[rows]).sub_(exact))
        update += _square(scratch.copy_(before).sub_(exact)) if tensor.links else 0.0
    return fits, lost, update


def _square(block: Tensor) -> float:
    """The sum of squares of one block."""
    return torch.dot(block.flatten(), block.flatten()).item()


def _is_rounded(found: Tensor, exact: Tensor, before: Tensor, tensor: MergedTensor) -> bool:
    """Whether these rows are what the exact ones round to.

    The fp32 sum itself may differ a little: the order in which a product is added up depends on
    where its values lie in memory and on how many threads share it.
    """
    slack = (exact.abs() + before.abs()).mul_(16 * torch.finfo(exact.dtype).eps)
    if tensor.seed is None:  # rounding keeps the order of values
        lowest, highest = (exact - slack).to(found.dtype), (exact + slack).to(found.dtype)
        return bool((lowest <= found).all() and (found <= highest).all())
    info = torch.finfo(tensor.dtype)
    # At least the distance of two neighbours.
    step = exact.abs().clamp_(min=info.smallest_normal).mul_(info.eps)
    return bool(((found.to(exact.dtype) - exact).abs() <= slack + step).all())
