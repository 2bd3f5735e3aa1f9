"""The objective: equal to the plain way, in value and gradient, at a fraction of the logits."""

import itertools
from array import array

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from litlora.data.examples import Example
from litlora.kernels import cross_entropy
from litlora.lora import add_lora
from litlora.model import GPT
from litlora.settings import LoRAConfig, TrainConfig
from litlora.train.objective import SFT

SIZES = [(17, 9), (11, 2), (5, 0), (2, 1)]
"""Length, and how much of it is the prompt."""
EXAMPLES = [
    Example(array("i", range(7 * i, 7 * i + length)), ((prompt, length),))
    for i, (length, prompt) in enumerate(SIZES)
]


CPU = torch.device("cpu")


def loss_of(model, examples, packed):
    objective = SFT(model, TrainConfig(packing=packed))
    return objective(objective.batch(examples, CPU))[0]


def plain_loss(model, examples):
    """One example at a time, logits everywhere, and torch's own cross-entropy."""
    total = 0
    for example in examples:
        ids = torch.tensor([list(example.ids)])
        learned = max(1, example.learned[0][0])
        total = total + F.cross_entropy(model(ids)[0, learned - 1 : -1], ids[0, learned:], reduction="sum")
    return total


VARIANTS = {
    "llama": {},
    "windows and caps": {"sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "learned positions": {"positions": "learned", "norm": "layernorm", "mlp": "plain", "hidden_act": "gelu"},
    "parallel": {"parallel_residual": True},
    "one norm for both": {"parallel_residual": True, "shared_norm": True},
    "norms behind": {"norm_position": "both"},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "tied": {"tie_word_embeddings": True},
}


def cases():
    """(variant, what trains, elements of a chunk of logits); chunks and a choice of layers on one variant
    stand for those on others."""
    every = itertools.product(VARIANTS, ["everything", "all-linear", "qv"], [2**24, 2000])
    for variant, trained, elements in every:
        repeats = trained == "qv" or (elements == 2000 and variant != "windows and caps")
        slow = [pytest.mark.slow] * (repeats and variant != "llama")
        yield pytest.param(variant, trained, elements, marks=slow)


@pytest.mark.parametrize(("variant", "trained", "elements"), [*cases()])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradients_equal_those_of_each_example_alone(
    packed, variant, trained, elements, monkeypatch
):
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", elements)
    model = GPT(tiny_config(**VARIANTS[variant])).double()
    if trained != "everything":
        add_lora(model, LoRAConfig(rank=2, targets=trained), dtype=torch.float64)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = plain_loss(model, EXAMPLES)
    expected_gradients = torch.autograd.grad(expected, parameters)
    got = loss_of(model, EXAMPLES, packed)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters), expected_gradients, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("packed", [True, False])
def test_the_last_block_computes_for_nothing_but_what_is_learned(packed):
    model, rows = GPT(tiny_config()), []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:2].numel()))
    objective = SFT(model, TrainConfig(packing=packed))
    batch = objective.batch(EXAMPLES, CPU)
    objective(batch)
    assert rows == [batch.input_ids.numel(), len(batch.targets)]


def test_what_is_packed_beside_an_example_does_not_change_it():
    """In bf16 too, where a pack has rows to spare: the loss of a pack is the sum of its examples'
    losses."""
    model = GPT(tiny_config()).bfloat16()
    add_lora(model, LoRAConfig(rank=2))
    together = loss_of(model, EXAMPLES, True).item()
    assert together == pytest.approx(
        sum(loss_of(model, [example], True).item() for example in EXAMPLES), rel=1e-3
    )
    changed = Example(array("i", [3] * 11), ((2, 11),))
    first = [
        loss_of(model, [EXAMPLES[0], other], True).item() - loss_of(model, [other], True).item()
        for other in (EXAMPLES[1], changed)
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-3)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_batch_without_labels_has_loss_zero_and_gradients_zero(adapter):
    model = GPT(tiny_config())
    if adapter:
        add_lora(model, LoRAConfig())
    objective = SFT(model)
    loss, _ = objective(objective.idle(objective.batch(EXAMPLES, CPU)))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("packed", [True, False])
def test_logits_exist_at_supervised_positions_only(packed):
    model = GPT(tiny_config())
    rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].size(0)))
    loss_of(model, EXAMPLES, packed)
    assert rows == [8 + 9 + 4 + 1]
