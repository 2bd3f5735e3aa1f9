"""litgpt's checkpoint directories, read as they are: `lit_model.pth` with its `model_config.yaml`,
and `lit_model.pth.lora`.

litgpt keeps query, key and value in one matrix: `attn.qkv` with all queries first, then all keys,
then all values; until 0.5 `attn.attn`, each group's queries followed by its key and its value. An
adapter of it holds one A of `rank` rows for each of the three that is adapted; its rank, its alpha
and which three those are stand in `hyperparameters.yaml` alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from litlora.config import CONFIG_FILE, ModelConfig, RopeScaling
from litlora.errors import CheckpointError, UserError
from litlora.formats import LITGPT_ADAPTER_FILE as ADAPTER_FILE
from litlora.formats import WEIGHTS_FILE
from litlora.formats.full import FullModel
from litlora.formats.layout import LAYER, QKV, Layout, Rule
from litlora.lora import Adapter, LoRAConfig, Update
from litlora.lora.update import scale_of
from litlora.storage.tensors import open_torch
from litlora.storage.untrusted import read_yaml

HYPERPARAMETERS_FILE = "hyperparameters.yaml"

_COVERED = {
    *(
        "name",
        "hf_config",
        "block_size",
        "n_layer",
        "n_embd",
        "vocab_size",
        "padding_multiple",
        "padded_vocab_size",
    ),
    *(
        "norm_class_name",
        "norm_eps",
        "norm_qk",
        "norm_qk_type",
        "post_attention_norm",
        "post_mlp_norm",
        "parallel_residual",
    ),
    *(
        "shared_attention_norm",
        "n_head",
        "head_size",
        "n_query_groups",
        "attn_bias",
        "attention_scores_scalar",
    ),
    *(
        "sliding_window_size",
        "sliding_window_indices",
        "attention_logit_softcapping",
        "rope_base",
        "rotary_percentage",
    ),
    *(
        "rope_condense_ratio",
        "rope_adjustments",
        "intermediate_size",
        "moe_intermediate_size",
        "bias",
        "mlp_class_name",
    ),
    *(
        "gelu_approximate",
        "n_expert",
        "n_expert_per_token",
        "scale_embeddings",
        "lm_head_bias",
        "final_logit_softcapping",
    ),
    *("norm_1", "norm_2", "rope_local_base_freq", "rope_indices", "norm_topk_prob"),
    *("n_topk_groups", "n_topk_scores_per_group"),  # of the grouped router, which n_expert_groups turns on
}
_NO_EFFECT = {"routed_scaling_factor": 1.0}


def open_full(directory: Path) -> FullModel:
    """The full model in a directory of litgpt's, under our names. Raises CheckpointError for a file
    that does not hold tensors, and names what is not covered."""
    file = directory / WEIGHTS_FILE
    config = load_config(directory)
    tensors = _stored_tensors(file)
    try:
        ours = _layout(config).read({_current(name): tensor for name, tensor in tensors.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return FullModel(directory, file, ours, config).checked()


def _stored_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of litgpt's, alone or under "model"."""
    content = open_torch(file)
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f'{file}: must hold a mapping of names to tensors, alone or under "model"')
    return tensors


def load_config(directory: Path) -> ModelConfig:
    """The architecture in litgpt's `model_config.yaml`. Raises CheckpointError, naming what is not
    covered."""
    path = directory / CONFIG_FILE
    values = _read_yaml(path)
    if "n_embd" not in values:
        raise CheckpointError(f"{path}: is not litgpt's: it lacks n_embd")
    try:
        return _config(values)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        LookupError,
        CheckpointError,
    ) as error:  # values of strange types
        raise CheckpointError(f"{path}: not a usable configuration: {error}") from None


