"""KTO: equal to TRL's in value, rewards, KL and gradient; and to the formula in float64, however a step
is cut up."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from trl_said import ALONE, CPU, answer, model_of, trl_said

from litlora.data.labelled import LabelledExample
from litlora.errors import UserError
from litlora.lora import add_lora
from litlora.model import GPT
from litlora.settings import LoRAConfig, PreferenceConfig, TrainConfig
from litlora.train.kto import KTO

trl = pytest.fixture(scope="module")(trl_said)
WEIGHED = {"desirable_weight": 1.3, "undesirable_weight": 0.7}


def examples_of(records):
    return [LabelledExample(answer(r["prompt"], r["completion"]), r["label"]) for r in records]


def some(count=5, seed=1):
    draw = torch.Generator().manual_seed(seed)

    def ids(most):
        size = int(torch.randint(1, most, (1,), generator=draw))
        return torch.randint(0, 400, (size,), generator=draw).tolist()

    records = [{"prompt": ids(9), "completion": ids(12), "label": n % 3 != 1} for n in range(count)]
    return examples_of(records)


def moved(objective, by=0.1):
    """As if trained: the weights are not what they were."""
    with torch.no_grad():
        for parameter in objective.trainable().values():
            parameter.add_(by * torch.randn_like(parameter))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kto", {"loss": "kto", **WEIGHED}),
        ("kto_turned", {"loss": "kto"}),
        ("apo_zero_unpaired", {"loss": "apo_zero_unpaired"}),
    ],
)
def test_loss_rewards_kl_and_gradients_are_those_of_trl(trl, name, settings, packing):
    settings = PreferenceConfig(beta=0.3, **settings)
    names = ["policy", "reference"]
    policy, reference = reversed(names) if name == "kto_turned" else names
    model = model_of(trl, reference).requires_grad_()
    objective = KTO(model, TrainConfig(packing=packing), preference=settings)
    examples = objective.prepared(examples_of(trl.labelled), ALONE)
    model.load_state_dict(model_of(trl, policy).state_dict())
    objective.begin_step(examples, ALONE)
    batch = objective.batch(examples, CPU)
    loss, figures = objective(batch)
    loss = loss / len(examples)
    torch.testing.assert_close(loss, trl.tensors[f"{name}.loss"][0], atol=1e-5, rtol=0)
    good, bad, kl = trl.tensors[f"{name}.figures"]
    torch.testing.assert_close(figures["kl"] / len(examples), kl, atol=1e-5, rtol=0)
    with torch.no_grad():
        rewards = 0.3 * (objective.log_probs(batch.answers) - batch.answers.reference)[:, 0]
    for expected, which in ((good, batch.desirable), (bad, ~batch.desirable)):
        torch.testing.assert_close(rewards[which].mean(), expected, atol=1e-5, rtol=0)
    loss.backward()
    for weight, parameter in model.named_parameters():
        expected = trl.tensors[f"{name}.gradient.{weight}"]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=0, msg=weight)


def plain_log_prob(model, example):
    """One answer at a time, logits everywhere."""
    (start, stop), ids = example.learned[0], torch.tensor([list(example.ids)])
    log_p = F.log_softmax(model(ids)[0].double(), -1)
    return log_p[range(start - 1, stop - 1), ids[0, start:stop]].sum()


def test_it_is_the_formula_in_float64():
    model = GPT(tiny_config()).double()
    add_lora(model, LoRAConfig(rank=2, targets=["q_proj", "v_proj"]))
    model = model.double()
    objective = KTO(model, TrainConfig(), preference=PreferenceConfig(loss="kto", beta=0.5, **WEIGHED))
    examples = objective.prepared(some(), ALONE)
    crossed = []
    for one, other in zip(examples, [examples[-1], *examples[:-1]], strict=True):
        start, begin = one.answer.learned[0][0], other.answer.learned[0][0]
        crossed.append(answer(one.answer.ids[:start].tolist(), other.answer.ids[begin:].tolist()))
    with torch.no_grad():
        before = torch.stack([plain_log_prob(model, example) for example in crossed])
        moved(objective, 0.3)
        now = torch.stack([plain_log_prob(model, example) for example in crossed])
    z = (now - before).mean().clamp(min=0)
    objective.begin_step(examples, ALONE)
    torch.testing.assert_close(objective.kl.double(), z, atol=1e-4, rtol=0)
    expected = torch.zeros((), dtype=torch.float64)
    for example in examples:
        distance = plain_log_prob(model, example.answer) - example.reference[0] - objective.kl
        sign, weight = (1, 1.3) if example.is_desirable else (-1, 0.7)
        expected = expected + weight * (1 - torch.sigmoid(0.5 * sign * distance))
    trained = list(objective.trainable().values())
    wanted = torch.autograd.grad(expected, trained)
    loss, _ = objective(objective.batch(examples, CPU))
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=0)
    for gradient, other in zip(torch.autograd.grad(loss, trained), wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-8, rtol=1e-6)


def trained_lora(**changes):
    torch.manual_seed(3)
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=2, dropout=0.5))
    objective = KTO(model, TrainConfig(**changes), preference=PreferenceConfig(loss="kto"))
    examples = objective.prepared(some(), ALONE)
    moved(objective, 0.3)
    return objective, examples


def test_micro_batches_make_no_difference():
    """Neither for the loss nor for KL, whose answers are packed in several ways."""
    objective, examples = trained_lora()
    objective.begin_step(examples, ALONE)
    kl = float(objective.kl)
    assert kl > 0
    with torch.no_grad():
        objective.eval()
        whole, figures = objective(objective.batch(examples, CPU))
        parts = [objective(objective.batch([example], CPU)) for example in examples]
    torch.testing.assert_close(whole, sum(part for part, _ in parts), atol=1e-4, rtol=1e-5)
    for name, total in figures.items():
        torch.testing.assert_close(total, sum(part[name] for _, part in parts), atol=1e-4, rtol=1e-5)
    assert float(figures["kl"]) == pytest.approx(len(examples) * kl)
    for changes in ({"micro_batch_tokens": 8}, {"packing": False, "micro_batch_size": 2}):
        other, _ = trained_lora(**changes)
        other.begin_step(examples, ALONE)
        assert float(other.kl) == pytest.approx(kl, abs=1e-5)


def test_the_reference_is_the_model_before_training_and_the_weights_return():
    objective, examples = trained_lora()
    weights = {name: weight.detach().clone() for name, weight in objective.trainable().items()}
    objective.train()
    drawn = torch.get_rng_state()
    objective.begin_step(examples, ALONE)
    assert objective.training and torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(weight, weights[name]) for name, weight in objective.trainable().items())


def test_before_training_all_is_even():
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=2, dropout=0.5))
    objective = KTO(model, TrainConfig(), preference=PreferenceConfig(loss="kto"))
    examples = objective.prepared(some(), ALONE)
    objective.begin_step(examples, ALONE)
    assert float(objective.kl) == 0
    with torch.no_grad():
        loss, _ = objective.eval()(objective.batch(examples, CPU))
    assert float(loss) == pytest.approx(len(examples) / 2, abs=1e-5)


def test_an_example_alone_in_the_data_has_no_kl():
    objective, _ = trained_lora()
    [alone] = objective.prepared(some(1), ALONE)
    moved(objective, 0.3)
    objective.begin_step([alone], ALONE)
    assert float(objective.kl) == 0 and alone.other is None


def test_a_prompt_has_the_same_other_answer_in_every_step():
    """So the model before training is asked once, ahead, and never in a step."""
    objective, examples = trained_lora()
    for one, other in zip(examples, [examples[-1], *examples[:-1]], strict=True):
        assert one.other == objective.exchanged(one, other).answer
    asked = []
    objective.all_log_probs = lambda rows, parallel: asked.append(len(rows)) or torch.zeros(len(rows), 1)
    objective.begin_step(examples[1:3], ALONE)
    wanted = -sum(example.other_reference for example in examples[1:3]) / 2
    assert asked == [2] and float(objective.kl) == pytest.approx(wanted)


def test_a_long_prompt_with_a_long_answer_is_cut_where_training_cuts():
    objective = KTO(
        GPT(tiny_config()), TrainConfig(max_seq_length=12), preference=PreferenceConfig(loss="kto")
    )
    one, other = examples_of(
        [
            {"prompt": [1] * 9, "completion": [2] * 2, "label": True},
            {"prompt": [3] * 2, "completion": [4, 5, 6, 7, 8], "label": False},
        ]
    )
    crossed = objective.exchanged(one, other)
    assert list(crossed.answer.ids) == [1] * 9 + [4, 5, 6] and crossed.answer.learned == ((9, 12),)
    other = replace(other, answer=replace(other.answer, learned=((2, 3), (4, 7))))
    assert objective.exchanged(one, other).answer.learned == ((9, 10), (11, 12))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "kto", "desirable_weight": 0.0}, "desirable_weight 0.0: must be a positive"),
        ({"loss": "dpo", "undesirable_weight": 2.0}, "undesirable_weight has no effect on loss dpo"),
        ({"loss": "kto", "label_smoothing": 0.1}, "label_smoothing has no effect on loss kto"),
        ({"loss": "kto", "gamma": 2.0}, "gamma has no effect on loss kto"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        PreferenceConfig(**settings)
