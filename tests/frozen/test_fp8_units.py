"""Products in fp8: as the plain twin computes them, within the bound of their roundings, and accepted by
what torch asks of a GPU's tensors."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from litlora.frozen import fp8_units
from litlora.frozen.float8 import BlockFloat8
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.quantize import QUANTIZERS
from litlora.frozen.quantized import QuantizedWeight
from litlora.kernels.lora import Layer, project
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.train.said import products_notice


@pytest.fixture
def units(monkeypatch):
    """Let the CPU, on which torch has the same operation, count as a GPU with fp8."""
    if torch.__version__ < "2.12":
        pytest.skip("this torch multiplies with scales of rows on GPUs alone")
    monkeypatch.setattr(fp8_units, "has_units", lambda device: True)


def stored(W):
    return QUANTIZERS["fp8"].quantised(W, "w", Path("random"))


def twin(x, entries, scales):
    """x Wᵀ with the rows of x rounded to fp8, summed in fp32 and rounded to bf16 once."""
    scale = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (x.float() / scale).to(torch.float8_e4m3fn).float()
    return ((rounded @ entries.float().t()) * scale * scales).to(torch.bfloat16)


def uneven(*shape):
    """Rows of very different sizes, one of zeros."""
    x = torch.randn(shape) * torch.logspace(-4, 4, shape[0])[:, None]
    x[shape[0] // 2] = 0
    return x.bfloat16()


@pytest.mark.parametrize("out", [48, 160])
def test_products_are_those_of_the_twin_within_the_bound(out, units):
    W = stored((torch.randn(out, 96) * torch.logspace(-2, 1, out)[:, None]).bfloat16())
    weight, exact = QuantizedWeight(W), W.entries.double() * W.scales.double()[:, None]
    x, dy = uneven(33, 96), uneven(33, out)
    bias, total = torch.randn(out).bfloat16(), torch.randn(33, 96).bfloat16()
    y, dx = weight.times(x.view(3, 11, 96)), weight.back(dy)
    assert torch.equal(weight.times(x, bias), y.flatten(0, 1) + bias)
    assert torch.equal(weight.back(dy, total.clone()), total + dx)
    by_twin = twin(x, W.entries, W.scales), twin(dy.float() * W.scales, W.entries.t(), torch.ones(96))
    cases = (y.flatten(0, 1), by_twin[0], x.double(), exact.t()), (dx, by_twin[1], dy.double(), exact)
    for got, plain, left, right in cases:
        assert got.dtype == torch.bfloat16 and got[16].abs().max() == 0
        torch.testing.assert_close(got, plain, rtol=2**-7, atol=1e-30)  # one step of bf16
        # What is rounded has the scales of W's rows in it, where they belong to the sum.
        inside = left * W.scales.double() if got is dx else left
        entries = W.entries.double() if got is dx else right
        step = inside.abs().amax(1, keepdim=True) / 448 * 2**-10
        bound = (inside.abs() * 2**-4 + step) @ entries.abs()
        wanted = left @ right
        assert ((got.double() - wanted).abs() <= bound * (1 + 2**-8) + wanted.abs() * 2**-8).all()
        rows = wanted.norm(dim=1) > 0
        assert ((got.double() - wanted).norm(dim=1)[rows] / wanted.norm(dim=1)[rows]).mean() < 0.04


def test_where_fp8_does_not_serve_it_is_computed_by_its_values(units, monkeypatch):
    def same_as_its_values(weight, x):
        with torch.no_grad():
            return torch.equal(weight.times(x), x @ weight.rows().to(x.dtype).t())

    weight, x = QuantizedWeight(stored(torch.randn(32, 48).bfloat16())), torch.randn(17, 48)
    assert not same_as_its_values(weight, x.bfloat16()) and same_as_its_values(weight, x)
    with torch.inference_mode():
        assert same_as_its_values(weight, x.bfloat16())
    assert same_as_its_values(QuantizedWeight(stored(torch.randn(33, 48).bfloat16())), x.bfloat16())
    assert same_as_its_values(
        QuantizedWeight(QUANTIZERS["int8"].quantised(torch.randn(32, 48), "w", Path())), x
    )
    monkeypatch.undo()
    assert same_as_its_values(weight, x.bfloat16())


def in_a_folder(entries, scales, block):
    return BlockFloat8("w", Path("a folder"), torch.bfloat16, 96, range(len(entries)), entries, scales, block)


@pytest.mark.parametrize(
    ("shape", "block"), [((160, 1), (1, 96)), ((1, 1), (160, 96)), ((3, 1), (64, 128))], ids=str
)
def test_what_a_folder_stores_in_fp8_is_multiplied_so(shape, block, units):
    """With a scale for each row, for all, or for some; of the rows of a fused layer, too."""
    W = stored(torch.randn(160, 96).bfloat16())
    folder = in_a_folder(W.entries, torch.rand(shape) + 0.5, block)
    scales = folder.scales[:, 0].repeat_interleave(block[0])[:160]
    x, dy = uneven(33, 96), uneven(33, 160)
    with AsOnAGPU() as mode:
        for rows in (range(160), range(32, 96)):
            part = dataclasses.replace(folder, stored_rows=rows)
            same = dataclasses.replace(W, scales=scales, stored_rows=rows)
            weight, cut = QuantizedWeight(part), dy[:, rows.start : rows.stop].contiguous()
            torch.testing.assert_close(same.rows(), part.rows(), rtol=0, atol=0)
            assert torch.equal(weight.times(x), QuantizedWeight(same).times(x))
            assert torch.equal(weight.back(cut), QuantizedWeight(same).back(cut))
            assert not torch.equal(weight.times(x), x @ part.rows().t())
    assert mode.calls == 10
    by_twin = twin(x, W.entries, scales)
    torch.testing.assert_close(QuantizedWeight(folder).times(x), by_twin, rtol=2**-7, atol=1e-30)


def test_other_forms_of_fp8_are_computed_by_their_values(units):
    W, x = stored(torch.randn(160, 96).bfloat16()), torch.randn(9, 96).bfloat16()
    rows = W.scales[:, None]
    for entries, scales, block in (
        (W.entries, torch.rand(2, 2) + 0.5, (128, 64)),  # blocks of columns
        (W.entries.to(torch.float32).to(torch.float8_e5m2), rows, (1, 96)),
    ):
        matrix = in_a_folder(entries, scales, block)
        assert torch.equal(QuantizedWeight(matrix).times(x), x @ matrix.rows().t())
    turned = dataclasses.replace(W, stored_rows=torch.arange(160).flip(0))
    assert torch.equal(QuantizedWeight(turned).times(x), x @ turned.rows().t())


def test_an_input_of_several_layers_is_rounded_once(units):
    layers = [Layer(QuantizedWeight(stored(torch.randn(out, 96).bfloat16()))) for out in (48, 32, 32)]
    x = torch.randn(2, 5, 96).bfloat16().requires_grad_()
    with RoundedToFp8() as apart:
        alone = [project(x, [layer])[0] for layer in layers]
    with RoundedToFp8() as together:
        outputs = project(x, layers)
    assert all(torch.equal(one, other) for one, other in zip(alone, outputs, strict=True))
    assert apart.count == 3 and together.count == 1
    torch.cat(outputs, -1).sum().backward()
    assert x.grad.isfinite().all()


class RoundedToFp8(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.count += operation is torch.ops.aten._to_copy.default and result.dtype == fp8_units.FP8
        return result


def on_a_gpu(value):
    """A tensor like this one without values; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


