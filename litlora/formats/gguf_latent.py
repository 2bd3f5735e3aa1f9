"""Multi-head latent attention in a GGUF file: its metadata, and the layer that llama.cpp has in two
parts; see gguf_export.py."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from litlora.config import ModelConfig

HALVED = ".self_attn.kv_b_proj.weight"
"""What makes keys and values of latents: (heads · (key + value), rank)."""


def halves(read: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The parts of each such layer, by names that the gguf package's table knows: that of the keys
    (heads, rank, key), whose products are queries among latents, and that of the values (heads, value,
    rank)."""
    for layer in range(config.num_hidden_layers if config.kv_lora_rank is not None else 0):
        place = f"model.layers.{layer}.self_attn"
        heads = read(f"model.layers.{layer}{HALVED}").unflatten(0, (config.num_attention_heads, -1))
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield f"{place}.k_b_proj.weight", keys.transpose(1, 2)
        yield f"{place}.v_b_proj.weight", values


def add_latent_attention(writer: Any, config: ModelConfig) -> None:
    """Its metadata. For llama.cpp, all heads share one key, the latent and the rotated part, and one
    value, the latent."""
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    if config.mscale_all_dim is not None:  # llama.cpp takes the factor 0.1 out again
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.mscale_all_dim)
