"""Mixtures of experts beside the sum that defines them."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from litlora.frozen import stack
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.quantize import QUANTIZERS
from litlora.frozen.quantized import QuantizedWeight
from litlora.lora import LoRAConfig, add_lora, merge_lora
from litlora.model import GPT
from litlora.model import experts as experts_module
from litlora.model.experts import MixtureOfExperts
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling

NUM_EXPERTS = 6


def make_experts(num_picked: int, *, shared: int | None = None) -> MixtureOfExperts:
    torch.manual_seed(0)
    config = tiny_config(
        hidden_size=16,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=num_picked,
        moe_intermediate_size=12,
        norm_topk_prob=True,
        shared_expert_intermediate_size=shared,
    )
    return MixtureOfExperts(config)


def defined(experts: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, times a share that is zero where it was not picked."""
    scores = experts.gate(x).softmax(dim=-1)
    shares, picked = scores.float().topk(experts.gate.num_picked)
    kept = torch.zeros_like(scores).scatter(-1, picked, 1.0) * scores
    kept = kept / kept.sum(dim=-1, keepdim=True)
    y = sum(kept[..., number, None] * expert(x) for number, expert in enumerate(experts.experts))
    if experts.shared_expert is not None:
        y = y + torch.sigmoid(experts.shared_expert_gate(x)) * experts.shared_expert(x)
    return y


