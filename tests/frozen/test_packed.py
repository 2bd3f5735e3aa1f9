"""A packed weight multiplies as the plain one does, and gives its values back."""

import pytest
import torch
from torch import nn

from litlora.frozen.few_rows import gains
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.packed import Packed, pack_linears

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 1, 96), (40, 96)], ids=str)
def test_products_are_those_of_the_plain_weight(dtype, shape):
    weight, bias = torch.randn(130, 96).to(dtype), torch.randn(130).to(dtype)
    if dtype != torch.float32 and not gains(weight):
        pytest.skip("oneDNN has no kernels of this dtype on this machine, so nothing is packed")
    packed, x = Packed(weight), torch.randn(shape).to(dtype)
    with torch.inference_mode():
        for own in (bias, None):
            got, expected = packed.times(x, own), nn.functional.linear(x.float(), weight.float(), own)
            assert got.dtype == dtype and got.is_contiguous()
            torch.testing.assert_close(got.float(), expected.float(), atol=0.1, rtol=0.02)
    assert torch.equal(packed.rows(), weight) and torch.equal(packed.rows(slice(3, 5)), weight[3:5])
    assert packed.shape == weight.shape and packed.dtype == dtype


def test_what_does_not_gain_stays_plain():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    pack_linears(model, leave="none")
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], FrozenLinear) == gains(torch.zeros(1, dtype=torch.bfloat16))
