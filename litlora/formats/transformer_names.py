"""Names of a diffusion transformer's tensors in its original layout and in that of `diffusers`; see
diffusion_names.py.

The original layouts keep query, key and value in one matrix, Flux's single blocks the MLP's as well.
The tables are facts of both, as diffusers states them (loaders/single_file_utils.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from litlora.formats.aliases import Aliases, Part, Shapes

Table = Mapping[str, tuple[str, ...]]
"""{a module of the original layout: those of diffusers that it consists of, one after another}."""

# ---- tables

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FLUX_ATTENTION = {
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
FLUX_DOUBLE = FLUX_ATTENTION | {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
FLUX_SINGLE = {
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
FLUX_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
FLUX2_DOUBLE = FLUX_ATTENTION | {
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
FLUX2_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
FLUX2_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SD3_BLOCK = {
    "x_block.attn.qkv": QKV,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ADDED_QKV,
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
SD3_ENDS = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
Z_IMAGE_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
}
Z_IMAGE_ENDS = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}


@dataclass(frozen=True)
class Kind:
    """One kind of diffusion transformer, whose names differ in the two layouts."""

    original: tuple[str, ...]
    """Beginnings of names, all of which an original model has, and no other kind before it."""
    diffusers: tuple[str, ...]
    ends: Table
    """Modules outside the blocks."""
    blocks: Mapping[tuple[str, str], Table]
    """{(what the blocks are called in the original layout, in diffusers): the modules inside}."""
    swapped: tuple[str, ...] = ()
    """Ends of original modules that give shift and scale, in diffusers scale and shift, where
    they give these two alone."""


KINDS = (
    Kind(  # Flux 2
        ("double_stream_modulation_img.lin.",),
        ("double_stream_modulation_img.linear.",),
        FLUX2_ENDS,
        {
            ("double_blocks", "transformer_blocks"): FLUX2_DOUBLE,
            ("single_blocks", "single_transformer_blocks"): FLUX2_SINGLE,
        },
        ("final_layer.adaLN_modulation.1",),
    ),
    Kind(  # Flux
        ("double_blocks.",),
        ("single_transformer_blocks.",),
        FLUX_ENDS,
        {
            ("double_blocks", "transformer_blocks"): FLUX_DOUBLE,
            ("single_blocks", "single_transformer_blocks"): FLUX_SINGLE,
        },
        ("final_layer.adaLN_modulation.1",),
    ),
    Kind(  # Stable Diffusion 3 and 3.5
        ("joint_blocks.",),
        ("pos_embed.proj.", "transformer_blocks.0.attn.add_q_proj."),
        SD3_ENDS,
        {("joint_blocks", "transformer_blocks"): SD3_BLOCK},
        ("final_layer.adaLN_modulation.1", "context_block.adaLN_modulation.1"),
    ),
    Kind(  # Z-Image
        ("noise_refiner.0.attention.qkv.", "layers.0.attention.qkv."),
        ("noise_refiner.0.attention.to_q.", "layers.0.attention.to_q."),
        Z_IMAGE_ENDS,
        {(name, name): Z_IMAGE_BLOCK for name in ("layers", "noise_refiner", "context_refiner")},
    ),
)

# ---- the names of a model


def other_transformer_names(shapes: Shapes) -> Aliases:
    """The names that the tensors of a diffusion transformer have in the other layout, without any
    prefix; empty for a model of another kind."""
    for kind in KINDS:
        for is_original, marks in ((True, kind.original), (False, kind.diffusers)):
            if all(any(name.startswith(mark) for name in shapes) for mark in marks):
                return _aliases(kind, shapes, is_original)
    return {}


def _aliases(kind: Kind, shapes: Shapes, is_original: bool) -> Aliases:
    found: Aliases = {}
    for original, several in _modules(kind, shapes, is_original):
        for end in ("weight", "bias"):
            here = original if is_original else several[0]
            if original.endswith(kind.swapped) and _gives_two(shapes, here):
                found |= _swapped(shapes, f"{here}.{end}", f"{several[0] if is_original else original}.{end}")
            elif is_original:
                found |= _divided(shapes, original, several, end)
            else:
                found |= _joined(shapes, original, several, end)
    return found


def _modules(kind: Kind, names: Iterable[str], is_original: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(the original module, those of diffusers that it consists of) for all blocks of a model."""
    yield from kind.ends.items()
    numbers: dict[str, set[int]] = {}
    for name in names:
        block, _, rest = name.partition(".")
        if (number := rest.partition(".")[0]).isdigit():
            numbers.setdefault(block, set()).add(int(number))
    for (original, theirs), table in kind.blocks.items():
        for number in sorted(numbers.get(original if is_original else theirs, ())):
            for module, several in table.items():
                parts = tuple(f"{theirs}.{number}.{part}" for part in several)
                yield f"{original}.{number}.{module}", parts


def _gives_two(shapes: Shapes, module: str) -> bool:
    """Whether a modulation gives a shift and a scale, and no gates."""
    shape = shapes.get(f"{module}.weight", ())
    return len(shape) == 2 and shape[0] == 2 * shape[1]


def _swapped(shapes: Shapes, name: str, other: str) -> Aliases:
    if name not in shapes:
        return {}
    half = shapes[name][0] // 2
    first, second = (0, half), (half, 2 * half)
    return {other: (Part(name, first, second), Part(name, second, first))}


def _divided(shapes: Shapes, original: str, several: tuple[str, ...], end: str) -> Aliases:
    """Names of the rows of an original tensor. Query, key and value are as many rows as the weight
    has columns, and the rest is the MLP's."""
    name = f"{original}.{end}"
    if name not in shapes or f"{original}.weight" not in shapes:
        return {}
    if len(several) == 1:
        return {f"{several[0]}.{end}": (Part(name),)}
    rows, width = shapes[name][0], shapes[f"{original}.weight"][1]
    starts = [width * number for number in range(len(several))]
    ends = [*starts[1:], rows]
    if ends != sorted(ends) or (len(several) == 3 and rows != 3 * width):
        return {}
    return {
        f"{module}.{end}": (Part(name, (start, stop)),)
        for module, start, stop in zip(several, starts, ends, strict=True)
    }


def _joined(shapes: Shapes, original: str, several: tuple[str, ...], end: str) -> Aliases:
    """The name of an original tensor whose rows diffusers keeps as several tensors."""
    names = [f"{module}.{end}" for module in several]
    if any(name not in shapes for name in names):
        return {}
    if len(names) == 1:
        return {f"{original}.{end}": (Part(names[0]),)}
    parts, start = [], 0
    for name in names:
        stop = start + shapes[name][0]
        parts.append(Part(name, of=(start, stop)))
        start = stop
    return {f"{original}.{end}": tuple(parts)}
