"""PEFT adapter folders, read: `adapter_config.json` beside `adapter_model.safetensors` or
`adapter_model.bin`. peft_export.py writes them.

PEFT names the layers of the Hugging Face model. Where that model fuses layers which are separate
here (query, key and value; gate and up), an adapter of the fused layer becomes one of each part: A
is shared, and the rows of B are divided. In the other direction the adapters of the parts are
joined: A is stacked, B is block-diagonal and the ranks add up, unless the parts share one A. An
update of the embedding, E + s · (B' A')^T in PEFT's file, is A = B'^T and B = A'^T here.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats import PEFT_CONFIG_FILE as CONFIG_FILE
from litlora.formats import peft_weights
from litlora.formats.layout import Rule
from litlora.formats.layout import layout as layout_of
from litlora.lora import Adapter, Update
from litlora.lora.update import scale_of
from litlora.settings import LEAST_ALPHA, LoRAConfig
from litlora.storage.tensors import at_least_16_bits, open_tensors
from litlora.storage.untrusted import check_pattern, read_json_object

PREFIX = "base_model.model."

_READ = set(
    """
    peft_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern
    base_model_name_or_path target_modules modules_to_save init_lora_weights ensure_weight_tying
    """.split()
)
_WITHOUT_EFFECT = set(
    """
    task_type auto_mapping peft_version revision inference_mode exclude_modules bias
    layers_to_transform layers_pattern megatron_config megatron_core loftq_config eva_config
    corda_config lora_ga_config qalora_group_size runtime_config velora_config fan_in_fan_out
    """.split()
)
"""Settings that decide what is trained or how, and leave no trace except the tensors."""
_FAMILIES = (
    (r"(^|\.)layers\.\d+\.(attention\.|mlp\.dense_)|^gpt_neox\.|^embed_(in|out)$", "gpt_neox"),
    (r"(^|\.)h\.\d+\.(attn|mlp)\.c_|^transformer\.(wte|wpe)$|(^|\.)h\.\d+\.ln_[12]", "gpt2"),
    (r"(^|\.)h\.\d+\.|^transformer\.", "falcon"),
    (r"self_attn\.qkv_proj|mlp\.gate_up_proj", "phi3"),
    (r"self_attn\.(dense|[qk]_layernorm)$|mlp\.fc[12]", "phi"),
    (r"block_sparse_moe", "mixtral"),
)
"""(pattern of a module's name, family) for families whose names differ from Llama's; the first
match counts."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialise that also change the base's weights."""


# ---- reading


def base_of(directory: Path) -> tuple[str, Path | None]:
    """What a PEFT folder calls its base, and the directory of that name if there is one."""
    name = read_config(directory).get("base_model_name_or_path") or ""
    places = [Path(name), directory / name] if name else []
    return name, next((place for place in places if place.is_dir()), None)


def read_adapter(directory: Path, model: ModelConfig, base: Mapping[str, Tensor]) -> Adapter:
    """The adapter in a PEFT folder, under our names; `model` and `base` describe its base.

    Raises CheckpointError for a setting or tensor that cannot be expressed here, and for a tensor
    that has no place in the base.
    """
    config = read_config(directory)
    refuse_variants(directory / CONFIG_FILE, config)
    file = peft_weights(directory)
    return adapter_of(file, open_tensors(file), config, model, base)


def adapter_of(
    file: Path,
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    model: ModelConfig,
    base: Mapping[str, Tensor],
) -> Adapter:
    """The adapter of these tensors, by PEFT's keys, that a file holds. See `read_adapter`."""
    pairs, whole = _sorted_out(file, tensors)
    found = _Found(file, config, _Names(model, base, [*pairs, *whole]))
    for module, pair in pairs.items():
        found.add_pair(module, pair)
    for name, tensor in whole.items():
        found.add_whole(name, tensor)
    return found.adapter()


@dataclass
class _Found:
    """What a folder holds, under our names, as it is found."""

    file: Path
    config: dict[str, Any]
    names: "_Names"
    updates: dict[str, Update] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def add_pair(self, module: str, pair: dict[str, Tensor]) -> None:
        """The factors of one module of theirs."""
        config = self.config
        rank = by_pattern(config["rank_pattern"], module, config["r"])
        alpha = float(by_pattern(config["alpha_pattern"], module, config["lora_alpha"]))
        A, B = _checked_pair(self.file, module, pair, rank)
        rule = self.names.rule_of(module)
        if not self.names.all_known(rule, "weight"):
            self.lost.append(module)
            return
        scale = scale_of(alpha, rank, rslora=config["use_rslora"])
        for ours, rows in zip(rule.ours, rule.split(B), strict=True):
            self.updates[ours], self.alphas[ours] = Update(A, rows, scale), alpha

    def add_whole(self, name: str, tensor: Tensor) -> None:
        """A tensor that replaces one of theirs."""
        module, _, leaf = name.rpartition(".")
        rule = self.names.rule_of(module)
        if not self.names.all_known(rule, leaf):
            self.lost.append(name)
            return
        parts = rule.split(tensor.t() if rule.transposed and tensor.ndim == 2 else tensor)
        self.whole |= {f"{ours}.{leaf}": part for ours, part in zip(rule.ours, parts, strict=True)}
        self.replaced += rule.ours

    def adapter(self) -> Adapter:
        """The whole. Raises CheckpointError for what cannot be used."""
        if self.lost:
            raise CheckpointError(
                f"{self.file}: the base has no place for {', '.join(self.lost)}; is it the base that this "
                "adapter was trained on?"
            )
        if not self.updates and not self.replaced:
            raise CheckpointError(f"{self.file}: the adapter is empty")
        ends = {"lm_head", "model.embed_tokens"}
        if self.config["ensure_weight_tying"] and ends & {*self.updates, *self.replaced}:
            path = self.file.parent / CONFIG_FILE
            raise CheckpointError(
                f"{path}: ensure_weight_tying is not supported for an embedding or output head"
            )
        return Adapter(self._settings(), self.updates, self.whole, file=self.file)

    def _settings(self) -> LoRAConfig:
        """The settings that give every layer its rank and alpha."""
        rank, alpha = self.config["r"], float(self.config["lora_alpha"])
        ranks = {name: update.rank for name, update in self.updates.items()}
        return LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=self.config["lora_dropout"],
            targets=list(ranks) or ["none"],
            rslora=self.config["use_rslora"],
            rank_pattern={name: value for name, value in ranks.items() if value != rank},
            alpha_pattern={name: value for name, value in self.alphas.items() if value != alpha},
            modules_to_save=list(dict.fromkeys(self.replaced)),
        )


