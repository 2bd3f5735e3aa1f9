"""PEFT adapter folders, read and written: `adapter_config.json` beside `adapter_model.safetensors`
or `adapter_model.bin`.

PEFT names the layers of the Hugging Face model. Where that model fuses layers which are apart here
(query, key and value; gate and up), an adapter of the fused layer becomes one on each part: A is
shared, the rows of B are divided. The other way round the parts' adapters are joined: A stacked, B
in blocks, the rank their sum, unless they share one A. An update of the embedding, E + s · (B'
A')^T in PEFT's file, is A = B'^T and B = A'^T here.
"""

import re
from collections.abc import Mapping
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
from litlora.storage.untrusted import check_pattern, read_json

PREFIX = "base_model.model."

_READ = {
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "base_model_name_or_path",
    ),
    *("target_modules", "modules_to_save", "init_lora_weights", "ensure_weight_tying"),
}
_WITHOUT_EFFECT = {
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "exclude_modules",
        "bias",
        "layers_to_transform",
    ),
    *(
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),
    *("qalora_group_size", "runtime_config", "velora_config", "fan_in_fan_out"),
}
"""Settings that decide what is trained or how, and leave no trace beyond the tensors."""
_FAMILIES = (
    (r"(^|\.)layers\.\d+\.(attention\.|mlp\.dense_)|^gpt_neox\.|^embed_(in|out)$", "gpt_neox"),
    (r"(^|\.)h\.\d+\.(attn|mlp)\.c_|^transformer\.(wte|wpe)$|(^|\.)h\.\d+\.ln_[12]", "gpt2"),
    (r"(^|\.)h\.\d+\.|^transformer\.", "falcon"),
    (r"self_attn\.qkv_proj|mlp\.gate_up_proj", "phi3"),
    (r"self_attn\.(dense|[qk]_layernorm)$|mlp\.fc[12]", "phi"),
    (r"block_sparse_moe", "mixtral"),
)
"""What tells a family that names its layers otherwise than Llama, the first that matches."""
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

    Raises CheckpointError for whatever cannot be expressed here, by name, and for every tensor that
    has no place.
    """
    config = read_config(directory)
    refuse_variants(directory / CONFIG_FILE, config)
    file = peft_weights(directory)
    pairs, whole = _sorted_out(file, open_tensors(file))
    names = _Names(model, base, [*pairs, *whole])
    updates: dict[str, Update] = {}
    ranks, alphas, lost = {}, {}, []
    for module, pair in pairs.items():
        rank, alpha = (
            _rank(config, module),
            float(by_pattern(config["alpha_pattern"], module, config["lora_alpha"])),
        )
        A, B = _checked_pair(file, module, pair, rank)
        rule = names.rule_of(module)
        if not names.all_known(rule, "weight"):
            lost.append(module)
            continue
        for ours, rows in zip(rule.ours, rule.split(B), strict=True):
            updates[ours] = Update(A, rows, scale_of(alpha, rank, rslora=config["use_rslora"]))
            ranks[ours], alphas[ours] = rank, alpha
    tensors: dict[str, Tensor] = {}
    replaced: list[str] = []
    for name, tensor in whole.items():
        module, _, leaf = name.rpartition(".")
        rule = names.rule_of(module)
        if not names.all_known(rule, leaf):
            lost.append(name)
            continue
        parts = rule.split(tensor.t() if rule.transposed and tensor.ndim == 2 else tensor)
        tensors |= {f"{ours}.{leaf}": part for ours, part in zip(rule.ours, parts, strict=True)}
        replaced += rule.ours
    if lost:
        raise CheckpointError(
            f"{file}: the base has no place for {', '.join(lost)}; is it the base that this adapter was "
            "trained on?"
        )
    if not updates and not replaced:
        raise CheckpointError(f"{file}: the adapter is empty")
    if config["ensure_weight_tying"] and {"lm_head", "model.embed_tokens"} & {*ranks, *replaced}:
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: ensure_weight_tying is not supported for an embedding or output head"
        )
    return Adapter(_settings(config, ranks, alphas, replaced), updates, tensors, file=file)


def _settings(
    config: dict[str, Any], ranks: dict[str, int], alphas: dict[str, float], replaced: list[str]
) -> LoRAConfig:
    """The settings by which every layer has its rank and alpha."""
    rank, alpha = config["r"], float(config["lora_alpha"])
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=config["lora_dropout"],
        targets=list(ranks) or ["none"],
        rslora=config["use_rslora"],
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        modules_to_save=list(dict.fromkeys(replaced)),
    )


def _sorted_out(
    file: Path, stored: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({module: {"A": ..., "B": ...}}, tensors saved whole) of a file, by PEFT's names without its
    prefix."""
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    untrained: list[str] = []
    for key, tensor in stored.items():
        name, tensor = key.removeprefix(PREFIX), at_least_16_bits(tensor)
        if found := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name):
            # An embedding's factors come transposed, so that its A is our B.
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
    # Beside a module that was trained whole PEFT may store what it was before, which has no effect.
    if odd := [name for name in untrained if name.replace(".original_module.", ".") not in whole]:
        raise CheckpointError(
            f"{file}: {odd[0]} is what a module was before training, but the trained one is missing"
        )
    return pairs, whole


