"""Weights that are updated as their gradients arrive."""

import csv
import os
import signal

import pytest
import torch
from conftest import AfterStep, extra_sinks, tiny_config, tune
from torch import nn

from litlora.errors import UserError
from litlora.model import GPT
from litlora.settings import FinetuneFull, FinetuneLoRA, TrainConfig
from litlora.train.early import EarlyUpdates
from litlora.train.optim import make_optimizer
from litlora.train.parallel import Parallel

ONE = {"global_batch_size": 6, "max_grad_norm": 0.0, "learning_rate": 1e-3}
EARLY = {**ONE, "update_early": True}


def rows(out):
    kept = ("step", "loss", "grad_norm", "val_loss")
    with open(out / "metrics.csv", newline="") as file:
        return [[row[name] for name in kept] for row in csv.DictReader(file)]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_result_is_that_of_updates_after_the_backward(tied, make_checkpoint, alpaca_file, tmp_path):
    base = make_checkpoint("base", tie_word_embeddings=tied)
    late, early = tmp_path / "late", tmp_path / "early"
    packed = {"micro_batch_tokens": 6 * 64}
    tune("full", base, alpaca_file, late, train={**ONE, **packed}, precision="32-true")
    tune("full", base, alpaca_file, early, train=EARLY, precision="32-true")
    name = "final/lit_model.pth"
    assert (early / name).read_bytes() == (late / name).read_bytes()
    assert rows(early) == rows(late)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"optimizer": "sgd"}, {"optimizer": "muon"}, {"checkpoint_activations": "full"}], ids=str
)
def test_it_resumes_to_the_bit(more, base, alpaca_file, tmp_path):
    expected, out = tmp_path / "expected", tmp_path / "out"
    train = {**EARLY, **more}
    tune("full", base, alpaca_file, expected, train=train, precision="32-true")
    with extra_sinks(AfterStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))), pytest.raises(SystemExit):
        tune("full", base, alpaca_file, out, train=train, precision="32-true")
    tune("full", base, alpaca_file, out, train=train, precision="32-true", resume="auto")
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()


def test_no_two_gradients_are_there_together():
    """Counted where a gradient is freed: at each update, all other weights have none."""
    model = GPT(tiny_config())
    trainable = dict(model.named_parameters())
    optimizer = make_optimizer(trainable, TrainConfig())
    early, together = EarlyUpdates(trainable, optimizer), []
    step = optimizer.step
    optimizer.step = lambda: (together.append(sum(p.grad is not None for p in trainable.values())), step())
    before = {name: p.detach().clone() for name, p in trainable.items()}
    early.backward(Parallel(), model(torch.arange(8)[None]).logsumexp(-1).sum())
    assert together == [1] * len(trainable)
    assert all(p.grad is None for p in trainable.values())
    assert not any(torch.equal(p, before[name]) for name, p in trainable.items())
    assert not early.without_gradient()


def test_what_is_not_finite_changes_nothing():
    layer = nn.Linear(2, 2, bias=False)
    before = layer.weight.detach().clone()
    early = EarlyUpdates(dict(layer.named_parameters()), torch.optim.SGD(layer.parameters(), lr=0.1))
    early.backward(Parallel(), layer(torch.tensor([[float("nan"), 1.0]])).sum())
    assert torch.equal(layer.weight, before) and not early.norm().isfinite()
    early.backward(Parallel(), layer(torch.ones(1, 2)).sum() + float("inf"))
    assert torch.equal(layer.weight, before) and layer.weight.grad is None
    early.backward(Parallel(), layer(torch.ones(1, 2)).sum())
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm 1"),
        ({"micro_batch_tokens": 512}, "micro_batch_tokens"),
        ({"packing": False, "micro_batch_size": 3}, "micro_batch_size 3"),
        ({"auto_batch": True}, "auto_batch"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_named(settings, named):
    with pytest.raises(UserError, match=f"^update_early and {named}: .*"):
        TrainConfig(**{**EARLY, **settings})


def test_it_is_for_full_fine_tuning_on_one_device():
    early = TrainConfig(**EARLY)
    with pytest.raises(UserError, match="^update_early and devices 2: "):
        FinetuneFull(train=early, devices=2)
    with pytest.raises(UserError, match=r"^update_early is for full fine-tuning \(finetune/full.py\)"):
        FinetuneLoRA(train=early)
