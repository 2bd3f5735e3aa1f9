"""PEFT adapter folders, read and written: `adapter_config.json` beside `adapter_model.safetensors`
or `adapter_model.bin`.

PEFT names the layers of the Hugging Face model. Where that model fuses layers which are apart here
(query, key and value; gate and up), an adapter of the fused layer becomes one on each part: A is
shared, the rows of B are divided. The other way round the parts' adapters are joined: A stacked, B
in blocks, the rank their sum, unless they share one A. An update of the embedding, E + s · (B'
A')^T in PEFT's file, is A = B'^T and B = A'^T here.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.layout import Layout, Rule
from litlora.formats.layout import layout as layout_of
from litlora.frozen.bitsandbytes import Quantized
from litlora.lora.select import layer_scale
from litlora.settings import LEAST_ALPHA, LoRAConfig
from litlora.storage.tensors import at_least_16_bits, open_tensors
from litlora.storage.untrusted import check_pattern, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
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


def adapter_file(directory: Path) -> Path | None:
    """The file of the weights in a PEFT adapter's folder; None if it is no such folder."""
    if not (directory / CONFIG_FILE).is_file():
        return None
    file = next((directory / name for name in WEIGHTS_FILES if (directory / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{directory}: has {CONFIG_FILE}, but neither {WEIGHTS_FILES[0]} nor {WEIGHTS_FILES[1]}"
        )
    return file


# ---- reading


def base_of(directory: Path) -> tuple[str, Path | None]:
    """What a PEFT folder calls its base, and the directory of that name if there is one."""
    name = read_config(directory).get("base_model_name_or_path") or ""
    places = [Path(name), directory / name] if name else []
    return name, next((place for place in places if place.is_dir()), None)


def read_adapter(
    directory: Path, model: ModelConfig, base: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], LoRAConfig]:
    """The tensors of a PEFT folder under our names, and their settings; `model` and `base` describe
    its base.

    Raises CheckpointError for whatever cannot be expressed here, by name, and for every tensor that
    has no place.
    """
    config = read_config(directory)
    refuse_variants(directory / CONFIG_FILE, config)
    file = adapter_file(directory)
    stored = open_tensors(file)
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
                raise CheckpointError(f"{file}: holds {name} twice, and not the same")
            whole[name] = tensor
    # Beside a module that was trained whole PEFT may store what it was before, which has no effect.
    if odd := [name for name in untrained if name.replace(".original_module.", ".") not in whole]:
        raise CheckpointError(
            f"{file}: {odd[0]} is what a module was before training, but the trained one is not there"
        )

    layout = layout_of(_family([*pairs, *whole]), model)
    bare = not any(
        name.startswith(layout.prefix) for name in (*pairs, *whole)
    )  # made for the decoder without its head
    known = {*base, "lm_head.weight"}  # a tied head is stored once, under the embedding's name

    def rule_of(module: str) -> Rule:
        return layout.to_ours(layout.prefix + module if bare and module != "lm_head" else module)

    tensors: dict[str, Tensor] = {}
    lora = LoRAConfig(rank=config["r"], alpha=float(config["lora_alpha"]), rslora=config["use_rslora"])
    ranks, alphas, lost = {}, {}, []
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{file}: {module} has lora_A or lora_B, but not both")
        A, B = pair["A"], pair["B"]
        rank = by_pattern(config["rank_pattern"], module, lora.rank)
        fits = A.ndim == B.ndim == 2 and A.size(0) == B.size(1) == rank and A.numel() and B.numel()
        if not fits or not (A.is_floating_point() and B.is_floating_point()):
            raise CheckpointError(
                f"{file}: {module}: A {tuple(A.shape)} and B {tuple(B.shape)} make no update of rank {rank}"
            )
        rule = rule_of(module)
        if not all(f"{ours}.weight" in known for ours in rule.ours):
            lost.append(module)
            continue
        for ours, rows in zip(rule.ours, rule.split(B), strict=True):
            tensors[f"{ours}.lora_A"], tensors[f"{ours}.lora_B"] = A, rows
            ranks[ours], alphas[ours] = rank, float(by_pattern(config["alpha_pattern"], module, lora.alpha))
    replaced = []
    for name, tensor in whole.items():
        module, _, leaf = name.rpartition(".")
        rule = rule_of(module)
        if not all(f"{ours}.{leaf}" in known for ours in rule.ours):
            lost.append(name)
            continue
        parts = rule.split(tensor.t() if rule.transposed and tensor.ndim == 2 else tensor)
        tensors |= {f"{ours}.{leaf}": part for ours, part in zip(rule.ours, parts, strict=True)}
        replaced += rule.ours
    if lost:
        raise CheckpointError(
            f"{file}: the base has no place for {', '.join(lost)}; is it the base that this adapter was trained on?"
        )
    if not ranks and not replaced:
        raise CheckpointError(f"{file}: the adapter is empty")
    if config["ensure_weight_tying"] and {"lm_head", "model.embed_tokens"} & {*ranks, *replaced}:
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: ensure_weight_tying is not supported for an embedding or output head"
        )
    return tensors, LoRAConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=config["lora_dropout"],
        targets=list(ranks) or ["none"],
        rslora=lora.rslora,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != lora.rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != lora.alpha},
        modules_to_save=list(dict.fromkeys(replaced)),
    )


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


