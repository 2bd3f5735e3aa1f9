"""Linear attention by the gated delta rule in a GGUF file: its metadata, and its tensors as llama.cpp
has them; see gguf_export.py."""

from typing import Any

import torch
from torch import Tensor

from litlora.config import ModelConfig
from litlora.formats.gguf_architectures import full_attention_interval

PLACE = ".linear_attn."
_NAMES = {"dt_bias": "dt_proj.bias"}


def their_leaf(name: str) -> str:
    """Hugging Face's name of a tensor, as the gguf package's table expects it."""
    place, found, leaf = name.partition(PLACE)
    return f"{place}{found}{_NAMES.get(leaf, leaf)}"


def as_stored(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """One of our tensors of linear attention with llama.cpp's values. Where it has four projections,
    the value heads take turns by key head: the first of each, the second of each, and so on."""
    leaf = name.partition(PLACE)[2]
    if leaf == "conv1d.weight":
        tensor = tensor.squeeze(1)  # (channels, 1, width)
    if config.linear_split:
        order = _order(config, leaf)
        if order is not None:
            # On the meta device there is nothing to reorder.
            dim = 1 if leaf == "out_proj.weight" else 0
            tensor = tensor if tensor.is_meta else tensor.index_select(dim, order)
    return -tensor.float().exp() if leaf == "A_log" else tensor


def _order(config: ModelConfig, leaf: str) -> Tensor | None:
    """The numbers of the rows, or of out_proj's columns, in their order; None if it is ours."""
    heads = torch.arange(config.linear_num_value_heads).view(config.linear_num_key_heads, -1).T.flatten()
    width = config.linear_value_head_dim
    values = (heads[:, None] * width + torch.arange(width)).flatten()
    if leaf in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
        return heads
    if leaf in ("in_proj_z.weight", "out_proj.weight"):
        return values
    if leaf in ("in_proj_qkv.weight", "conv1d.weight"):  # queries and keys come first
        keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        return torch.cat([torch.arange(keys), keys + values])
    return None


def add_linear_attention(writer: Any, config: ModelConfig) -> None:
    """Its metadata."""
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(full_attention_interval(config))
    if config.linear_split:  # Qwen 3.5: frequencies for time, height and width in turns; of text all are one
        pairs = config.rotary_dim // 2
        writer.add_rope_dimension_sections([-(-(pairs - part) // 3) for part in range(3)] + [0])
