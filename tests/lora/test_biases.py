"""Biases that train: those of the base, and one of every B; against PEFT, and through every command."""

import copy
import importlib.util
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, AfterStep, extra_sinks, tiny_config, tune
from torch import nn

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import open_checkpoint, reference_to, resolve, write_adapter
from litlora.errors import UserError
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.quantize import QUANTIZERS
from litlora.frozen.quantized import QuantizedWeight
from litlora.load import build, load
from litlora.lora import LoRAConfig, LoRALinear, adapter_of, add_lora, merge_lora, unmerge_lora
from litlora.lora.layer import lora_layers
from litlora.lora.together import project
from litlora.model import GPT
from litlora.settings import ExportPEFT, FinetuneLoRA

BIASED = {"attention_bias": True, "mlp_bias": True}
IDS = torch.arange(48).view(4, 12) * 7 % 300
KINDS = pytest.mark.parametrize(
    ("bias", "lora_bias"),
    [("none", True), ("lora_only", False), ("all", False), ("lora_only", True), ("all", True)],
)


def prepared(bias, lora_bias, targets=("q_proj", "down_proj"), **changes):
    torch.manual_seed(0)
    model = GPT(tiny_config(**{**BIASED, **changes}))
    config = LoRAConfig(rank=4, alpha=6, targets=list(targets), bias=bias, lora_bias=lora_bias)
    add_lora(model, config)
    return model, config


def disturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@KINDS
def test_what_trains(bias, lora_bias):
    model, _ = prepared(bias, lora_bias)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    every = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    of_base = {"none": set(), "all": every, "lora_only": {n for n in every if n.endswith(".linear.bias")}}
    of_b = {f"{name}.lora_bias" for name in lora_layers(model)} if lora_bias else set()
    assert len(every) == 14 and trained == of_base[bias] | of_b


@pytest.mark.parametrize("storage", [None, "nf4"])
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(storage, grad):
    """Alone, and beside layers of the same input in a fused function: one whose bias trains, and a
    plain one."""

    def linear():
        made = nn.Linear(64, 32)
        if storage is not None:
            W = QUANTIZERS[storage].quantised(made.weight.detach(), "layer", "file")
            made = FrozenLinear(QuantizedWeight(W), made.bias)
        return made.requires_grad_(False)

    adapted, plain = LoRALinear(linear(), 4, 6.0), linear()
    adapted.lora_bias = nn.Parameter(torch.randn(32))
    for bias in (adapted.linear.bias, plain.bias):
        bias.requires_grad_(True)
    nn.init.normal_(adapted.lora_B)
    x = torch.randn(3, 5, 64)
    weights = [adapted.lora_A, adapted.lora_B, adapted.lora_bias, adapted.linear.bias, plain.bias]
    A, B, b_B, b, other = weights
    wanted = [
        F.linear(x, adapted.linear.weight, b) + 1.5 * (x @ A.T @ B.T + b_B),
        F.linear(x, plain.weight, other),
    ]
    with torch.set_grad_enabled(grad):
        for found in (project(x, adapted, plain), (adapted(x), plain(x))):
            for one, expected in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
            if grad:
                gradients = (
                    torch.autograd.grad(sum(y.square().sum() for y in ys), weights, retain_graph=True)
                    for ys in (found, wanted)
                )
                for one, expected in zip(*gradients, strict=True):
                    torch.testing.assert_close(one, expected, atol=1e-3, rtol=1e-4)


@KINDS
@torch.no_grad()
def test_merged_in_memory(bias, lora_bias):
    model, _ = prepared(bias, lora_bias)
    disturb(model)
    live = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), live, atol=1e-5, rtol=1e-5)
    unmerge_lora(model)
    assert torch.equal(model(IDS), live)


@KINDS
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_the_loss_falls_as_with_peft_and_merges_to_the_same(bias, lora_bias):
    """50 steps of AdamW in fp32 from the same start."""
    from peft import LoraConfig, get_peft_model
    from test_model import hugging_face_twin

    torch.manual_seed(0)
    theirs, ours = hugging_face_twin(tiny_config(**BIASED))
    ours = copy.deepcopy(ours)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, bias=bias, lora_bias=lora_bias)
    theirs = get_peft_model(theirs, config)
    add_lora(ours, LoRAConfig(rank=4, alpha=6, targets=targets, bias=bias, lora_bias=lora_bias))
    for name, layer in lora_layers(ours).items():
        layer.lora_A.data.copy_(theirs.get_submodule(f"base_model.model.{name}.lora_A.default").weight)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert counts[0] == counts[1]
    found = [
        (model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3))
        for model in (ours, theirs)
    ]
    for _ in range(50):
        losses = []
        for model, optimizer in found:
            out = model(IDS)
            logits = getattr(out, "logits", out)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    merge_lora(ours)
    biases = {name: p for name, p in theirs.merge_and_unload().named_parameters() if name.endswith(".bias")}
    assert len(biases) == 14
    for name, theirs in biases.items():
        torch.testing.assert_close(
            ours.get_submodule(name.removesuffix(".bias")).bias, theirs, atol=1e-4, rtol=1e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "lora_bias", "quantize"), [("all", True, None), ("lora_only", True, "nf4")])
