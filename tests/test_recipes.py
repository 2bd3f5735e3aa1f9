"""configs/: every recipe loads, and takes the memory that it says."""

import re
import shlex

import pytest
from conftest import REPO

from litlora.cli import parse
from litlora.config import ModelConfig
from litlora.formats.families.hf_config import HFConfig
from litlora.formats.families.table import FAMILIES
from litlora.model import GPT
from litlora.settings import FinetuneDPO, FinetuneFull, FinetuneLoRA
from litlora.train.estimate import need

RECIPES = sorted((REPO / "configs").glob("*.yaml"))
SETTINGS = {"lora": FinetuneLoRA, "full": FinetuneFull, "dpo": FinetuneDPO}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "model_type")
MODELS = {
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True, "qwen3"),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, False, "qwen3"),
    "meta-llama/Llama-3.2-1B-Instruct": (2048, 8192, 16, 32, 8, 64, 128256, True, "llama"),
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128, 128256, False, "llama"),
}
"""What the config.json of these models says."""
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
}
"""As their model cards count them."""


def config_of(model: str) -> ModelConfig:
    values = dict(zip(SIZES, MODELS[model], strict=True), max_position_embeddings=40960)
    return ModelConfig(**FAMILIES[values["model_type"]].read(HFConfig(values)))


def settings_of(recipe):
    """The method and the settings of the command in a recipe's first lines."""
    (command,) = re.findall(r"^# +python finetune/(.+)$", recipe.read_text(), re.MULTILINE)
    script, *words = shlex.split(command)
    assert words[:2] == ["--config", f"configs/{recipe.name}"] and words[2] == "--data"
    return script.removesuffix(".py"), parse(SETTINGS[script.removesuffix(".py")], words)


def gib(recipe) -> float:
    """The estimate of the memory that a recipe takes on each device."""
    method, settings = settings_of(recipe)
    config, train = config_of(settings.checkpoint_dir.removeprefix("checkpoints/")), settings.train
    kind = "full" if method == "full" else "QLoRA" if settings.quantize else "LoRA"
    rank = settings.lora.rank if method != "full" else 1
    one = need(config, kind, rank=rank, tokens=train.micro_batch_tokens)
    total = one.least if train.checkpoint_activations == "full" else one.total
    if settings.strategy == "fsdp":
        total -= one.weights - one.weights // settings.devices
    return total / 2**30


def test_the_models_are_those_that_are_named():
    for model, count in PARAMETERS.items():
        assert sum(weight.numel() for weight in GPT.without_weights(config_of(model)).parameters()) == count


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_loads(recipe, monkeypatch):
    monkeypatch.chdir(REPO)
    (said,) = re.findall(r"^# memory: about ([\d.]+) GiB", recipe.read_text(), re.MULTILINE)
    _, settings = settings_of(recipe)
    assert f"scripts/download.py {settings.checkpoint_dir.removeprefix('checkpoints/')}" in recipe.read_text()
    limit = re.search(r"GPUs? of (\d+) GB", recipe.read_text())
    assert limit is None or float(said) * 2**30 < 0.85 * int(limit[1]) * 10**9, "room for buffers"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_takes_the_memory_that_it_says(recipe, monkeypatch):
    monkeypatch.chdir(REPO)
    (said,) = re.findall(r"^# memory: about ([\d.]+) GiB", recipe.read_text(), re.MULTILINE)
    assert float(said) == pytest.approx(gib(recipe), abs=0.051)


def test_there_are_recipes_for_every_way():
    methods = [settings_of(recipe)[0] for recipe in RECIPES]
    assert {"lora", "full", "dpo"} <= set(methods) and len(RECIPES) >= 7
