"""Adapters of other formats, as small files that tests read."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LITGPT = Path(__file__).parents[0] / "litgpt_files"


def write_peft(directory: Path, base: str | Path, **changes: object) -> Path:
    """A PEFT folder for the tiny base of the fixtures: rank 3 on every q_proj; keys as PEFT writes
    them."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(3, 32, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(32, 3, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(base),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    return directory
