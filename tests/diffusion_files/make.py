"""Make names.json.gz: the names and shapes of tiny models of diffusers with the real structure, in
its layout and in the original one, as diffusers' own conversion maps them.

    pip install diffusers transformers; python tests/diffusion_files/make.py

Original names are proposed by `litlora.formats.diffusion_names`, and accepted only if diffusers,
given random tensors under these names, makes every tensor of its model of them, bit for bit.
"""

import gzip
import json
from pathlib import Path

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils

from litlora.formats.diffusion_names import UNET, other_names

COMMON = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=4, cross_attention_dim=8
)
ATTENDS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def unet(channels: tuple[int, ...], blocks: list[tuple[str, str]], **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=tuple(down for down, _ in blocks),
        up_block_types=tuple(up for _, up in reversed(blocks)),
        attention_head_dim=4,
        **COMMON,
        **more,
    )


def models() -> dict[str, tuple[torch.nn.Module, object]]:
    return {
        "sd": (
            unet((8, 16, 16, 16), [ATTENDS, ATTENDS, ATTENDS, PLAIN]),
            single_file_utils.convert_ldm_unet_checkpoint,
        ),
        "sdxl": (
            unet(
                (8, 16, 16),
                [PLAIN, ATTENDS, ATTENDS],
                transformer_layers_per_block=(1, 2, 3),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=40,
            ),
            single_file_utils.convert_ldm_unet_checkpoint,
        ),
        "flux": (
            FluxTransformer2DModel(
                patch_size=1,
                in_channels=4,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=128,
                num_attention_heads=24,
                joint_attention_dim=8,
                pooled_projection_dim=8,
                axes_dims_rope=(16, 56, 56),
                guidance_embeds=True,
            ),
            single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        ),
        "flux2": (
            Flux2Transformer2DModel(
                in_channels=4,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=8,
                timestep_guidance_channels=8,
                axes_dims_rope=(4, 4, 4, 4),
            ),
            single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        ),
        "sd3": (
            SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                num_layers=3,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=8,
                caption_projection_dim=16,
                pooled_projection_dim=8,
                out_channels=4,
                pos_embed_max_size=4,
                dual_attention_layers=(0, 1),
                qk_norm="rms_norm",
            ),
            single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        ),
        "z_image": (
            ZImageTransformer2DModel(
                in_channels=4,
                dim=16,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=8,
                axes_dims=[4, 2, 2],
                axes_lens=[8, 8, 8],
            ),
            single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        ),
    }


def main() -> None:
    torch.manual_seed(0)
    found = {}
    with torch.device("meta"):
        made_models = models()
    for name, (model, convert) in made_models.items():
        shapes = {
            key: tuple(tensor.shape)
            for key, tensor in model.state_dict().items()
            if not is_left_out(name, key)
        }
        # one column of each matrix of Flux, whose conversion knows the real width only
        columns = slice(1, 1 if name == "flux" else None)
        theirs = {key: torch.randn(*shape[:1], *shape[columns]) for key, shape in shapes.items()}
        original, maps = {}, {}
        for alias, parts in other_names(shapes).items():
            key = alias.removeprefix(UNET)
            rows = sum(len(theirs[part.tensor]) for part in parts if part.rows == (None, None))
            whole = torch.empty(rows or len(theirs[parts[0].tensor]), *theirs[parts[0].tensor].shape[1:])
            for part in parts:
                whole[slice(*part.of)] = theirs[part.tensor][slice(*part.rows)]
            original[key] = whole
            maps[key] = [[part.tensor, part.rows, part.of] for part in parts]
        changed = {part[0] for parts in maps.values() for part in parts}
        original |= {key: tensor for key, tensor in theirs.items() if key not in changed} | besides(name)
        prefix = "model.diffusion_model." if name in ("sd", "sdxl") else ""
        made = convert({prefix + key: tensor for key, tensor in original.items()}, config=model.config)
        for key, tensor in theirs.items():
            assert torch.equal(made[key], tensor), key
        found[name] = {
            "diffusers": shapes,
            "original": {key: [len(original[key]), *shapes[parts[0][0]][1:]] for key, parts in maps.items()},
            "maps": maps,
        }
    text = json.dumps(found, separators=(",", ":")).encode()
    (Path(__file__).parent / "names.json.gz").write_bytes(gzip.compress(text, mtime=0))


def is_left_out(name: str, key: str) -> bool:
    """Whether it is a norm of Flux's queries and keys or a table of positions, which no LoRA file
    changes."""
    return (name.startswith("flux") and ".attn.norm_" in key) or key == "pos_embed.pos_embed"


def besides(name: str) -> dict[str, torch.Tensor]:
    """What diffusers' conversion wants besides."""
    if name == "sd3":
        return {"pos_embed": torch.ones(1)}
    if not name.startswith("flux"):
        return {}
    double = [f"double_blocks.{i}.{kind}_attn.norm" for i in range(2) for kind in ("img", "txt")]
    modules = [*double, *(f"single_blocks.{i}.norm" for i in range(2))]
    return {f"{module}.{part}_norm.scale": torch.ones(4) for module in modules for part in ("query", "key")}


if __name__ == "__main__":
    main()
