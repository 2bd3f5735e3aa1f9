"""Preference objectives: equal to TRL's in value, rewards and gradient; and to the formula in
float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from trl_said import ALONE, CPU, answer, model_of, trl_said

from litlora.config import RopeScaling
from litlora.data.pairs import PairExample
from litlora.errors import UserError
from litlora.formats.families.example import example_config
from litlora.lora import add_lora
from litlora.model import GPT
from litlora.settings import LoRAConfig, PreferenceConfig, TrainConfig
from litlora.train.preference import Preference

trl = pytest.fixture(scope="module")(trl_said)


def pairs_of(records):
    return [
        PairExample(answer(r["prompt"], r["chosen"]), answer(r["prompt"], r["rejected"])) for r in records
    ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", {"loss": "dpo", "beta": 0.3}),
        ("ipo", {"loss": "ipo", "beta": 0.3}),
        ("simpo", {"loss": "simpo", "beta": 2.0, "gamma": 0.5}),
        ("orpo1", {"loss": "orpo", "beta": 0.7}),
        ("orpo2", {"loss": "orpo", "beta": 0.7}),
    ],
)
def test_losses_rewards_and_gradients_are_those_of_trl(trl, name, settings, packing):
    records = trl.pairs[int(name[-1]) :][:1] if name[-1].isdigit() else trl.pairs
    config, preference = TrainConfig(packing=packing), PreferenceConfig(**settings)
    before = Preference(model_of(trl, "reference"), config, preference=preference)
    pairs = before.prepared(pairs_of(records), ALONE)
    model = model_of(trl, "policy").requires_grad_()
    objective = Preference(model, config, preference=preference)
    loss, figures = objective(objective.batch(pairs, CPU))
    loss = loss / len(pairs)
    torch.testing.assert_close(loss, trl.tensors[f"{name}.loss"][0], atol=1e-5, rtol=0)
    if f"{name}.rewards" in trl.tensors:
        rewards = torch.stack([figures["chosen_reward"], figures["rejected_reward"]]) / len(pairs)
        torch.testing.assert_close(rewards, trl.tensors[f"{name}.rewards"], atol=1e-5, rtol=0)
    loss.backward()
    for weight, parameter in model.named_parameters():
        expected = trl.tensors[f"{name}.gradient.{weight}"]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=0, msg=weight)


def random_pairs(count=5):
    draw = torch.Generator().manual_seed(1)

    def ids(most):
        size = int(torch.randint(1, most, (1,), generator=draw))
        return torch.randint(0, 400, (size,), generator=draw).tolist()

    return pairs_of([{"prompt": ids(9), "chosen": ids(12), "rejected": ids(12)} for _ in range(count)])


def plain_log_prob(model, example):
    """One answer at a time, logits everywhere."""
    (start, stop), ids = example.learned[0], torch.tensor([list(example.ids)])
    log_p = F.log_softmax(model(ids)[0].double(), -1)
    return log_p[range(start - 1, stop - 1), ids[0, start:stop]].sum()


@pytest.mark.parametrize("trains", ["all-linear", "head", "everything"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_formula_in_float64(trains, smoothing):
    model = GPT(tiny_config()).double()
    targets = {"all-linear": ["q_proj", "v_proj"], "head": ["lm_head"]}.get(trains)
    if targets:
        add_lora(model, LoRAConfig(rank=2, targets=targets))
        model = model.double()
    else:
        model.requires_grad_()
    settings = PreferenceConfig(beta=0.5, label_smoothing=smoothing)
    objective = Preference(model, TrainConfig(), preference=settings)
    pairs = objective.prepared(random_pairs(), ALONE)
    with torch.no_grad():
        before = [[plain_log_prob(model, e) for e in (p.chosen, p.rejected)] for p in pairs]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.testing.assert_close(
        torch.tensor([p.reference for p in pairs]).double(), torch.tensor(before), atol=1e-4, rtol=0
    )
    # The reference is stored in fp32; compare with what is stored.
    expected = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        chosen, rejected = plain_log_prob(model, pair.chosen), plain_log_prob(model, pair.rejected)
        margin = 0.5 * ((chosen - pair.reference[0]) - (rejected - pair.reference[1]))
        expected = expected - (1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    loss, _ = objective(objective.batch(pairs, CPU))
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=0)
    for gradient, other in zip(torch.autograd.grad(loss, trained), wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo"])
def test_micro_batches_make_no_difference(loss):
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=2))
    objective = Preference(model, TrainConfig(), preference=PreferenceConfig(loss=loss))
    pairs = objective.prepared(random_pairs(), ALONE)
    with torch.no_grad():
        for parameter in objective.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    whole, figures = objective(objective.batch(pairs, CPU))
    parts = [objective(objective.batch([pair], CPU)) for pair in pairs]
    torch.testing.assert_close(whole, sum(part for part, _ in parts), atol=1e-4, rtol=1e-5)
    for name, total in figures.items():
        torch.testing.assert_close(total, sum(part[name] for _, part in parts), atol=1e-4, rtol=1e-5)
    assert len(pairs) == sum(map(objective.weight, pairs))


def test_before_training_nothing_is_preferred():
    """A fresh adapter is its own reference: every margin is 0 and the loss is log 2 a pair."""
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=2, dropout=0.5))
    objective = Preference(model, TrainConfig())
    pairs = objective.prepared(random_pairs(), ALONE)
    with torch.no_grad():
        loss, figures = objective.eval()(objective.batch(pairs, CPU))
    assert float(loss) == pytest.approx(5 * math.log(2), abs=1e-5)
    assert abs(float(figures["margin"])) < 1e-5


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_do_not_compute_one(loss):
    objective = Preference(GPT(tiny_config()), preference=PreferenceConfig(loss=loss))
    assert all(pair.reference is None for pair in objective.prepared(random_pairs(), ALONE))


def test_an_answer_that_is_certain_has_finite_odds():
    model = GPT(tiny_config())
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1e4 * torch.randn(32)
    add_lora(model, LoRAConfig(rank=2))
    objective = Preference(model, preference=PreferenceConfig(loss="orpo"))
    pairs = pairs_of([{"prompt": [1], "chosen": [7, 7], "rejected": [7]}])
    loss, _ = objective(objective.batch(pairs, CPU))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in objective.trainable().values() if p.grad is not None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beta": 0.0}, "beta 0.0: must be a positive"),
        ({"beta": math.nan}, "beta nan"),
        ({"loss": "simpo", "gamma": -1.0}, "gamma -1.0: must be 0 or more"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5: must be"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect on loss ipo"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        PreferenceConfig(**settings)


def test_prompts_cannot_be_preferred():
    with pytest.raises(UserError, match="mask_prompt false: a preference"):
        Preference(GPT(tiny_config()), TrainConfig(mask_prompt=False))


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"sliding_window": 5, "full_attention_layers": (1,)},
        {"positions": "learned"},
        {"attn_logit_softcapping": 2.0, "sliding_window": 4},
    ],
    ids=["rotary", "windows", "learned positions", "softcap"],
)
def test_answers_that_share_a_prompt_are_those_computed_apart(facts, monkeypatch):
    model = GPT(tiny_config(**facts)).double().requires_grad_()
    pairs = random_pairs(4)
    same = [1, 2, 3, 4, 5]  # the answers begin alike too, and one is the beginning of the other
    pairs += [
        PairExample(answer(same, [6, 7, 8]), answer(same, [6, 7, 9, 10])),
        PairExample(answer(same, [6]), answer(same, [6, 7])),
    ]

    def computed():
        objective = Preference(model, TrainConfig(), preference=PreferenceConfig(loss="orpo"))
        batch = objective.batch(pairs, CPU)
        loss, _ = objective(batch)
        model.zero_grad()
        loss.backward()
        assert objective.text(batch).shared is None
        return batch.batch, loss.detach(), [weight.grad.clone() for weight in model.parameters()]

    batch, loss, gradients = computed()
    monkeypatch.setattr(Preference, "shares_prompts", False)
    apart, expected, expected_gradients = computed()
    assert batch.input_ids.numel() < apart.input_ids.numel() == sum(batch.lengths)
    torch.testing.assert_close(loss, expected, atol=1e-11, rtol=0)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-11, rtol=0)


def test_nothing_is_shared_where_the_length_of_a_sequence_changes_its_tokens():
    scaling = RopeScaling(rope_type="dynamic", factor=2.0)
    for facts, config in (
        ({"rope_scaling": scaling}, {}),
        ({}, {"neftune_alpha": 5.0}),
        ({}, {"packing": False}),
    ):
        objective = Preference(GPT(tiny_config(**facts)), TrainConfig(**config))
        assert objective.batch(random_pairs(), CPU).batch.shared is None


def test_shared_prompts_in_bf16_keep_to_the_precision():
    """Sizes are buckets there, so that tokens are added to the pack."""
    model = GPT(tiny_config()).bfloat16().requires_grad_()
    pairs = random_pairs(4)
    objective = Preference(model, TrainConfig(), preference=PreferenceConfig(loss="orpo"))
    loss, _ = objective(objective.batch(pairs, CPU))
    loss.backward()
    model.float()
    expected, _ = objective(objective.batch(pairs, CPU))
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0)


def test_linear_attention_shares_nothing():
    model = GPT(example_config("qwen3_5_text"))
    objective = Preference(model, TrainConfig(), preference=PreferenceConfig(loss="orpo"))
    assert objective.batch(random_pairs(), CPU).batch.shared is None
