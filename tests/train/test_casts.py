"""A and B cast once a step: nothing that is learned changes by a bit."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_config
from test_experts import adapted as adapted_experts
from test_experts import learned
from test_fit import examples, train
from torch.utils._python_dispatch import TorchDispatchMode

from litlora.lora import LoRAConfig, LoRALinear, add_lora
from litlora.lora.casts import cast_ahead
from litlora.model import GPT
from litlora.train.activations import checkpoint_activations
from litlora.train.objective import SFT


class CastAtEachUse(SFT):
    def in_step(self):
        return nullcontext()


class Casts(TorchDispatchMode):
    """Counts the operations that change a dtype, of tensors as large as a factor, and all others."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        cast = operation is torch.ops.aten._to_copy.default and args[0].dtype != result.dtype
        self.counts["casts to bf16" if cast and result.dtype == torch.bfloat16 else "others"] += 1
        return result


def adapted(dtype, layers=1, **lora):
    torch.manual_seed(0)
    model = GPT(tiny_config(num_hidden_layers=layers)).to(dtype)
    add_lora(model, LoRAConfig(rank=4, targets=["all-linear"], **lora))
    return model


@pytest.mark.parametrize(
    ("how", "lora"),
    [("none", {"dropout": 0.1}), ("full", {"rank_pattern": {"v_proj": 2}}), ("none", {"variant": "dora"})],
    ids=["dropout", "computed again", "dora"],
)
def test_steps_learn_the_same_to_the_bit(how, lora, tmp_path):
    """In bf16, over several micro-batches, with weights that change between the steps."""
    found = []
    for objective in (SFT, CastAtEachUse):
        model = adapted(torch.bfloat16, **lora)
        checkpoint_activations(model, how)
        settings = {"global_batch_size": 4, "micro_batch_tokens": 48, "max_steps": 3}
        train(model, examples(12), tmp_path, objective=objective, **settings)
        found.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
        assert all(module.cast is None for module in model.modules() if type(module) is LoRALinear)
    assert found[0].keys() == found[1].keys() and all(p.dtype == torch.float32 for p in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_each_factor_is_cast_once():
    model = adapted(torch.bfloat16)
    objective = SFT(model).train()
    batch, counts = objective.batch(examples(3), torch.device("cpu")), []
    for context in (nullcontext, objective.in_step):
        with Casts() as mode, context():
            for _ in range(2):
                objective(batch)[0].backward()
        counts.append(mode.counts)
    before, after = counts
    # Of 7 layers, 4 products in the forward and 4 in the backward want A (of the lowest ones no
    # gradient of x is asked for), and 7 and 7 want B.
    assert before["casts to bf16"] - after["casts to bf16"] == 2 * (4 + 3 + 7 + 7), counts
    assert after["others"] < before["others"], counts


@pytest.mark.parametrize("rank", [8, 2])
def test_experts_at_once_take_them_too(rank):
    layer, x = adapted_experts(rank, dtype=torch.bfloat16), torch.randn(2, 9, 16).bfloat16()
    layer.experts.lay_together()
    found = []
    for context in (nullcontext(), cast_ahead(layer, torch.bfloat16)):
        with context, Casts() as mode:
            found.append((learned(layer, x), mode.counts["casts to bf16"]))
    (before, casts), (after, rest) = found
    assert casts - rest == 6, "A and B of three layers"
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_has_the_dtype_is_not_cast():
    model = adapted(torch.float32)
    with cast_ahead(model, torch.float32):
        assert all(module.cast is None for module in model.modules() if type(module) is LoRALinear)
    with cast_ahead(model, torch.float64):
        assert any(module.cast is not None for module in model.modules() if type(module) is LoRALinear)
