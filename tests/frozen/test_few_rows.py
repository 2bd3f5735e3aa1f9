"""Products of few rows are as exact as those with the stored values, with a compiler and without."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from litlora.frozen.awq import AWQ
from litlora.frozen.compressed import Int8, Packed
from litlora.frozen.few_rows import few_rows
from litlora.frozen.float8 import BlockFloat8
from litlora.frozen.ggml import BLOCK_FORMATS, GGML
from litlora.frozen.gptq import GPTQ
from litlora.frozen.methods import GPTQ_BITS
from litlora.frozen.mxfp4 import MXFP4
from litlora.frozen.quantize import QUANTIZERS
from litlora.frozen.quantized import QuantizedWeight
from litlora.kernels import cpu
from litlora.kernels.cpu_build import why_none

ROWS, COLUMNS = 200, 512
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def block_float8(dtype, facts):
    entries = torch.randn(ROWS, COLUMNS).to(dtype)
    return BlockFloat8(*facts, entries, torch.rand(2, 4) + 0.1, (128, 128))


def ggml(name, facts):
    """Random entries, with scales that are finite."""
    form = BLOCK_FORMATS[name]
    blocks = torch.randint(0, 256, (ROWS * COLUMNS // form.values, form.num_bytes), dtype=torch.uint8)
    for place in form.scales:
        blocks[:, place : place + 2] = torch.randn(len(blocks), 1).half().view(torch.uint8)
    return GGML(*facts, blocks.view(ROWS, -1), form)


def mxfp4(facts):
    packed = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8)
    exponents = torch.randint(118, 130, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    exponents[0] = torch.arange(16)  # powers that are subnormal, or nearly
    return MXFP4(*facts, packed, exponents)


def grouped(kind, bits, size, facts):
    """Random whole numbers with scales and zero points. `size` is that of a group, "any" for columns in no
    order, or None for scales and a zero point of a row."""
    shape = ROWS, COLUMNS // (64 if size == "any" else size or COLUMNS)
    scales, low = torch.randn(shape).ldexp(torch.randint(-24, -2, shape)), 128 if kind is Int8 else 0
    zeros = torch.randint(-low, 2**bits - low, shape).to(torch.int8 if low else torch.uint8)
    groups = torch.randint(shape[1], (COLUMNS,)).int() if size == "any" else size or COLUMNS
    words = {GPTQ: (COLUMNS * bits // 32, ROWS), AWQ: (COLUMNS, ROWS // 8)}.get(
        kind, (ROWS, COLUMNS * bits // 32)
    )
    packed = torch.randint(-(2**31), 2**31, words).int()
    packed = packed.t() if kind is GPTQ else packed.view(torch.int8) if kind is Int8 else packed
    return kind(*facts, packed, scales, zeros if size else 2 ** (bits - 1) - low, groups, bits)


GROUPED = {
    **{f"gptq {bits}": (GPTQ, bits, 128) for bits in GPTQ_BITS},
    "gptq act-order": (GPTQ, 3, "any"),
    "awq": (AWQ, 4, 32),
    "awq in small groups": (AWQ, 4, 16),
    "compressed 4": (Packed, 4, 256),
    "compressed 8": (Packed, 8, None),
    "compressed int8": (Int8, 8, 64),
    "compressed int8 act-order": (Int8, 8, "any"),
}
MADE = {
    **{kind: lambda W, name, file, how=how: grouped(*how, facts(W)) for kind, how in GROUPED.items()},
    **{kind: QUANTIZERS[kind].quantised for kind in QUANTIZERS},
    "fp8 in blocks": lambda W, name, file: block_float8(torch.float8_e4m3fn, facts(W)),
    "e5m2 in blocks": lambda W, name, file: block_float8(torch.float8_e5m2, facts(W)),
    "mxfp4": lambda W, name, file: mxfp4(facts(W)),
    **{kind: lambda W, name, file, kind=kind: ggml(kind, facts(W)) for kind in BLOCK_FORMATS},
}


def facts(W):
    return "w", Path("random"), W.dtype, W.size(1), range(len(W))


@pytest.mark.parametrize("kind", MADE)
def test_compiled_code_gives_the_stored_values_and_products_as_exact(kind):
    matrix = MADE[kind](torch.randn(ROWS, COLUMNS), "w", Path("random"))
    some = torch.randperm(ROWS)[:40]
    for own in (matrix, matrix.take(torch.arange(8, 120)), matrix.take(some)):
        exact, own = own.rows(), own.in_rows()
        if own.layout() is None or (found := cpu.compiled(own.layout(), own.stored_rows)) is None:
            assert why_none()
            pytest.skip(why_none())
        assert torch.equal(own.rows(), exact)
        for first, dtype in product(DTYPES, DTYPES):
            W = torch.empty(exact.shape, dtype=dtype)
            assert found.write_to(W, first) and torch.equal(W, exact.to(first).to(dtype))
        assert not found.write_to(W.double(), torch.float32)  # which it does not know
        x = torch.randn(cpu.MOST_ROWS, COLUMNS)
        y, expected = found.times(x), x.double() @ exact.double().t()
        assert (y - expected).norm() / expected.norm() < 3e-7
        for n in (1, 3):  # a sequence of a batch gets what it gets alone
            assert torch.equal(found.times(x[:n]), y[:n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MADE)
@torch.inference_mode()
def test_what_a_file_stores_is_multiplied_in_the_dtype_of_its_values(kind, dtype):
    weight = QuantizedWeight(MADE[kind](torch.randn(ROWS, COLUMNS).to(dtype), "w", Path("random")))
    weight.rounds = True
    if weight.compiled is None:
        pytest.skip(why_none())
    assert torch.float32 in weight.compiled_for
    x = torch.eye(COLUMNS)[:: COLUMNS // cpu.MOST_ROWS]  # rows that pick one value each
    W = weight.rows().float()[:, :: COLUMNS // cpu.MOST_ROWS]
    assert torch.equal(weight.times(x), W.t())
    assert torch.equal(weight.times(x[:1]), W.t()[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GROUPED)
def test_whole_numbers_in_groups_are_rounded_as_a_file_says(kind, dtype):
    matrix = grouped(*GROUPED[kind], ("w", Path("random"), dtype, COLUMNS, range(ROWS)))
    values, weight, odd = matrix.rows(), QuantizedWeight(matrix), torch.randn(3, COLUMNS, dtype=torch.float64)
    for own in DTYPES:
        assert torch.equal(weight.values(own), values.to(own))
        x = torch.randn(3, COLUMNS).to(own)
        with torch.inference_mode():
            y, expected = weight.times(x), x.double() @ values.double().t()
        assert y.dtype == own and (y - expected).norm() / expected.norm() < max(
            3e-7, torch.finfo(own).eps / 2
        )
    assert weight.compiled is None or weight.compiled_for == (*DTYPES,)
    assert torch.equal(weight.times(odd), odd @ values.double().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [96, 33], ids=["columns that suit", "odd columns"])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_products_of_few_rows_are_those_of_the_stored_values(kind, dtype, columns, monkeypatch):
    W, rows = torch.randn(7001, columns).to(dtype), cpu.MOST_ROWS
    matrix = QUANTIZERS[kind].quantised(W, "w", Path("random"))
    values = QUANTIZERS[kind].quantised(W.float(), "w", Path("random")).rows().double()  # not rounded
    weight, x = QuantizedWeight(matrix), torch.randn(1, rows, columns).to(dtype)
    bias = torch.randn(7001).to(dtype)
    exact = x.double() @ values.t() + bias.double()
    rounded = weight.times(x, bias)  # with a backward, by its values
    assert (weight.compiled is None) == (columns == 33 or cpu.library() is None)
    for _ in range(2):
        with torch.inference_mode():
            got = weight.times(x, bias)
        assert got.dtype == dtype and got.shape == exact.shape
        assert dtype == torch.float32 or not torch.equal(got, rounded)
        error, before = ((part.double() - exact).norm() / exact.norm() for part in (got, rounded))
        assert error < 1.5 * before + 3e-7
        monkeypatch.setattr(cpu, "library", lambda: None)
        weight = QuantizedWeight(replace(matrix))


def test_what_learns_and_what_is_stored_otherwise_goes_by_the_values():
    matrix = QUANTIZERS["int8"].quantised(torch.randn(64, 96), "w", Path("random"))
    weight, x = QuantizedWeight(matrix), torch.randn(2, 96)
    assert torch.equal(weight.times(x), F.linear(x, matrix.rows()))
    packed, x = torch.randint(-(2**31), 2**31 - 1, (40, 8), dtype=torch.int32), torch.randn(2, 40)
    awq = AWQ(*facts(torch.empty(64, 40)), packed, torch.rand(64, 5), torch.zeros(64, 5), 8, 4)
    with torch.inference_mode():
        got, expected = QuantizedWeight(awq).times(x), x.double() @ awq.rows().double().t()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plain_weight_is_read_by_compiled_code(dtype):
    W, bias = torch.randn(130, 96).to(dtype), torch.randn(130).to(dtype)
    if (weight := few_rows(W)) is None:
        pytest.skip(why_none())
    x = torch.randn(1, 3, 96).to(dtype)
    for own in (bias, None):
        exact = F.linear(x.double(), W.double(), None if own is None else own.double())
        with torch.inference_mode():
            got, many = weight.times(x, own), weight.times(x.expand(6, 3, 96), own)
            assert torch.equal(weight.times(x[:, 1:2], own), got[:, 1:2])
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
        torch.testing.assert_close(many[:1].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
        if dtype == torch.float32:
            assert torch.equal(many, F.linear(x.expand(6, 3, 96), W, own))
    assert torch.equal(weight.times(x), F.linear(x, W))  # where autograd may follow
    assert few_rows(torch.randn(4, 33)) is None and few_rows(torch.randn(64, 32).t()) is None
