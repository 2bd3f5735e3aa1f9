"""torch.compile of a model's blocks, all of which share what was compiled for the first of their kind,
and of the loss at its output head."""

from collections.abc import Callable
from dataclasses import replace

import torch

from litlora.errors import UserError, setting
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantized import QuantizedWeight
from litlora.kernels.attention import packed_attention
from litlora.kernels.attention_op import register
from litlora.kernels.cross_entropy import plain_tile
from litlora.model import GPT, LanguageModel
from litlora.settings import AUTO, Finetune
from litlora.train.activations import computed_again
from litlora.train.objective import Objective


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile does not work for this device: it needs a C++ compiler for the
    CPU, and Triton for a GPU."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3, device=device))
    except Exception as error:  # many parts of the compiler can be missing, each in its own way
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        on_cpu = device.type == "cpu"
        need = "a C++ compiler (g++, or the one named by CXX)" if on_cpu else "Triton and a C compiler"
        raise UserError(
            f"{setting('compile')}: torch.compile does not work here ({reason}); it needs {need}"
        ) from None


def settle_compile(
    settings: Finetune, model: LanguageModel, device: torch.device, say: Callable[[str], None]
) -> Finetune:
    """The settings with what compile auto means: true on a GPU, unless something forbids it; a line says
    what."""
    if settings.train.compile != AUTO:
        return settings
    hindrance = _hindrance(settings, model)
    if device.type == "cuda" and hindrance is None:
        try:
            check_compiler(device)
        except UserError as error:
            hindrance = str(error)
    if device.type == "cuda":
        say("compile: the blocks, in the first step" if hindrance is None else f"compile: false: {hindrance}")
    compiled = device.type == "cuda" and hindrance is None
    return replace(settings, train=replace(settings.train, compile=compiled))


def _hindrance(settings: Finetune, model: LanguageModel) -> str | None:
    """Why the blocks of a run are not compiled, if they cannot be, or gain nothing."""
    if not model.packs:
        return "this model runs through transformers"
    if stored_weights(model):
        return "a base in few bits, or one that streams, is not computed inside of compiled blocks"
    for name, is_set in (
        ("offload_activations", settings.train.offload_activations),
        ("strategy", settings.strategy == "fsdp"),
        ("every", settings.eval.every),
        ("prompts", settings.report.prompts),
    ):
        if is_set:
            return f"{setting(name)} does not go together with it"
    return None


def compile_blocks(model: GPT, *, recomputed: bool = False, backend: str = "inductor") -> None:
    """Compile every block in place, for any number of tokens; with `recomputed`, the backward also
    computes it again. Names stay the same.

    Attention over a pack is one operation to the compiler, or, with a softcap, sinks or chunks, whose
    number depends on each length, not compiled.
    Nor is linear attention, which loops over chunks of the tokens; nor is dequantising, whose memory
    is shared by all layers.
    """
    for weight in stored_weights(model).values():
        if isinstance(weight, QuantizedWeight):
            weight.values = torch.compiler.disable(weight.values)
    register()
    outside = torch.compiler.disable(packed_attention)
    for block in model.blocks:
        if block.is_linear:
            block.linear_attn.forward = torch.compiler.disable(block.linear_attn.forward)
        else:
            attention = block.self_attn
            if any(getattr(attention, name, None) is not None for name in ("softcap", "sinks", "chunk")):
                attention.packed_attention = outside
        # The block is compiled inside of what computes it again, since the compiler skips what it
        # cannot compile in one piece.
        forward = torch.compile(type(block).forward.__get__(block), dynamic=True, backend=backend)
        block.forward = computed_again(forward) if recomputed else forward


def compile_head(objective: Objective, *, backend: str = "inductor") -> None:
    """Compile the loss at a frozen output head: one function for each tile of the vocabulary, of any
    size."""
    objective.head_tile = torch.compile(plain_tile, dynamic=True, backend=backend)
