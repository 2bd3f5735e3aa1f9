"""A variant of LoRA, written outside the library: it trains, merges and comes apart again, and
nothing else had to know it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tune
from torch import nn

from litlora.errors import UserError
from litlora.lora import (
    VARIANTS,
    LoRAConfig,
    LoRALinear,
    Variant,
    adapter_of,
    add_lora,
    lora_updates,
    merge_lora,
    unmerge_lora,
    unwrap_lora,
)
from litlora.model import GPT

IDS = torch.arange(24).view(2, 12)


class Gain(Variant):
    """W' = g · W + s · B A, with a learned gain g for each output."""

    name = "gain"
    extra = ("lora_gain",)

    def start(self, layer):
        super().start(layer)
        layer.lora_gain = nn.Parameter(torch.ones_like(layer.lora_B[:, 0]))

    def change(self, update, before, rows):
        gain = update.extra["lora_gain"][rows, None].to(before.dtype)
        return (gain - 1) * before + super().change(update, before, rows)


class GainWithDropout(Gain):
    name = "gain_with_dropout"

    def forward(self, layer, x):
        update = layer.update
        added = F.linear(F.dropout(x, layer.dropout, layer.training), update.A) * update.scale @ update.B.T
        y = layer.frozen.times(x) * update.extra["lora_gain"] + added
        return y if layer.bias is None else y + layer.bias


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for variant in (Gain(), GainWithDropout()):
        monkeypatch.setitem(VARIANTS, variant.name, variant)


def trained(model: GPT) -> GPT:
    """As after training: nothing of an update is where it started."""
    with torch.no_grad():
        for tensor in adapter_of(model, LoRAConfig()).tensors.values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing():
    model = GPT(tiny_config()).eval()
    expected = model(IDS)
    names = add_lora(model, LoRAConfig(rank=4, variant="gain"))
    assert torch.equal(model(IDS), expected)
    parts = ("lora_A", "lora_B", "lora_gain")
    assert set(adapter_of(model, LoRAConfig()).tensors) == {
        f"{name}.{part}" for name in names for part in parts
    }


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gain", "gain_with_dropout"])
def test_a_merge_equals_the_live_outputs_and_can_be_undone(variant):
    model = GPT(tiny_config(attention_bias=True))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_lora(model, LoRAConfig(rank=4, variant=variant))
    live = trained(model)(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), live, atol=1e-5, rtol=1e-4)
    unmerge_lora(model)
    assert torch.equal(model(IDS), live)
    unwrap_lora(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_an_update_adds_any_rows_to_any_weight():
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=4, variant="gain", targets="qv"))
    (update, *_), layer = lora_updates(trained(model)).values(), model.model.layers[0].self_attn.q_proj
    W, whole, rows = layer.linear.weight.detach(), layer.weight.detach(), slice(3, 7)
    some = update.add_to(torch.zeros(4, 32, dtype=torch.float64), W[rows].double(), rows, factor=2.0)
    torch.testing.assert_close(some, 2 * (whole - W)[rows].double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", ["gain", "gain_with_dropout"])
def test_gradients_equal_float64_autograd(variant):
    """Of the formula y = g · W x + b + s · B A x, written out."""
    layer = LoRALinear(nn.Linear(6, 5).double(), 2, 7.0, dtype=torch.float64, variant=variant)
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.lora_gain)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    W, b = layer.linear.weight, layer.linear.bias
    expected = x @ W.T * layer.lora_gain + b + 3.5 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    inputs, upstream = (x, layer.lora_A, layer.lora_B, layer.lora_gain), torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


def test_it_trains_in_the_real_loop(base, alpaca_file, tmp_path):
    tune("lora", base, alpaca_file, tmp_path / "run", lora=LoRAConfig(rank=2, variant="gain"))
    tensors = torch.load(tmp_path / "run/final/lit_model.pth", weights_only=True)["model"]
    gains = [tensor for name, tensor in tensors.items() if name.endswith("lora_gain")]
    assert len(gains) == 2 * 7 and len(tensors) == 3 * len(gains)
    assert all((gain != 1).any() for gain in gains)


def test_it_resumes_to_the_bit(base, alpaca_file, tmp_path):
    config = {"train": {"save_interval": 3}, "lora": LoRAConfig(rank=2, variant="gain")}
    tune("lora", base, alpaca_file, tmp_path / "run", **config)
    step = tmp_path / "run/step-000003"
    tune("lora", base, alpaca_file, tmp_path / "resumed", resume=str(step), **config)
    files = [tmp_path / name / "final/lit_model.pth" for name in ("run", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != (step / "lit_model.pth").read_bytes()


def test_dropout_is_refused_by_name_unless_the_variant_applies_it():
    model = GPT(tiny_config())
    with pytest.raises(UserError, match=r"^dropout 0.5: variant gain does not apply dropout"):
        add_lora(model, LoRAConfig(rank=2, dropout=0.5, variant="gain"))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    add_lora(model, LoRAConfig(rank=2, dropout=0.5, variant="gain_with_dropout"))
    trained(model)
    assert torch.equal(model(IDS), model(IDS)) and not torch.equal(model.train()(IDS), model(IDS))


def test_an_unknown_variant_is_refused_by_name():
    with pytest.raises(UserError, match=r"^variant nothing: no such variant; choose from lora, "):
        add_lora(GPT(tiny_config()), LoRAConfig(variant="nothing"))
