"""Hugging Face's module names and fused tensors <-> ours, declared once for each family and used in
both directions.

Our names are those of Hugging Face's Llama, so most families need no rules. A rule names one of
their modules and the modules of ours that share its rows (the first axis of its weight and bias):

    Rule("gpt_neox.layers.{}.attention.dense", ("model.layers.{}.self_attn.o_proj",))
        another name
    Rule("...self_attn.qkv_proj", ("...q_proj", "...k_proj", "...v_proj"), sizes=(q, k, v))
        three parts, concatenated
    Rule("...query_key_value", ("...q_proj", "...k_proj", "...v_proj"), groups=H, sizes=(D, D, D))
        H times q, k, v
    Rule("...attn.c_attn", (...), sizes=(C, C, C), transposed=True)
        stored as (in, out)
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.tensor_rules import FusedExperts, Row, TensorRule
from litlora.frozen.few_bits import Quantized
from litlora.transformers_config import Architecture, TransformersConfig

LAYER = "model.layers.{}."
QKV = tuple(f"{LAYER}self_attn.{part}_proj" for part in "qkv")
NOT_WEIGHTS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))$")
"""Entries of old files that are not weights: rotary frequencies and causal masks, which are
computed here."""

CONSTANTS = {"beta": 0.5, "eps": -1e-6}
"""What is stored beside the weights of the activation xIELU, and is the same in every model."""


@dataclass(frozen=True)
class Rule:
    """One module of theirs and the modules of ours that share its rows. `{}` stands for the number
    of a layer or expert."""

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    """The rows consist of this many groups; each has some rows of every part."""
    sizes: tuple[int, ...] = ()
    """Rows of each part in one group; not needed for one part."""
    transposed: bool = False
    """Their weight is (in, out), as in GPT-2's Conv1D; ours is always (out, in)."""
    also: str | None = None
    """Another name of theirs for the module, which is read but not written."""

    def fill(self, numbers: Iterable[str]) -> "Rule":
        """The rule for one layer (and expert)."""
        numbers = list(numbers)
        ours = tuple(name.format(*numbers) for name in self.ours)
        return dataclasses.replace(self, theirs=self.theirs.format(*numbers), ours=ours)

    def split(self, rows: Tensor | Quantized) -> list[Tensor | Quantized]:
        """Their tensor (out, ...), in our orientation, as one tensor for each of ours. They are
        views where their rows are adjacent.

        Raises CheckpointError if the number of rows does not fit the parts.
        """
        if len(self.ours) == 1:
            return [rows]
        group = sum(self.sizes)
        if len(rows.shape) == 0 or rows.size(0) != self.groups * group:
            raise CheckpointError(
                f"{self.theirs} has shape {tuple(rows.shape)}; the architecture needs "
                f"{self.groups * group} rows"
            )
        if isinstance(rows, Quantized):
            return [rows.take(part) for part in self.split(torch.arange(rows.size(0)))]
        grouped = rows.reshape(self.groups, group, *rows.shape[1:]) if self.groups > 1 else rows.unsqueeze(0)
        # (groups, size, ...) -> (groups · size, ...)
        return [part.flatten(0, 1) for part in grouped.split(self.sizes, dim=1)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if len(parts) == 1:
            return parts[0]
        grouped = [
            part.unflatten(0, (self.groups, size)) for part, size in zip(parts, self.sizes, strict=True)
        ]
        return torch.cat(grouped, dim=1).flatten(0, 1)


class Layout:
    """The rules of one model. A module without a rule has the same name on both sides."""

    def __init__(self, rules: list[Rule | TensorRule], prefix: str = "model.") -> None:
        self.rules = [rule for rule in rules if isinstance(rule, Rule)]
        tensors = [rule for rule in rules if isinstance(rule, TensorRule)]
        experts = [rule for rule in tensors if isinstance(rule, FusedExperts)]
        self.fused = [rule for rule in experts if not rule.is_optional]
        """Tensors that hold a part of all experts of a layer, in every file."""
        self.prefix = prefix
        """The prefix of all their names but the output head's. Files of the bare decoder lack
        it."""
        self._by_theirs = [
            (_pattern(name), rule) for rule in self.rules for name in (rule.theirs, rule.also) if name
        ]
        self._by_ours = [(_pattern(name), rule) for rule in self.rules for name in rule.ours]
        self._tensors_by_theirs = [(_pattern(rule.theirs), rule) for rule in tensors]
        self._tensors_by_ours = [(_pattern(name), rule) for rule in tensors for name in rule.forms]
        self._apart = {name for rule in experts if rule.is_optional for name in rule.forms}

    def is_apart(self, names: Iterable[str]) -> bool:
        """Whether tensors of theirs are layers of single experts where one tensor can hold them all."""
        forms = [_pattern(form) for form in self._apart]
        return any(form.fullmatch(name) for form in forms for name in names)

    def to_ours(self, module: str) -> Rule:
        """The rule for a module of theirs, with numbers filled in."""
        return _find(self._by_theirs, module)

    def to_theirs(self, module: str) -> Rule:
        """The rule for a module of ours, with numbers filled in; `rule.ours.index(module)` is its
        part."""
        return _find(self._by_ours, module)

    @property
    def swaps_factors(self) -> bool:
        """Whether A and B of experts change places in PEFT's files."""
        return any(fused.transposed and not fused.is_marked for fused in self.fused)

    def rule_of_expert(self, expert: str, leaves: tuple[str, ...], size: int) -> Rule:
        """How these layers of one expert, of `size` rows each, share a parameter of transformers 5."""
        turns = len(leaves) > 1 and any(fused.interleaved for fused in self.fused)
        ours = tuple(f"{expert}.{leaf}" for leaf in leaves)
        return Rule(expert, ours, size if turns else 1, (1 if turns else size,) * len(leaves))

    def read(self, tensors: Mapping[str, Tensor | Quantized]) -> dict[str, Tensor | Quantized]:
        """Their tensors under our names. Raises CheckpointError if two of theirs claim one of
        ours."""
        ours: dict[str, Tensor | Quantized] = {}
        sources: dict[str, str] = {}
        bare = bool(tensors) and not any(name.startswith(self.prefix) for name in tensors)
        for name, tensor in tensors.items():
            if NOT_WEIGHTS.search(name) or _is_constant(name, tensor):
                continue
            module, _, parameter = name.rpartition(".")
            if bare and module not in ("lm_head", "embed_out"):
                module = self.prefix + module
            for target, value in self._parts(module, parameter, tensor):
                if target in ours:
                    raise CheckpointError(f"{name} and {sources[target]} are both read as {target}")
                ours[target], sources[target] = value, name
        return ours

    def _parts(
        self, module: str, parameter: str, tensor: Tensor | Quantized
    ) -> Iterable[tuple[str, Tensor | Quantized]]:
        """The tensors of ours that one of theirs consists of, by name."""
        if (whole := _match(self._tensors_by_theirs, f"{module}.{parameter}")) is not None:
            return zip(whole.ours, whole.split(tensor), strict=True)
        rule = self.to_ours(module)
        # A quantized weight is always (out, in).
        transposed = rule.transposed and isinstance(tensor, Tensor) and tensor.ndim == 2
        parts = rule.split(tensor.t() if transposed else tensor)
        return [(f"{part}.{parameter}", value) for part, value in zip(rule.ours, parts, strict=True)]

    def write(self, tensors: Mapping[str, Tensor], *, apart: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Our tensors under their names and in our order, joined one at a time. `apart`: as `is_apart`
        finds them."""
        wholes = [(form, rule) for form, rule in self._tensors_by_ours if not (apart and rule.is_optional)]
        for name, tensor in tensors.items():
            if (whole := _match(wholes, name)) is not None:
                if name == whole.ours[0]:
                    yield whole.theirs, whole.join([tensors[one] for one in whole.ours])
                continue
            module, _, parameter = name.rpartition(".")
            rule = self.to_theirs(module)
            if rule.ours[0] != module:
                continue  # written together with the first part
            if len(rule.ours) > 1:
                tensor = rule.join([tensors[f"{part}.{parameter}"] for part in rule.ours])
            yield f"{rule.theirs}.{parameter}", tensor.t() if rule.transposed and tensor.ndim == 2 else tensor
            if module.endswith(".act_fn") and parameter == "alpha_p":
                for constant, value in CONSTANTS.items():
                    yield f"{rule.theirs}.{constant}", torch.tensor(value, dtype=tensor.dtype)


def layout(model_type: str, config: Architecture) -> Layout:
    """How a Hugging Face family names and fuses its tensors. `model_type` is a key of
    `families.FAMILIES`."""
    if isinstance(config, TransformersConfig):  # its names are transformers' own
        return Layout([], "")
    rules, prefix = LAYOUTS.get(model_type, (lambda config: [], "model."))
    return Layout(rules(config), prefix)


def unused(model_type: str, config: ModelConfig) -> dict[str, re.Pattern[str]]:
    """{what they are: the names of weights in released files that no model here has}."""
    ahead = "the weights that predict several tokens ahead"
    if model_type in ("glm4_moe", "deepseek_v3", "kimi_k2"):  # the layers after the last one
        return {ahead: re.compile(re.escape(LAYER.format(config.num_hidden_layers)) + ".*")}
    if model_type.startswith(("qwen3_next", "qwen3_5")):
        return {ahead: re.compile(r"mtp\..*")}
    layers = [str(layer) for layer in range(config.num_hidden_layers) if config.shares_keys(layer)]
    if layers:
        place = rf"model\.layers\.({'|'.join(layers)})\.self_attn\.[kv]_(proj|norm)\..*"
        return {"the keys and values of layers that share those of others": re.compile(place)}
    return {}


def _gpt_neox(config: ModelConfig) -> list[Rule]:
    theirs = "gpt_neox.layers.{}."
    return [
        Rule("gpt_neox.embed_in", ("model.embed_tokens",)),
        Rule("gpt_neox.final_layer_norm", ("model.norm",)),
        Rule("embed_out", ("lm_head",), also="lm_head"),
        Rule(theirs + "input_layernorm", (LAYER + "input_layernorm",)),
        Rule(theirs + "post_attention_layernorm", (LAYER + "post_attention_layernorm",)),
        Rule(
            theirs + "attention.query_key_value",
            QKV,
            groups=config.num_attention_heads,
            sizes=(config.head_dim,) * 3,
        ),
        Rule(theirs + "attention.dense", (LAYER + "self_attn.o_proj",)),
        Rule(theirs + "mlp.dense_h_to_4h", (LAYER + "mlp.up_proj",)),
        Rule(theirs + "mlp.dense_4h_to_h", (LAYER + "mlp.down_proj",)),
    ]


def _gpt2(config: ModelConfig) -> list[Rule]:
    theirs = "transformer.h.{}."
    return [
        Rule("transformer.wte", ("model.embed_tokens",)),
        Rule("transformer.wpe", ("model.embed_positions",)),
        Rule("transformer.ln_f", ("model.norm",)),
        Rule(theirs + "ln_1", (LAYER + "input_layernorm",)),
        Rule(theirs + "ln_2", (LAYER + "post_attention_layernorm",)),
        Rule(theirs + "attn.c_attn", QKV, sizes=(config.hidden_size,) * 3, transposed=True),
        Rule(theirs + "attn.c_proj", (LAYER + "self_attn.o_proj",), transposed=True),
        Rule(theirs + "mlp.c_fc", (LAYER + "mlp.up_proj",), transposed=True),
        Rule(theirs + "mlp.c_proj", (LAYER + "mlp.down_proj",), transposed=True),
    ]


def _falcon(config: ModelConfig) -> list[Rule]:
    theirs = "transformer.h.{}."
    groups, D = config.num_key_value_heads, config.head_dim
    two_parallel = config.parallel_residual and not config.shared_norm
    return [
        Rule("transformer.word_embeddings", ("model.embed_tokens",)),
        Rule("transformer.ln_f", ("model.norm",)),
        Rule(theirs + ("ln_attn" if two_parallel else "input_layernorm"), (LAYER + "input_layernorm",)),
        Rule(
            theirs + ("ln_mlp" if two_parallel else "post_attention_layernorm"),
            (LAYER + "post_attention_layernorm",),
        ),
        # each key/value head follows the query heads that it serves
        Rule(
            theirs + "self_attention.query_key_value",
            QKV,
            groups,
            (config.num_attention_heads // groups * D, D, D),
        ),
        Rule(theirs + "self_attention.dense", (LAYER + "self_attn.o_proj",)),
        Rule(theirs + "mlp.dense_h_to_4h", (LAYER + "mlp.up_proj",)),
        Rule(theirs + "mlp.dense_4h_to_h", (LAYER + "mlp.down_proj",)),
    ]


def _phi(config: ModelConfig) -> list[Rule]:
    return [
        Rule("model.final_layernorm", ("model.norm",)),
        Rule(LAYER + "self_attn.dense", (LAYER + "self_attn.o_proj",)),
        Rule(LAYER + "self_attn.q_layernorm", (LAYER + "self_attn.q_norm",)),
        Rule(LAYER + "self_attn.k_layernorm", (LAYER + "self_attn.k_norm",)),
        Rule(LAYER + "mlp.fc1", (LAYER + "mlp.up_proj",)),
        Rule(LAYER + "mlp.fc2", (LAYER + "mlp.down_proj",)),
    ]


def _phi3(config: ModelConfig) -> list[Rule]:
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    gate_up = (LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj")
    return [
        Rule(LAYER + "self_attn.qkv_proj", QKV, sizes=(q, kv, kv)),
        Rule(LAYER + "mlp.gate_up_proj", gate_up, sizes=(config.intermediate_size,) * 2),
    ]


def _glm(config: ModelConfig) -> list[Rule]:
    gate_up = (LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj")
    return [Rule(LAYER + "mlp.gate_up_proj", gate_up, sizes=(config.intermediate_size,) * 2)]


def _glm4(config: ModelConfig) -> list[Rule]:
    return [
        *_glm(config),
        Rule(LAYER + "post_self_attn_layernorm", (LAYER + "post_attention_layernorm",)),
        Rule(LAYER + "post_attention_layernorm", (LAYER + "pre_feedforward_layernorm",)),
        Rule(LAYER + "post_mlp_layernorm", (LAYER + "post_feedforward_layernorm",)),
    ]


def _starcoder2(config: ModelConfig) -> list[Rule]:
    return [
        Rule(LAYER + "mlp.c_fc", (LAYER + "mlp.up_proj",)),
        Rule(LAYER + "mlp.c_proj", (LAYER + "mlp.down_proj",)),
    ]


def _apertus(config: ModelConfig) -> list[Rule]:
    return [
        Rule(LAYER + "attention_layernorm", (LAYER + "input_layernorm",)),
        Rule(LAYER + "feedforward_layernorm", (LAYER + "post_attention_layernorm",)),
    ]


def _hunyuan(config: ModelConfig) -> list[Rule]:
    return [
        Rule(LAYER + "self_attn.query_layernorm", (LAYER + "self_attn.q_norm",)),
        Rule(LAYER + "self_attn.key_layernorm", (LAYER + "self_attn.k_norm",)),
    ]


def _stablelm(config: ModelConfig) -> list[Rule]:
    return [
        Rule(LAYER + "self_attn.q_layernorm.norms.{}", (LAYER + "self_attn.q_norm.norms.{}",)),
        Rule(LAYER + "self_attn.k_layernorm.norms.{}", (LAYER + "self_attn.k_norm.norms.{}",)),
    ]


def _mixtral(config: ModelConfig) -> list[Rule]:
    theirs = LAYER + "block_sparse_moe."
    return [
        Rule(theirs + "gate", (LAYER + "mlp.gate",)),
        Rule(theirs + "experts.{}.w1", (LAYER + "mlp.experts.{}.gate_proj",)),
        Rule(theirs + "experts.{}.w3", (LAYER + "mlp.experts.{}.up_proj",)),
        Rule(theirs + "experts.{}.w2", (LAYER + "mlp.experts.{}.down_proj",)),
    ]


def _ernie4_5_moe(config: ModelConfig) -> list[Row]:
    leaf = "e_score_correction_bias"
    return [Row(f"{LAYER}mlp.moe_statics.{leaf}", f"{LAYER}mlp.gate.{leaf}")]


def _gpt_oss(config: ModelConfig) -> list[Rule | FusedExperts]:
    def fused(theirs: str, leaf: str, *parts: str) -> FusedExperts:
        ours = tuple(f"{part}_proj.{leaf}" for part in parts)
        place, count = LAYER + "mlp.experts", config.num_experts
        return FusedExperts(f"{place}.{theirs}", place, ours, count, interleaved=True, transposed=True)

    return [
        Rule(LAYER + "mlp.router", (LAYER + "mlp.gate",)),
        fused("gate_up_proj", "weight", "gate", "up"),
        fused("gate_up_proj_bias", "bias", "gate", "up"),
        fused("down_proj", "weight", "down"),
        fused("down_proj_bias", "bias", "down"),
    ]


def _llama4(config: ModelConfig) -> list[Rule | FusedExperts]:
    theirs, ours, experts = f"{LAYER}feed_forward.", f"{LAYER}mlp.", f"{LAYER}mlp.experts"
    leaves = ("gate_proj", "up_proj", "down_proj")
    rules = [Rule(f"{theirs}{leaf}", (f"{ours}{leaf}",)) for leaf in leaves]
    rules += [Rule(f"{theirs}shared_expert.{leaf}", (f"{ours}shared_experts.{leaf}",)) for leaf in leaves]
    rules += [Rule(f"{theirs}router", (f"{ours}gate",)), Rule(f"{theirs}experts", (experts,))]
    if config.num_experts is None:
        return rules
    count = config.num_experts
    return rules + _fused(f"{theirs}experts", experts, count, transposed=True, is_marked=False)


def _qwen3_5_moe(config: ModelConfig) -> list[FusedExperts]:
    """Released files have them, and those that transformers writes do not."""
    place = LAYER + "mlp.experts"
    return _fused(place, place, config.num_experts, is_optional=True)


def _gemma4(config: ModelConfig) -> list[FusedExperts]:
    place = LAYER + "experts"
    return [] if config.num_experts is None else _fused(place, place, config.num_experts)


def _fused(theirs: str, ours: str, count: int, **settings: bool) -> list[FusedExperts]:
    """The two tensors of a layer's experts, by what these are called."""
    parts = {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)}
    return [
        FusedExperts(f"{theirs}.{name}", ours, several, count, **settings) for name, several in parts.items()
    ]


LAYOUTS = {
    "gpt_neox": (_gpt_neox, "gpt_neox."),
    "gpt2": (_gpt2, "transformer."),
    "falcon": (_falcon, "transformer."),
    "phi": (_phi, "model."),
    "phi3": (_phi3, "model."),
    "stablelm": (_stablelm, "model."),
    "glm": (_glm, "model."),
    "glm4": (_glm4, "model."),
    "starcoder2": (_starcoder2, "model."),
    "apertus": (_apertus, "model."),
    "hunyuan_v1_dense": (_hunyuan, "model."),
    "mixtral": (_mixtral, "model."),
    "gpt_oss": (_gpt_oss, "model."),
    "llama4_text": (_llama4, "model."),
    "qwen3_5_moe_text": (_qwen3_5_moe, "model."),
    "gemma4_text": (_gemma4, "model."),
    "ernie4_5_moe": (_ernie4_5_moe, "model."),
}


def _is_constant(name: str, tensor: Tensor | Quantized) -> bool:
    """Whether it is a constant of xIELU. Raises CheckpointError for another value."""
    module, _, parameter = name.rpartition(".")
    if not module.endswith(".mlp.act_fn") or parameter not in CONSTANTS:
        return False
    value = CONSTANTS[parameter]
    # 1%: files in bf16 round it
    if tuple(tensor.shape) not in ((), (1,)) or not abs(tensor.item() - value) <= 0.01 * abs(value):
        raise CheckpointError(f"{name} is not {value}; another value is not implemented")
    return True


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


def _find(patterns: list[tuple[re.Pattern[str], Rule]], module: str) -> Rule:
    found = _match(patterns, module)
    return Rule(module, (module,)) if found is None else found


def _match(patterns: list[tuple[re.Pattern[str], Any]], name: str) -> Any:
    """The first rule whose pattern a name matches, with numbers filled in; None if there is none."""
    for pattern, rule in patterns:
        if match := pattern.fullmatch(name):
            return rule.fill(match.groups())
    return None
