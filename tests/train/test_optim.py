"""The schedule and the optimizer's groups."""

import copy
import csv
import importlib.util
import itertools
import math
import os
import signal
import sys

import pytest
import torch
from conftest import AfterStep, extra_sinks, tiny_config, tune
from torch import nn

from litlora.checkpoint import open_checkpoint
from litlora.errors import MissingExtraError, UserError
from litlora.lora import add_lora
from litlora.model import GPT
from litlora.settings import FinetuneFull, FinetuneLoRA, LoRAConfig, TrainConfig
from litlora.train.optim import check_optimizer, lr_at, make_optimizer, set_learning_rate, state_bytes


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_no_step_has_a_learning_rate_of_zero(schedule):
    for warmup, floor in itertools.product([0, 1, 3, 50, 0.0, 0.05, 0.5], [0.0, 0.1, 1.0]):
        config = TrainConfig(learning_rate=1e-3, warmup_steps=warmup, min_lr_ratio=floor, schedule=schedule)
        for total in (1, 2, 7, 100):
            rates = [lr_at(step, total, config) for step in range(total)]
            assert all(0 < rate <= 1e-3 for rate in rates), (total, config)


def test_warm_up_then_cosine():
    config = TrainConfig(learning_rate=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [lr_at(step, 24, config) for step in range(24)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))


def test_other_schedules():
    settings = {"learning_rate": 1.0, "warmup_steps": 2, "min_lr_ratio": 0.0}
    linear, constant, wsd = (
        [lr_at(step, 10, TrainConfig(**settings, **more)) for step in range(10)]
        for more in (
            {"schedule": "linear"},
            {"schedule": "constant"},
            {"schedule": "wsd", "decay_steps": 3},
        )
    )
    warmup = pytest.approx([1 / 3, 2 / 3])
    assert linear[:2] == constant[:2] == wsd[:2] == warmup
    assert linear[2:] == pytest.approx([1 - k / 8 for k in range(8)])
    assert constant[2:] == [1.0] * 8
    assert wsd[2:] == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    share = TrainConfig(**settings, schedule="wsd", decay_steps=0.3)
    assert [lr_at(step, 10, share) for step in range(10)] == wsd
    floor = TrainConfig(learning_rate=1.0, warmup_steps=0, min_lr_ratio=0.5, schedule="linear")
    assert lr_at(5, 10, floor) == 0.75


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
        {"decay_steps": 1.5},
        {"decay_steps": 3, "schedule": "cosine"},
        {"loraplus_lr_ratio": 0},
        {"learning_rate_ratios": {"lora_B": 0}},
        {"learning_rate_ratios": {"lora_B": math.inf}},
        {"loraplus_lr_ratio": 2.0, "learning_rate_ratios": {"lora_A": 2.0}},
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
    groups = make_optimizer(trainable(model), TrainConfig(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], [id(p) for p in group["params"]]) for group in groups] == [
        (0.1, [id(model[1].weight)]),
        (0.0, [id(model[1].bias)]),
    ]
    assert isinstance(make_optimizer(trainable(model[1:]), TrainConfig()), torch.optim.AdamW)


def test_lora_plus_needs_an_adapter():
    with pytest.raises(UserError, match="^loraplus_lr_ratio has no effect on full fine-tuning"):
        FinetuneFull(train=TrainConfig(loraplus_lr_ratio=2.0))


def test_lora_plus_gives_every_b_a_rate_of_its_own():
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=2, targets=["q_proj", "v_proj"]))
    weights = trainable(model)
    optimizer = make_optimizer(weights, TrainConfig(loraplus_lr_ratio=16.0))
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for name, p in weights.items() if name.endswith("lora_B")} == {8.0}
    assert {rates[id(p)] for name, p in weights.items() if name.endswith("lora_A")} == {0.5}
    assert len(rates) == len(weights)
    (group,) = make_optimizer(weights, TrainConfig()).param_groups
    assert "lr_ratio" not in group, "states of earlier versions have no such entry"


