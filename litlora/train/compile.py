"""--train.compile: torch.compile of the blocks, which all share what is compiled for the first of
their kind."""

import torch

from litlora.errors import UserError
from litlora.kernels.attention import packed_attention
from litlora.model import GPT
from litlora.train.memory import computed_again


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile cannot compile for this device: for the CPU it needs a C++
    compiler, for a GPU Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3, device=device))
    except Exception as error:  # of many kinds, as the parts of the compiler that can be missing
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        need = (
            "a C++ compiler (g++, or the one named by CXX)"
            if device.type == "cpu"
            else "Triton and a C compiler"
        )
        raise UserError(
            f"--train.compile: torch.compile does not work here ({reason}); it needs {need}"
        ) from None


def compile_blocks(model: GPT, *, recomputed: bool = False) -> None:
    """Compile every block in place, for any number of tokens; `recomputed`: and compute it again in
    the backward. Names stay.

    Attention over a pack stays as it is: its loop over the lengths would be compiled anew for every
    pack.
    """
    attention = torch.compiler.disable(packed_attention)
    for block in model.model.layers:
        block.self_attn.packed_attention = attention
        # A block that computes itself again is compiled inside of that: the compiler leaves alone
        # what it cannot take in one piece.
        forward = torch.compile(type(block).forward.__get__(block), dynamic=True)
        block.forward = computed_again(forward) if recomputed else forward