def _rank(config: dict[str, Any], module: str) -> int:
    return by_pattern(config["rank_pattern"], module, config["r"])


def _checked_pair(file: Path, module: str, pair: dict[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of one module. Raises CheckpointError if they are not the factors of a matrix."""
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{file}: {module} has lora_A or lora_B, but not both")
    A, B = pair["A"], pair["B"]
    fits = A.ndim == B.ndim == 2 and A.size(0) == B.size(1) == rank and A.numel() and B.numel()
    if not fits or not (A.is_floating_point() and B.is_floating_point()):
        raise CheckpointError(
            f"{file}: {module}: A {tuple(A.shape)} and B {tuple(B.shape)} make no update of rank {rank}"
        )
    return A, B


class _Names:
    """PEFT's names of modules, those of the Hugging Face model, beside the base's own."""

    def __init__(self, model: ModelConfig, base: Mapping[str, Tensor], modules: list[str]) -> None:
        self._layout = layout_of(_family(modules), model)
        # made for the decoder without its head
        self._bare = not any(name.startswith(self._layout.prefix) for name in modules)
        # a tied head is stored once, under the embedding's name
        self._known = {*base, "lm_head.weight"}

    def rule_of(self, module: str) -> Rule:
        """Which of our modules it is made of."""
        is_bare = self._bare and module != "lm_head"
        return self._layout.to_ours(self._layout.prefix + module if is_bare else module)

    def all_known(self, rule: Rule, leaf: str) -> bool:
        """Whether the base has this tensor of each of the modules."""
        return all(f"{ours}.{leaf}" in self._known for ours in rule.ours)


def _family(modules: list[str]) -> str:
    """The Hugging Face architecture that has modules of these names, as far as the names of its
    layers go."""
    return next(
        (family for pattern, family in _FAMILIES for name in modules if re.search(pattern, name)), "llama"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json with PEFT's defaults for what it leaves out."""
    path = directory / CONFIG_FILE
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold an object")
    defaults: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "ensure_weight_tying": False,
    }
    defaults |= {
        "rank_pattern": {},
        "alpha_pattern": {},
        "base_model_name_or_path": None,
        "init_lora_weights": True,
    }
    config = defaults | {
        name: value for name, value in values.items() if value is not None or name not in defaults
    }
    kinds = {
        "r": int,
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "use_rslora": bool,
        "ensure_weight_tying": bool,
    }
    for name, kind in (kinds | {"rank_pattern": dict, "alpha_pattern": dict}).items():
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
    if not (_is_rank(config["r"]) and _is_alpha(config["lora_alpha"])):
        raise CheckpointError(
            f"{path}: r {config['r']} and lora_alpha {config['lora_alpha']} make no adapter"
        )
    return config


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and LEAST_ALPHA <= abs(value) <= 1 / LEAST_ALPHA


def refuse_variants(path: Path, config: dict[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: peft_type {kind} is not supported; LORA is")
    if str(how := config["init_lora_weights"]).lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights {how} changed the base's weights as well; save the adapter again in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    if odd := sorted(name for name, value in config.items() if value and name not in _READ | _WITHOUT_EFFECT):
        raise CheckpointError(
            f"{path}: {odd[0]} ({config[odd[0]]!r}) is not supported: only plain LoRA and rsLoRA are"
        )


def by_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of a module's name; the first that
    matches counts."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
