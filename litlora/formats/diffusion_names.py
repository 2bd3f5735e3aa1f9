"""Names of a diffusion model's tensors in its original layout and in that of `diffusers`.

The same weights go by two sets of names, and some layers are fused in one of them:

    original   Stable Diffusion's and SDXL's `input_blocks`, with OpenCLIP's fused `in_proj`
    diffusers  `down_blocks`, with `to_q`, `to_k` and `to_v`

A LoRA file may use either. The names follow from a model's own structure: how many layers its
blocks have, and which of them attend. transformer_names.py has those of Flux and other transformers.
The tables below are facts of these two layouts, as their loaders state them (ComfyUI's comfy/utils.py
and lora.py, diffusers' loaders/single_file_utils.py).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from litlora.formats.aliases import ALL, Aliases, Part, Rows, Shapes
from litlora.formats.transformer_names import other_transformer_names

COMFYUI = "diffusion_model."
WHOLE = "model.diffusion_model."
"""Prefix of the diffusion model in a file that holds the text encoders and the VAE, too."""
PREFIXES = (COMFYUI, "base_model.model.", "unet.", "transformer.", WHOLE)
"""Prefixes of a module's name in a LoRA file, and with some tools of a tensor's name in a model."""
UNET, ENCODER, ENCODER_2, ENCODER_3 = "unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3."
"""The parts of a pipeline as diffusers calls them; any diffusion model goes by UNET here."""
FLAT_PREFIXES = {
    "lora_unet_": UNET,
    "lora_transformer_": UNET,
    "lora_te_": ENCODER,
    "lora_te1_": ENCODER,
    "lora_te2_": ENCODER_2,
    "lora_te3_": ENCODER_3,
    "lycoris_": UNET,
}
"""Prefixes of a name whose dots are underscores, and the part that they mean."""

KNOWN = "Stable Diffusion 1 to 3.5, SDXL, Flux, Flux 2 and Z-Image, with CLIP and T5"
"""The models whose names are known in both layouts."""

# ---- tables

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": ("time_embedding.linear_1",),
    "time_embed.2": ("time_embedding.linear_2",),
    "label_emb.0.0": ("add_embedding.linear_1", "class_embedding.linear_1"),
    "label_emb.0.2": ("add_embedding.linear_2", "class_embedding.linear_2"),
    "input_blocks.0.0": ("conv_in",),
    "out.0": ("conv_norm_out",),
    "out.2": ("conv_out",),
}
"""Both: original module, and what diffusers may call it."""
T5 = ENCODER_2, ENCODER_3
"""Flux's second text encoder and Stable Diffusion 3's third, whose names are unlike CLIP's."""
ENCODERS = {
    "cond_stage_model.transformer.": (ENCODER,),
    "conditioner.embedders.0.transformer.": (ENCODER,),
    "text_encoders.clip_l.transformer.": (ENCODER,),
    "text_encoders.clip_g.transformer.": (ENCODER_2,),
    "text_encoders.t5xxl.transformer.": T5,
}
"""Text encoders whose names within a single file are those of transformers."""
OPEN_CLIPS = {
    "cond_stage_model.model.": (ENCODER,),  # Stable Diffusion 2
    "conditioner.embedders.1.model.": (ENCODER_2,),  # SDXL
    "conditioner.embedders.0.model.": (ENCODER, ENCODER_2),  # SDXL's refiner, which has no other
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
TEXT_MODEL = "text_model."
"""What stands in front of the names of a CLIP text encoder, before version 5 of transformers."""
OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}

# ---- the names of a model


def other_names(shapes: Shapes) -> Aliases:
    """The names that the tensors of a model have in the other layout; empty for a model of another
    kind."""
    found: Aliases = {}
    for prefix in ("", *PREFIXES):
        inside = {
            name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)
        }
        for name, parts in (_unet(inside) | other_transformer_names(inside)).items():
            moved = tuple(Part(prefix + part.tensor, part.rows, part.of) for part in parts)
            found.setdefault(UNET + name, moved)
    return found | _encoders(shapes)


