"""litgpt's checkpoint directories, read without conversion: `lit_model.pth` with its
`model_config.yaml`, and `lit_model.pth.lora`.

litgpt keeps query, key and value in one matrix: `attn.qkv` holds all queries, then all keys, then
all values. Before version 0.5, `attn.attn` held each group's queries followed by its key and its
value. An adapter of the matrix stacks one A of `rank` rows for each of the three that is adapted.
Only `hyperparameters.yaml` tells its rank, its alpha and which of the three are adapted.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from litlora.config import CONFIG_FILE, ModelConfig, RopeScaling
from litlora.errors import CheckpointError, UserError
from litlora.formats import LITGPT_ADAPTER_FILE as ADAPTER_FILE
from litlora.formats import WEIGHTS_FILE, Outline
from litlora.formats.full import FullModel
from litlora.formats.layout import LAYER, QKV, Layout, Rule
from litlora.lora import Adapter, LoRAConfig, Update
from litlora.lora.update import scale_of
from litlora.model import shorten
from litlora.storage.tensors import open_torch
from litlora.storage.untrusted import read_yaml

HYPERPARAMETERS_FILE = "hyperparameters.yaml"

_COVERED = set(
    """
    name hf_config block_size n_layer n_embd vocab_size padding_multiple padded_vocab_size
    norm_class_name norm_eps norm_qk norm_qk_type post_attention_norm post_mlp_norm
    parallel_residual shared_attention_norm n_head head_size n_query_groups attn_bias
    attention_scores_scalar sliding_window_size sliding_window_indices attention_logit_softcapping
    rope_base rotary_percentage rope_condense_ratio rope_adjustments intermediate_size
    moe_intermediate_size bias mlp_class_name gelu_approximate n_expert n_expert_per_token
    scale_embeddings lm_head_bias final_logit_softcapping norm_1 norm_2 rope_local_base_freq
    rope_indices norm_topk_prob n_topk_groups n_topk_scores_per_group
    """.split()
)
"""Settings that `_config` reads, or that have an effect only beside others: the last two need
n_expert_groups."""
_NO_EFFECT = {"routed_scaling_factor": 1.0}
"""Values with which other settings have no effect."""
_UNUSABLE = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, CheckpointError)
"""What values of unexpected types raise."""


def open_full(directory: Path) -> FullModel:
    """The full model in a litgpt directory, under our names. Raises CheckpointError for a file that
    does not hold tensors, and for a setting that is not covered, by name."""
    file = directory / WEIGHTS_FILE
    config = load_config(directory)
    tensors = _stored_tensors(file)
    try:
        ours = _layout(config).read({_current(name): tensor for name, tensor in tensors.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return FullModel(directory, file, ours, config).checked()


def _stored_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a litgpt file, alone or under "model"."""
    content = open_torch(file)
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f'{file}: must hold a mapping of names to tensors, alone or under "model"')
    return tensors


def load_config(directory: Path) -> ModelConfig:
    """The architecture in litgpt's `model_config.yaml`. Raises CheckpointError for a setting that
    is not covered, by name."""
    path = directory / CONFIG_FILE
    values = _read_yaml(path)
    if "n_embd" not in values:
        raise CheckpointError(f"{path}: not a litgpt configuration: it lacks n_embd")
    try:
        return _config(values)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    except _UNUSABLE as error:
        raise CheckpointError(f"{path}: not a usable configuration: {error}") from None


