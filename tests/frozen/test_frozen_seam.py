"""A storage of frozen weights, written outside the library: int8 with a scale for each row. Models
train adapters on it, and merge them, as on the dense model that holds the same values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from torch import nn

from litlora.frozen.dense import Dense
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.weight import FrozenWeight
from litlora.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_of,
    add_lora,
    merge_lora,
    select_layers,
    unmerge_lora,
    unwrap_lora,
)
from litlora.model import GPT

IDS = torch.arange(24).view(2, 12)


class EightBits(nn.Module, FrozenWeight):
    """W = entries · scales."""

    device = property(lambda self: self.entries.device)
    dtype = property(lambda self: self.scales.dtype)
    shape = property(lambda self: self.entries.shape)

    def __init__(self, weight):
        super().__init__()
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("entries", (weight / scales).round().to(torch.int8))

    def times(self, x, bias=None):
        with torch.no_grad():  # autograd cannot follow it: it must ask `back`
            return F.linear(x, self.rows().to(x.dtype), bias)

    def back(self, dy, into=None):
        W = self.rows().to(dy.dtype)
        return dy @ W if into is None else into.addmm_(dy, W)

    def rows(self, rows=slice(None)):
        return self.entries[rows] * self.scales[rows]


def pair(dtype=torch.float64, **changes) -> tuple[GPT, GPT]:
    """A model in int8, and a dense one with the same values."""
    stored = GPT(tiny_config(**changes)).to(dtype)
    dense = copy.deepcopy(stored)
    with torch.no_grad():
        for name in select_layers(stored, "all-linear"):
            linear = stored.get_submodule(name)
            frozen = FrozenLinear(EightBits(linear.weight.detach()), linear.bias)
            stored.set_submodule(name, frozen)
            dense.get_submodule(name).weight.copy_(frozen.weight)
    return stored, dense


def adapted(models, dropout=0.0, targets="all-linear", dtype=torch.float64) -> list[list[str]]:
    """The same random adapter on each model; returns the names of the layers, for each model."""
    names = []
    for model in models:
        names.append(add_lora(model, LoRAConfig(rank=3, dropout=dropout, targets=targets), dtype))
        torch.manual_seed(3)
        for tensor in adapter_of(model, LoRAConfig()).tensors.values():
            tensor.normal_(std=0.1)
    return names


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)  # dropout
    F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", ["all-linear", "qv", ["down_proj"]])
@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"mlp": "plain", "hidden_act": "relu"}]
)
def test_gradients_equal_those_of_a_dense_model_of_the_same_values(targets, changes):
    models = stored, dense = pair(**changes)
    assert len({tuple(names) for names in adapted(models, dropout=0.2, targets=targets)}) == 1
    got, expected = gradients(stored.train()), gradients(dense.train())
    assert got.keys() == expected.keys() == adapter_of(stored, LoRAConfig()).tensors.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12)


def test_it_learns_under_autocast():
    models = pair(torch.float32)
    adapted(models, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (gradients(model) for model in models)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0.05, atol=1e-3)


def test_below_the_first_adapter_nothing_is_differentiated():
    frozen = FrozenLinear(EightBits(torch.randn(4, 6)))
    assert not frozen(torch.randn(2, 6)).requires_grad
    x = torch.randn(2, 6, requires_grad=True)
    frozen(x).sum().backward()
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(2, 6))


@torch.no_grad()
def test_a_merge_is_the_dequantised_weight_plus_the_update():
    models = stored, dense = pair(torch.float32, attention_bias=True)
    adapted(models, dtype=torch.float32)
    live, layer = stored.eval()(IDS), stored.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(live, dense.eval()(IDS), atol=1e-5, rtol=1e-5)
    expected = layer.frozen.rows() + layer.update.product()
    names = list(stored.state_dict())
    merge_lora(stored)
    merge_lora(dense)
    torch.testing.assert_close(layer.linear.weight, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stored(IDS), live, atol=1e-5, rtol=1e-4)
    assert stored.state_dict().keys() == dense.state_dict().keys()
    unmerge_lora(stored)
    assert torch.equal(stored(IDS), live) and list(stored.state_dict()) == names
    merge_lora(stored)
    unwrap_lora(stored)
    assert type(stored.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(stored(IDS), live, atol=1e-5, rtol=1e-4)


def test_it_is_part_of_the_state_and_moves_with_the_model():
    (stored, _), (other, _) = pair(), pair()
    adapted([stored, other])
    name = "model.layers.0.mlp.up_proj.linear.storage.entries"
    assert stored.state_dict()[name].dtype == torch.int8
    other.load_state_dict(stored.state_dict())
    assert torch.equal(other.eval()(IDS), stored.eval()(IDS))
    merge_lora(stored)
    stored.to("meta")
    unmerge_lora(stored)
    storage = stored.get_submodule(name.removesuffix(".entries"))
    assert storage.device.type == "meta" and isinstance(storage, FrozenWeight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_a_compiled_block_learns_the_same_in_one_graph():
    stored, dense = pair(num_hidden_layers=1)
    adapted([stored, dense])
    torch._dynamo.reset()
    for block in stored.model.layers:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    got, expected = gradients(stored), gradients(dense)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_dense_storage_is_a_linear_layer():
    linear, x = nn.Linear(6, 5), torch.randn(3, 6)
    frozen = FrozenLinear(Dense(linear.weight), linear.bias)
    assert torch.equal(frozen(x), linear(x))
    assert (frozen.in_features, frozen.out_features) == (6, 5)
    assert isinstance(LoRALinear(frozen, 2, 4.0).merge(), nn.Linear)