# ---- writing


def to_peft(
    tensors: dict[str, Tensor],
    lora: LoRAConfig,
    model_type: str,
    model: ModelConfig,
    base: Mapping[str, Tensor],
    base_name: str,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a PEFT folder for this adapter holds: the tensors by PEFT's keys, and
    adapter_config.json.

    `model_type` is the Hugging Face family that the folder is for. `model` and `base` describe the
    base, whose tensors stand in for what PEFT wants whole; `base_name` is what the folder will call
    it. Raises CheckpointError for a tensor that the Hugging Face model has no place for.
    """
    adapted = {name.rpartition(".")[0] for name in tensors if name.endswith(".lora_A")}
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith((".lora_A", ".lora_B"))}
    written: dict[str, Tensor] = {}
    ranks, alphas, saved, embeddings, biases = {}, {}, [], [], False
    left = adapted | whole.keys()
    groups = _groups(layout_of(model_type, model), base)
    for theirs, (rule, _) in groups.items():
        module, _, leaf = theirs.rpartition(".")
        members = rule.ours if leaf == "weight" else ()
        if any(name in adapted for name in members):
            rank, scale, A, B = _join(rule, tensors, lora, base)
            ranks[module], alphas[module] = rank, _plain(scale * (math.sqrt(rank) if lora.rslora else rank))
            if members[0].rpartition(".")[2].startswith("embed_"):
                embeddings.append(module)
                written |= {
                    f"{PREFIX}{module}.lora_embedding_A": B.T,
                    f"{PREFIX}{module}.lora_embedding_B": A.T,
                }
            else:
                written |= {f"{PREFIX}{module}.lora_A.weight": A, f"{PREFIX}{module}.lora_B.weight": B}
            left -= set(members)
    for theirs, (rule, ours) in groups.items():
        if any(name in whole for name in ours):
            module, _, leaf = theirs.rpartition(".")
            if module in ranks:
                written[f"{PREFIX}{module}.base_layer.{leaf}"] = _whole(rule, ours, whole, base)
                biases |= leaf == "bias"
            elif module not in saved:  # of any other module PEFT wants every tensor
                saved.append(module)
                for name, (_, parts) in groups.items():
                    if name.rpartition(".")[0] == module:
                        written[PREFIX + name] = _whole(rule, parts, whole, base)
            left -= set(ours)
    if left:
        raise CheckpointError(
            f"{', '.join(sorted(left))}: the Hugging Face model of this architecture has no place for it"
        )

    rank, alpha = (
        Counter(values.values()).most_common(1)[0][0] if values else 1 for values in (ranks, alphas)
    )
    if model.num_experts is not None:
        _check_experts(
            adapted,
            base,
            uniform=not lora.rslora and {*ranks.values()} == {rank} and {*alphas.values()} == {alpha},
        )
    return {name: tensor.contiguous() for name, tensor in written.items()}, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": _targets(
            list(ranks), [name.rpartition(".")[0] for name in groups if name.endswith(".weight")]
        ),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "modules_to_save": saved or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(groups[f"{name}.weight"][0].transposed for name in ranks),
        "init_lora_weights": True,
    }


def write_peft(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write the two files of a PEFT folder."""
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        directory / WEIGHTS_FILES[0],
        metadata={"format": "pt"},
    )
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_experts(adapted: set[str], base: Mapping[str, Tensor], *, uniform: bool) -> None:
    """Refuse what PEFT misreads: it joins the experts' adapters by the last part of their names,
    all of them or none."""
    mlps = {name for name in adapted if ".mlp." in name}
    experts = {name.removesuffix(".weight") for name in base if ".mlp.experts." in name}
    if beside := sorted(mlps - experts):
        raise CheckpointError(
            f"{beside[0]}: PEFT would take its adapter for one of an expert's; adapt attention or experts only"
        )
    if mlps and mlps != experts:
        raise CheckpointError(
            f"{sorted(experts - mlps)[0]}: has no adapter, but other experts have; PEFT needs one for all or none"
        )
    if mlps and not uniform:
        raise CheckpointError(
            f"{sorted(mlps)[0]}: PEFT reads an expert's adapter wrongly unless all ranks and alphas are the same, without rsLoRA"
        )


