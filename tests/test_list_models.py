"""scripts/list_models.py: what can be fine-tuned, and the memory that it takes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import REPO, tiny_config
from families import FAMILIES as MODELS

from litlora.data.batches import Batch
from litlora.formats.families import FAMILIES, read_config
from litlora.formats.families.multimodal import MULTIMODAL
from litlora.frozen.quantize import QUANTIZERS
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.train.estimate import need, quantised_bytes
from litlora.train.memory import saved_bytes
from litlora.train.objective import SFT

QUICKSTART = REPO / "checkpoints/litlora/quickstart"
SMALL = tiny_config(num_hidden_layers=3)


def test_every_family_is_listed_with_what_the_presets_adapt(forked, tmp_path):
    found = json.loads(forked.succeeds("scripts/list_models.py", "--json", cwd=tmp_path))
    listed = {kind: row["layers"] for row in found["families"] for kind in row["families"]}
    assert listed.keys() == FAMILIES.keys() and found["multimodal"] == list(MULTIMODAL)
    assert {"experts.up_proj", "shared_expert.up_proj"} <= set(listed["qwen2_moe"])
    said = forked.succeeds("scripts/list_models.py", cwd=tmp_path)
    assert all(kind in said for kind in FAMILIES)


def test_the_figures_are_those_of_a_real_model():
    model = GPT(SMALL).to(torch.bfloat16)
    base = sum(weight.nbytes for weight in model.parameters())
    layers = [module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    nf4 = QUANTIZERS["nf4"]
    packed = sum(nf4.quantised(weight.detach(), "w", Path("f")).nbytes for weight in layers)
    assert packed == sum(quantised_bytes(weight, nf4) for weight in layers)
    model.requires_grad_(False)
    add_lora(model, LoRAConfig(rank=4))
    adapter = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    ids = torch.zeros(1, 50, dtype=torch.long)
    kept = saved_bytes(SFT(model), Batch(ids, torch.arange(49), ids[0, 1:], [50]))

    one = need(SMALL, "LoRA", rank=4, tokens=50)
    assert (one.weights, one.adapter, one.gradients) == (base, adapter, adapter)
    assert (one.optimizer, one.activations) == (2 * adapter, kept)
    assert one.recomputed < one.activations and one.total == base + 4 * adapter + kept
    few = need(SMALL, "QLoRA", rank=4, tokens=50)
    assert few.weights == base - sum(weight.nbytes for weight in layers) + packed
    full = need(SMALL, "full", rank=4, tokens=50)
    assert full.weights == full.gradients == 2 * base and full.optimizer == 4 * base and full.adapter == 0


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "gemma4-26b"])
def test_layers_that_differ_have_figures(name):
    """Those that share keys cannot be the only ones; experts are counted beside the MLP."""
    import transformers

    kind, settings = MODELS[name]
    config = read_config(getattr(transformers, kind)(**settings).to_dict())[1]
    weights = sum(2 * weight.numel() for weight in GPT.without_weights(config).parameters())
    figures = need(config, "LoRA", rank=4, tokens=20)
    assert figures.weights == weights and 0 < figures.recomputed < figures.activations


@pytest.mark.slow
def test_a_config_alone_is_enough(forked, tmp_path):
    words = ("--memory", QUICKSTART / "model_config.yaml", "--seq", "16")
    said = forked.succeeds("scripts/list_models.py", *words, cwd=tmp_path).splitlines()
    assert said[0].startswith("MiB on one device, rank 16") and [line.split()[0] for line in said[3:6]] == [
        "LoRA",
        "QLoRA",
        "full",
    ]
    found = json.loads(
        forked.succeeds("scripts/list_models.py", QUICKSTART, "--seq", "8", "--json", cwd=tmp_path)
    )
    assert found[0]["weights"] == 2 * 1_894_080
    config = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "model_type": "mixtral"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "QLoRA" in forked.succeeds("scripts/list_models.py", "config.json", cwd=tmp_path)


@pytest.mark.parametrize(
    "words, says",
    [
        (["nothing"], "nothing: no such directory"),
        (["config.json"], "runs through transformers"),
        (["--memory", "tokenizer.json"], "must be a directory, a config.json or a model_config.yaml"),
        ([QUICKSTART, "--rank", "0"], "--rank must be at least 1"),
        ([QUICKSTART, "--seq", "1"], "--seq must be at least 2"),
    ],
)
def test_what_cannot_be_listed_is_one_line(words, says, forked, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert says in forked.refuses("scripts/list_models.py", *words, cwd=tmp_path)