def _unet(shapes: Shapes) -> Aliases:
    """A U-Net's names in the other layout."""
    pairs = [(own, theirs) for own, several in UNET_ENDS.items() for theirs in several]
    is_original = any(name.startswith("input_blocks.") for name in shapes)
    if is_original:
        blocks = _original_blocks(shapes, "input_blocks", 1), _original_blocks(shapes, "output_blocks", 0)
    elif any(name.startswith("down_blocks.") for name in shapes):
        blocks = _diffusers_blocks(shapes, "down_blocks"), _diffusers_blocks(shapes, "up_blocks")
    else:
        return {}
    pairs += [
        (f"{original}.{inner}" if inner else original, f"{theirs}.{named}" if named else theirs)
        for original, theirs in _unet_pairs(*blocks)
        for inner, named in (RESNET.items() if ".resnets." in theirs else (("", ""),))
    ]
    found: Aliases = {}
    for original, theirs in pairs:
        here, there = (original, theirs) if is_original else (theirs, original)
        for name in shapes:
            if name.startswith(f"{here}."):
                found[there + name.removeprefix(here)] = (Part(name),)
    return found


@dataclass
class _Block:
    """The layers of a U-Net at one resolution."""

    resnets: int = 0
    attends: bool = False
    is_sampled: bool = False
    """Whether a change of resolution follows."""


def _original_blocks(names: Iterable[str], where: str, first: int) -> list[_Block]:
    """`input_blocks` or `output_blocks` from number `first` on, which count layers."""
    inside: dict[int, set[str]] = {}
    for name in names:
        if layer := re.match(rf"{where}\.(\d+)\.(\d+\.[a-z_]+)", name):
            inside.setdefault(int(layer[1]), set()).add(layer[2])
    blocks = [_Block()]
    for number in range(first, max(inside, default=first - 1) + 1):
        layers = inside.get(number, set())
        is_down, is_up = "0.op" in layers, bool(layers & {"1.conv", "2.conv"})
        if not is_down:
            blocks[-1].resnets += 1
            blocks[-1].attends |= any(layer.startswith("1.") and layer != "1.conv" for layer in layers)
        if is_down or is_up:
            blocks[-1].is_sampled = True
            blocks.append(_Block())
    return [block for block in blocks if block.resnets]