def _sorted_out(
    file: Path, stored: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({module: {"A": ..., "B": ...}}, tensors saved whole) in a file, by PEFT's names without the
    prefix."""
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    untrained: list[str] = []
    for key, tensor in stored.items():
        name, tensor = key.removeprefix(PREFIX), at_least_16_bits(tensor)
        if found := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name):
            # An embedding's factors are stored transposed: its A is our B.
            part, value = ({"A": "B", "B": "A"}[found[3]], tensor.T) if found[2] else (found[3], tensor)
            pairs.setdefault(found[1], {})[part] = value
        elif ".lora_" in name or ".token_adapter." in name:
            raise CheckpointError(
                f"{file}: {key} is not supported: only LoRA's A and B and tensors saved whole are"
            )
        elif ".original_module." in name:
            untrained.append(name)
        else:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if name in whole and not (whole[name].dtype == tensor.dtype and torch.equal(whole[name], tensor)):
                raise CheckpointError(f"{file}: holds {name} twice, with different values")
            whole[name] = tensor
    # Beside a module that was trained whole, PEFT may store the original, which has no effect.
    if orphans := [name for name in untrained if name.replace(".original_module.", ".") not in whole]:
        raise CheckpointError(
            f"{file}: {orphans[0]} is a module before training, but the trained one is missing"
        )
    return pairs, whole


def _checked_pair(file: Path, module: str, pair: dict[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of one module. Raises CheckpointError if they are not the factors of an update."""
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{file}: {module} has lora_A or lora_B, but not both")
    A, B = pair["A"], pair["B"]
    fits = A.ndim == B.ndim == 2 and A.size(0) == B.size(1) == rank and A.numel() and B.numel()
    if not fits or not (A.is_floating_point() and B.is_floating_point()):
        raise CheckpointError(
            f"{file}: {module}: A {tuple(A.shape)} and B {tuple(B.shape)} do not form an update of rank "
            f"{rank}"
        )
    return A, B


class _Names:
    """PEFT's names of modules, which are those of the Hugging Face model, and the base's own."""

    def __init__(self, model: ModelConfig, base: Mapping[str, Tensor], modules: list[str]) -> None:
        self._layout = layout_of(_family(modules), model)
        # An adapter of the decoder without its head has names without the prefix.
        self._bare = not any(name.startswith(self._layout.prefix) for name in modules)
        # A tied head is stored once, under the embedding's name.
        self._known = {*base, "lm_head.weight"}

    def rule_of(self, module: str) -> Rule:
        """Which of our modules a module of theirs consists of."""
        is_bare = self._bare and module != "lm_head"
        return self._layout.to_ours(self._layout.prefix + module if is_bare else module)

    def all_known(self, rule: Rule, leaf: str) -> bool:
        """Whether the base has this tensor for each of the rule's modules."""
        return all(f"{ours}.{leaf}" in self._known for ours in rule.ours)


def _family(modules: list[str]) -> str:
    """The Hugging Face family whose layers have names like these."""
    return next(
        (family for pattern, family in _FAMILIES for name in modules if re.search(pattern, name)), "llama"
    )


_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "ensure_weight_tying": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "base_model_name_or_path": None,
    "init_lora_weights": True,
}
"""PEFT's, of the settings that decide what the tensors mean."""
_KINDS: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": bool,
    "ensure_weight_tying": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, with PEFT's defaults for missing settings. Raises CheckpointError for a
    value that is not usable."""
    path = directory / CONFIG_FILE
    return checked_config(path, read_json_object(path))


def checked_config(path: Path | str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a LoraConfig that stands at `path`, with PEFT's defaults. Raises
    CheckpointError for a value that is not usable."""
    config = _DEFAULTS | {
        name: value for name, value in values.items() if value is not None or name not in _DEFAULTS
    }
    for name, kind in _KINDS.items():
        if not isinstance(config[name], kind) or (isinstance(config[name], bool) and kind is not bool):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}")
    if (name := config["base_model_name_or_path"]) is not None and not isinstance(name, str):
        raise CheckpointError(f"{path}: base_model_name_or_path is {name!r}; it must be text")
    for name, allowed in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        for pattern, value in config[name].items():
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise CheckpointError(f"{path}: {name}: {error}") from None
            if not allowed(value):
                raise CheckpointError(f"{path}: {name}: {pattern!r} has the value {value!r}")
    if not 0 <= config["lora_dropout"] < 1:
        raise CheckpointError(
            f"{path}: lora_dropout is {config['lora_dropout']!r}; it must be at least 0 and below 1"
        )
    for name, allowed in (("r", _is_rank), ("lora_alpha", _is_alpha)):
        if not allowed(config[name]):
            raise CheckpointError(f"{path}: {name} is {config[name]}, which no adapter can have")
    return config


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and LEAST_ALPHA <= abs(value) <= 1 / LEAST_ALPHA


def refuse_variants(path: Path | str, config: dict[str, Any]) -> None:
    """Raise CheckpointError for anything but plain LoRA and rsLoRA; `path` is the config's."""
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: peft_type {kind} is not supported; LORA is")
    if str(how := config["init_lora_weights"]).lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights {how} changed the base's weights as well; save the adapter again "
            "in PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    if odd := sorted(name for name, value in config.items() if value and name not in _READ | _WITHOUT_EFFECT):
        raise CheckpointError(
            f"{path}: {odd[0]} ({config[odd[0]]!r}) is not supported: only plain LoRA and rsLoRA are"
        )


def by_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """The value for a module by PEFT's rule: a key is a regular expression for the end of the
    module's name, and the first match counts."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def stated(updates: Mapping[str, Update]) -> dict[str, Any]:
    """The settings that give every module, by its name in the model, the rank and the scale of its
    update."""
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: update.scale * update.rank for name, update in updates.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))

    def pattern(name: str) -> str:
        """PEFT matches a name with the end of any other, too."""
        return f"^{re.escape(name)}" if any(other.endswith(f".{name}") for other in ranks) else name

    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern(name): value for name, value in alphas.items() if value != alpha},
    }
