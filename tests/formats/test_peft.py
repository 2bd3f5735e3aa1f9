"""PEFT adapters, read and written: PEFT and litlora compute the same, whatever the adapter's
settings."""

import copy
import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import reference_to, resolve, write_adapter, write_full
from litlora.errors import CheckpointError
from litlora.load import attach_adapter, build
from litlora.lora import LoRAConfig, adapter_of, add_lora
from litlora.settings import ConvertLit, ExportPEFT, MergeLoRA

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT and transformers warn about each other, and about what these tests do on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **LLAMA),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, **LLAMA, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **LLAMA),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "phi3": lambda: transformers.Phi3Config(**SIZES, **LLAMA, pad_token_id=0),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES, **LLAMA, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **LLAMA, **MOE, shared_expert_intermediate_size=24
    ),
}
LATE = ("olmo3", "olmoe", "exaone4", "starcoder2", "granite", "cohere2", "glm", "glm4", "ernie4-5")
LATE += (
    "nemotron",
    "hunyuan",
    "apertus",
    "arcee",
    "helium",
    "ministral3",
    "seed-oss",
    "qwen3-next",
    "qwen3-5",
    "qwen3-5-moe",
    "llama4",
    "gpt-oss",
    "glm4-moe",
    "dots1",
    "flex-olmo",
    "ernie4-5-moe",
    "ernie4-5-moe-bias",
    "deepseek-v3",
    "moonlight",
    "gemma4",
    "gemma4-31b",
    "gemma4-26b",
    "gemma3n",
)


def of_family(name: str) -> Any:
    kind, settings = FAMILIES[name]
    return getattr(transformers, kind)(**{**settings, "vocab_size": SIZES["vocab_size"]})


MODELS |= {name: functools.partial(of_family, name) for name in LATE}
LLAMA_CASES = {
    "r_not_alpha": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"layers.0.*": 3},
    },
    "patterns_rslora": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.0.*": 6},
    },
    "head_whole": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding_and_norm_whole": {
        "r": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "norm"],
    },
    "layers": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers_by_expression": {"target_modules": r".*layers\.1\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "head_and_embedding_adapted": {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": ["q_proj", "lm_head", "embed_tokens"],
    },
}
CASES = {f"llama-{name}": ("llama", case) for name, case in LLAMA_CASES.items()}
CASES |= {
    f"llama_tied-{name}": ("llama_tied", case)
    for name, case in LLAMA_CASES.items()
    if "head" in name or "whole" in name
}
CASES |= {
    "qwen2-biases": (
        "qwen2",
        {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "o_proj"], "bias": "all"},
    ),
    "gpt_neox": (
        "gpt_neox",
        {"r": 4, "lora_alpha": 10, "target_modules": ["query_key_value", "dense", "dense_h_to_4h"]},
    ),
    "gpt_neox-biases": ("gpt_neox", {"r": 4, "target_modules": ["query_key_value"], "bias": "lora_only"}),
    "gpt_neox-whole": (
        "gpt_neox",
        {"r": 4, "target_modules": ["dense"], "modules_to_save": ["query_key_value", "embed_out"]},
    ),
    "gpt2": (
        "gpt2",
        {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "gpt2-whole": (
        "gpt2",
        {"r": 4, "target_modules": ["c_fc"], "modules_to_save": ["c_attn", "wpe"], "fan_in_fan_out": True},
    ),
    "gpt2-patterns": (
        "gpt2",
        {
            "r": 4,
            "target_modules": ["c_attn", "wte"],
            "rank_pattern": {"h.1.attn.c_attn": 6},
            "fan_in_fan_out": True,
        },
    ),
    "qwen2_moe": ("qwen2_moe", {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "o_proj"]}),
    "qwen3_next": (
        "qwen3-next",
        {"r": 4, "lora_alpha": 10, "target_modules": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"]},
    ),
    "phi3": (
        "phi3",
        {
            "r": 4,
            "lora_alpha": 10,
            "use_rslora": True,
            "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"],
        },
    ),
}


