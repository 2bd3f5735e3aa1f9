"""LoRA of an embedding, and of some layers of a model."""

import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import AfterStep, extra_sinks, random_adapter, tiny_config, tune
from torch import nn

from litlora.checkpoint import open_checkpoint
from litlora.errors import UserError
from litlora.load import load
from litlora.lora import LoRAEmbedding, add_lora, merge_lora, unmerge_lora
from litlora.model import GPT
from litlora.settings import FinetuneLoRA, LoRAConfig

ENDS = LoRAConfig(rank=4, targets=["embed_tokens", "q_proj"])
IDS = torch.tensor([[1, 5, 5, 9, 300, 2]])


def filled(model):
    """Every factor random, as after training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
def test_merged_and_unmerged_in_memory(tied):
    model = GPT(tiny_config(tie_word_embeddings=tied))
    before = model(IDS)
    head = model.lm_head.weight.detach().clone()
    assert add_lora(model, ENDS)[0] == "model.embed_tokens"
    torch.testing.assert_close(model(IDS), before, msg="a fresh adapter changes nothing")
    live = filled(model)(IDS)
    assert not torch.allclose(live, before)
    if not tied:
        merge_lora(model)
        torch.testing.assert_close(model(IDS), live, atol=1e-5, rtol=1e-5)
        unmerge_lora(model)
    assert torch.equal(model(IDS), live)
    assert torch.equal(model.lm_head.weight, head), "the head is not adapted, though it may be tied"


def test_gradients_are_those_of_the_formula_in_float64():
    embedding = nn.Embedding(11, 6, dtype=torch.float64)
    layer = LoRAEmbedding(embedding, 3, 6.0, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    ids, wanted = torch.tensor([[1, 4, 4], [0, 10, 1]]), torch.randn(2, 3, 6, dtype=torch.float64)
    A, B = (factor.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    expected = (embedding.weight + 2.0 * B @ A)[ids]
    torch.testing.assert_close(layer(ids), expected, atol=1e-12, rtol=0)
    (layer(ids) * wanted).sum().backward()
    (expected * wanted).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.lora_B.grad, B.grad, atol=1e-12, rtol=0)
    assert layer.linear.weight.grad is None


def test_a_regular_expression_means_no_embedding():
    model = GPT(tiny_config())
    assert not any("embed" in name for name in add_lora(model, LoRAConfig(rank=2, targets=[".*"])))


def test_an_embedding_has_plain_lora_alone():
    dora = LoRAConfig(rank=2, targets=["q_proj", "embed_tokens"], variant="dora")
    with pytest.raises(UserError, match="^variant dora and targets embed_tokens: "):
        FinetuneLoRA(lora=dora)
    with pytest.raises(UserError, match="^variant dora: an embedding has plain LoRA alone"):
        add_lora(GPT(tiny_config()), dora)


def test_an_embedding_is_in_no_layer():
    with pytest.raises(UserError, match="^layers_to_transform and targets embed_tokens: "):
        FinetuneLoRA(lora=LoRAConfig(rank=2, targets=["embed_tokens", "qv"], layers_to_transform=[0]))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_trained_merged_and_the_same_as_live(tied, make_checkpoint, alpaca_file, tmp_path, forked):
    base = make_checkpoint("base", tie_word_embeddings=tied)
    out = tmp_path / "out"
    lora = LoRAConfig(rank=4, targets=["embed_tokens", "q_proj", "lm_head"])
    tune("lora", base, alpaca_file, out, lora=lora, precision="32-true")
    adapter = open_checkpoint(out / "final")
    update = adapter.updates["model.embed_tokens"]
    assert update.B.shape == (400, 4) and update.A.shape == (4, 32) and update.B.count_nonzero()
    forked.succeeds(
        "scripts/merge_lora.py", "--lora_path", out / "final", "--out_dir", tmp_path / "merged", cwd=tmp_path
    )
    merged = load(tmp_path / "merged").model(IDS)
    live = GPT(tiny_config(tie_word_embeddings=tied))
    live.load_state_dict(dict(open_checkpoint(base).tensors), strict=False)
    add_lora(live, lora)
    for name, layer in live.named_modules():
        if name in adapter.updates:
            layer.load_update(adapter.updates[name])
    torch.testing.assert_close(live.eval()(IDS), merged, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load(out / "final", live=True).model(IDS), merged, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_it_resumes_to_the_bit(base, alpaca_file, tmp_path):
    expected, out = tmp_path / "expected", tmp_path / "out"
    settings = {"lora": ENDS, "precision": "32-true"}
    tune("lora", base, alpaca_file, expected, **settings)
    with extra_sinks(AfterStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))), pytest.raises(SystemExit):
        tune("lora", base, alpaca_file, out, **settings)
    tune("lora", base, alpaca_file, out, **settings, resume="auto")
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_it_learns_as_in_peft(tied):
    """50 steps of AdamW in fp32 from the same factors: the losses are equal to 1e-4, and at the start
    the factors have the same distribution."""
    from peft import LoraConfig, get_peft_model
    from test_model import hugging_face_twin

    theirs, ours = hugging_face_twin(tiny_config(tie_word_embeddings=tied))
    ours = copy.deepcopy(ours)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=16, target_modules=ENDS.targets))
    add_lora(ours, ENDS)
    at = "base_model.model.model.embed_tokens.lora_embedding"
    started = dict(theirs.named_parameters())
    A, B = started[f"{at}_B.default"].T, started[f"{at}_A.default"].T  # theirs are transposed
    embedding = ours.model.embed_tokens
    assert not B.count_nonzero() and not embedding.lora_B.count_nonzero()
    assert A.std().item() == pytest.approx(embedding.lora_A.std().item(), rel=0.3)
    with torch.no_grad():
        for name, layer in ours.named_modules():
            if name.endswith("q_proj"):
                layer.lora_A.copy_(started[f"base_model.model.{name}.lora_A.default.weight"])
        embedding.lora_A.copy_(A)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for model in (ours, theirs)
    ]
    ids = torch.randint(400, (50, 2, 12))
    for batch in ids:
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            out = model(batch)
            logits = getattr(out, "logits", out)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- layers by their numbers


@pytest.mark.parametrize(
    ("given", "numbers"), [(1, [1]), ("0-2", [0, 1, 2]), ([3, "0-1", "1"], [0, 1, 3]), ("2", [2])]
)
def test_layers_to_transform(given, numbers):
    config = LoRAConfig(rank=2, targets="qv", layers_to_transform=given)
    names = add_lora(GPT(tiny_config(num_hidden_layers=4)), config)
    leaves = ("q_proj", "v_proj")
    assert names == [f"model.layers.{n}.self_attn.{leaf}" for n in numbers for leaf in leaves]
    assert config.layers_to_transform == numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_to_transform": -1}, "^layers_to_transform -1: must be a number from 0, or a range"),
        ({"layers_to_transform": "3-1"}, "^layers_to_transform 3-1: must be"),
        ({"layers_to_transform": []}, "^layers_to_transform is empty"),
        ({"layers_to_transform": [1, 5]}, "^layers_to_transform 5: none of the .*; they have 0 to 1$"),
        (
            {"layers_to_transform": 1, "targets": ["q_proj", "lm_head"]},
            "^layers_to_transform and targets: lm_head is in no layer",
        ),
    ],
    ids=str,
)
def test_layers_that_are_not_there_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        add_lora(GPT(tiny_config()), LoRAConfig(**{"rank": 2, "targets": "qv", **settings}))


def test_they_are_stored_and_others_store_nothing(base, tmp_path):
    some, every = (
        open_checkpoint(random_adapter(tmp_path / name, base, LoRAConfig(rank=2, **more)))
        for name, more in (("some", {"layers_to_transform": [1]}), ("every", {}))
    )
    assert some.settings["layers_to_transform"] == [1] and "layers_to_transform" not in every.settings
    assert {name.split(".")[2] for name in some.updates} == {"1"}
