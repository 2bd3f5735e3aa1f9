"""A full model as a GGUF file of llama.cpp: metadata, weights and vocabulary, by the gguf package's
writer and its table of names.

What llama.cpp's own converter changes is changed here, too: rows of Llama's rotated heads are
reordered, Gemma's norms hold 1 + w, experts are one tensor, fused projections hold one part after
the other. gguf.py reads such files. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litlora.config import ModelConfig
from litlora.errors import CheckpointError, MissingExtraError, setting
from litlora.formats.gguf_architectures import GraphOf, context_of, graph_of, has_windows
from litlora.formats.gguf_delta_net import PLACE, add_linear_attention, as_stored, their_leaf
from litlora.formats.gguf_latent import HALVED, add_latent_attention, halves
from litlora.formats.layout import CONSTANTS, Layout, layout
from litlora.frozen.ggml import BLOCK_FORMATS
from litlora.storage.blocks import LazyTensor
from litlora.transformers_config import Architecture, TransformersConfig

PLAIN_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WRITTEN_KINDS = (*PLAIN_KINDS, "Q8_0")
"""The number formats that the gguf package writes; llama.cpp makes others of such a file."""
_EXACT = ("blk.*.ffn_gate_inp.weight", "position_embd.weight", "blk.*.ssm_conv1d.weight")
"""Matrices that are always in fp32, as llama.cpp's converter has them. So is all that is no matrix."""
ACTIVATION = ".mlp.act_fn."
"""The weights of xIELU, which llama.cpp has as metadata."""
_PARTS = ("gate_proj", "up_proj", "down_proj")


def gguf_package() -> Any:
    """The gguf package. Raises MissingExtraError without it."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError(
            "GGUF files need the package gguf; install it with: pip install 'litlora[gguf]'"
        ) from None
    return gguf


class _Read(Mapping[str, Tensor]):
    """Tensors that are read, or computed, one at a time."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = [*names], read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A model in llama.cpp's names and order."""

    graph: GraphOf
    config: ModelConfig
    layout: Layout
    tensors: Mapping[str, Tensor | LazyTensor]
    """By our names."""

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the file, one at a time."""
        return self._stored(lambda name: _whole(self.tensors[name]))

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Their shapes; nothing is read or computed."""
        on_meta = self._stored(lambda name: torch.empty(self.tensors[name].shape, device="meta"))
        return ((name, tuple(tensor.shape)) for name, tensor in on_meta)

    def _stored(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        names = name_map(self.graph, self.config.num_hidden_layers)
        yield from extra_tensors(self.config)
        apart = (".mlp.experts.", HALVED, ACTIVATION)
        dense = [name for name in self.tensors if not any(part in name for part in apart)]
        for name, tensor in self.layout.write(_Read(dense, lambda name: self.rows(name, read(name)))):
            yield their_name(names, name), tensor
        for name, tensor in (*_stacked(read, self.config), *halves(read, self.config)):
            yield their_name(names, name), tensor
        if self.graph.own_head and self.config.tie_word_embeddings:
            yield "output.weight", read("model.embed_tokens.weight")

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """One of our tensors with the values and the order of rows that llama.cpp has."""
        if PLACE in name:
            return as_stored(self.config, name, tensor)
        if name.endswith("norm.weight") and self.config.norm.endswith("plus_one"):
            return tensor.float() + 1
        if name.endswith("mlp.shared_expert_gate.weight"):
            return tensor.flatten()
        heads = {".q_proj.": self.config.num_attention_heads, ".k_proj.": self.config.num_key_value_heads}
        count = next((heads[part] for part in heads if self.graph.rotated and part in name), None)
        if count is None:
            return tensor
        # The two numbers that are rotated together lie side by side, not half a head apart.
        return tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)


def as_gguf(
    tensors: Mapping[str, Tensor | LazyTensor], config: Architecture, model_type: str, directory: Path
) -> GGUFModel:
    """The model in a directory for a file. Raises CheckpointError for what llama.cpp does not compute,
    by name."""
    if isinstance(config, TransformersConfig):
        raise CheckpointError(
            f"{directory}: model_type {config.model_type} runs through transformers here and cannot be "
            "written as GGUF; write a Hugging Face folder with scripts/convert_lit_checkpoint.py, and try "
            "llama.cpp's convert_hf_to_gguf.py on it"
        )
    try:
        graph = graph_of(model_type, config)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    theirs = layout(model_type, config)
    # Fused rows hold one part after the other here, and no weight is transposed.
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rules = [
        dataclasses.replace(
            rule, groups=1, sizes=(q, kv, kv) if rule.groups > 1 else rule.sizes, transposed=False
        )
        for rule in theirs.rules
    ]
    return GGUFModel(graph, config, Layout(rules, theirs.prefix), tensors)