def _config(c: dict[str, Any]) -> ModelConfig:
    if unknown := sorted(
        name for name, value in c.items() if value and name not in _COVERED and value != _NO_EFFECT.get(name)
    ):
        raise CheckpointError(f"{unknown[0]} ({c[unknown[0]]!r}) is not implemented here")
    return ModelConfig(
        vocab_size=c["padded_vocab_size"],
        hidden_size=c["n_embd"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["n_layer"],
        num_attention_heads=c["n_head"],
        num_key_value_heads=c["n_query_groups"],
        head_dim=c["head_size"],
        max_position_embeddings=c["block_size"],
        parallel_residual=c["parallel_residual"],
        shared_norm=c["shared_attention_norm"],
        attention_bias=c["bias"] or c.get("attn_bias", False),
        attention_output_bias=None if c["bias"] or not c.get("attn_bias") else False,
        lm_head_bias=c["lm_head_bias"],
        scale_embeddings=c["scale_embeddings"],
        query_pre_attn_scalar=float(scalar) if (scalar := c.get("attention_scores_scalar")) else None,
        attn_logit_softcapping=c.get("attention_logit_softcapping"),
        final_logit_softcapping=c.get("final_logit_softcapping"),
        **_norms(c),
        **_mlp(c),
        **_positions(c),
    )


def _norms(c: dict[str, Any]) -> dict[str, Any]:
    """Kind and place of the norms."""
    before = bool(c.get("norm_1", True)), bool(c.get("norm_2", True))
    after = c["post_attention_norm"], c["post_mlp_norm"]
    position = {
        ((True, True), (False, False)): "before",
        ((False, False), (True, True)): "after",
        ((True, True), (True, True)): "both",
    }.get((before, after))
    if position is None:
        raise CheckpointError(
            f"norm_1, norm_2 {before} with post_attention_norm, post_mlp_norm {after} is not implemented here"
        )
    rms = "rmsnorm_plus_one" if "Gemma" in c["name"] else "rmsnorm"  # litgpt decides by the name, too
    qk_norm = "none"
    if c.get("norm_qk"):
        qk_norm = {"default": "head", "olmo2": "all_heads"}[c.get("norm_qk_type", "default")]
    return {
        "norm": "layernorm" if c["norm_class_name"] == "LayerNorm" else rms,
        "norm_eps": c["norm_eps"],
        "norm_position": position,
        "qk_norm": qk_norm,
    }


def _mlp(c: dict[str, Any]) -> dict[str, Any]:
    """The feed-forward layers, dense or of experts."""
    kind = c["mlp_class_name"]
    moe = kind == "LLaMAMoE"
    gelu = "gelu_tanh" if c["gelu_approximate"] == "tanh" else "gelu"
    return {
        "mlp": "plain" if kind == "GptNeoxMLP" else "gated",
        "hidden_act": gelu if kind in ("GptNeoxMLP", "GemmaMLP") else "silu",
        "mlp_bias": c["bias"],
        "num_experts": c["n_expert"] if moe else None,
        "num_experts_per_tok": c["n_expert_per_token"] if moe else None,
        "moe_intermediate_size": (c.get("moe_intermediate_size") or c["intermediate_size"]) if moe else None,
        "norm_topk_prob": moe,  # litgpt's shares are a softmax over the experts that were picked
    }


def _positions(c: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings and sliding windows."""
    layers, window = range(c["n_layer"]), c.get("sliding_window_size")
    indices = list(c.get("sliding_window_indices") or [])[: len(layers)]
    full = tuple(layer for layer, slides in enumerate(indices) if not slides) if window else ()
    local = c.get("rope_local_base_freq")
    if local:
        rope_indices = (c.get("rope_indices") or [1] * len(layers))[: len(layers)]
        slides = [bool(window) and layer not in full for layer in layers]
        if [bool(index) for index in rope_indices] != slides:
            raise CheckpointError(
                "rope_indices differ from sliding_window_indices, which is not implemented here"
            )
    return {
        "rope_theta": float(c["rope_base"]),
        "rope_local_base_freq": float(local) if local else None,
        "rope_scaling": _rope_scaling(c),
        "partial_rotary_factor": c["rotary_percentage"],
        "sliding_window": window,
        "full_attention_layers": full,
    }


def _rope_scaling(c: dict[str, Any]) -> RopeScaling | None:
    found, condense = c.get("rope_adjustments") or {}, c.get("rope_condense_ratio", 1)
    if condense != 1:
        if found:
            raise CheckpointError("rope_condense_ratio with rope_adjustments is not implemented here")
        return RopeScaling(rope_type="linear", factor=float(condense))
    if not found:
        return None
    if found.keys() == {"factor"}:
        return RopeScaling(rope_type="linear", factor=float(found["factor"]))
    if found.keys() == {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}:
        return RopeScaling(
            rope_type="llama3",
            factor=float(found["factor"]),
            low_freq_factor=float(found["low_freq_factor"]),
            high_freq_factor=float(found["high_freq_factor"]),
            original_max_position_embeddings=found["original_max_seq_len"],
        )
    raise CheckpointError(f"rope_adjustments with {', '.join(found)} is not implemented here")


def _current(name: str) -> str:
    """The name with the old matrix of query, key and value renamed, so that its bias is not taken
    for GPT-NeoX's causal mask, `attn.bias`."""
    return name.replace(".attn.attn.", ".attn.grouped_qkv.")


def base_of(directory: Path) -> tuple[str, Path | None]:
    """What a litgpt adapter calls its base, and the directory of that name if there is one."""
    name = _read_yaml(directory / HYPERPARAMETERS_FILE).get("checkpoint_dir") or ""
    # litgpt stores the path as it was typed: relative to the directory of the run, which is the
    # current one or most likely one above the adapter.
    places = [Path(name), *(parent / name for parent in directory.absolute().parents)] if name else []
    return str(name), next(
        (place for place in places if place.is_dir() and place.resolve() != directory.resolve()), None
    )


def outline(directory: Path) -> Outline:
    """What an adapter's own files tell: its tensors, and what it calls its base."""
    file = directory / ADAPTER_FILE
    content = open_torch(file)
    content = content.get("model", content) if isinstance(content, dict) else {}
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return Outline("litgpt", file, tensors, base_of(directory)[0] or None)


def read_adapter(directory: Path, model: ModelConfig, base: Mapping[str, Tensor]) -> Adapter:
    """The adapter in a `lit_model.pth.lora`, under our names; `model` and `base` describe its base.

    Raises CheckpointError for a tensor that has no place in the base, and for shapes that
    `hyperparameters.yaml` does not explain.
    """
    file, path = directory / ADAPTER_FILE, directory / HYPERPARAMETERS_FILE
    run = _run_settings(path)
    pairs, lost = _pairs(file)
    updates: dict[str, Update] = {}
    layout = _layout(model)
    for module, pair in pairs.items():
        layers = _adapted_layers(layout.to_ours(module), run)
        if layers and all(f"{layer}.weight" in base for layer in layers):
            sizes = [base[f"{layer}.weight"].size(0) for layer in layers]
            updates |= _updates(f"{file}: {module}", pair, dict(zip(layers, sizes, strict=True)), run)
        else:
            lost.append(module)
    if lost:
        raise CheckpointError(
            f"{file}: the base has no place for {shorten(lost)}; is it the base that this adapter was "
            "trained on?"
        )
    if not updates:
        raise CheckpointError(f"{file}: the adapter is empty")
    rank, alpha, dropout = run["lora_r"], float(run["lora_alpha"]), float(run.get("lora_dropout", 0))
    try:
        config = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, targets=list(updates))
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Adapter(config, updates, file=file)


def _pairs(file: Path) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({module: {"A": ..., "B": ...}}, the names of all other tensors) of an adapter's file."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in _stored_tensors(file).items():
        if found := re.fullmatch(r"(.+)\.lora_([AB])", name):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        else:
            others.append(name)
    for module, pair in pairs.items():
        if module.endswith(".attn.attn"):
            raise CheckpointError(
                f"{file}: {module} was adapted by litgpt before version 0.5, whose order of rows differs; "
                "merge the adapter with that version"
            )
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{file}: {module} has lora_A or lora_B, but not both")
    return pairs, others


def _adapted_layers(rule: Rule, run: dict[str, Any]) -> list[str]:
    """Our layers that an update of one of litgpt's modules belongs to: of a fused one, those that
    the run adapted."""
    if len(rule.ours) == 1:
        return list(rule.ours)
    return [layer for layer in rule.ours if run[_SWITCHES[layer.rpartition(".")[2]]]]


def _updates(
    where: str, pair: dict[str, Tensor], sizes: dict[str, int], run: dict[str, Any]
) -> dict[str, Update]:
    """The update of each of our layers, whose rows `sizes` counts, in one of litgpt's pairs."""
    A, B, rank, rows = pair["A"], pair["B"], run["lora_r"], sum(sizes.values())
    if A.ndim != 2 or B.ndim != 2 or (A.size(0), *B.shape) != (rank * len(sizes), rows, rank):
        raise CheckpointError(
            f"{where}: A {tuple(A.shape)} and B {tuple(B.shape)} do not form an update of rank {rank} of "
            f"{len(sizes)} layer(s), {rows} rows, as {HYPERPARAMETERS_FILE} and the base say"
        )
    scale = scale_of(float(run["lora_alpha"]), rank, rslora=False)
    parts = zip(sizes, A.split(rank), B.split(list(sizes.values())), strict=True)
    return {layer: Update(own_A, own_B, scale) for layer, own_A, own_B in parts}


def _run_settings(path: Path) -> dict[str, Any]:
    """The settings of the run, which reading the adapter needs."""
    run = _read_yaml(path)
    required = ("lora_r", "lora_alpha", "lora_query", "lora_key", "lora_value")
    if missing := [name for name in required if name not in run]:
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing)}, which reading the adapter beside it needs"
        )
    for name in ("lora_r", "lora_alpha", "lora_dropout"):
        value = run.get(name, 0)
        if type(value) is not int and (name == "lora_r" or type(value) is not float):
            raise CheckpointError(f"{path}: {name} is {value!r}; it must be a number")
    if run["lora_r"] < 1:
        raise CheckpointError(f"{path}: lora_r is {run['lora_r']}; it must be at least 1")
    return run


