"""Write the directories beside this file with litgpt's own code: tiny random checkpoints, and the
logits that litgpt computes.

litgpt 0.5.13 pins a jsonargparse that litlora cannot use, so it needs an environment of its own:

    pip install torch==2.13.0 litgpt==0.5.13 requests
    python tests/litgpt_files/make.py
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt import lora
from litgpt.config import Config
from litgpt.finetune.lora import setup
from litgpt.model import GPT
from litgpt.parser_config import save_hyperparameters
from litgpt.prompts import Alpaca, save_prompt_style
from litgpt.utils import save_config
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
TOKENS = torch.arange(20).reshape(1, 20) * 7 % 30
SIZES = {"block_size": 32, "vocab_size": 30, "padding_multiple": 32, "n_layer": 2, "n_embd": 16, "n_head": 4}
LLAMA = {
    "n_query_groups": 2,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 24,
    "bias": False,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
}
LLAMA3_ROPE = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}
FULL: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "name": "tiny-llama", "rope_adjustments": LLAMA3_ROPE},
    "qwen": {
        **LLAMA,
        "name": "tiny-qwen",
        "attn_bias": True,
        "rope_base": 1_000_000,
        "norm_qk": True,
        "head_size": 6,
    },
    "pythia": {
        "name": "tiny-pythia",
        "intermediate_size": 24,
        "parallel_residual": True,
        "rotary_percentage": 0.5,
    },
    "gemma": {
        **LLAMA,
        "name": "Gemma-2-tiny",
        "mlp_class_name": "GemmaMLP",
        "gelu_approximate": "tanh",
        "scale_embeddings": True,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "attention_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "sliding_window_size": 6,
        "sliding_window_indices": [1, 0],
        "attention_scores_scalar": 8,
    },
    "mixtral": {
        **LLAMA,
        "name": "tiny-mixtral",
        "n_layer": 1,
        "mlp_class_name": "LLaMAMoE",
        "n_expert": 3,
        "n_expert_per_token": 2,
    },
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_lora": (
        "llama",
        {"lora_r": 3, "lora_alpha": 10, "lora_query": True, "lora_key": False, "lora_value": True},
    ),
    "pythia_lora": (
        "pythia",
        {
            "lora_r": 2,
            "lora_alpha": 5,
            "lora_query": True,
            "lora_key": True,
            "lora_value": True,
            "lora_projection": True,
        }
        | {"lora_mlp": True, "lora_head": True},
    ),
}


def randomize(model: torch.nn.Module, std: float) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)


def write(
    directory: Path, file: str, content: dict[str, Any], model: torch.nn.Module, config: Config
) -> None:
    """A directory as litgpt leaves it, and what its model answers."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    torch.save(content, directory / file)
    save_config(config, directory)
    save_prompt_style(Alpaca(), directory)
    with torch.no_grad():
        save_file({"tokens": TOKENS, "logits": model.eval()(TOKENS)}, directory / "logits.safetensors")


def main() -> None:
    os.chdir(HERE)
    torch.manual_seed(0)
    for name, settings in FULL.items():
        config = Config(**{**SIZES, **settings})
        model = GPT(config)
        randomize(model, 0.3)
        write(HERE / name, "lit_model.pth", {"model": model.state_dict()}, model, config)
        if name in ("llama", "pythia"):
            # As written before 0.5: another name, each group's queries, key and value together.
            # litgpt itself reorders them.
            old = {
                key.replace("attn.qkv.", "attn.attn."): value.clone()
                for key, value in model.state_dict().items()
            }
            model.load_state_dict(dict(old))
            write(HERE / f"{name}_old", "lit_model.pth", old, model, config)
    for name, (base, settings) in ADAPTERS.items():
        config = lora.Config.from_file(HERE / base / "model_config.yaml", **settings)
        model = lora.GPT(config)
        model.load_state_dict(
            torch.load(HERE / base / "lit_model.pth", weights_only=True)["model"], strict=False
        )
        for key, parameter in model.named_parameters():
            if lora.lora_filter(key, parameter):
                torch.nn.init.normal_(parameter, std=0.3)
        state = {key: value for key, value in model.state_dict().items() if lora.lora_filter(key, value)}
        write(HERE / name, "lit_model.pth.lora", {"model": state}, model, config)
        (HERE / name / "model_config.yaml").write_bytes((HERE / base / "model_config.yaml").read_bytes())
        sys.argv = [
            "litgpt",
            "finetune_lora",
            base,
            *(f"--{key}={str(value).lower()}" for key, value in settings.items()),
        ]
        save_hyperparameters(setup, HERE / name)


if __name__ == "__main__":
    main()
