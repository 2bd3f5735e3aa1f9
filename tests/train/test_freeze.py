"""Weights that a full fine-tune leaves as they are."""

import os
import signal

import pytest
import torch
from conftest import AfterStep, extra_sinks, tiny_config, tune
from torch import nn

from litlora.checkpoint import open_checkpoint
from litlora.errors import UserError
from litlora.model import GPT
from litlora.settings import FinetuneLoRA, TrainConfig
from litlora.train.freeze import frozen_notice, train_all_but


def frozen(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["embed_tokens"], "model.embed_tokens"),
        (["layers.0-1"], "model.layers.0, model.layers.1"),
        (["layers.0-1.mlp"], "model.layers.0.mlp, model.layers.1.mlp"),
        (["model.norm.weight", r".*layers\.1\.self_attn"], "model.layers.1.self_attn, model.norm"),
    ],
)
def test_what_a_target_means(targets, expected):
    model = GPT(tiny_config(num_hidden_layers=3))
    train_all_but(model, targets)
    assert frozen_notice(model) == expected
    modules = expected.split(", ")
    assert frozen(model) == {
        name for name, _ in model.named_parameters() if any(name.startswith(f"{m}.") for m in modules)
    }


def test_a_tied_weight_is_frozen_by_either_name():
    model = GPT(tiny_config(tie_word_embeddings=True))
    train_all_but(model, ["lm_head"])
    assert frozen(model) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert frozen_notice(model) == "model.embed_tokens, lm_head"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "q_prj: no module or weight has that name; modules: .*q_proj"),
        ("layers.0-2", "layers.0-2: layers.2: no module or weight has that name"),
        ("layers.1-0", "layers.1-0: 1-0 is not a range of layers"),
        ("(", r"\(: neither a layer's name nor a regular expression"),
        ("model|lm_head", "freezes every weight, so nothing trains"),
    ],
)
def test_a_target_that_means_nothing_is_refused(target, message):
    with pytest.raises(UserError, match=f"^freeze .*{message}"):
        train_all_but(GPT(tiny_config()), [target])


def test_added_tokens_must_train():
    model = GPT(tiny_config())
    train_all_but(model, ["layers.0"], adds_tokens=True)
    with pytest.raises(UserError, match="^add_tokens and freeze: .* lm_head.weight is frozen"):
        train_all_but(model, ["lm_head"], adds_tokens=True)


def test_it_is_for_full_fine_tuning():
    with pytest.raises(UserError, match=r"^freeze is for full fine-tuning \(finetune/full.py\)"):
        FinetuneLoRA(train=TrainConfig(freeze=["norm"]))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_frozen_weights_keep_every_bit_and_the_others_train(
    dtype, make_checkpoint, alpaca_file, tmp_path, capsys
):
    base = make_checkpoint("base", dtype=dtype)
    train = {"freeze": ["embed_tokens", "layers.0"], "learning_rate": 1e-2}
    tune("full", base, alpaca_file, tmp_path / "out", train=train, precision="32-true")
    assert "frozen: model.embed_tokens, model.layers.0\n" in capsys.readouterr().out
    before, after = (open_checkpoint(path).tensors for path in (base, tmp_path / "out/final"))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if "embed_tokens" in name or "layers.0." in name}
    assert {tensor.dtype for tensor in after.values()} == {dtype}


def test_a_precision_that_would_round_them_is_refused(base, alpaca_file, tmp_path):
    with pytest.raises(UserError, match="^precision rounds model.norm.weight from fp32 to bf16, and freeze"):
        tune("full", base, alpaca_file, tmp_path / "out", train={"freeze": ["norm"]}, precision="bf16-true")


@pytest.mark.slow
def test_it_resumes_to_the_bit_and_stores_what_trains_alone(base, alpaca_file, tmp_path):
    expected, out = tmp_path / "expected", tmp_path / "out"
    train = {"freeze": ["layers.0-0", "embed_tokens"]}
    tune("full", base, alpaca_file, expected, train=train, precision="32-true")
    with extra_sinks(AfterStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))), pytest.raises(SystemExit):
        tune("full", base, alpaca_file, out, train=train, precision="32-true")
    state = torch.load(out / "step-000003/state.pth", weights_only=True)
    assert not any("layers.0." in name or "embed" in name for name in state["weights"])
    assert len(state["optimizer"]["state"]) == len(state["weights"])
    tune("full", base, alpaca_file, out, train=train, precision="32-true", resume="auto")
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()


def test_any_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    train_all_but(model, ["0"])
    assert frozen(model) == {"0.weight", "0.bias"}