def _groups(layout: Layout, base: Mapping[str, Tensor]) -> dict[str, tuple[Rule, list[str]]]:
    """Every tensor of the Hugging Face model: the rule of its module, and those of ours that it is
    made of."""
    groups = {}
    for name in (
        *base,
        "lm_head.weight",
    ):  # of a tied head, which is not stored, PEFT speaks like of any other
        module, _, leaf = name.rpartition(".")
        rule = layout.to_theirs(module)
        groups[f"{rule.theirs}.{leaf}"] = rule, [f"{part}.{leaf}" for part in rule.ours]
    return groups


def _join(
    rule: Rule, tensors: dict[str, Tensor], lora: LoRAConfig, base: Mapping[str, Tensor]
) -> tuple[int, float, Tensor, Tensor]:
    """(rank, scale, A, B) of one update that does what those of the members do, each on its own
    rows.

    Members that share one A share its rows; every other has rows of A and columns of B to itself.
    """
    there = [name for name in rule.ours if f"{name}.lora_A" in tensors]
    scale = layer_scale(lora, there[0])
    blocks: list[Tensor] = []
    columns: dict[str, int] = {}
    for name in there:
        A = tensors[f"{name}.lora_A"]
        known = next((index for index, block in enumerate(blocks) if torch.equal(block, A)), None)
        columns[name] = len(blocks) if known is None else known
        blocks += [A] if known is None else []
    starts = [sum(block.size(0) for block in blocks[:index]) for index in range(len(blocks) + 1)]
    rows = []
    for member in rule.ours:
        out = tensors[f"{member}.lora_B"].size(0) if member in columns else base[f"{member}.weight"].size(0)
        rows.append(torch.zeros(out, starts[-1], dtype=tensors[f"{there[0]}.lora_B"].dtype))
        if member in columns:
            factor = (
                layer_scale(lora, member) / scale
            )  # one update has one scale: the others' goes into their B
            B = tensors[f"{member}.lora_B"]
            start = starts[columns[member]]
            rows[-1][:, start : start + B.size(1)] = B if factor == 1 else B * factor
    return starts[-1], scale, torch.cat(blocks), rule.join(rows)


def _whole(rule: Rule, ours: list[str], whole: dict[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    kept = {name: base[name] for name in ours if name not in whole}
    found = whole | {
        name: tensor.tensor() if isinstance(tensor, Quantized) else tensor for name, tensor in kept.items()
    }
    joined = rule.join([found[name] for name in ours])
    return joined.t() if rule.transposed and joined.ndim == 2 else joined


def _targets(adapted: list[str], modules: list[str]) -> list[str]:
    """target_modules: the last part of a name where it means adapted layers only, else the whole
    name."""
    leaves = {name.rpartition(".")[2] for name in modules if name not in adapted}
    return sorted({name if (leaf := name.rpartition(".")[2]) in leaves else leaf for name in adapted})


def _plain(value: float) -> float | int:
    """16.0 as 16, and 16.000000000000004, which comes of dividing and multiplying, too."""
    return int(round(value)) if abs(value - round(value)) < 1e-9 * abs(value) else value