def rates_of(weights, config, rate=1.0):
    optimizer = make_optimizer(weights, config)
    set_learning_rate(optimizer, rate)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(weights)
    return {name: rates[id(p)] for name, p in weights.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_the_first_target_that_means_a_weight_sets_its_rate(optimizer):
    weights = trainable(GPT(tiny_config(num_hidden_layers=3, attention_bias=True)))
    ratios = {"layers.0-1.mlp": 0.5, "q_proj.bias": 3.0, ".*self_attn": 2.0, "embed_tokens": 0.1}
    found = rates_of(weights, TrainConfig(learning_rate_ratios=ratios, optimizer=optimizer), 0.5)
    for name, rate in found.items():
        wanted = 1.0
        if ".mlp." in name and ".2." not in name:
            wanted = 0.5
        elif name.endswith("q_proj.bias"):
            wanted = 3.0
        elif ".self_attn." in name:
            wanted = 2.0
        elif "embed_tokens" in name:
            wanted = 0.1
        assert rate == pytest.approx(0.5 * wanted), name
    assert len(set(found.values())) == 5


def test_lora_plus_is_a_ratio_of_every_b():
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=2, targets="qv"))
    plus, named = (
        make_optimizer(trainable(model), TrainConfig(**settings)).state_dict()
        for settings in ({"loraplus_lr_ratio": 16.0}, {"learning_rate_ratios": {"lora_B": 16.0}})
    )
    assert plus == named and len(plus["param_groups"]) == 2


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        (
            {"k_proj": 2.0},
            "^learning_rate_ratios k_proj: no weight that trains .*: lora_A, lora_B",
        ),
        (
            {"q_proj": 2.0, ".*lora_.": 3.0, "v_proj": 1.5},
            "^learning_rate_ratios v_proj: means only weights that",
        ),
        ({"layers.1-0": 2.0}, "^learning_rate_ratios layers.1-0: 1-0 is not a range of layers"),
        ({"q_proj(": 2.0}, "^learning_rate_ratios q_proj\\(: neither"),
    ],
)
def test_targets_without_weights_are_refused(ratios, message):
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=2, targets="qv"))
    with pytest.raises(UserError, match=message):
        make_optimizer(trainable(model), TrainConfig(learning_rate_ratios=ratios))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"optimizer": "sgd", "learning_rate": 0.3}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "adafactor", "learning_rate": 0.03}, marks=pytest.mark.slow),
        {"optimizer": "lion"},
        pytest.param({"optimizer": "lion_8bit"}, marks=pytest.mark.slow),
        pytest.param({"loraplus_lr_ratio": 4.0, "schedule": "wsd"}, marks=pytest.mark.slow),
        pytest.param(
            {"learning_rate_ratios": {"layers.0": 0.5, "lora_B": 4.0, "embed_tokens": 0.1}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_they_learn_and_resume_to_the_bit(settings, base, alpaca_file, tmp_path, capsys):
    """8-bit moments are kept from 4,096 values on, so embeddings train too."""
    if settings.get("optimizer", "")[:4] in ("lion", "adam"):
        pytest.importorskip("bitsandbytes")
    expected, out = tmp_path / "expected", tmp_path / "out"
    lora = LoRAConfig(rank=2, modules_to_save=["embed_tokens"])
    whole = {"learning_rate": 3e-3, "max_steps": 8, **settings}
    tune("lora", base, alpaca_file, expected, train=whole, lora=lora)
    with extra_sinks(AfterStep(4, lambda: os.kill(os.getpid(), signal.SIGTERM))), pytest.raises(SystemExit):
        tune("lora", base, alpaca_file, out, train=whole, lora=lora)
    tune("lora", base, alpaca_file, out, train=whole, lora=lora, resume="auto")
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()
    losses = [row["loss"] for row in csv.DictReader(open(out / "metrics.csv")) if row["loss"]]
    assert float(losses[-1]) < float(losses[0])


def test_muon_is_for_the_matrices_of_the_blocks_and_adamw_for_the_rest():
    """Two steps of it are to the bit those of torch's two optimizers side by side."""
    model = GPT(tiny_config(qk_norm="head"))
    twin = copy.deepcopy(model)
    config = TrainConfig(optimizer="muon", weight_decay=0.1, learning_rate=1e-2)
    whole = make_optimizer(trainable(model), config)
    matrices, vectors, rest = [], [], []
    for name, p in twin.named_parameters():
        (matrices if p.ndim == 2 and ".layers." in name else rest if p.ndim == 2 else vectors).append(p)
    assert matrices and len(rest) == 2 and vectors
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for rate in (1e-2, 5e-3):
        set_learning_rate(whole, rate)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        for p, other in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        for optimizer in (whole, muon, adamw):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    kept = sum(v.nbytes for slot in whole.state.values() for v in slot.values() if v.ndim)
    assert kept == state_bytes(trainable(model), config)


def test_muon_is_for_full_fine_tuning():
    with pytest.raises(UserError, match=r"^optimizer muon is for full fine-tuning \(finetune/full.py\)"):
        FinetuneLoRA(train=TrainConfig(optimizer="muon"))


@pytest.mark.slow
def test_muon_learns_and_resumes_to_the_bit(base, alpaca_file, tmp_path):
    expected, out = tmp_path / "expected", tmp_path / "out"
    train = {"optimizer": "muon", "max_steps": 8}
    tune("full", base, alpaca_file, expected, train=train, precision="32-true")
    with extra_sinks(AfterStep(4, lambda: os.kill(os.getpid(), signal.SIGTERM))), pytest.raises(SystemExit):
        tune("full", base, alpaca_file, out, train=train, precision="32-true")
    tune("full", base, alpaca_file, out, train=train, precision="32-true", resume="auto")
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()
    with open(out / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit"])
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
    optimizer = make_optimizer({"weight": weight}, TrainConfig(optimizer="adamw_8bit"))
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    moments = [
        value
        for value in optimizer.state[weight].values()
        if torch.is_tensor(value) and value.numel() == 64 * 64
    ]
    assert (
        sum(value.nbytes for value in moments)
        == state_bytes({"weight": weight}, TrainConfig(optimizer="adamw_8bit"))
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
