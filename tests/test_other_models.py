"""Models that are not litlora's own run through transformers."""

import json
import shutil

import pytest
import torch
from conftest import random_adapter, succeeds, tune
from other_models import SETTINGS, make_folder
from safetensors.torch import load_file

from litlora.adapters.describe import describe, table
from litlora.data.examples import Example
from litlora.errors import CheckpointError
from litlora.load import load
from litlora.lora import LoRAConfig, add_lora
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling
from litlora.train.objective import SFT

FAST = ["opt", "mamba2"]
KINDS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in SETTINGS]

TARGETS = {"deepseek_v32": "attention"}
"""Where not all-linear: PEFT adapts fused experts of this one wherever an MLP is named."""


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, tmp_path, tokenizer_dir):
    return make_folder(tmp_path / kind, kind, tokenizer_dir)


def reference(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def examples(lengths) -> list[Example]:
    from array import array

    torch.manual_seed(1)
    return [
        Example(array("i", torch.randint(2, 300, (length,)).tolist()), ((length // 2, length),))
        for length in lengths
    ]


def test_losses_and_gradients_are_those_of_transformers(folder):
    """Of a batch of sequences of different and equal lengths, with half of each learned."""
    model, theirs = load(folder).model, reference(folder)
    add_lora(model, LoRAConfig(rank=2, targets="all-linear"))
    lora = {name: p for name, p in model.named_parameters() if p.requires_grad}
    data = examples([9, 23, 9, 14])
    objective = SFT(model)
    losses = objective.token_losses(objective.batch(data, torch.device("cpu")))
    expected = []
    for example in data:
        ids = torch.tensor([list(example.ids)])
        log_p = theirs(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected.append(-log_p[len(ids[0]) // 2 - 1 :])
    assert torch.allclose(losses, torch.cat(expected), atol=1e-5)
    model.requires_grad_(True)
    objective(objective.batch(data, torch.device("cpu")))[0].backward()
    torch.cat(expected).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    checked = 0
    for name, parameter in model.named_parameters():
        plain = name.replace(".linear.", ".")
        if name not in lora and parameter.grad is not None:
            assert torch.allclose(parameter.grad, gradients[plain], atol=1e-4, rtol=1e-4), name
            checked += 1
    assert checked > 5
    assert any(p.grad.abs().max() > 0 for p in lora.values())


@pytest.mark.slow
def test_the_way_from_training_to_every_export(kind, folder, tmp_path, alpaca_file):
    """Train, resume, chat with the cache, merge, and write the model and the adapter for
    transformers and PEFT; a PEFT adapter comes back."""
    settings = LoRAConfig(rank=2, alpha=8, targets=TARGETS.get(kind, "all-linear"))
    options = {"precision": "32-true", "lora": settings}
    steps = {"save_interval": 3, "global_batch_size": 4, "micro_batch_size": 2}
    tune("lora", folder, alpaca_file, tmp_path / "whole", train=steps, **options)
    tune("lora", folder, alpaca_file, tmp_path / "cut", train={**steps, "max_steps": 6}, **options)
    for name in ("final", "step-000006"):
        shutil.rmtree(tmp_path / "cut" / name, ignore_errors=True)
    assert (tmp_path / "cut/step-000003").is_dir()
    tune("lora", folder, alpaca_file, tmp_path / "cut", train=steps, resume="auto", **options)
    one, other = (load(tmp_path / name / "final", live=True).model for name in ("whole", "cut"))
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    _chat(tmp_path / "whole/final", tmp_path)
    adapter = random_adapter(tmp_path / "adapter", folder, settings)
    said = succeeds("scripts/merge_lora.py", "--lora_path", adapter, "--out_dir", tmp_path / "merged")
    assert "verified on" in said.stdout and "runs through transformers, without packing" in said.stdout
    ids = torch.randint(2, 300, (1, 20))
    live = load(adapter, live=True).model
    expected = live(ids)
    assert (expected - load(folder).model(ids)).abs().max() > 1e-3
    assert torch.allclose(load(tmp_path / "merged").model(ids), expected, atol=2e-4)

    for out, command in {
        "hf": ("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", tmp_path / "merged"),
        "peft": ("scripts/export_peft.py", "--lora_path", adapter),
    }.items():
        succeeds(*command, "--out_dir", tmp_path / out)
    assert torch.allclose(reference(tmp_path / "hf")(input_ids=ids).logits, expected, atol=2e-4)
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert {name: tensor.shape for name, tensor in there.items()} == {n: t.shape for n, t in here.items()}
    config, written = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "hf"))
    assert {**config, "dtype": 0, "eos_token_id": 0} == {**written, "dtype": 0, "eos_token_id": 0}
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(reference(folder), tmp_path / "peft")
    assert torch.allclose(tuned(input_ids=ids).logits, expected, atol=2e-4)
    back = load(tmp_path / "peft", live=True, base_dir=folder).model
    assert torch.allclose(back(ids), expected, atol=1e-5)


def _chat(directory, tmp_path) -> None:
    """Greedy tokens, with the cache, are those of transformers' own generation."""
    loaded = load(directory)
    with torch.no_grad():
        prompt = [5, 9, 14, 200, 31]
        engine = Engine(loaded.model)
        beside = engine.generate([7, 3], Sampling(max_new_tokens=12))  # each has a turn
        next(beside)
        ours = list(engine.generate(prompt, Sampling(max_new_tokens=12)))
        inner = loaded.model.inner
        theirs = inner.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=True
        )
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_a_peft_adapter_computes_the_same(kind, folder, tmp_path):
    """One that PEFT itself made, on the layers that a preset means."""
    from peft import LoraConfig, get_peft_model

    loaded = load(folder).model
    layers = {n.rpartition(".")[2] for n, m in loaded.named_modules() if is_meant(loaded, n, m, kind)}
    model = get_peft_model(reference(folder), LoraConfig(r=2, target_modules=sorted(layers)))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(config))
    ids = torch.randint(2, 300, (1, 20))
    expected = model.eval()(input_ids=ids).logits
    assert torch.allclose(load(tmp_path / "theirs").model(ids), expected, atol=2e-4)


def is_meant(model, name, module, kind) -> bool:
    return isinstance(module, torch.nn.Linear) and model.in_preset(name, TARGETS.get(kind, "all-linear"))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")
def test_an_adapter_on_fused_experts_is_refused_by_what_it_adapts(tmp_path, tokenizer_dir):
    """PEFT makes one of an adapter on the MLPs of a model that has layers without experts too."""
    from peft import LoraConfig, get_peft_model

    folder = make_folder(tmp_path / "folder", "deepseek_v32", tokenizer_dir)
    get_peft_model(
        reference(folder), LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    ).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"mlp\.experts, experts in one tensor.* merge it with PEFT"):
        load(tmp_path / "theirs", base_dir=folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "no causal decoder of this"),
        ({"architectures": ["OPTForSequenceClassification"]}, "only OPTForCausalLM of this type runs"),
        ({"num_hidden_layers": 2**40}, "no model is that large"),
        ({"num_hidden_layers": 5000}, "describes 5,000 modules or more"),
        ({"quantization_config": {"quant_method": "gptq"}}, "these are quantized"),
        ({"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "remote code"),
    ],
)
def test_what_cannot_run_is_named(changes, says, tmp_path, tokenizer_dir):
    folder = make_folder(tmp_path / "opt", "opt", tokenizer_dir)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=says):
        load(folder)


def test_a_description_names_its_sizes(tmp_path, tokenizer_dir):
    folder = make_folder(tmp_path / "opt", "opt", tokenizer_dir)
    assert "model    opt: 2 layers, hidden 32, vocabulary 400, context 128" in table(describe(folder))


def test_a_folder_that_transformers_cannot_compute_is_one_line(tmp_path, tokenizer_dir):
    """More of each head is rotated than it has."""
    folder = make_folder(tmp_path / "gptj", "gptj", tokenizer_dir)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rotary_dim": 64}))
    with pytest.raises(CheckpointError, match="GPTJForCausalLM cannot be computed by transformers"):
        load(folder)


def test_an_encoder_is_refused_by_what_its_tokens_see(tmp_path, tokenizer_dir):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "bert", vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    make_folder(tmp_path / "bert", "opt", tokenizer_dir)
    model.save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="is not a causal decoder|is not covered"):
        load(tmp_path / "bert")
