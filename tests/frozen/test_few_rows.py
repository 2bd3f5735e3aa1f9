"""Products of few rows with a weight in 4 or 8 bits are as exact as those with its values."""

from pathlib import Path

import pytest
import torch

from litlora.frozen.quantize import QUANTIZERS
from litlora.frozen.quantized import QuantizedWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [96, 33], ids=["the kernel's columns", "odd columns"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_products_of_few_rows_are_those_of_the_stored_values(kind, dtype, columns, rows):
    W = torch.randn(7001, columns).to(dtype)
    matrix = QUANTIZERS[kind].quantised(W, "w", Path("random"))
    values = QUANTIZERS[kind].quantised(W.float(), "w", Path("random")).rows().double()  # not rounded
    weight, x = QuantizedWeight(matrix), torch.randn(1, rows, columns).to(dtype)
    bias = torch.randn(7001).to(dtype)
    exact = x.double() @ values.t() + bias.double()
    with torch.inference_mode():
        got, alone = weight.times(x, bias), weight.times(x[:, :1], bias)
    assert got.dtype == dtype and got.shape == exact.shape
    rounded = weight.times(x, bias)  # with a backward, by its values
    assert dtype == torch.float32 or not torch.equal(got, rounded)
    error, before = ((part.double() - exact).norm() / exact.norm() for part in (got, rounded))
    assert error < 1.5 * before + 1e-7
    if (
        kind == "int8" and dtype == torch.bfloat16 and columns == 96
    ):  # torch's kernel computes each row by itself
        assert torch.equal(got[:, :1], alone)


def test_rows_that_learn_and_rows_of_other_layers_go_by_the_values():
    matrix = QUANTIZERS["int8"].quantised(torch.randn(64, 96), "w", Path("random"))
    with torch.inference_mode():
        some = QuantizedWeight(matrix.take(torch.tensor([3, 5])))
        x = torch.randn(1, 96)
        assert torch.equal(some.times(x), torch.nn.functional.linear(x, matrix.rows()[[3, 5]]))
    weight, x = QuantizedWeight(matrix), torch.randn(2, 96)
    assert torch.equal(weight.times(x), torch.nn.functional.linear(x, matrix.rows()))