DORA = {"r": 4, "lora_alpha": 10, "use_dora": True}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES |= {
    "llama-dora": ("llama", {**DORA, "target_modules": "all-linear", "lora_dropout": 0.1}),
    "llama-dora-head-rslora": (
        "llama_tied",
        {**DORA, "target_modules": ["v_proj", "lm_head"], "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    ),
    "qwen2-dora": ("qwen2", {**DORA, "target_modules": ["q_proj", "o_proj"], "modules_to_save": ["norm"]}),
    "gpt_neox-dora": ("gpt_neox", {**DORA, "target_modules": ["query_key_value", "dense"]}),
    "gpt2-dora": ("gpt2", {**DORA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "phi3-dora": ("phi3", {**DORA, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "llama-dora-embedding": ("llama", {**DORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "llama_tied-dora-embedding": ("llama_tied", {**DORA, "target_modules": ["embed_tokens"]}),
    "qwen2-lora_bias-biases": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "gpt2-dora-embedding": (
        "gpt2",
        {**DORA, "target_modules": ["c_fc", "wte", "wpe"], "fan_in_fan_out": True},
    ),
    "qwen2-lora_bias": ("qwen2", {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "gpt2-lora_bias": (
        "gpt2",
        {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
    ),
    "llama-tokens": ("llama", {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [7, 0, 21]}),
    "llama-tokens-head": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 0], "lm_head": [3]},
        },
    ),
    "llama_tied-tokens": (
        "llama_tied",
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [7]},
    ),
    "gpt2-tokens": (
        "gpt2",
        {
            "r": 4,
            "target_modules": ["c_attn"],
            "trainable_token_indices": {"wte": [7, 14]},
            "fan_in_fan_out": True,
        },
    ),
    "glm4_moe": (
        "glm4-moe",
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "target_parameters": [*EXPERTS, "shared_experts.up_proj.weight"],
        },
    ),
    "gpt_oss-experts": (
        "gpt-oss",
        {"r": 4, "lora_alpha": 10, "target_modules": ["k_proj"], "target_parameters": EXPERTS},
    ),
    "gemma3n": (  # PEFT's all-linear adapts what routes the streams, too
        "gemma3n",
        {"r": 2, "lora_alpha": 10, "target_modules": "all-linear"},
    ),
    "gemma4-experts": (  # those of the MLP are no experts there, and all linear layers have the router's
        "gemma4-26b",
        {
            "r": 4,
            "lora_alpha": 10,
            "target_modules": ["q_proj", "router.proj", "gate_proj", "down_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "llama4-experts": (
        "llama4",
        {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "shared_expert.up_proj"]}
        | {"target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]},
    ),
    "mixtral-experts": (
        "mixtral",
        {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
}
CASES |= {
    f"llama_tied-tying-{name}": (
        "llama_tied",
        {"r": 4, "target_modules": targets, "modules_to_save": saved, "ensure_weight_tying": True},
    )
    for name, targets, saved in (
        ("embedding_saved", ["q_proj"], ["embed_tokens"]),
        ("head_saved", ["q_proj"], ["lm_head"]),
        ("embedding_adapted", ["q_proj", "embed_tokens"], None),
        ("head_adapted", ["q_proj", "lm_head"], None),
        ("neither", ["o_proj"], None),
    )
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str], tuple[Any, Path]]:
    """name -> a random model of transformers, and its folder."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            made[name] = model, directory
        return made[name]

    return make


def theirs(base: Any, directory: Path | None = None, **settings: Any) -> Any:
    """A PEFT model on a copy of the base: loaded, or new with random weights."""
    base = copy.deepcopy(base)
    if directory is not None:
        return peft.PeftModel.from_pretrained(base, directory).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    randomize(model)
    return model


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def ours(directory: Path, base_dir: Path | None = None, *, live: bool = False) -> torch.nn.Module:
    chain = resolve(directory, base_dir=base_dir)
    if not live:
        tensors, config = merge_chain(chain)
        return build(config, tensors, chain.base).eval()
    model = build(chain.config, chain.base.tensors, chain.base)
    attach_adapter(model, chain.top)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    result = model(torch.arange(24).reshape(2, 12) * 7 % 97)
    return getattr(result, "logits", result)


def script(name: str) -> Any:
    """A command of scripts/, without a process of its own."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def export(adapter: Path, out_dir: Path, **settings: Any) -> None:
    script("export_peft").main(ExportPEFT(lora_path=str(adapter), out_dir=str(out_dir), **settings))


def save(model: Any, directory: Path, base_dir: Path) -> Path:
    model.peft_config["default"].base_model_name_or_path = str(base_dir)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_same_logits_here_and_back(case, bases, tmp_path):
    name, settings = CASES[case]
    base, base_dir = bases(name)
    model = theirs(base, **settings)
    directory = save(model, tmp_path / "peft", base_dir)
    wanted = logits(model)
    assert (wanted - logits(base)).abs().max() > 0.01  # the adapter does something
    assert (logits(ours(directory)) - wanted).abs().max() < 1e-5
    assert (logits(ours(directory, live=True)) - wanted).abs().max() < 1e-5
    export(directory, tmp_path / "again")
    assert (logits(theirs(base, tmp_path / "again")) - wanted).abs().max() < 1e-5


OWN_CASES = {
    "llama": ("llama", LoRAConfig(rank=3, alpha=7.0)),
    "llama-rslora": ("llama", LoRAConfig(rank=3, alpha=7.0, rslora=True, targets="qv")),
    "llama-patterns": (
        "llama",
        LoRAConfig(
            rank=3,
            rank_pattern={"q_proj": 5, r".*layers\.1\.mlp\..*": 2},
            alpha_pattern={"model.layers.0.mlp.up_proj": 1.5},
        ),
    ),
    "llama-whole": ("llama", LoRAConfig(targets="qv", modules_to_save=["lm_head", "model.norm"])),
    "llama_tied-head": ("llama_tied", LoRAConfig(rank=3, targets=["q_proj", "lm_head"])),
    "llama_tied-embedding": ("llama_tied", LoRAConfig(rank=3, targets=["q_proj", "embed_tokens"])),
    "llama_tied-ends": ("llama_tied", LoRAConfig(rank=3, alpha=7.0, targets=["lm_head", "embed_tokens"])),
    "llama-embedding": (
        "llama",
        LoRAConfig(rank=3, rslora=True, targets=["embed_tokens", "qv"], rank_pattern={"embed_tokens": 5}),
    ),
    "gpt2-embeddings": ("gpt2", LoRAConfig(rank=3, targets=["embed_tokens", "embed_positions", "q_proj"])),
    "llama-layers": ("llama", LoRAConfig(rank=3, layers_to_transform=[1])),
    "gpt_neox": ("gpt_neox", LoRAConfig(rank=3, alpha=7.0)),
    "gpt_neox-qv": ("gpt_neox", LoRAConfig(rank=3, alpha=7.0, targets="qv")),
    "gpt_neox-mixed": (
        "gpt_neox",
        LoRAConfig(
            rank=3,
            rslora=True,
            targets="attention",
            rank_pattern={"k_proj": 5},
            alpha_pattern={"v_proj": 2.5},
        ),
    ),
    "gpt_neox-whole_part": ("gpt_neox", LoRAConfig(targets=["up_proj"], modules_to_save=["k_proj"])),
    "gpt2": ("gpt2", LoRAConfig(rank=3, alpha=7.0)),
    "gpt2-qv": ("gpt2", LoRAConfig(rank=3, alpha=7.0, targets="qv")),
    "phi3": ("phi3", LoRAConfig(rank=3, alpha=7.0, rank_pattern={"k_proj": 4, "gate_proj": 2})),
    "mixtral": ("mixtral", LoRAConfig(rank=3, alpha=7.0)),
    "qwen2_moe": (
        "qwen2_moe",
        LoRAConfig(rank=3, alpha=7.0, rslora=True, targets="attention", rank_pattern={"o_proj": 5}),
    ),
}
IN_EXPERTS = r".*mlp\.experts\..*"
OWN_CASES |= {
    f"qwen2_moe-{name}": ("qwen2_moe", LoRAConfig(rank=3, alpha=7.0, **settings))
    for name, settings in {
        "all": {"dropout": 0.1},
        "experts": {"targets": [IN_EXPERTS]},
        "experts and attention": {"targets": [IN_EXPERTS, "q_proj"], "rslora": True},
        "one expert": {"targets": [r".*experts\.2\..*"]},
        "one layer": {"targets": [r".*layers\.1\.mlp.*"]},
        "up": {"targets": [r".*experts\..*up_proj", "down_proj"]},
        "shared expert": {"targets": ["shared_expert.up_proj"], "modules_to_save": ["mlp.gate"]},
        "ranks": {
            "targets": [IN_EXPERTS],
            "rank_pattern": {r".*experts\.1\..*": 5, r".*experts\.2\.up_proj": 2},
            "alpha_pattern": {r".*experts\.0\.gate_proj": 2.5, "down_proj": 4},
        },
    }.items()
}
OWN_CASES |= {
    "mixtral-rslora": ("mixtral", LoRAConfig(rank=3, rslora=True, modules_to_save=["mlp.gate"])),
    "mixtral-router": ("mixtral", LoRAConfig(rank=3, modules_to_save=["mlp.gate"])),
    "mixtral-one layer": ("mixtral", LoRAConfig(rank=3, targets=[r".*layers\.1\.mlp.*"])),
    "mixtral-patterns": ("mixtral", LoRAConfig(rank=3, rank_pattern={"q_proj": 2, "up_proj": 4})),
}


OWN_CASES |= {
    "glm4-moe-router": ("glm4-moe", LoRAConfig(rank=3, targets="qv", modules_to_save=["mlp.gate"])),
}
OWN_CASES |= {name: (name, LoRAConfig(rank=3, alpha=7.0)) for name in LATE}


def make_own(directory: Path, base_dir: Path, settings: LoRAConfig) -> torch.nn.Module:
    """An adapter of our own with random weights, and the model that has it."""
    chain = resolve(base_dir)
    model = build(chain.config, chain.base.tensors, chain.base)
    add_lora(model, settings)
    randomize(model)
    adapter = adapter_of(model, settings).trained_on(reference_to(chain.base, directory))
    write_adapter(directory, adapter, chain.config, sidecars_from=[base_dir])
    return model


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LATE else case for case in OWN_CASES]
)
def test_an_adapter_made_here_gives_the_same_logits_in_peft(case, bases, tmp_path):
    name, settings = OWN_CASES[case]
    base, base_dir = bases(name)
    model = make_own(tmp_path / "own", base_dir, settings)
    wanted = logits(model.eval())
    assert (wanted - logits(base)).abs().max() > 0.01
    assert (logits(ours(tmp_path / "own")) - wanted).abs().max() < 1e-5
    assert (logits(ours(tmp_path / "own", live=True)) - wanted).abs().max() < 1e-5
    export(tmp_path / "own", tmp_path / "peft")
    assert (logits(theirs(base, tmp_path / "peft")) - wanted).abs().max() < 1e-5
    assert (logits(ours(tmp_path / "peft", base_dir)) - wanted).abs().max() < 1e-5  # and back again


def test_a_base_of_our_own_layout_needs_the_family_that_fuses(bases, tmp_path, capsys):
    base, folder = bases("phi3")
    chain = resolve(folder)
    write_full(tmp_path / "ours", chain.base.tensors, chain.config, sidecars_from=[tmp_path])
    model = theirs(base, r=4, target_modules=["qkv_proj", "gate_up_proj"])
    directory = save(model, tmp_path / "peft", tmp_path / "ours")
    assert (logits(ours(directory)) - logits(model)).abs().max() < 1e-5
    export(directory, tmp_path / "again", model_type="phi3")
    assert "is not a Hugging Face folder" in capsys.readouterr().out
    assert (logits(theirs(base, tmp_path / "again")) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoRAConfig(variant="dora"), "PEFT adapts the layers of a model with experts without DoRA"),
        (
            LoRAConfig(targets="qv", modules_to_save=["experts.0.up_proj"]),
            "PEFT cannot save one expert's layer whole",
        ),
    ],
)
def test_what_peft_would_read_wrongly_is_not_written(settings, message, bases, tmp_path):
    make_own(tmp_path / "own", bases("qwen2_moe")[1], settings)
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "own", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_an_adapter_may_resize_the_vocabulary(name, bases, tmp_path):
    base, base_dir = bases(name)
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(104, mean_resizing=False)
    model = theirs(resized, r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    merged = ours(save(model, tmp_path / "peft", base_dir))
    assert merged.config.vocab_size == 104
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


ENDS = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "embedding, head whole": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "head, embedding whole": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    "embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


RESIZED = [pytest.param(ends, 104, marks=[pytest.mark.slow] * (ends != "both")) for ends in ENDS]


@pytest.mark.parametrize(("ends", "num_rows"), [*((ends, 97) for ends in ENDS), *RESIZED])
def test_a_tied_model_is_untied_as_peft_computes_it(ends, num_rows, bases, tmp_path):
    """The layer that has no update keeps the weight below that of the other. PEFT, the merge that
    our command verifies, and its export to transformers compute the same."""
    base, _ = bases("llama_tied")
    base_dir, resized = tmp_path / "base", copy.deepcopy(base)
    base.save_pretrained(base_dir)
    if num_rows != 97:
        resized.resize_token_embeddings(num_rows, mean_resizing=False)
    else:  # the adapter stores what the embedding was trained with, changed or not
        resized.get_input_embeddings().weight.data[90:] += 1 if "whole" not in ends else 0
    model = theirs(resized, r=4, lora_alpha=10, **ENDS[ends])
    wanted = logits(model)
    adapter = save(model, tmp_path / "peft", base_dir)
    small_tokenizer(base_dir)
    merged_dir, hf = tmp_path / "merged", tmp_path / "hf"
    script("merge_lora").main(MergeLoRA(lora_path=[str(adapter)], out_dir=str(merged_dir)))
    merged = ours(merged_dir)
    assert not merged.config.tie_word_embeddings and merged.config.vocab_size == num_rows
    assert (logits(merged) - wanted).abs().max() < 1e-5
    script("convert_lit_checkpoint").main(ConvertLit(checkpoint_dir=str(merged_dir), out_dir=str(hf)))
    exported = transformers.AutoModelForCausalLM.from_pretrained(hf)
    assert not exported.config.tie_word_embeddings
    assert (logits(exported) - wanted).abs().max() < 1e-5
    if num_rows == 97:
        assert (logits(ours(adapter, live=True)) - wanted).abs().max() < 1e-5
    # An adapter of the untied merge finds a base of its own size and head.
    second = make_own(tmp_path / "second", merged_dir, LoRAConfig(rank=3, targets=["q_proj", "lm_head"]))
    assert (logits(ours(tmp_path / "second")) - logits(second.eval())).abs().max() < 1e-5


def small_tokenizer(directory: Path) -> None:
    """A tokenizer of two words for a base of tests."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    backend.add_special_tokens(["<eos>"])
    backend.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_experts_that_peft_adapts_as_parameters_are_read(parameters, bases, tmp_path):
    base, base_dir = bases("qwen2_moe")
    settings = {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {".*down_proj": 2}}
    model = theirs(base, r=4, lora_alpha=10, target_parameters=parameters, **settings)
    directory = save(model, tmp_path / "peft", base_dir)
    wanted = logits(model)
    assert (wanted - logits(base)).abs().max() > 0.001
    assert (logits(ours(directory)) - wanted).abs().max() < 1e-5
    assert (logits(ours(directory, live=True)) - wanted).abs().max() < 1e-5
    export(directory, tmp_path / "again")
    assert (logits(theirs(base, tmp_path / "again")) - wanted).abs().max() < 1e-5


WEIGHTS = {
    "gpt2": ["c_attn.weight", "wte.weight", "mlp.c_proj.weight"],
    "qwen2_moe": ["mlp.gate.weight", "shared_expert.up_proj.weight", "gate_up_proj"],
    "mixtral": ["mlp.gate.weight", "q_proj.weight"],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_peft_adapts_as_parameters_are_read(name, bases, tmp_path):
    base, base_dir = bases(name)
    settings = {"rank_pattern": {"up_proj.weight": 3}, "alpha_pattern": {".*c_proj.weight": 2}}
    model = theirs(base, r=4, target_modules=[], target_parameters=WEIGHTS[name], **settings)
    directory = save(model, tmp_path / "peft", base_dir)
    wanted = logits(model)
    assert (wanted - logits(base)).abs().max() > 0.001
    assert (logits(ours(directory)) - wanted).abs().max() < 1e-5
    export(directory, tmp_path / "again")
    assert (logits(theirs(base, tmp_path / "again")) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("wrapped", "head"),
    [("model.language_model.", "lm_head"), ("language_model.model.", "language_model.lm_head")],
)
def test_an_adapter_of_the_language_model_in_another_model_is_read(wrapped, head, bases, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    base, base_dir = bases("llama")
    config = transformers.LlavaConfig(text_config=MODELS["llama"](), vision_config=vision)
    whole = transformers.LlavaForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(base.model.state_dict())
    whole.lm_head.load_state_dict(base.lm_head.state_dict())
    targets = r"model\.language_model\..*(q|down)_proj|lm_head"
    alphas = {"language_model.*q_proj": 3}
    model = theirs(whole, r=4, lora_alpha=10, target_modules=targets, alpha_pattern=alphas)
    directory = save(model, tmp_path / "peft", base_dir)
    rename(
        directory,
        lambda key: key.replace("model.language_model.", wrapped).replace("model.lm_head", f"model.{head}"),
    )
    wanted = logits(model)
    assert (wanted - logits(base)).abs().max() > 0.01
    assert (logits(ours(directory)) - wanted).abs().max() < 1e-5
    export(directory, tmp_path / "again")  # of the language model alone
    assert (logits(theirs(base, tmp_path / "again")) - wanted).abs().max() < 1e-5


def rename(directory: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of a PEFT folder other keys."""
    file = directory / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("adapter", ["default", "my_task-2"])
def test_keys_may_hold_the_adapters_name(adapter, bases, tmp_path):
    base, base_dir = bases("llama")
    model = theirs(base, **DORA, target_modules=["q_proj"], modules_to_save=["lm_head"])
    directory = save(model, tmp_path / "peft", base_dir)
    wanted = logits(model)

    def named(key: str) -> str:
        key = re.sub(r"(lora_[AB])", rf"\1.{adapter}", key).replace("vector", f"vector.{adapter}.weight")
        return key.replace("lm_head.", f"lm_head.modules_to_save.{adapter}.")

    rename(directory, named)
    assert (logits(ours(directory)) - wanted).abs().max() < 1e-5
    rename(directory, lambda key: key.replace(adapter, "other") if "layers.1" in key else key)
    with pytest.raises(CheckpointError, match=f"holds several adapters .*{adapter}.*other"):
        resolve(directory)


def test_a_head_that_is_not_the_embedding_is_used_whatever_the_config_says(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(MODELS["llama"]()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    wanted = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (logits(ours(tmp_path)) - wanted).abs().max() < 1e-5
    assert not ours(tmp_path).config.tie_word_embeddings