def name_map(graph: GraphOf, num_layers: int) -> Any:
    """The gguf package's table from Hugging Face's names to llama.cpp's."""
    gguf = gguf_package()
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == graph.name), None)
    assert kind is not None, f"the gguf package does not know {graph.name}"
    return gguf.get_tensor_name_map(kind, num_layers)


def their_name(names: Any, name: str) -> str:
    """llama.cpp's name of one of Hugging Face's tensors."""
    name = their_leaf(name.replace("e_score_correction_bias", "e_score_correction.bias"))
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"{name}: llama.cpp has no such weight in this architecture")
    return found


def _whole(tensor: Tensor | LazyTensor) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor
    return torch.cat([block.flatten() for block in tensor.blocks()]).view(tensor.shape)


def _stacked(read: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The layers of all experts of a block as one tensor (experts, out, in)."""
    layers = range(config.num_hidden_layers if config.num_experts is not None else 0)
    for layer in (n for n in layers if n not in config.dense_layers):
        for part in _PARTS:
            place = f"model.layers.{layer}.mlp.experts"
            yield (
                f"{place}.{part}.weight",
                torch.stack([read(f"{place}.{n}.{part}.weight") for n in range(config.num_experts)]),
            )


# ---- tensors that follow from the configuration


def extra_tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The divisors of rotary frequencies, where the metadata cannot say them."""
    scaling, half = config.rope_scaling, config.rotary_dim // 2
    if scaling is None:
        return
    if scaling.rope_type == "longrope":
        yield "rope_factors_long.weight", torch.tensor(scaling.long_factor, dtype=torch.float32)
        yield "rope_factors_short.weight", torch.tensor(scaling.short_factor, dtype=torch.float32)
    if scaling.rope_type == "llama3":
        frequencies = config.rope_theta ** -(torch.arange(half).double() / half)
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0, 1)
        yield "rope_freqs.weight", (1 / ((1 - share) / scaling.factor + share)).float()


# ---- metadata


def add_architecture(writer: Any, model: GGUFModel) -> None:
    """The metadata of the architecture."""
    config, graph = model.config, model.graph
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(graph, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.kv_lora_rank is not None:
        add_latent_attention(writer, config)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    layer_norm = config.norm.startswith("layernorm")
    (writer.add_layer_norm_eps if layer_norm else writer.add_layer_norm_rms_eps)(config.norm_eps)
    if config.positions == "rotary":
        writer.add_rope_dimension_count(config.rotary_dim)
        writer.add_rope_freq_base(config.rope_theta)
    if has_windows(graph, config):
        writer.add_sliding_window(config.sliding_window)
    elif graph.name == "phi3":
        writer.add_sliding_window(0)  # it wants the entry, and has no windows
    if config.num_experts is not None:
        _add_experts(writer, graph, config)
    if graph.name == "ernie4_5-moe":
        writer.add_interleave_moe_layer_step(1)
        writer.add_expert_shared_feed_forward_length(config.shared_experts_intermediate_size or 0)
    if config.shared_expert_intermediate_size is not None:
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.linear_attention_layers:
        add_linear_attention(writer, config)
    if "parallel_residual" in graph.free:
        writer.add_parallel_residual(config.parallel_residual)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.hidden_act == "xielu":
        _add_xielu(writer, model)
    _add_factors(writer, graph, config)
    _add_scaling(writer, config)


def _add_experts(writer: Any, graph: GraphOf, config: ModelConfig) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if graph.dense_first:
        writer.add_leading_dense_block_count(len(config.dense_layers))
    if graph.is_shared:
        writer.add_expert_shared_count(
            config.shared_experts_intermediate_size // config.moe_intermediate_size
        )
    if config.n_group is not None and config.topk_group < config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if config.router_scoring == "sigmoid":
        writer.add_expert_gating_func(gguf_package().ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config.routed_scaling_factor or 1.0)
        writer.add_expert_weights_norm(config.norm_topk_prob)


def _add_xielu(writer: Any, model: GGUFModel) -> None:
    layers = range(model.config.num_hidden_layers)
    for name, add in (("alpha_n", writer.add_xielu_alpha_n), ("alpha_p", writer.add_xielu_alpha_p)):
        found = [_whole(model.tensors[f"model.layers.{layer}{ACTIVATION}{name}"]) for layer in layers]
        add([tensor.item() for tensor in found])
    writer.add_xielu_beta([CONSTANTS["beta"]] * len(layers))
    writer.add_xielu_eps([CONSTANTS["eps"]] * len(layers))


def _add_factors(writer: Any, graph: GraphOf, config: ModelConfig) -> None:
    """What the architecture multiplies and clamps."""
    if graph.name == "granite":
        writer.add_attention_scale((config.query_pre_attn_scalar or config.head_dim) ** -0.5)
        writer.add_logit_scale(1 / (config.logit_scale or 1))  # it divides
    elif "logit_scale" in graph.free:
        writer.add_logit_scale(config.logit_scale or 1.0)
    if config.embedding_multiplier is not None:
        writer.add_embedding_scale(config.embedding_multiplier)
    if config.residual_multiplier is not None:
        writer.add_residual_scale(config.residual_multiplier)
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)