def test_through_every_command(bias, lora_bias, quantize, make_checkpoint, alpaca_file, tmp_path, forked):
    """Trained, stopped and resumed to the bit, merged and verified, live, and to PEFT and back."""
    base = make_checkpoint("base", **BIASED, hidden_size=64, head_dim=16)
    lora = LoRAConfig(rank=4, targets=["q_proj", "down_proj"], bias=bias, lora_bias=lora_bias)
    settings = {"lora": lora, "precision": "32-true", "quantize": quantize, "train": {"save_interval": 2}}
    expected, out = tmp_path / "expected", tmp_path / "out"
    tune("lora", base, alpaca_file, expected, **settings)
    with extra_sinks(AfterStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))), pytest.raises(SystemExit):
        tune("lora", base, alpaca_file, out, **settings)
    tune("lora", base, alpaca_file, out, **settings, resume="auto")
    final = out / "final"
    assert (final / "lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()
    adapter = open_checkpoint(final)
    assert len(adapter.whole) == (14 if bias == "all" else 4)
    before = dict(open_checkpoint(base).tensors)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in adapter.whole.items())
    words = ["--lora_path", final, "--out_dir"]
    forked.succeeds("scripts/merge_lora.py", *words, tmp_path / "merged", cwd=tmp_path)
    merged = load(tmp_path / "merged").model
    for name, tensor in adapter.whole.items():
        assert torch.equal(merged.get_parameter(name), tensor)
    live = load(final, live=True).model(IDS)
    torch.testing.assert_close(merged(IDS), live, atol=1e-5, rtol=1e-5)


@KINDS
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_peft_gives_the_same_logits_and_back(bias, lora_bias, tmp_path):
    import peft
    from test_model import hugging_face_twin

    theirs, _ = hugging_face_twin(tiny_config(**BIASED))
    theirs.save_pretrained(tmp_path / "base")
    chain = resolve(tmp_path / "base")
    model = build(chain.config, chain.base.tensors, chain.base).eval()
    plain = model(IDS)
    config = LoRAConfig(
        rank=3, targets=["q_proj", "k_proj", "v_proj", "down_proj"], bias=bias, lora_bias=lora_bias
    )
    add_lora(model, config)
    disturb(model)
    wanted = model(IDS)
    assert (wanted - plain).abs().max() > 0.1
    adapter = adapter_of(model, config).trained_on(reference_to(chain.top, tmp_path / "adapter"))
    write_adapter(tmp_path / "adapter", adapter, chain.config, sidecars_from=chain.sources)
    spec = importlib.util.spec_from_file_location("export_peft", REPO / "scripts/export_peft.py")
    export = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export)
    export.main(ExportPEFT(lora_path=str(tmp_path / "adapter"), out_dir=str(tmp_path / "peft")))
    found = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    torch.testing.assert_close(found(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    back = resolve(tmp_path / "peft")
    tensors, architecture = merge_chain(back)
    torch.testing.assert_close(build(architecture, tensors, back.base)(IDS), wanted, atol=1e-5, rtol=1e-5)


def test_in_bf16_biases_of_adapted_layers_train_in_fp32():
    torch.manual_seed(0)
    model = GPT(tiny_config(**BIASED)).bfloat16()
    add_lora(model, LoRAConfig(rank=4, targets=["q_proj"], bias="all", lora_bias=True))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.linear.bias.dtype == layer.lora_bias.dtype == torch.float32
    model(IDS).float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "architecture", "message"),
    [
        ({"lora_bias": True}, {}, "^lora_bias and targets: model.layers.0.self_attn.q_proj has no bias"),
        ({"bias": "all"}, {}, "^bias all: nothing in this model has a bias; leave bias out$"),
        (
            {"bias": "lora_only"},
            {"mlp_bias": True},
            "^bias lora_only: none of the adapted layers has a bias; leave bias out, or choose others by ",
        ),
    ],
)
def test_biases_that_are_not_there_are_refused(settings, architecture, message):
    with pytest.raises(UserError, match=message):
        add_lora(GPT(tiny_config(**architecture)), LoRAConfig(rank=2, targets=["q_proj"], **settings))


@pytest.mark.parametrize(
    ("lora", "more", "message"),
    [
        ({"bias": "some"}, {}, "^bias some: choose from none, lora_only, all"),
        ({"lora_bias": True, "init": "pissa"}, {}, "^lora_bias and init pissa do not go together"),
        ({"lora_bias": True, "variant": "dora"}, {}, "^lora_bias and variant dora do not go together"),
        ({"lora_bias": True, "targets": ["embed_tokens"]}, {}, "^lora_bias and targets embed_tokens: "),
        ({"bias": "all"}, {"stream_base": True}, "^stream_base true: bias needs the base in memory"),
        ({"lora_bias": True}, {"strategy": "fsdp", "devices": 2}, "^lora_bias and strategy fsdp"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(lora, more, message):
    with pytest.raises(UserError, match=message):
        FinetuneLoRA(lora=LoRAConfig(rank=2, **lora), **more)
