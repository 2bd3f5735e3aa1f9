"""GGUF files of llama.cpp: the metadata as Hugging Face's settings, and the tensors as they are
stored, under Hugging Face's names.

What llama.cpp's converter changed is undone: the rows of Llama's rotated heads are in another order,
Gemma's norms hold 1 + w, and the experts of a block are one tensor. All tensors that are not in blocks
get the dtype of the embedding, or bf16 where that is in blocks; that is also what blocks are dequantised
to. The tokenizer is read by litlora.gguf_vocabulary.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats.families import FAMILIES, read_config
from litlora.formats.full import FullModel
from litlora.formats.layout import layout
from litlora.frozen.few_bits import Quantized
from litlora.frozen.ggml import BLOCK_FORMATS, GGML

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
}
"""model_type by general.architecture. Mistral's is llama; so is Mixtral's, which has experts."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""The modules of all families; `NAMES_IN` has what differs in one."""
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.N.gate_proj",
    "ffn_up_exps": "mlp.experts.N.up_proj",
    "ffn_down_exps": "mlp.experts.N.down_proj",
}
"""Experts are one tensor (experts, out, in); each becomes a matrix, N its number."""
NAMES_IN = {
    "mixtral": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.N.w1",
        "ffn_up_exps": "block_sparse_moe.experts.N.w3",
        "ffn_down_exps": "block_sparse_moe.experts.N.w2",
    },
    "qwen2_moe": {
        **_EXPERTS,
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    },
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3_text": {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_FACTORS, LLAMA3_THETA = (8.0, 32.0), 500_000.0
"""Of the models of 3.1 and 3.3, and of 3.2."""
_GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models whose scores are divided by √(hidden_size / heads), not by √head_dim: the
metadata does not tell."""


def open_gguf(file: Path) -> FullModel:
    """The model in a file, memory-mapped. Raises CheckpointError for anything but a sound file of an
    architecture that is covered."""
    reader = _reader(file)
    try:
        infos = {info.name: info for info in reader.tensors}
        kind, values = _settings(reader.fields, infos)
        if (info := infos.pop("rope_freqs.weight", None)) is not None and kind == "llama":
            values["rope_scaling"] = _llama3(info.data)
        theirs = _tensors(file, infos.values(), kind)
        embedding = theirs.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError("lacks token_embd.weight, the embedding")
        values["vocab_size"] = embedding.shape[0]
        kind, config = read_config(values)
        if values["model_type"] in ("llama", "mixtral"):
            theirs = _rotated(theirs, config.num_attention_heads, config.num_key_value_heads)
        ours = layout(kind, config).read(theirs)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return FullModel(file.parent, file, ours, config).checked()


_SAID = ("GGUF", "Sorry", "Bad", "Invalid", "Unknown", "Found")
"""How the package's own messages begin."""


def _reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(
            f"{file}: GGUF files need the package gguf; install it with: pip install 'litlora[gguf]'"
        ) from None
    try:
        return GGUFReader(file)
    except ValueError as error:  # in the package's own words, or in numpy's
        reason = " ".join(str(error).split())[:200] if str(error).startswith(_SAID) else ""
    except (IndexError, KeyError, TypeError, OverflowError):
        reason = ""
    reason = reason or f"it ends too early, or is no GGUF file ({file.stat().st_size:,} bytes)"
    raise CheckpointError(f"{file}: not a usable GGUF file: {reason}; copy it again")


# ---- settings


