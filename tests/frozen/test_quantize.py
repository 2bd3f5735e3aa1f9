"""Quantising: the bits are those of bitsandbytes, and fp8's those of its definition."""

import dataclasses
from pathlib import Path

import pytest
import torch

from litlora.frozen.bitsandbytes import NF4, FourBit
from litlora.frozen.native import nf4_of_bitsandbytes
from litlora.frozen.quantize import QUANTIZERS, Quantizer, ToQuantize, dynamic_table, fingerprint_of
from litlora.frozen.quantized import QuantizedWeight
from litlora.storage.blocks import one_thread

FILE = Path("model.pth")
SHAPES = [(48, 80), (7, 96), (3, 43), (1100, 600)]
"""Of whole blocks, blocks across rows, an odd number of values, and more than one piece."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, one of zeros."""
    W = torch.randn(shape) * torch.logspace(-3, 0, shape[0])[:, None]
    W[shape[0] // 2] = 0
    return W.to(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_that_of_bitsandbytes(shape, dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = weight(shape, dtype)
    packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    ours = QUANTIZERS["nf4"].quantised(W, "a", FILE)
    assert torch.equal(ours.packed, packed.flatten()) and torch.equal(ours.absmax, state.absmax)
    theirs = FourBit("a", FILE, dtype, shape[1], range(shape[0]), packed.flatten(), "nf4", state.absmax, 64)
    assert ours.dtype == dtype and ours.shape == shape and torch.equal(ours.rows(), theirs.rows())


@pytest.mark.parametrize("shape", [*SHAPES, (4, 64), (5, 32)])
def test_values_are_those_of_the_table_with_and_without_bitsandbytes(shape):
    """Its compiled code, which is used where it is there, and the plain one."""
    matrix = QUANTIZERS["nf4"].quantised(weight(shape, torch.float32), "a", FILE)
    entries = torch.stack([matrix.packed >> 4, matrix.packed & 15], 1).flatten()[: shape[0] * shape[1]]
    values = torch.tensor(NF4)[entries.int()] * matrix.absmax.repeat_interleave(64)[: len(entries)]
    assert torch.equal(matrix.rows(), values.view(shape))
    assert torch.equal(matrix.rows(slice(1, 3)), values.view(shape)[1:3])


def test_the_compiled_code_is_used_where_bitsandbytes_is():
    pytest.importorskip("bitsandbytes")
    assert nf4_of_bitsandbytes() is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantisation_is_that_of_bitsandbytes(shape):
    """Its compiled kernel for the CPU looks scales up in a coarse table and misses the nearest entry
    of one in 600; its code for other dtypes, like its kernel for GPUs, does not."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = weight(shape, torch.bfloat16)
    ours = QUANTIZERS["nf4-dq"].quantised(W, "a", FILE)
    with one_thread():
        packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
        absmax = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")[1].absmax
    exact = torch.ops.bitsandbytes.quantize_blockwise.default
    entries, outer = exact((absmax - absmax.mean()).double(), state.state2.code, 256)
    scales = ours.absmax
    assert torch.equal(ours.packed, packed.flatten()) and torch.equal(scales.table, state.state2.code)
    assert scales.offset == state.offset.item() and torch.equal(scales.absmax, state.state2.absmax)
    assert torch.equal(scales.entries, entries) and torch.equal(scales.absmax, outer)
    beside = (scales.entries.int() - state.absmax.int()).abs()
    assert beside.max() <= 1 and beside.sum() <= 0.01 * len(beside)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_that_of_bitsandbytes(shape, dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = weight(shape, dtype)
    entries, largest, _ = bnb.int8_vectorwise_quant(W.clone())
    ours = QUANTIZERS["int8"].quantised(W, "a", FILE)
    assert torch.equal(ours.entries, entries) and torch.equal(ours.largest, largest)
    exact = dataclasses.replace(ours, dtype=torch.float32).rows()
    assert torch.equal(exact, bnb.int8_vectorwise_dequant(entries, largest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_has_a_scale_for_each_row_and_the_nearest_entry(dtype):
    W = weight((24, 40), dtype)
    ours = dataclasses.replace(QUANTIZERS["fp8"].quantised(W, "a", FILE), dtype=torch.float32)
    largest = W.float().abs().amax(1)
    torch.testing.assert_close(ours.scales[largest > 0] * 448, largest[largest > 0], rtol=1e-6, atol=0)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    scaled = W.float() / ours.scales[:, None]
    least = (scaled[..., None] - every).abs().amin(-1)
    error = (ours.entries.float() - scaled).abs()
    assert torch.equal(error, least)
    assert torch.equal(ours.rows(), ours.entries.float() * ours.scales[:, None])
    assert (ours.rows()[12] == 0).all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_row_of_zeros_stays_and_bad_values_are_refused(name):
    W = weight((6, 64), torch.float32)
    assert torch.equal(QUANTIZERS[name].quantised(W, "a", FILE).rows(slice(3, 4)), W[3:4])
    for bad in (torch.inf, torch.nan):
        spoiled = W.clone()
        spoiled[1, 2] = bad
        with pytest.raises(Exception, match="model.pth: a holds values that are not finite"):
            QuantizedWeight(QUANTIZERS[name].quantised(spoiled, "a", FILE))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_quantised_later_is_quantised_once_to_the_same(name):
    W, asked = weight((48, 80), torch.bfloat16), []
    later = ToQuantize("a", FILE, W.dtype, 80, range(48), lambda: (asked.append(1), W)[1], QUANTIZERS[name])
    now = QUANTIZERS[name].quantised(W, "a", FILE)
    assert later.shape == W.shape and not asked
    assert torch.equal(later[3:9], now[3:9]) and torch.equal(later.tensor(), now.tensor())
    assert len(asked) == 1 and type(later.settled()) is type(now) and now.settled() is now
    assert fingerprint_of({"a": later}) == fingerprint_of({"a": now}) != fingerprint_of({"b": now})


def test_every_setting_of_a_quantiser_is_stored():
    for name, quantizer in QUANTIZERS.items():
        assert Quantizer.parse(quantizer.settings()) == quantizer and quantizer.name == name
    with pytest.raises(ValueError, match="rounding is not known to this version"):
        Quantizer.parse({"kind": "nf4", "blocksize": 64, "rounding": "up"})
    for odd in ({"kind": "nf3"}, {"kind": "nf4", "blocksize": 32}):
        with pytest.raises(ValueError, match="is not one of nf4, nf4-dq, int8, fp8"):
            Quantizer.parse(odd)


def test_sizes_in_memory():
    W = torch.randn(512, 1024, dtype=torch.bfloat16)
    for name, most in (("nf4", 0.2813), ("nf4-dq", 0.26), ("int8", 0.503), ("fp8", 0.503)):
        matrix = QUANTIZERS[name].quantised(W, "a", FILE)
        assert 0 < matrix.nbytes <= most * W.nbytes, name


def test_the_dynamic_table_ascends():
    assert len(dynamic_table()) == 256 and (dynamic_table().diff() > 0).all()