class AsOnAGPU(TorchDispatchMode):
    """Asks torch whether a GPU would take the tensors of each product: their order in memory, sizes and
    scales."""

    calls = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._scaled_mm.default:
            self.calls += 1
            with FakeTensorMode():
                operation(*map(on_a_gpu, args), **(kwargs or {}))
        return operation(*args, **(kwargs or {}))


def test_torch_takes_the_tensors_of_a_gpu(units):
    W, x = stored(torch.randn(64, 32).bfloat16()), torch.randn(2, 5, 32).bfloat16()
    turned = torch.randn(32, 10).bfloat16().t()
    with AsOnAGPU() as mode:
        y, dx = fp8_units.times(x, W, {}), fp8_units.back(torch.randn(10, 64).bfloat16(), W)
        fp8_units.times(x[:1, :1], W, {})
        assert torch.equal(fp8_units.times(turned, W, {}), fp8_units.times(turned.contiguous(), W, {}))
    assert y.shape == (2, 5, 64) and dx.shape == (10, 32) and mode.calls == 5
    with AsOnAGPU(), pytest.raises(RuntimeError, match="col_major"):
        torch._scaled_mm(W.entries.view(32, 64), W.entries, torch.ones(1), torch.ones(1))


def trained(model, steps=20):
    """The last loss of some steps on one batch."""
    ids = torch.randint(0, 400, (4, 24))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    for _ in range(steps):
        logits = model(ids[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_step_learns_nearly_the_same(units):
    """The loss of an adapter over some steps, beside the values of the same bits."""
    losses = {}
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = GPT(tiny_config()).bfloat16()
        for name, linear in list(model.named_modules()):
            if type(linear) is torch.nn.Linear and name != "lm_head":
                W = stored(linear.weight)
                W = W if fp8 else dataclasses.replace(W, stored_rows=torch.arange(len(W.entries)))
                model.set_submodule(name, FrozenLinear(QuantizedWeight(W)))
        add_lora(model, LoRAConfig(rank=4, targets=["all-linear"]))
        losses[fp8] = trained(model)
    assert losses[True] != losses[False] and math.isclose(losses[True], losses[False], rel_tol=0.01), losses


def test_a_run_says_so(monkeypatch, units):
    model = GPT(tiny_config(num_hidden_layers=1))
    linear = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = FrozenLinear(QuantizedWeight(stored(linear.weight)))
    assert "rounded to fp8, too" in products_notice(model, torch.device("cuda"))
    monkeypatch.undo()
    assert products_notice(model, torch.device("cpu")) is None