def _config(c: dict[str, Any]) -> ModelConfig:
    if odd := sorted(
        name for name, value in c.items() if value and name not in _COVERED and value != _NO_EFFECT.get(name)
    ):
        raise CheckpointError(f"{odd[0]} ({c[odd[0]]!r}) is not implemented here")
    before, after = (
        (bool(c.get("norm_1", True)), bool(c.get("norm_2", True))),
        (c["post_attention_norm"], c["post_mlp_norm"]),
    )
    positions = {
        ((True, True), (False, False)): "before",
        ((False, False), (True, True)): "after",
        ((True, True), (True, True)): "both",
    }
    if (before, after) not in positions:
        raise CheckpointError(
            f"norm_1, norm_2 {before} with post_attention_norm, post_mlp_norm {after} is not implemented here"
        )
    rms = "rmsnorm_plus_one" if "Gemma" in c["name"] else "rmsnorm"  # litgpt decides by the name, too
    moe, kind = c["mlp_class_name"] == "LLaMAMoE", c["mlp_class_name"]
    gelu = "gelu_tanh" if c["gelu_approximate"] == "tanh" else "gelu"
    window, indices = (
        c.get("sliding_window_size"),
        list(c.get("sliding_window_indices") or [])[: c["n_layer"]],
    )
    full = tuple(layer for layer, slides in enumerate(indices) if not slides) if window else ()
    local = c.get("rope_local_base_freq")
    if local and [bool(index) for index in (c.get("rope_indices") or [1] * c["n_layer"])[: c["n_layer"]]] != [
        bool(window) and layer not in full for layer in range(c["n_layer"])
    ]:
        raise CheckpointError(
            "rope_indices differ from sliding_window_indices, which is not implemented here"
        )
    return ModelConfig(
        vocab_size=c["padded_vocab_size"],
        hidden_size=c["n_embd"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["n_layer"],
        num_attention_heads=c["n_head"],
        num_key_value_heads=c["n_query_groups"],
        head_dim=c["head_size"],
        max_position_embeddings=c["block_size"],
        norm="layernorm" if c["norm_class_name"] == "LayerNorm" else rms,
        norm_eps=c["norm_eps"],
        norm_position=positions[before, after],
        qk_norm=(
            {"default": "head", "olmo2": "all_heads"}[c.get("norm_qk_type", "default")]
            if c.get("norm_qk")
            else "none"
        ),
        parallel_residual=c["parallel_residual"],
        shared_norm=c["shared_attention_norm"],
        mlp="plain" if kind == "GptNeoxMLP" else "gated",
        hidden_act=gelu if kind in ("GptNeoxMLP", "GemmaMLP") else "silu",
        attention_bias=c["bias"] or c.get("attn_bias", False),
        attention_output_bias=None if c["bias"] or not c.get("attn_bias") else False,
        mlp_bias=c["bias"],
        lm_head_bias=c["lm_head_bias"],
        scale_embeddings=c["scale_embeddings"],
        rope_theta=float(c["rope_base"]),
        rope_local_base_freq=float(local) if local else None,
        rope_scaling=_rope_scaling(c),
        partial_rotary_factor=c["rotary_percentage"],
        sliding_window=window,
        full_attention_layers=full,
        query_pre_attn_scalar=float(scalar) if (scalar := c.get("attention_scores_scalar")) else None,
        attn_logit_softcapping=c.get("attention_logit_softcapping"),
        final_logit_softcapping=c.get("final_logit_softcapping"),
        num_experts=c["n_expert"] if moe else None,
        num_experts_per_tok=c["n_expert_per_token"] if moe else None,
        moe_intermediate_size=(c.get("moe_intermediate_size") or c["intermediate_size"]) if moe else None,
        norm_topk_prob=moe,  # litgpt's shares are a softmax over the experts that were picked
    )


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
    """A name that tells the old matrix of query, key and value from GPT-NeoX's causal mask,
    `attn.bias`."""
    return name.replace(".attn.attn.", ".attn.grouped_qkv.")


def base_of(directory: Path) -> tuple[str, Path | None]:
    """What an adapter of litgpt's calls its base, and the directory of that name if there is
    one."""
    name = _read_yaml(directory / HYPERPARAMETERS_FILE).get("checkpoint_dir") or ""
    # Stored as it was typed: relative to a directory that the adapter most likely lies in, if not
    # to the current one.
    places = [Path(name), *(parent / name for parent in directory.absolute().parents)] if name else []
    return str(name), next(
        (place for place in places if place.is_dir() and place.resolve() != directory.resolve()), None
    )


def read_adapter(directory: Path, model: ModelConfig, base: Mapping[str, Tensor]) -> Adapter:
    """The adapter in a `lit_model.pth.lora`, under our names; `model` and `base` describe its base.

    Raises CheckpointError for a tensor that has no place and for shapes that `hyperparameters.yaml`
    does not explain.
    """
    file, path = directory / ADAPTER_FILE, directory / HYPERPARAMETERS_FILE
    run = _run_settings(path)
    rank, alpha = run["lora_r"], float(run["lora_alpha"])
    pairs: dict[str, dict[str, Tensor]] = {}
    lost = []
    for name, tensor in _stored_tensors(file).items():
        if found := re.fullmatch(r"(.+)\.lora_([AB])", name):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        else:
            lost.append(name)
    updates: dict[str, Update] = {}
    layout = _layout(model)
    for module, pair in pairs.items():
        if module.endswith(".attn.attn"):
            raise CheckpointError(
                f"{file}: {module} was adapted by a litgpt of before 0.5, whose order of rows differs; "
                "merge it there"
            )
        rule = layout.to_ours(module)
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{file}: {module} has lora_A or lora_B, but not both")
        adapted = [
            name for name in rule.ours if len(rule.ours) == 1 or run[_SWITCHES[name.rpartition(".")[2]]]
        ]
        if not adapted or not all(f"{name}.weight" in base for name in adapted):
            lost.append(module)
            continue
        sizes = [base[f"{name}.weight"].size(0) for name in adapted]
        A, B = pair["A"], pair["B"]
        if A.ndim != 2 or B.ndim != 2 or (A.size(0), *B.shape) != (rank * len(adapted), sum(sizes), rank):
            raise CheckpointError(
                f"{file}: {module}: A {tuple(A.shape)} and B {tuple(B.shape)} make no update of rank {rank} "
                f"of {len(adapted)} layer(s), {sum(sizes)} rows, which is what {path.name} and the base say"
            )
        for name, own_A, own_B in zip(adapted, A.split(rank), B.split(sizes), strict=True):
            updates[name] = Update(own_A, own_B, scale_of(alpha, rank, rslora=False))
    if lost:
        raise CheckpointError(
            f"{file}: the base has no place for {', '.join(lost)}; is it the base that this adapter was "
            "trained on?"
        )
    if not updates:
        raise CheckpointError(f"{file}: the adapter is empty")
    try:
        dropout = float(run.get("lora_dropout", 0))
        config = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, targets=list(updates))
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Adapter(config, updates, file=file)