@pytest.mark.parametrize(("num_picked", "shared"), [(1, None), (2, None), (3, 20), (NUM_EXPERTS, None)])
def test_output_and_gradients_are_those_of_the_definition(num_picked: int, shared: int | None) -> None:
    experts = make_experts(num_picked, shared=shared).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    parameters = [x, *experts.parameters()]
    ours, wanted = experts(x), defined(experts, x)
    # The shares are fp32 in the layer.
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(ours)
    for got, expected in zip(
        torch.autograd.grad((ours * weights).sum(), parameters),
        torch.autograd.grad((wanted * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_expert_that_no_token_picked_has_gradients_of_zero() -> None:
    experts = make_experts(2)
    experts(torch.randn(1, 1, 16)).sum().backward()
    sizes = [expert.up_proj.weight.grad.abs().sum().item() for expert in experts.experts]
    assert sum(size > 0 for size in sizes) == 2


@pytest.mark.parametrize("grad", [True, False])
def test_no_token_gives_no_row(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert make_experts(2)(torch.zeros(1, 0, 16)).shape == (1, 0, 16)


def test_host_waits_for_the_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    monkeypatch.setattr(torch, "where", lambda *_: pytest.fail("its size must be waited for"))
    make_experts(2)(torch.randn(2, 7, 16))
    assert reads == [(NUM_EXPERTS,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_added_in_their_order(dtype: torch.dtype) -> None:
    """To the bit: results of earlier versions can be repeated."""
    experts = make_experts(4).to(dtype)
    x = torch.randn(9, 16, dtype=dtype)
    with torch.no_grad():
        shares, picked = experts.gate(x).softmax(dim=-1, dtype=torch.float32).topk(4)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(x)
        for number, expert in enumerate(experts.experts):
            rows, places = torch.where(picked == number)
            y.index_add_(0, rows, (expert(x[rows]) * shares[rows, places, None]).to(dtype))
        assert torch.equal(experts(x[None])[0], y)


GPT_OSS = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "expert_bias": True, "router_bias": True}


def adapted(
    rank: int = 8, *, dtype: torch.dtype = torch.float32, stored: str | None = None, **settings: object
) -> MixtureOfExperts:
    """Frozen experts with an adapter that does something, in few bits if so named."""
    torch.manual_seed(0)
    config = tiny_config(
        hidden_size=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        norm_topk_prob=True,
        **settings,
    )
    layer = MixtureOfExperts(config).to(dtype)
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
        if isinstance(module, nn.Linear) and stored:
            matrix = QUANTIZERS[stored].quantised(module.weight, name, Path("a file"))
            layer.set_submodule(name, FrozenLinear(QuantizedWeight(matrix), module.bias))
    add_lora(layer, LoRAConfig(rank=rank, targets=["experts"]))
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return layer


def far(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def learned(layer: MixtureOfExperts, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs, and the gradients of the input and of all that trains."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((y * weights).sum(), [x, *trained.values()])
    return {"y": y.detach(), **dict(zip(["x", *trained], gradients, strict=True))}


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 3}, {"stored": "nf4"}, {**GPT_OSS, "rank": 2}, {"mlp": "plain"}],
    ids=["dense", "unaligned", "nf4", "gpt-oss", "plain"],
)
def test_experts_at_once_learn_what_they_learn_one_by_one(settings, monkeypatch):
    layer, x = adapted(**settings), torch.randn(2, 9, 16)
    expected = learned(copy.deepcopy(layer).double(), x.double())
    layer.experts.lay_together()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("the host read counts"))
    got = learned(layer, x)
    assert got.keys() == expected.keys() and len(got) > 20
    for name, value in expected.items():
        assert far(got[name], value) < 2e-6, name


def test_nothing_waits_for_how_many_rows_an_expert_has(monkeypatch):
    """With tensors that have no values: there is nothing to read, and no address."""
    monkeypatch.setattr(stack.Beside, "holds", lambda *_: True)
    experts, x = adapted(dtype=torch.bfloat16), torch.randn(2, 9, 16).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in experts.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(mode.from_tensor(p.data), p.requires_grad)
        experts.experts.lay_together()
        assert learned(experts, mode.from_tensor(x)).keys() > {"y", "x"}
        experts.experts.at_once = False
        with pytest.raises(DataDependentOutputException):
            experts(mode.from_tensor(x))


@pytest.mark.slow
def test_compiled_experts_are_one_graph():
    layer, x = adapted(dtype=torch.bfloat16), torch.randn(2, 9, 16).bfloat16()
    layer.experts.lay_together()
    expected = learned(layer, x)
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    got = learned(layer, x)
    for name, value in expected.items():
        assert far(got[name], value) < 0.02, name


@pytest.mark.slow
@pytest.mark.parametrize("change", ["copied", "replaced", "merged", "moved"])
def test_compiled_experts_see_that_a_weight_is_another_one(change):
    """Whatever it is that changes, before they were compiled or since."""
    layer, x = adapted(dtype=torch.bfloat16), torch.randn(2, 9, 16).bfloat16()
    layer.experts.lay_together()
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        before = compiled(x)
        up = layer.experts[3].up_proj
        if change == "copied":
            layer = copy.deepcopy(layer)
            compiled, up = torch.compile(layer, backend="aot_eager"), layer.experts[3].up_proj
            up.linear.weight.data.mul_(4)
        elif change == "replaced":
            up.linear.weight = nn.Parameter(up.linear.weight * 4, requires_grad=False)
        elif change == "merged":
            merge_lora(layer)
            up.linear.weight.data.mul_(4)
        else:
            layer.to(torch.float32).to(torch.bfloat16).experts.lay_together()
            up.linear.weight.data.mul_(4)
        after = compiled(x)
        layer.experts.at_once = False
        assert far(after, layer(x)) < 0.02 < far(after, before)


def test_a_model_that_moves_to_a_gpu_computes_them_at_once(monkeypatch):
    """The device stands in for one: the weights stay where they are."""
    layer = adapted()
    assert not layer.to(torch.float32).experts.at_once
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(experts_module, "frozen_weight", lambda linear: gpu)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("the host read counts"))
    assert layer.to(torch.float32).experts.at_once
    layer(torch.randn(2, 9, 16))
    # What trains stays where it is.
    trained = [expert.up_proj.linear.weight.requires_grad_() for expert in layer.experts]
    places = [weight.data_ptr() for weight in trained]
    again = copy.deepcopy(layer).to(torch.float64)
    alone = [expert.up_proj.linear.weight for expert in again.experts]
    assert len({weight.untyped_storage().data_ptr() for weight in alone}) == len(alone)
    assert [weight.data_ptr() for weight in trained] == places


def test_an_engine_reads_prompts_with_all_experts_at_once(monkeypatch):
    """Of a model whose weights nobody had frozen."""
    model = GPT(tiny_config(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16)).eval()
    prompt, sampling = [*range(1, 20)], Sampling(max_new_tokens=4)
    expected = [*Engine(copy.deepcopy(model), owns_model=True).generate(prompt, sampling)]
    counts, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: counts.append(self.shape) or tolist(self))
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(experts_module, "frozen_weight", lambda linear: gpu)
    monkeypatch.setattr("litlora.serve.engine.pack_linears", lambda *_, **__: None)  # on the CPU alone
    assert [*Engine(model.to("cpu"), owns_model=True).generate(prompt, sampling)] == expected
    # Of the tokens after the prompt only: each picks fewer experts than there are.
    assert counts.count((6,)) == model.config.num_hidden_layers * 3


def test_weights_laid_together_are_the_same_weights():
    """Also where a model is copied, converted or merged afterwards: nothing computes with old ones."""
    layer, x = adapted(), torch.randn(2, 9, 16)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.experts.lay_together()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    changed = copy.deepcopy(layer)
    for name, parameter in changed.named_parameters():
        if name.endswith("linear.weight"):
            parameter.data.mul_(2)
    with torch.no_grad():
        alone = copy.deepcopy(changed)
        alone.experts.at_once = False
        assert far(changed(x), alone(x)) < 1e-6
        merge_lora(layer)
        alone = copy.deepcopy(layer)
        alone.experts.at_once = False
        assert far(layer(x), alone(x)) < 1e-6
