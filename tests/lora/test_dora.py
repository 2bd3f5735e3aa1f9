"""DoRA: W' = m · (W + s · B A) / ‖W + s · B A‖, the norm of each row a constant of the gradient."""

import pytest
import torch
from conftest import tiny_config, tune
from torch import nn

from litlora.errors import CheckpointError
from litlora.lora import LoRAConfig, LoRALinear, add_lora, lora_updates, merge_lora, unmerge_lora
from litlora.lora.adapter import parse_tensors
from litlora.lora.variants import MAGNITUDE
from litlora.model import GPT

IDS = torch.arange(24).view(2, 12)


def layer_with_values(dropout: float = 0.0) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5).double(), 2, 7.0, dropout, dtype=torch.float64, variant="dora")
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.lora_magnitude_vector)
    return layer


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing():
    model = GPT(tiny_config()).eval()
    expected = model(IDS)
    add_lora(model, LoRAConfig(rank=4, variant="dora"))
    torch.testing.assert_close(model(IDS), expected)
    for name, update in lora_updates(model).items():
        W = model.get_submodule(name).linear.weight
        torch.testing.assert_close(update.extra[MAGNITUDE], W.square().sum(dim=1).sqrt())


def test_outputs_and_gradients_equal_the_formula_in_float64():
    layer = layer_with_values()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    V = layer.linear.weight + 3.5 * layer.lora_B @ layer.lora_A
    effective = layer.lora_magnitude_vector[:, None] * V / V.detach().square().sum(dim=1, keepdim=True).sqrt()
    expected = x @ effective.T + layer.linear.bias
    torch.testing.assert_close(layer(x), expected)
    inputs = (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    upstream = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


def test_dropout_and_gradients_equal_pefts():
    peft = pytest.importorskip("peft")
    layer = layer_with_values(dropout=0.5)
    model = nn.Sequential(layer.linear)
    config = peft.LoraConfig(r=2, lora_alpha=7, lora_dropout=0.5, use_dora=True, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, model, adapter_name="default")[0].double().train()
    magnitude = theirs.lora_magnitude_vector["default"].weight
    pairs = [
        (theirs.lora_A["default"].weight, layer.lora_A),
        (theirs.lora_B["default"].weight, layer.lora_B),
        (magnitude, layer.lora_magnitude_vector),
    ]
    for their, our in pairs:
        their.data.copy_(our)
    x = torch.randn(3, 6, dtype=torch.float64)
    results = []
    for module, parameters in ((theirs, [their for their, _ in pairs]), (layer, [our for _, our in pairs])):
        torch.manual_seed(3)
        y = module(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), parameters)))
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_a_merge_equals_the_live_outputs_and_can_be_undone():
    model = GPT(tiny_config(attention_bias=True)).eval()
    add_lora(model, LoRAConfig(rank=4, variant="dora"))
    for update in lora_updates(model).values():
        for tensor in update.tensors().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    live = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), live, atol=1e-5, rtol=1e-4)
    unmerge_lora(model)
    assert torch.equal(model(IDS), live)


def test_rows_of_zeros_stay_finite():
    layer = LoRALinear(nn.Linear(4, 3, bias=False), 1, 1.0, variant="dora")
    nn.init.zeros_(layer.linear.weight)
    assert torch.equal(layer(torch.ones(1, 4)), torch.zeros(1, 3))


def test_it_trains_and_resumes_to_the_bit(base, alpaca_file, tmp_path):
    config = {"train": {"save_interval": 3}, "lora": LoRAConfig(rank=2, dropout=0.1, variant="dora")}
    tune("lora", base, alpaca_file, tmp_path / "run", **config)
    step = tmp_path / "run/step-000003"
    tune("lora", base, alpaca_file, tmp_path / "resumed", resume=str(step), **config)
    files = [tmp_path / name / "final/lit_model.pth" for name in ("run", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    places = (files[0], step / "lit_model.pth")
    stored, before = (torch.load(place, weights_only=True)["model"] for place in places)
    names = [name for name in stored if name.endswith(MAGNITUDE)]
    assert len(names) == 14 and not any(torch.equal(stored[name], before[name]) for name in names)


def test_a_magnitude_of_another_size_is_refused():
    tensors = {"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(3, 2), f"a.{MAGNITUDE}": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"a: lora_magnitude_vector is \(1,\); 3 outputs need as many"):
        parse_tensors(tensors, LoRAConfig(rank=2, variant="dora"))
