"""What is taken out of a weight before it is quantised: the same bits however it is computed."""

from pathlib import Path

import pytest
import torch

from litlora.frozen.low_rank import LowRank
from litlora.frozen.quantize import QUANTIZERS

SHAPE = (700, 300)
"""More than one piece, whose ends are within rows."""


def product(rank: int = 5) -> LowRank:
    return LowRank.near(torch.randn(rank, SHAPE[1]), torch.randn(SHAPE[0], rank), 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_what_is_left_is_quantised(kind, dtype):
    """As a weight in fp32 of these values is, but rounded to the dtype of W when it is used."""
    taken_out, W = product(), torch.randn(SHAPE).to(dtype)
    before, left = W.clone(), W.to(torch.float32, copy=True)
    for k in range(5):  # one product and one sum at a time, each rounded
        left = left - taken_out.B[:, k : k + 1].float() * taken_out.A[k].float()
    exact = W.double() - taken_out.B.double() @ taken_out.A.double()
    torch.testing.assert_close(left.double(), exact, atol=1e-5, rtol=0)
    matrix = QUANTIZERS[kind].quantised(W, "W", Path("x"), taken_out)
    wanted = QUANTIZERS[kind].quantised(left, "W", Path("x"))
    for name, tensor in wanted.stored().items():
        assert torch.equal(matrix.stored()[name], tensor)
    assert torch.equal(matrix.rows(), wanted.rows().to(dtype)) and torch.equal(W, before)


def test_rows_have_the_bits_of_the_whole():
    taken_out, whole = product(), torch.randn(SHAPE)
    part = whole[37:91].clone()
    taken_out.take_out(part, slice(37, 91))
    taken_out.take_out(whole, slice(0, SHAPE[0]))
    assert torch.equal(part, whole[37:91])


def test_factors_that_make_no_product_are_refused():
    A, B = product().A, product().B
    for wrong, error in (
        ((A.float(), B), "must be in torch.bfloat16"),
        ((A[:3], B), "make no product"),
        ((A[0], B), "make no product"),
        ((A[:0], B[:, :0]), "make no product"),
        ((A / 0, B), "not finite"),
    ):
        with pytest.raises(ValueError, match=error):
            LowRank(*wrong)
