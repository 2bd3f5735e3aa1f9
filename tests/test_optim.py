"""The schedule and the optimizer's groups."""

import math

import pytest
import torch
from torch import nn

from litlora.errors import UserError
from litlora.optim import lr_at, make_optimizer
from litlora.settings import TrainConfig


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 3, 50, 0.0, 0.05, 0.5])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_no_step_has_a_learning_rate_of_zero(total, warmup, floor):
    config = TrainConfig(learning_rate=1e-3, warmup_steps=warmup, min_lr_ratio=floor)
    rates = [lr_at(step, total, config) for step in range(total)]
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_warm_up_then_cosine():
    config = TrainConfig(learning_rate=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [lr_at(step, 24, config) for step in range(24)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert lr_at(0, 10, TrainConfig(learning_rate=0.5, warmup_steps=0)) == 0.5


def test_a_share_counts_of_all_steps():
    config = TrainConfig(learning_rate=1.0, warmup_steps=0.25)
    assert lr_at(24, 100, config) < 1.0 == lr_at(25, 100, config)


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0}, {"learning_rate": float("nan")}, {"warmup_steps": 1.5}, {"warmup_steps": -1}, {"epochs": 0}, {"max_steps": 0},
     {"max_grad_norm": float("inf")}, {"beta2": 1.0}, {"micro_batch_size": 0}, {"max_seq_length": 1}],
    ids=str,
)
def test_settings_that_train_nothing_are_refused(settings):
    with pytest.raises(UserError, match=rf"--train\.{next(iter(settings))}"):
        TrainConfig(**settings)


def test_only_what_requires_a_gradient_is_optimised_and_vectors_are_not_decayed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    groups = make_optimizer(model.parameters(), TrainConfig(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], [id(p) for p in group["params"]]) for group in groups] == [
        (0.1, [id(model[1].weight)]),
        (0.0, [id(model[1].bias)]),
    ]
    assert isinstance(make_optimizer(model[1:].parameters(), TrainConfig()), torch.optim.AdamW)