def _settings(metadata: Mapping[str, Any], infos: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(model_type, the settings as a config.json has them, without the vocabulary's size)."""

    def read(key: str) -> Any:
        field = metadata.get(key)
        return None if field is None else field.contents()

    architecture = read("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise CheckpointError(f"architecture {architecture!r} is not covered as GGUF, only {known}")
    if read("split.count") not in (None, 0, 1):
        raise CheckpointError("is one of several parts; join them with llama.cpp's gguf-split")
    experts = _expert_settings(architecture, read, infos)
    kind = "mixtral" if architecture == "llama" and experts else MODEL_TYPES[architecture]
    values: dict[str, Any] = {"model_type": kind, "architectures": [FAMILIES[kind].architecture]}
    for key, name in SETTINGS.items():
        if (value := read(f"{architecture}.{key}")) is not None:
            if type(value) not in (int, float):
                raise CheckpointError(f"{architecture}.{key} must be one number for all layers")
            # Stored in fp32: 1e-6 is 9.999999974752427e-07 there.
            values[name] = float(f"{value:.7g}") if type(value) is float else value
    if missing := [n for n in ("hidden_size", "num_hidden_layers", "num_attention_heads") if n not in values]:
        raise CheckpointError(f"lacks the metadata of {missing[0]}")
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if "head_dim" not in values and (rotated := read(f"{architecture}.rope.dimension_count")):
        values["head_dim"] = rotated
    values["tie_word_embeddings"] = "output.weight" not in infos
    values["attention_bias"] = "blk.0.attn_q.bias" in infos
    values["mlp_bias"] = "blk.0.ffn_up.bias" in infos
    values |= experts
    if kind in ("qwen2", "qwen2_moe"):
        values.pop("head_dim", None)
    if kind in _GEMMA_27B:
        is_27b = values["num_hidden_layers"] == _GEMMA_27B[kind]
        scalar = values["hidden_size"] / values["num_attention_heads"] if is_27b else values.get("head_dim")
        values["query_pre_attn_scalar"] = scalar or 256
    if architecture == "llama" or values.get("sliding_window") == 0:  # 0 is what files of Phi 4 have for none
        values.pop("sliding_window", None)
    return kind, values | _rope(architecture, read)


def _expert_settings(architecture: str, read: Any, infos: Mapping[str, Any]) -> dict[str, Any]:
    """How many experts there are, how wide, and how many each token picks; nothing without any. Files
    may not say the widths, so the tensors do."""
    count, used = (read(f"{architecture}.{key}") for key in ("expert_count", "expert_used_count"))
    if not count:
        return {}
    stacked, shared = infos.get("blk.0.ffn_gate_exps.weight"), infos.get("blk.0.ffn_gate_shexp.weight")
    if type(count) is not int or type(used) is not int or stacked is None or len(stacked.shape) != 3:
        raise CheckpointError("lacks expert_used_count, or the experts of its first layer as one tensor")
    values = {"num_experts": count, "num_local_experts": count, "num_experts_per_tok": used}
    values["moe_intermediate_size"] = int(stacked.shape[1])
    if shared is not None:
        values["shared_expert_intermediate_size"] = int(shared.shape[1])
    # llama.cpp's graphs are made so, whatever the metadata says.
    return values | {"norm_topk_prob": architecture == "qwen3moe", "mlp_only_layers": []}


def _rope(architecture: str, read: Any) -> dict[str, Any]:
    """The scaling of rotary frequencies. Raises CheckpointError for one that is not covered."""
    scaling = read(f"{architecture}.rope.scaling.type")
    if scaling in (None, "none"):
        return {}
    factor = read(f"{architecture}.rope.scaling.factor")
    if scaling != "linear" or type(factor) not in (int, float):
        raise CheckpointError(f"{architecture}.rope.scaling.type {scaling!r} is not covered as GGUF")
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _llama3(stored: Any) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, of which a file holds only the divisors of each frequency.
    Raises CheckpointError for divisors that are not those of a released model."""
    divisors = torch.tensor(stored).flatten()
    frequencies = LLAMA3_THETA ** -(torch.arange(len(divisors)).double() / len(divisors))
    turns = LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    for factor in LLAMA3_FACTORS:
        if torch.allclose(1 / ((1 - share) / factor + share), divisors.double(), rtol=1e-4):
            return {**LLAMA3, "factor": factor}
    raise CheckpointError(
        "rope_freqs.weight: these divisors of rotary frequencies are not those of Llama 3.1 to 3.3; use "
        "the model's Hugging Face folder"
    )


# ---- tensors


def _tensors(file: Path, infos: Any, kind: str) -> dict[str, Tensor | Quantized]:
    """The tensors by Hugging Face's names."""
    size = file.stat().st_size
    stored = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    types = {info.name: info.tensor_type.name for info in infos}
    dtype = PLAIN.get(types.get("token_embd.weight", ""), torch.bfloat16)
    found: dict[str, Tensor | Quantized] = {}
    for info in infos:
        shape, start = [int(count) for count in info.shape][::-1], int(info.data_offset)
        raw = stored[start : start + int(info.n_bytes)]
        for name, part, matrix in _matrices(_name(info.name, kind), shape, raw):
            tensor = _tensor(file, name, info.name, types[info.name], matrix, part, dtype)
            if isinstance(tensor, Tensor):
                tensor = _as_theirs(tensor, name, kind).to(dtype)
            if name in found:
                raise CheckpointError(f"{info.name} is not the only tensor that is read as {name}")
            found[name] = tensor
    return found


def _matrices(name: str, shape: list[int], raw: Tensor) -> Iterator[tuple[str, Tensor, list[int]]]:
    """A tensor, or the matrix of each expert: name, bytes and shape."""
    if ".N." not in name:
        yield name, raw, shape
        return
    if len(shape) != 3 or not shape[0] or len(raw) % shape[0]:
        raise CheckpointError(f"{name} is {' x '.join(map(str, shape))}, not a matrix for each expert")
    for number, part in enumerate(raw.view(shape[0], -1)):
        yield name.replace(".N.", f".{number}."), part, shape[1:]


def _as_theirs(tensor: Tensor, name: str, kind: str) -> Tensor:
    """A tensor that is not in blocks, as Hugging Face has it."""
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor - 1
    return tensor[None] if name.endswith("shared_expert_gate.weight") and tensor.ndim == 1 else tensor


def _name(theirs: str, kind: str) -> str:
    """Hugging Face's name of a tensor. Raises CheckpointError for one that no module here has."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", theirs)
    module = (NAMES | NAMES_IN.get(kind, {})).get(match[2]) if match else None
    if module is None:
        raise CheckpointError(f"holds {theirs[:80]}, which the architecture does not have")
    return f"model.layers.{match[1]}.{module}.{match[3]}" if match[1] else f"{module}.{match[3]}"


def _tensor(
    file: Path, name: str, theirs: str, kind: str, shape: list[int], raw: Tensor, dtype: torch.dtype
) -> Tensor | Quantized:
    """One tensor in the type `kind` of ggml; those in blocks stay so."""
    count = torch.Size(shape).numel()
    if kind in PLAIN:
        plain = PLAIN[kind]
        if len(raw) != count * plain.itemsize or raw.storage_offset() % plain.itemsize:
            raise CheckpointError(f"{theirs} lies beyond the end of the file; copy it again")
        return raw.view(plain).view(shape)
    if kind not in BLOCK_FORMATS:
        known = ", ".join([*PLAIN, *BLOCK_FORMATS])
        raise CheckpointError(f"{theirs} is in {kind}, which is not supported, only {known}")
    blocks = BLOCK_FORMATS[kind]
    if len(shape) != 2 or not count or shape[1] % blocks.values:
        raise CheckpointError(f"{theirs} is {' x '.join(map(str, shape))}, not a matrix of whole blocks")
    row = shape[1] // blocks.values * blocks.num_bytes
    if len(raw) != shape[0] * row:
        raise CheckpointError(f"{theirs} lies beyond the end of the file; copy it again")
    return GGML(name, file, dtype, shape[1], range(shape[0]), raw.view(shape[0], row), blocks)


def _rotated(
    tensors: dict[str, Tensor | Quantized], heads: int, groups: int
) -> dict[str, Tensor | Quantized]:
    """The rows of queries and keys in Hugging Face's order: llama.cpp puts the two numbers that are
    rotated together side by side, Hugging Face half a head apart."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        count = heads if ".q_proj." in name else groups if ".k_proj." in name else 0
        if not count:
            continue
        rows = tensor.shape[0]
        if rows % (count * 2):
            raise CheckpointError(f"{name} has {rows} rows; they do not make up {count} heads")
        order = torch.arange(rows).view(count, -1, 2).transpose(1, 2).flatten()
        found[name] = tensor[order] if isinstance(tensor, Tensor) else tensor.take(order)
    return found
