"""Weights that are computed a block at a time: the same model as one that is computed while it is
loaded."""

import pytest
import torch
from conftest import random_adapter

from litlora.checkpoint import resolve
from litlora.errors import CheckpointError
from litlora.frozen.later import LateWeight, settle
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantize import fingerprint_of
from litlora.load import load_chain
from litlora.lora import LoRAConfig

IDS = torch.arange(20)[None] * 7 % 300


@pytest.mark.parametrize("quantize", [None, "nf4-dq", "int8"])
@pytest.mark.parametrize("chained", [False, True])
def test_late_weights_settle_to_the_same_model(quantize, chained, base, tmp_path):
    directory = base
    if chained:
        directory = random_adapter(tmp_path / "adapter", base, LoRAConfig(rank=2, targets="all-linear"))
    expected = load_chain(resolve(directory), quantize=quantize, dense=[])
    late = load_chain(resolve(directory), quantize=quantize, dense=[], late=True)
    weights = stored_weights(late.model)
    assert len(weights) == (14 if quantize or chained else 0)
    assert all(isinstance(weight, LateWeight) for weight in weights.values())
    with torch.no_grad():
        wanted = expected.model(IDS)
        assert torch.equal(late.model(IDS), wanted)  # computed for every use
    dy = torch.randn(3, 32)
    for name, weight in weights.items():
        dense = expected.model.get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(weight.rows(slice(1, 3)), dense[1:3]) and weight.dtype == dense.dtype
        if weight.shape[0] == 32:
            assert torch.equal(weight.back(dy), dy @ dense)
            total = torch.ones(3, dense.size(1))
            assert torch.equal(weight.back(dy, total.clone()), total.addmm(dy, dense))
    found = {}
    for block in late.model.model.layers:
        found |= settle(block)
    assert not any(isinstance(weight, LateWeight) for weight in stored_weights(late.model).values())
    with torch.no_grad():
        assert torch.equal(late.model(IDS), wanted)
    if quantize:
        assert fingerprint_of(found) == expected.quantized.fingerprint and late.quantized.fingerprint is None


def test_a_late_weight_that_is_not_finite_is_refused(make_checkpoint):
    directory = make_checkpoint("broken")
    file = directory / "lit_model.pth"
    content = torch.load(file, weights_only=True)
    content["model"]["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    torch.save(content, file)
    model = load_chain(resolve(directory), quantize="int8", dense=[], late=True).model
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight holds values that are not finite"):
        settle(model)