def _add_scaling(writer: Any, config: ModelConfig) -> None:
    scaling, kinds = config.rope_scaling, gguf_package().RopeScalingType
    if scaling is None:
        return
    if scaling.original_max_position_embeddings is not None and scaling.rope_type != "llama3":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    if scaling.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(kinds.LINEAR if scaling.rope_type == "linear" else kinds.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "longrope":
        writer.add_rope_scaling_attn_factors(scaling.attention_factor)


def notes_on(model: GGUFModel) -> list[str]:
    """What people must know of a file beside what it says itself."""
    config, graph = model.config, model.graph
    found, context = [], context_of(graph, config)
    if context < config.max_position_embeddings:
        found.append(
            f"llama.cpp's architecture {graph.name} has no such sliding window: the file has a context of "
            f"{context} tokens, that of the window, in which it computes the same"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        found.append(f"the file has a context of {context} tokens, up to which dynamic scaling is none")
    return found


# ---- the file


def write_model(file: Path, model: GGUFModel, kind: str, metadata: Callable[[Any], None]) -> None:
    """Write a file, its matrices in `kind`; `metadata(writer)` adds what is not of the architecture.

    One tensor at a time is converted. Raises CheckpointError for values that `kind` cannot hold.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(file, model.graph.name)
    metadata(writer)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_architecture(writer, model)
    kinds = {}
    for name, exact in model.shapes():
        kinds[name] = kind_for(name, exact, kind)
        shape, size = _stored_shape(exact, kinds[name])
        dtype = {"F32": "float32", "F16": "float16"}.get(kinds[name], "uint8")
        writer.add_tensor_info(name, shape, np.dtype(dtype), size, _raw(gguf, kinds[name]))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in model.stored():
            writer.write_tensor_data(_converted(name, tensor, kinds[name]))
    finally:
        writer.close()


def kinds_in(file: Path) -> dict[str, int]:
    """How many tensors of a file are in each number format, the most frequent first."""
    tensors = gguf_package().GGUFReader(file).tensors
    return dict(Counter(tensor.tensor_type.name for tensor in tensors).most_common())


def kind_for(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The number format of one tensor in a file whose matrices are in `kind`."""
    if len(shape) < 2 or any(Path(name).match(pattern) for pattern in _EXACT):
        return "F32"
    if kind in BLOCK_FORMATS and shape[-1] % BLOCK_FORMATS[kind].values:
        return "F16"  # rows must be whole blocks
    return kind


def _stored_shape(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], int]:
    """(the shape of the array that holds a tensor, its bytes)."""
    if kind in ("F32", "F16"):
        return shape, math.prod(shape) * PLAIN_KINDS[kind].itemsize
    blocks = BLOCK_FORMATS.get(kind)
    width = shape[-1] * 2 if blocks is None else shape[-1] // blocks.values * blocks.num_bytes
    return (*shape[:-1], width), math.prod(shape[:-1]) * width


def _raw(gguf: Any, kind: str) -> Any:
    return None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind]


def _converted(name: str, tensor: Tensor, kind: str) -> Any:
    """A tensor as the array that is written. Raises CheckpointError for values beyond its format."""
    tensor = tensor.detach()
    if kind in PLAIN_KINDS:
        result = tensor.to(PLAIN_KINDS[kind]).contiguous()
        if kind == "F16" and not bool(torch.isfinite(result).all()):
            raise CheckpointError(
                f"{name}: has values up to {float(tensor.abs().max()):.4g}, and F16 ends at 65,504; "
                f"choose {setting('dtype')} BF16"
            )
        return result.numpy() if kind != "BF16" else result.view(torch.uint8).numpy()
    gguf = gguf_package()
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind])
