"""scripts/lora_merger.py on folders of PEFT: the files are those that PEFT's own merge saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file

from litlora.cli import parse
from litlora.errors import CheckpointError
from litlora.settings import LoRAMerger

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=24),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, intermediate_size=24),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, tie_word_embeddings=False),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=3),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SIZES, **MOE, intermediate_size=24, num_experts=3),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SIZES, intermediate_size=12, intermediate_size_mlp=16, num_local_experts=3, head_dim=8
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES, head_dim=8, num_key_value_heads=1, intermediate_size=16, num_local_experts=3
    ),
}
FED = "feed_forward.experts"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DORA = {"use_dora": True, "lora_alpha": 7}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bias": ("qwen2", {"lora_bias": True, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]}),
    "bias of Conv1D": (
        "gpt2",
        {"lora_bias": True, "target_modules": ["c_attn", "c_proj"], "use_rslora": True},
    ),
    "bias, biases": ("qwen2", {"lora_bias": True, "bias": "all", "target_modules": ["q_proj"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 0, 21]}),
    "tokens, head": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 0], "lm_head": [3]}},
    ),
    "tokens, tied": ("llama_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "dora of an embedding": ("llama", {**DORA, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "dora of Conv1D": ("gpt2", {**DORA, "target_modules": ["c_attn", "c_proj", "wte", "lm_head"]}),
    "experts": ("qwen2_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "lora_alpha": 10}),
    "experts, patterns": (
        "mixtral",
        {
            "target_modules": [],
            "target_parameters": EXPERTS,
            "rank_pattern": {"gate_up_proj": 5},
            "alpha_pattern": {".*down_proj": 2},
        },
    ),
    "one parameter": ("qwen2_moe", {"target_modules": [], "target_parameters": EXPERTS[:1]}),
    "experts of Llama 4": (
        "llama4",
        {"target_modules": [], "target_parameters": [f"{FED}.gate_up_proj", f"{FED}.down_proj"]},
    ),
    "transposed experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "weights": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.gate.weight", "0.self_attn.q_proj.weight"]},
    ),
    "weights of Conv1D": (
        "gpt2",
        {"target_modules": [], "target_parameters": ["c_proj.weight", "wte.weight"]},
    ),
}


def merge(base: Path, adapter: Path, output: Path, *more: object) -> dict[str, torch.Tensor]:
    words = ["--source-model", base, "--lora-model", adapter, "--output", output, "--output_dtype", "fp32"]
    module = {"__name__": "script"}  # within this process, which need not import torch again
    exec((REPO / "scripts/lora_merger.py").read_text(), module)
    module["main"](parse(LoRAMerger, [*map(str, words), *map(str, more)]))
    return load_file(output)


def make(name: str, settings: dict[str, Any], directory: Path) -> Any:
    """A base in directory/base, an adapter of random values in directory/peft; its model in PEFT."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    base.save_pretrained(directory / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(directory / "peft")
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_merged_as_peft_merges_it(case, tmp_path):
    make(*CASES[case], tmp_path).merge_and_unload().save_pretrained(tmp_path / "theirs")
    before = load_file(tmp_path / "base/model.safetensors")
    wanted = load_file(tmp_path / "theirs/model.safetensors")
    found = merge(tmp_path / "base", tmp_path / "peft", tmp_path / "ours.safetensors")
    assert found.keys() == wanted.keys() == before.keys()
    changed = [name for name in wanted if not torch.equal(wanted[name], before[name])]
    assert changed
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-6, msg=name)


def test_what_depends_on_the_base_is_computed_of_the_one_that_the_folder_holds(tmp_path):
    """PEFT stores an adapted embedding's own weight, which may have changed, and biases."""
    settings = {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "bias": "all"}
    make("qwen2", settings, tmp_path)
    file = tmp_path / "peft/adapter_model.safetensors"
    stored = load_file(file)
    [name] = [key for key in stored if key.endswith("embed_tokens.base_layer.weight")]
    save_file(stored | {name: stored[name] + 0.5 * torch.randn(32, 16)}, file)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = load_file(tmp_path / "theirs/model.safetensors")
    found = merge(tmp_path / "base", tmp_path / "peft", tmp_path / "ours.safetensors")
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-6, msg=name)


def test_half_of_an_adapter_is_half_of_what_it_changes(tmp_path):
    settings = {"lora_bias": True, "target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    make("qwen2", settings, tmp_path).merge_and_unload().save_pretrained(tmp_path / "theirs")
    before = load_file(tmp_path / "base/model.safetensors")
    wanted = load_file(tmp_path / "theirs/model.safetensors")
    found = merge(tmp_path / "base", tmp_path / "peft", tmp_path / "ours.safetensors", "--alpha", 0.5)
    for name in wanted:
        torch.testing.assert_close(found[name], (before[name] + wanted[name]) / 2, rtol=0, atol=2e-6)


def without(file: Path, part: str) -> None:
    """Take the tensors whose names contain `part` out of a file."""
    save_file({key: tensor for key, tensor in load_file(file).items() if part not in key}, file)


@pytest.mark.parametrize(
    ("name", "settings", "change", "message"),
    [
        (
            "llama",
            {"lora_bias": True, "target_modules": ["q_proj"]},
            lambda base, adapter: None,
            "q_proj.lora_B.bias: the model has no such tensor",
        ),
        (
            "qwen2",
            {"lora_bias": True, "target_modules": ["q_proj"]},
            lambda base, adapter: without(adapter, "0.self_attn.q_proj.lora_B.bias"),
            "has no lora_B.bias, though lora_bias is set",
        ),
        (
            "llama",
            {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [31]}},
            lambda base, adapter: save_file(
                load_file(base) | {"lm_head.weight": load_file(base)["lm_head.weight"][:30].clone()}, base
            ),
            r"lm_head is \(32, 16\)",
        ),
        (
            "gpt_oss",
            {"target_modules": [], "target_parameters": EXPERTS[1:]},
            lambda base, adapter: None,
            "down_proj is square, and no other parameter of these experts tells",
        ),
        (
            "llama_tied",
            {"target_modules": ["q_proj"], "trainable_token_indices": [7]},
            lambda base, adapter: save_file(
                {**load_file(base), "lm_head.weight": load_file(base)["model.embed_tokens.weight"].clone()},
                base,
            ),
            "whether the two are tied, the files do not tell; use scripts/merge_lora.py",
        ),
        (
            "llama_tied",
            {"target_modules": ["embed_tokens"], "use_dora": True},
            lambda base, adapter: None,
            "an output head tied to it would change with it",
        ),
    ],
)
def test_what_the_files_do_not_tell_is_refused(name, settings, change, message, tmp_path):
    make(name, settings, tmp_path)
    change(tmp_path / "base/model.safetensors", tmp_path / "peft/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path / "base", tmp_path / "peft", tmp_path / "ours.safetensors")
    assert not (tmp_path / "ours.safetensors").exists()
