"""The schedule and the optimizer's groups."""

import importlib.util
import math
import sys

import pytest
import torch
from conftest import tune
from torch import nn

from litlora.checkpoint import open_checkpoint
from litlora.errors import MissingExtraError, UserError
from litlora.settings import TrainConfig
from litlora.train.optim import check_optimizer, lr_at, make_optimizer, state_bytes


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
    [
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"warmup_steps": 1.5},
        {"warmup_steps": -1},
        {"epochs": 0},
        {"max_steps": 0},
        {"max_grad_norm": float("inf")},
        {"beta2": 1.0},
        {"micro_batch_size": 0},
        {"max_seq_length": 1},
    ],
    ids=str,
)
def test_settings_that_train_nothing_are_refused(settings):
    with pytest.raises(UserError, match=rf"^{next(iter(settings))}"):
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


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_a_missing_extra_is_named_before_any_work(name, base, alpaca_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        MissingExtraError, match=rf"^optimizer {name} needs bitsandbytes; .*litlora\[bitsandbytes\]"
    ):
        tune("lora", base, alpaca_file, tmp_path / "out", train={"optimizer": name})
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_moments_in_8_bits_learn_nearly_the_same(base, alpaca_file, tmp_path, capsys):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    with pytest.raises(UserError, match="^optimizer paged_adamw: .*needs CUDA, not cpu"):
        check_optimizer("paged_adamw", torch.device("cpu"))
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = make_optimizer([weight], TrainConfig(optimizer="adamw_8bit"))
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    moments = [
        value
        for value in optimizer.state[weight].values()
        if torch.is_tensor(value) and value.numel() == 64 * 64
    ]
    assert (
        sum(value.nbytes for value in moments)
        == state_bytes([weight], TrainConfig(optimizer="adamw_8bit"))
        == 2 * 64 * 64
    )
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        tune("full", base, alpaca_file, tmp_path / name, train={"optimizer": name})
        losses[name] = float(capsys.readouterr().out.split("validation loss ")[-1].split()[0])
        assert open_checkpoint(tmp_path / name / "final").tensors
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.02)


def test_an_optimizer_that_a_device_cannot_run_is_one_line():
    class Broken(torch.optim.SGD):
        def step(self):
            raise RuntimeError("no kernel\nfor this device")

    with pytest.raises(
        UserError, match="^optimizer adamw_8bit does not work on cpu here: no kernel; use adamw$"
    ):
        check_optimizer("adamw_8bit", torch.device("cpu"), lambda name: (Broken, {}))
