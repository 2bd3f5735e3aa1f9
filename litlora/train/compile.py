"""torch.compile of a model's blocks: all of them share what was compiled for the first of their
kind."""

import torch

from litlora.errors import UserError, setting
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantized import QuantizedWeight
from litlora.kernels.attention import packed_attention
from litlora.kernels.attention_op import register
from litlora.model import GPT
from litlora.train.activations import computed_again


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


def compile_blocks(model: GPT, *, recomputed: bool = False) -> None:
    """Compile every block in place, for any number of tokens; with `recomputed`, the backward also
    computes it again. Names stay the same.

    Attention over a pack is one operation to the compiler, or, with a softcap or sinks, not compiled.
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
            scores = getattr(attention, "softcap", None), getattr(attention, "sinks", None)
            if scores != (None, None):
                attention.packed_attention = outside
        # The block is compiled inside of what computes it again, since the compiler skips what it
        # cannot compile in one piece.
        forward = torch.compile(type(block).forward.__get__(block), dynamic=True)
        block.forward = computed_again(forward) if recomputed else forward
