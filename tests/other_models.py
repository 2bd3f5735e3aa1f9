"""Tiny models of transformers that litlora has no family of its own for."""

import json
import shutil
from pathlib import Path

import torch

_SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_GPT = {"vocab_size": 400, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_STATE = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
# fmt: off
SETTINGS = {
    "mamba2": {**_STATE, "head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 8,
               "tie_word_embeddings": False},
    "falcon_h1": {**_GROUPED, **_MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.5},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "nemotron_h": {**_GROUPED, "num_hidden_layers": 4, "head_dim": 8, "mamba_num_heads": 4,
                   "layers_block_type": ["mamba", "attention", "moe", "mlp"], "mamba_head_dim": 8,
                   "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8, "n_routed_experts": 4,
                   "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
                   "moe_shared_expert_intermediate_size": 16},
    "bamba": {**_GROUPED, **_MAMBA, "attn_layer_indices": [1]},
    "gptj": _GPT,
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "recurrent_gemma": {**_SMALL, "num_hidden_layers": 3, "intermediate_size": 96, "lru_width": 32,
                        "attention_window_size": 16, "num_key_value_heads": 1,
                        "block_types": ["recurrent", "recurrent", "attention"]},
    "minicpm3": {**_SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                 "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "mpt": {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128,
            "expansion_ratio": 2},
    "jamba": {**_GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8,
              "mamba_dt_rank": 4},
    "gpt_neo": {"vocab_size": 400, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]],
                "window_size": 16},
    "falcon_mamba": {**_STATE, "time_step_rank": 4},
    "codegen": _GPT,
    "biogpt": _SMALL,
    "xglm": {"vocab_size": 400, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
             "max_position_embeddings": 128},
    "persimmon": _SMALL,
    "deepseek_v32": {**_GROUPED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                     "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
                     "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                     "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "index_n_heads": 2,
                     "index_head_dim": 16, "index_topk": 8},
    "deepseek_v4": {**_GROUPED, "num_key_value_heads": 1, "head_dim": 16, "partial_rotary_factor": 0.5,
                    "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "index_n_heads": 2,
                    "index_head_dim": 16, "index_topk": 8, "sliding_window": 16,
                    "mlp_layer_types": ["hash_moe", "moe"],
                    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
                    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"]},
}
# fmt: on
"""By model_type."""


def make_folder(directory: Path, kind: str, tokenizer_dir: Path, *, seed: int = 0, **changes) -> Path:
    """A folder as transformers writes it, with the weights of a model that was trained a little: no
    norm, bias or gate is at its start."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, **SETTINGS[kind], **changes}
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # DeepSeek V4: two experts for each token id
                table.copy_(torch.stack([torch.randperm(4)[:2] for _ in table]))
    model.tie_weights()
    model.save_pretrained(directory)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return directory