def _run_settings(path: Path) -> dict[str, Any]:
    """The run's settings, which an adapter cannot be read without."""
    run = _read_yaml(path)
    wanted = ("lora_r", "lora_alpha", "lora_query", "lora_key", "lora_value")
    if missing := [name for name in wanted if name not in run]:
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing)}; the adapter beside it cannot be read without"
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
    theirs, D = "transformer.h.{}.", config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    before = config.norm_position == "before"
    plain = config.mlp == "plain"
    rules = [
        Rule("transformer.wte", ("model.embed_tokens",)),
        Rule("transformer.ln_f", ("model.norm",)),
        Rule(theirs + "norm_1", (LAYER + "input_layernorm",)),
        Rule(
            theirs + "norm_2",
            (LAYER + ("post_attention_layernorm" if before else "pre_feedforward_layernorm"),),
        ),
        Rule(theirs + "post_attention_norm", (LAYER + "post_attention_layernorm",)),
        Rule(theirs + "post_mlp_norm", (LAYER + "post_feedforward_layernorm",)),
        Rule(theirs + "attn.qkv", QKV, sizes=(H * D, G * D, G * D)),
        Rule(theirs + "attn.grouped_qkv", QKV, groups=G, sizes=(H // G * D, D, D)),
        Rule(theirs + "attn.proj", (LAYER + "self_attn.o_proj",)),
        Rule(theirs + "attn.norm_q", (LAYER + "self_attn.q_norm",)),
        Rule(theirs + "attn.norm_k", (LAYER + "self_attn.k_norm",)),
        Rule(theirs + "mlp.fc", (LAYER + "mlp.up_proj",)),
        Rule(theirs + "mlp.gate", (LAYER + "mlp.gate",)),
    ]
    for mine, number in (
        (LAYER + "mlp.", theirs + "mlp."),
        (LAYER + "mlp.experts.{}.", theirs + "mlp.experts.{}."),
    ):
        rules += [Rule(number + "proj", (mine + "down_proj",))]
        rules += (
            []
            if plain
            else [Rule(number + "fc_1", (mine + "gate_proj",)), Rule(number + "fc_2", (mine + "up_proj",))]
        )
    return Layout(rules, "transformer.")


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty if there is no such file."""
    try:
        value = read_yaml(path)
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
