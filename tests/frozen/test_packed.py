"""A packed weight multiplies as the plain one does, and gives its values back."""

import pytest
import torch
from torch import nn

from litlora.frozen import packed as packed_weights
from litlora.frozen.few_rows import gains
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.packed import Packed, pack_linears, packs
from litlora.kernels import cpu

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


@pytest.mark.skipif(not cpu.has_threads(), reason="there is no compiled code")
def test_the_faster_of_two_layouts_is_measured_once(tmp_path, monkeypatch):
    found = [3.0, 0.5, 1.2, 1.3]
    monkeypatch.setattr(packed_weights, "gains", lambda _: True)
    monkeypatch.setattr(packed_weights, "_measured", lambda _: found.pop(0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weight = torch.zeros(1, dtype=torch.bfloat16)

    def chosen():
        packed_weights.advantage.cache_clear()
        return packs(weight)

    assert chosen() and packs(weight) and chosen()  # the second time from the file
    [file] = (tmp_path / "litlora/kernels").iterdir()
    assert file.name.endswith(f".onednn-bfloat16-{torch.get_num_threads()}") and file.read_text() == "3.0"
    file.write_text("three")
    assert not chosen() and file.read_text() == "0.5"
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # where nothing can be written
    assert not chosen() and chosen() and not found
    packed_weights.advantage.cache_clear()


@pytest.mark.skipif(not cpu.has_threads(), reason="there is no compiled code")
def test_what_is_measured_is_a_ratio_of_two_times(monkeypatch):
    for name, value in (("MEASURED", (256, 64)), ("WEIGHTS", 2), ("TURNS", 2)):
        monkeypatch.setattr(packed_weights, name, value)
    assert 0 < packed_weights._measured(torch.float32) < 1000
