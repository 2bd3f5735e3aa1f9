"""What a run says of itself, in lines: before it trains, and at its end."""

import shlex
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from litlora.frozen.bitsandbytes import FourBit
from litlora.frozen.fp8_units import multiplies_in_fp8
from litlora.frozen.later import LateWeight
from litlora.frozen.linear import LINEAR, stored_weights
from litlora.frozen.native import four_bit_on
from litlora.frozen.quantized import QuantizedWeight
from litlora.lora.layer import lora_layers
from litlora.prompts import lacking_tokens
from litlora.report.console import duration
from litlora.report.events import Done
from litlora.report.page import PAGE_FILE
from litlora.settings.targets import kind_of
from litlora.train.best import closing_lines
from litlora.train.freeze import frozen_notice
from litlora.train.plan import described
from litlora.train.vocabulary import cut_notice

if TYPE_CHECKING:
    from litlora.train.run import Run


def what_trains(run: "Run", num_rounded: int) -> list[str]:
    """The base, what of it trains, the precision and the prompt style."""
    lines: list[str] = []
    say = lines.append
    weights, precision = list(run.model.parameters()), run.precision
    trainable = sum(p.numel() for p in weights if p.requires_grad)
    everything = sum(w.shape.numel() for w in (*weights, *stored_weights(run.model).values()))
    frozen = everything - trainable or everything
    say(f"base: {run.base.directory}, {frozen:,} parameters; {trainable:,} train")
    if choice := describe_choice(run.model):
        say(f"adapters: {choice}")
    if run.settings.train.freeze:
        say(f"frozen: {frozen_notice(run.model)}")
    lines += _quantised(run)
    if notice := products_notice(run.model, run.parallel.device):
        say(f"note: {notice}")
    say(f"precision: {precision.name} ({precision.reason})")
    if num_rounded:
        trains_base = run.method.trains_base
        say(
            f"note: {precision.name} rounds {num_rounded:,} of the base's tensors in memory; "
            + ("the result keeps their dtype" if trains_base else "chat and merging use them as stored")
        )
    if any(p.requires_grad and p.dtype == torch.bfloat16 for p in weights):
        say(
            "note: weights of the base train in bf16, which loses updates below 1/256 of a weight; "
            "precision bf16-mixed keeps them"
        )
    for notice in run.loaded.chain.notices:
        say(f"note: {notice}")
    if run.dataset.notice:
        say(f"data: {run.dataset.notice}")
    for notice in run.dataset.notices:
        say(f"data: {notice}")
    say(f"prompt style: {run.style.title} ({run.style_reason})")
    if run.settings.tokenizer.add_tokens:
        say(f"tokenizer: {run.added.notice}")
    if run.style.called and (needed := lacking_tokens(run.style, run.loaded.tokenizer)):
        say(f"note: {cut_notice(needed)}")
    return lines


def describe_choice(model: nn.Module) -> str | None:
    """The kinds of linear layers that have an adapter, and those that have none, each with its count;
    None for a model without adapters."""
    adapted = lora_layers(model)
    if not adapted:
        return None
    inside = {id(layer.linear) for layer in adapted.values()}
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and id(module) not in inside
    ]
    chosen, left = (
        ", ".join(f"{count} {kind}" for kind, count in Counter(map(kind_of, names)).items())
        for names in (adapted, others)
    )
    more = getattr(model, "not_adapted", dict)()  # what has no linear layer of its own
    left = ", ".join([left, *(f"{count} {kind}" for kind, count in more.items())]).removeprefix(", ")
    return f"{chosen}; none on {left}" if left else chosen


def _quantised(run: "Run") -> list[str]:
    if (quantized := run.loaded.quantized) is None:
        return []
    weights, how = list(stored_weights(run.model).values()), quantized.quantizer.describe()
    if any(isinstance(weight, LateWeight) for weight in weights):
        return [f"quantised: {len(weights)} layers to {how}, each when its block is divided"]
    size = sum(weight.nbytes for weight in weights) / 2**20
    dense = sum(weight.shape.numel() * weight.dtype.itemsize for weight in weights) / 2**20
    return [f"quantised: {len(weights)} layers to {how}: {size:,.1f} MiB instead of {dense:,.1f}"]


def products_notice(model: nn.Module, device: torch.device) -> str | None:
    """What a GPU makes of this model's weights in few bits, if that is not what is expected."""
    weights = stored_weights(model).values() if device.type == "cuda" else ()
    matrices = [weight.matrix for weight in weights if isinstance(weight, QuantizedWeight)]
    if any(multiplies_in_fp8(matrix, device) for matrix in matrices):
        return (
            "this GPU multiplies in fp8: where precision is bf16-true, each row that a weight in fp8 is "
            "multiplied by is rounded to fp8, too"
        )
    if any(isinstance(matrix, FourBit) for matrix in matrices) and four_bit_on(device) is None:
        return (
            "weights in 4 bits are computed by plain operations, slower than by bitsandbytes' kernel; "
            "install it with: pip install 'litlora[bitsandbytes]'"
        )
    return None


def what_it_learns(run: "Run") -> str:
    """The examples, in numbers."""
    lengths = run.objective.lengths(run.data.train)
    how = described(lengths, run.settings.train, run.data.seed, packs=run.model.packs)
    return (
        f"data: {len(lengths):,} examples to train on, {len(run.data.val):,} to validate; "
        f"{sum(lengths):,} tokens, the longest example {max(lengths):,}{how}"
    )


def outcome(run: "Run", done: Done) -> list[str]:
    """How a complete run ended, what it made, and what to do with it."""
    val = "" if done.val_loss is None else f", validation loss {done.val_loss:.4f}"
    lines = [
        f"{done.steps:,} steps in {duration(done.seconds)}, {done.tokens / done.seconds:,.0f} tokens/s, "
        f"peak memory {done.peak_memory / 2**30:.2f} GiB; loss {done.loss:.4f}{val}",
        *closing_lines(done),
    ]
    if done.skipped:
        lines.append(f"skipped: {done.skipped:,} steps whose loss or gradient was not finite")
    if run.dataset.notice:
        lines.append(f"trained on: {run.dataset.notice}")
    size = run.result.stat().st_size
    return [
        *lines,
        f"result: {run.result} ({size:,} bytes: {run.method.stores})",
        f"report: {run.path / PAGE_FILE}",
        f"next: {run.method.next.format(result=shlex.quote(str(run.result.parent)))}",
    ]


def kept(done: Done) -> str:
    """What remains of a run that did not end."""
    if done.checkpoint is None:
        return "no checkpoint could be saved"
    return f"the newest checkpoint is {done.checkpoint}"
