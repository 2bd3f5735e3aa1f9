"""A small model of each family, to look at its layers. Torch-free."""

from litlora.config import ModelConfig
from litlora.formats.families.hf_config import HFConfig
from litlora.formats.families.table import FAMILIES

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "num_experts_per_tok": 2,
    "enable_moe_block": True,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
"""By all the names that the families have for them."""


def example_config(model_type: str) -> ModelConfig:
    """The architecture of a family, with small sizes and its own defaults for all else."""
    return ModelConfig(**FAMILIES[model_type].read(HFConfig({**_SIZES, "model_type": model_type})))
