"""Mixtures of experts beside the sum that defines them."""

import pytest
import torch
from conftest import tiny_config

from litlora.model.experts import MixtureOfExperts

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
