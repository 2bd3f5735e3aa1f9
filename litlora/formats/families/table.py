"""The families that are covered. Torch-free."""

from litlora.formats.families import (
    gemma,
    gpt,
    gpt_oss,
    interleaved,
    llama,
    near_llama,
    qwen,
    qwen_next,
    routed,
)
from litlora.formats.families.hf_config import Family

_NOT_FALCON = ("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps")
_NOT_GPT_NEOX = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta")
_NOT_GPT2 = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "rope_theta", "rope_scaling"),
)
# fmt: off
FAMILIES = {
    "llama": Family("LlamaForCausalLM", llama.read_llama, llama.write_llama),
    "mistral": Family("MistralForCausalLM", llama.read_mistral, llama.write_mistral),
    "mixtral": Family("MixtralForCausalLM", llama.read_mixtral, llama.write_mixtral),
    "qwen2": Family("Qwen2ForCausalLM", qwen.read_qwen2, qwen.write_qwen2, ("head_dim",)),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", qwen.read_qwen2_moe, qwen.write_qwen2_moe, ("head_dim",)),
    "qwen3": Family("Qwen3ForCausalLM", qwen.read_qwen3, qwen.write_qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qwen.read_qwen3_moe, qwen.write_qwen3_moe),
    "gemma": Family("GemmaForCausalLM", gemma.read_gemma, gemma.write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", gemma.read_gemma2, gemma.write_gemma2, ("hidden_act",)),
    "gemma3_text": Family("Gemma3ForCausalLM", gemma.read_gemma3, gemma.write_gemma3, ("hidden_act",)),
    "phi": Family("PhiForCausalLM", gpt.read_phi, gpt.write_phi, ("head_dim", "rms_norm_eps")),
    "phi3": Family("Phi3ForCausalLM", llama.read_phi3, llama.write_phi3, ("head_dim",)),
    "gpt_neox": Family("GPTNeoXForCausalLM", gpt.read_gpt_neox, gpt.write_gpt_neox, _NOT_GPT_NEOX),
    "gpt2": Family("GPT2LMHeadModel", gpt.read_gpt2, gpt.write_gpt2, _NOT_GPT2),
    "falcon": Family("FalconForCausalLM", gpt.read_falcon, gpt.write_falcon, _NOT_FALCON),
    "stablelm": Family("StableLmForCausalLM", gpt.read_stablelm, gpt.write_stablelm,
                       ("head_dim", "rms_norm_eps")),
    "olmo": Family("OlmoForCausalLM", llama.read_olmo, llama.write_olmo, ("head_dim", "rms_norm_eps")),
    "olmo2": Family("Olmo2ForCausalLM", llama.read_olmo2, llama.write_olmo2, ("head_dim",)),
    "smollm3": Family("SmolLM3ForCausalLM", llama.read_smollm3, llama.write_smollm3),
    "olmo3": Family("Olmo3ForCausalLM", near_llama.read_olmo3, near_llama.write_olmo3,
                    ("head_dim", "rope_theta", "rope_scaling")),
    "olmoe": Family("OlmoeForCausalLM", near_llama.read_olmoe, near_llama.write_olmoe, ("head_dim",)),
    "exaone4": Family("Exaone4ForCausalLM", near_llama.read_exaone4, near_llama.write_exaone4),
    "seed_oss": Family("SeedOssForCausalLM", near_llama.read_seed_oss, near_llama.write_seed_oss),
    "starcoder2": Family("Starcoder2ForCausalLM", gpt.read_starcoder2, gpt.write_starcoder2,
                         ("head_dim", "rms_norm_eps")),
    "granite": Family("GraniteForCausalLM", near_llama.read_granite, near_llama.write_granite, ("head_dim",)),
    "cohere": Family("CohereForCausalLM", interleaved.read_cohere, interleaved.write_cohere,
                     ("head_dim", "rms_norm_eps")),
    "cohere2": Family("Cohere2ForCausalLM", interleaved.read_cohere2, interleaved.write_cohere2,
                      ("head_dim", "rms_norm_eps")),
    "glm": Family("GlmForCausalLM", interleaved.read_glm, interleaved.write_glm),
    "glm4": Family("Glm4ForCausalLM", interleaved.read_glm4, interleaved.write_glm),
    "ernie4_5": Family("Ernie4_5ForCausalLM", interleaved.read_ernie4_5, interleaved.write_ernie4_5),
    "nemotron": Family("NemotronForCausalLM", gpt.read_nemotron, gpt.write_nemotron, ("rms_norm_eps",)),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM", near_llama.read_hunyuan,
                               near_llama.write_hunyuan),
    "arcee": Family("ArceeForCausalLM", near_llama.read_arcee, llama.write_llama),
    "apertus": Family("ApertusForCausalLM", near_llama.read_apertus, near_llama.write_apertus,
                      ("head_dim", "rope_theta", "rope_scaling")),
    "helium": Family("HeliumForCausalLM", interleaved.read_helium, interleaved.write_helium),
    "ministral": Family("MinistralForCausalLM", near_llama.read_ministral, near_llama.write_ministral),
    "ministral3": Family("Ministral3ForCausalLM", near_llama.read_ministral3, near_llama.write_ministral3,
                         ("rope_theta", "rope_scaling")),
    "qwen3_next": Family("Qwen3NextForCausalLM", qwen_next.read_qwen3_next, qwen_next.write_qwen3_next),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", qwen_next.read_qwen3_5, qwen_next.write_qwen3_5),
    "gpt_oss": Family("GptOssForCausalLM", gpt_oss.read_gpt_oss, gpt_oss.write_gpt_oss,
                      ("rope_theta", "rope_scaling")),
    "glm4_moe": Family("Glm4MoeForCausalLM", routed.read_glm4_moe, routed.write_glm4_moe),
    "dots1": Family("Dots1ForCausalLM", routed.read_dots1, routed.write_dots1),
    "flex_olmo": Family("FlexOlmoForCausalLM", near_llama.read_flex_olmo, near_llama.write_olmoe,
                        ("head_dim",)),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", routed.read_ernie4_5_moe,
                           routed.write_ernie4_5_moe),
}
# fmt: on
"""By `model_type`. A model without a family of its own is written as the first that can express
it."""
