"""How the files in this folder were made: LoRA files by the real `diffusers` (0.42.1, peft 0.21.2),
and the weights that it gives when it loads and fuses them.

    pip install diffusers==0.42.1 peft==0.21.2 pillow accelerate
    python tests/diffusers_files/make.py

Of the model only the weights of the layers that the LoRA updates are kept.
"""

from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

HERE = Path(__file__).parent
TARGETS = ["to_q", "to_k", "to_out.0"]
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"attn.to_q": 9, "to_k": 3},
    },
}


def model() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def kept(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ends = tuple(f".{target}.weight" for target in TARGETS)
    return {name: tensor.contiguous() for name, tensor in state.items() if name.endswith(ends)}


def main() -> None:
    save_file(kept(model().state_dict()), HERE / "base.safetensors")
    for name, config in CONFIGS.items():
        trained = model()
        trained.add_adapter(LoraConfig(target_modules=TARGETS, init_lora_weights=False, **config))
        metadata = trained.peft_config["default"].to_dict()
        FluxPipeline.save_lora_weights(
            HERE,
            transformer_lora_layers=get_peft_model_state_dict(trained),
            transformer_lora_adapter_metadata=metadata,
            weight_name=f"{name}.safetensors",
        )
        trained.save_lora_adapter(HERE, weight_name=f"{name}_bare.safetensors")
        fused = model()
        fused.load_lora_adapter(HERE, prefix="transformer", weight_name=f"{name}.safetensors")
        fused.fuse_lora()
        fused.unload_lora()
        save_file(kept(fused.state_dict()), HERE / f"{name}_merged.safetensors")


if __name__ == "__main__":
    main()