_SWITCHES = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}


def _layout(config: ModelConfig) -> Layout:
    """litgpt's names and fused rows."""
    block, D = "transformer.h.{}.", config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    before = config.norm_position == "before"
    plain = config.mlp == "plain"
    rules = [
        Rule("transformer.wte", ("model.embed_tokens",)),
        Rule("transformer.ln_f", ("model.norm",)),
        Rule(block + "norm_1", (LAYER + "input_layernorm",)),
        Rule(
            block + "norm_2",
            (LAYER + ("post_attention_layernorm" if before else "pre_feedforward_layernorm"),),
        ),
        Rule(block + "post_attention_norm", (LAYER + "post_attention_layernorm",)),
        Rule(block + "post_mlp_norm", (LAYER + "post_feedforward_layernorm",)),
        Rule(block + "attn.qkv", QKV, sizes=(H * D, G * D, G * D)),
        Rule(block + "attn.grouped_qkv", QKV, groups=G, sizes=(H // G * D, D, D)),
        Rule(block + "attn.proj", (LAYER + "self_attn.o_proj",)),
        Rule(block + "attn.norm_q", (LAYER + "self_attn.q_norm",)),
        Rule(block + "attn.norm_k", (LAYER + "self_attn.k_norm",)),
        Rule(block + "mlp.fc", (LAYER + "mlp.up_proj",)),
        Rule(block + "mlp.gate", (LAYER + "mlp.gate",)),
    ]
    for ours, theirs in (
        (LAYER + "mlp.", block + "mlp."),
        (LAYER + "mlp.experts.{}.", block + "mlp.experts.{}."),
    ):
        rules.append(Rule(theirs + "proj", (ours + "down_proj",)))
        if not plain:
            rules.append(Rule(theirs + "fc_1", (ours + "gate_proj",)))
            rules.append(Rule(theirs + "fc_2", (ours + "up_proj",)))
    return Layout(rules, "transformer.")


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty if there is no such file."""
    try:
        value = read_yaml(path)
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
