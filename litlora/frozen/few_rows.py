"""Products of few rows with a weight, which read it as it is stored.

A token that is decoded multiplies by every weight once: what counts is how few bytes are read, and
that all threads read them. Compiled code does so (litlora/kernels/cpu.py); without a compiler, weights in
few bits are computed in pieces that stay in the processor's cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.frozen.dense import Dense
from litlora.frozen.few_bits import Quantized
from litlora.frozen.scratch import scratch
from litlora.kernels import cpu

FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Of plain weights, by cpu.c's names."""
TILE_BYTES = 2 << 20
"""Values that exist at a time, without compiled code."""


def product(x: Tensor, matrix: Quantized, compiled: cpu.Compiled | None) -> Tensor | None:
    """x Wᵀ (..., out) for x (..., in), of the dtype of x, where nothing learns; None where computing
    with W's values is as quick, or where these were rounded to fewer bits than x has.

    W itself is not rounded, but where its compiled code does so. `compiled` is what reads the matrix for x
    of this dtype, if anything does.
    """
    if not (cpu.is_few(x) and cpu.is_plain(x)):
        return None
    if compiled is not None:
        return compiled.times(x).to(x.dtype)
    if x.dtype != matrix.dtype:
        return None
    sums = _in_pieces(x.reshape(-1, x.size(-1)).float(), matrix)
    return sums.to(x.dtype).view(*x.shape[:-1], -1)


def _in_pieces(x: Tensor, matrix: Quantized) -> Tensor:
    """x (n, in) Wᵀ in fp32, whose values exist for some rows of W at a time."""
    step = max(1, TILE_BYTES // (matrix.columns * torch.float32.itemsize))
    sums, row = x.new_empty(len(x), len(matrix.stored_rows)), 0
    for values in matrix.parts(step):
        torch.mm(x, values.t(), out=sums[:, row : row + len(values)])
        row += len(values)
    return sums


class FewRows(Dense):
    """A plain weight that all threads read: torch reads it by one, in fp32. In 16 bits more rows are
    multiplied in fp32, on a processor that has no products of 16 bits."""

    def __init__(self, weight: Tensor, compiled: cpu.Compiled) -> None:
        super().__init__(weight)
        self.compiled = compiled

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.product(x, bias)
        return F.linear(x, self.weight, bias) if y is None else y

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """x Wᵀ + b by compiled code, for x in the dtype of W or a larger one; None where torch's is as
        quick, or something learns."""
        if torch.promote_types(x.dtype, self.dtype) != x.dtype or not cpu.is_plain(x):
            return None
        if cpu.is_few(x) and x.dtype != torch.float64:
            y = self.compiled.times(x)
            return (y if bias is None else y.add_(bias)).to(x.dtype)
        if not is_emulated(self.weight) or not is_emulated(x) or not x.numel():
            return None
        W = scratch(self.shape, torch.float32, self.device)
        if x.dtype != self.dtype or not self.compiled.write_to(W, torch.float32):
            return None
        return F.linear(x.float(), W, None if bias is None else bias.float()).to(x.dtype)


def few_rows(weight: Tensor) -> FewRows | None:
    """A plain weight (out, in) with the code that reads it; None where there is none."""
    if weight.ndim != 2 or weight.dtype not in FORMATS or not weight.is_contiguous():
        return None
    if not cpu.has_threads():
        return None
    rows, columns = weight.shape
    layout = cpu.Layout(
        format=FORMATS[weight.dtype],
        columns=columns,
        entries=weight.detach(),
        row_bytes=columns * weight.element_size(),
    )
    found = cpu.compiled(layout, range(rows))
    return None if found is None else FewRows(weight.detach(), found)


def is_emulated(x: Tensor) -> bool:
    """Whether this processor has no products in the dtype of x: torch's are slow, and fp32's are not."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not gains(x)


def gains(weight: Tensor) -> bool:
    """Whether products with few rows are faster packed, on this machine: in the dtypes of 16 bits
    for which oneDNN has kernels here. Elsewhere torch's own read a plain weight at full speed."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return weight.dtype in supported and supported[weight.dtype]()