def _diffusers_blocks(names: Iterable[str], where: str) -> list[_Block]:
    """`down_blocks` or `up_blocks`."""
    blocks: dict[int, _Block] = {}
    for name in names:
        if layer := re.match(rf"{where}\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name):
            block = blocks.setdefault(int(layer[1]), _Block())
            if layer[2] == "resnets":
                block.resnets = max(block.resnets, int(layer[3]) + 1)
            block.attends |= layer[2] == "attentions"
            block.is_sampled |= layer[2].endswith("samplers")
    return [blocks[number] for number in sorted(blocks)]


def _unet_pairs(down: list[_Block], up: list[_Block]) -> Iterator[tuple[str, str]]:
    """(the original name, diffusers' name) of every layer of the blocks."""
    number = count(1)
    for b, block in enumerate(down):
        for i in range(block.resnets):
            n = next(number)
            yield f"input_blocks.{n}.0", f"down_blocks.{b}.resnets.{i}"
            if block.attends:
                yield f"input_blocks.{n}.1", f"down_blocks.{b}.attentions.{i}"
        if block.is_sampled:
            yield f"input_blocks.{next(number)}.0.op", f"down_blocks.{b}.downsamplers.0.conv"
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    number = count(0)
    for b, block in enumerate(up):
        for i in range(block.resnets):
            n = next(number)
            yield f"output_blocks.{n}.0", f"up_blocks.{b}.resnets.{i}"
            if block.attends:
                yield f"output_blocks.{n}.1", f"up_blocks.{b}.attentions.{i}"
            if block.is_sampled and i == block.resnets - 1:
                yield f"output_blocks.{n}.{1 + block.attends}.conv", f"up_blocks.{b}.upsamplers.0.conv"


def _encoders(shapes: Shapes) -> Aliases:
    """The names of text encoders, of a folder or within a single file, as transformers has them,
    without TEXT_MODEL."""
    found: Aliases = {}
    tables = dict(ENCODERS)
    for prefix in ("", TEXT_MODEL):
        if f"{prefix}embeddings.token_embedding.weight" in shapes:
            tables[prefix] = (ENCODER, ENCODER_2)
    if any(name.startswith("encoder.block.0.layer.0.") for name in shapes):
        tables[""] = T5
    for name, shape in shapes.items():
        for prefix, encoders in tables.items():
            if name.startswith(prefix):
                theirs = name.removeprefix(prefix).removeprefix(TEXT_MODEL)
                found |= {encoder + theirs: (Part(name),) for encoder in encoders}
        for prefix, encoders in OPEN_CLIPS.items():
            if name.startswith(prefix):
                for theirs, rows in _open_clip(name.removeprefix(prefix), shape):
                    found |= {encoder + theirs: (Part(name, rows),) for encoder in encoders}
    return found


def _open_clip(name: str, shape: Sequence[int]) -> Iterator[tuple[str, Rows]]:
    """(what transformers calls it, the rows) of every part of a tensor of OpenCLIP's."""
    if name in OPEN_CLIP_ENDS:
        yield OPEN_CLIP_ENDS[name], ALL
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
    if layer is None:
        return
    where, module, end = f"encoder.layers.{layer[1]}", layer[2], layer[3]
    if module in OPEN_CLIP_LAYER:
        yield f"{where}.{OPEN_CLIP_LAYER[module]}.{end}", ALL
    elif module == "attn.in_proj":
        width = shape[0] // 3
        for i, part in enumerate("qkv"):
            yield f"{where}.self_attn.{part}_proj.{end}", (i * width, (i + 1) * width)


# ---- the names in a LoRA file


def names_in_lora(shapes: Shapes, format: str) -> dict[str, str]:
    """{a tensor of a model: the name that comfyui's or kohya's loader knows it by, without their
    prefix}.

    In a file that holds the text encoders and the VAE, too, these are the tensors of the diffusion
    model only. kohya calls the layers of Stable Diffusion's U-Net as diffusers does, and those of
    SDXL's, which has a `label_emb`, as the original does.
    """
    prefix = next((one for one in (WHOLE, COMFYUI) if any(name.startswith(one) for name in shapes)), "")
    names = {name: name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    inside = set(names.values())
    is_unet = any(name.startswith("input_blocks.") for name in inside)
    if format == "kohya" and is_unet and not any(name.startswith("label_emb.") for name in inside):
        for theirs, parts in other_names({name: shapes[name] for name in names}).items():
            names[parts[0].tensor] = theirs.removeprefix(UNET)
    return names


def part_of_checkpoint(name: str) -> str:
    """What a tensor of a file that holds a diffusion model and more belongs to, in words."""
    top = name.partition(".")[0]
    known = {
        "cond_stage_model": "text encoder",
        "conditioner": "text encoders",
        "text_encoders": "text encoders",
        "first_stage_model": "VAE",
        "vae": "VAE",
        "model_ema": "averaged copy of the weights",
    }
    return f"{top} ({known[top]})" if top in known else top


@dataclass(frozen=True)
class Spelling:
    """A module's name in a LoRA file, taken apart."""

    part: str
    """The part of a pipeline that it belongs to: UNET and the like."""
    name: str
    """Its name without any prefix."""
    is_flat: bool
    """Whether the dots of the name are underscores."""
    prefix: str
    """What stands in front of the name."""

    @property
    def flat(self) -> str:
        """The same for every spelling of a name."""
        return self.part + self.name.replace(".", "_")


def spelling(key: str) -> Spelling:
    """A module's name in a LoRA file, taken apart."""
    name, part, is_flat = key, None, False
    for prefix, named in FLAT_PREFIXES.items():
        if key.startswith(prefix):
            name, part, is_flat = key.removeprefix(prefix), named, True
    while not is_flat and (prefix := next((one for one in PREFIXES if name.startswith(one)), None)):
        name = name.removeprefix(prefix)
    if part is None:
        part = next((one for one in (ENCODER, ENCODER_2, ENCODER_3) if name.startswith(one)), UNET)
        name = name.removeprefix(part)
    if part != UNET:
        name = name.removeprefix("text_model_" if is_flat else TEXT_MODEL)
    prefix = key.removesuffix(name)
    # Attention processors, where old versions of diffusers keep factors, have their layers' names.
    return Spelling(part, name.replace(".processor.", "."), is_flat, prefix)
