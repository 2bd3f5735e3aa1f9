"""Which activations are kept, and where: no choice changes what is learned."""

import pytest
import torch
from conftest import tune
from test_memory import FAMILIES, all_learned, gradients, objective
from torch import nn

from litlora.errors import UserError
from litlora.train.activations import checkpoint_activations, offloading
from litlora.train.memory import saved_bytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["full", "selective"])
def test_computing_again_changes_no_gradient(how, family):
    plain, ids = objective(dropout=0.3, **FAMILIES[family]), torch.randint(0, 400, (2, 24))
    expected, kept = gradients(plain, ids), saved_bytes(plain, all_learned(ids))
    names = [name for name, _ in plain.named_parameters()]
    checkpoint_activations(plain.model, how)
    got = gradients(plain, ids)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-10)
    assert saved_bytes(plain, all_learned(ids)) < (0.4 if how == "full" else 0.85) * kept, (
        "something must be given up"
    )
    assert [name for name, _ in plain.named_parameters()] == names
    checkpoint_activations(plain.model, "none")
    assert saved_bytes(plain, all_learned(ids)) == kept


def test_nothing_is_computed_again_where_nothing_is_learned():
    plain, calls = objective(), []
    checkpoint_activations(plain.model, "full")
    plain.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(0, 400, (2, 8))
    with torch.no_grad():
        plain(all_learned(ids))
    assert len(calls) == 1
    plain(all_learned(ids))[0].backward()
    assert len(calls) == 3


def test_offloading_copies_activations_and_no_weight():
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    with offloading(layer):
        y = torch.mm(x * 1, layer.weight)
    assert y.grad_fn._saved_mat2.data_ptr() == layer.weight.data_ptr()
    plain, ids = objective(), torch.randint(0, 400, (2, 24))
    expected = gradients(plain, ids)
    with offloading(plain):
        got = gradients(plain, ids)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_offloading_has_no_effect_on_the_cpu(base, alpaca_file, tmp_path):
    with pytest.raises(UserError, match="^offload_activations has no effect on cpu"):
        tune("lora", base, alpaca_file, tmp_path / "out", train={"offload_activations": True})
