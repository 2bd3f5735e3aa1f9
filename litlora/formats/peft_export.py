"""PEFT adapter folders, written: `adapter_config.json` and `adapter_model.safetensors`; see
peft.py.

Since transformers 5 the experts of a layer are two 3-D parameters, `gate_up_proj` and `down_proj`.
PEFT adapts each as a whole, and wraps the one in the other:

    A (E · r, in)    the A of each expert, one after another
    B (out, r · E)   column e + E · i is column i of the B of expert e

In a model whose MLPs hold experts PEFT takes every layer that is called gate_proj, up_proj or down_proj
for an expert's, as it had them before. Such layers beside the experts are therefore written as
parameters, too: their `weight`. Not in a model whose experts are beside the MLP (Gemma 4), nor in
Llama 4, which never had single experts.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILES
from litlora.formats.layout import Layout, Rule
from litlora.formats.layout import layout as layout_of
from litlora.formats.parts import Parts
from litlora.formats.peft_config import EXPERTS
from litlora.formats.peft_keys import PREFIX
from litlora.frozen.few_bits import Quantized
from litlora.lora import Adapter
from litlora.lora.rows import TokenRows
from litlora.lora.variants import MAGNITUDE, variant_named
from litlora.model import shorten
from litlora.storage.tensors import save_safetensors
from litlora.transformers_config import Architecture

NO_TARGETS = "dummy-target-modules"
"""What PEFT calls an adapter that only replaces modules: it refuses an empty list."""
_LAYER = re.compile(r"model\.layers\.\d+\.")
_IN_EXPERTS = ".experts."
_LEAVES = ("gate", "gate_proj", "up_proj", "down_proj")


def to_peft(
    adapter: Adapter,
    model_type: str,
    model: Architecture,
    base: Mapping[str, Tensor],
    base_name: str,
    parts: Parts | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by PEFT's keys, adapter_config.json) of a PEFT folder for this adapter.

    `model_type` is the Hugging Face family that the folder is for. `model` and `base` describe the
    base, whose tensors complete the modules that PEFT stores whole; `base_name` is what the folder
    will call it. With `parts`, the base is the language model of a multimodal model, by whose names
    the folder calls its layers. Raises CheckpointError for a tensor that has no place in the Hugging
    Face model, and for a variant of LoRA that we do not write as PEFT.
    """
    if not (variant_named(adapter.config.variant).is_plain or _is_dora(adapter)):
        raise CheckpointError(
            f"a PEFT folder cannot hold the variant {adapter.config.variant}; merge the adapter and "
            "export the merged model"
        )
    beside = [] if parts is None else [name.rpartition(".")[0] for name in parts.tensors]
    layout = layout_of(model_type, model)
    named = str if parts is None else parts.outer.spellings[0].outer
    found = _Found(layout, _groups(layout, base, named), beside, named)
    made = {*adapter.rows.tensors} if adapter.rows else set()
    as_parameters = set()
    is_new = bool(layout.fused) or parts is not None  # and never had the layers of single experts
    if model.num_experts is not None and (is_new or not _are_joined_rightly(adapter, base)):
        in_mlp = not (model.enable_moe_block or model.scale_expert_inputs)
        as_parameters = {name for name in adapter.updates if _is_taken_for_expert(name, in_mlp)}
    if as_parameters:
        found.add_parameters(as_parameters, adapter, base, model.num_experts)
    left = {*adapter.updates, *adapter.whole} - made - as_parameters
    for theirs, (rule, _) in found.groups.items():
        module, _, leaf = theirs.rpartition(".")
        if leaf == "weight" and any(name in adapter.updates and name in left for name in rule.ours):
            found.add_update(module, rule, adapter, base)
            left -= set(rule.ours)
    for theirs, (_, ours) in found.groups.items():
        if made & {*ours}:
            found.add_rows(theirs, adapter.rows)
        elif any(name in adapter.whole for name in ours):
            found.add_whole(theirs, adapter, base)
            left -= set(ours)
    if left:
        raise CheckpointError(
            f"{shorten(sorted(left))}: no place in the Hugging Face model of this architecture"
        )
    config = found.config(adapter, base_name)
    return {name: tensor.contiguous() for name, tensor in found.tensors.items()}, config


@dataclass
class _Found:
    """What goes into the folder, as it is collected."""

    layout: Layout
    groups: dict[str, tuple[Rule, list[str]]]
    beside: list[str]
    """The modules of the other parts of a multimodal model."""
    named: Callable[[str], str]
    """What a layer of the language model is called in the whole model."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    has_biases: bool = False

    def add_update(self, module: str, rule: Rule, adapter: Adapter, base: Mapping[str, Tensor]) -> None:
        """The update of one module of theirs."""
        rank, scale, A, B = join(rule, adapter, base)
        self._set_strength(module, rank, scale, adapter)
        key, is_embedding = PREFIX + module, rule.ours[0].rpartition(".")[2].startswith("embed_")
        if is_embedding and _is_dora(adapter):
            raise CheckpointError(
                f"{rule.ours[0]}: its DoRA has a magnitude for each token, and PEFT's one for each column; "
                "merge the adapter and export the merged model"
            )
        if _is_dora(adapter):
            self.tensors[f"{key}.{MAGNITUDE}"] = magnitude(rule, adapter, base)
        if is_embedding:
            self.tensors |= {f"{key}.lora_embedding_A": B.T, f"{key}.lora_embedding_B": A.T}
        else:
            self.tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}

    def add_parameters(
        self, names: set[str], adapter: Adapter, base: Mapping[str, Tensor], num_experts: int
    ) -> None:
        """The updates of these layers of ours, as parameters of theirs."""
        if not variant_named(adapter.config.variant).is_plain:
            raise CheckpointError(
                f"{min(names)}: PEFT adapts the layers of a model with experts without DoRA; merge the "
                "adapter and export the merged model"
            )
        for name in sorted(name for name in names if _IN_EXPERTS not in name):
            rank, scale, A, B = join(Rule(name, (name,)), adapter, base)
            theirs = self.named(name)
            self._add_parameter(f"{theirs}.weight", f"{PREFIX}{theirs}", (rank, scale, A, B), adapter)
        for place in sorted({name.partition(_IN_EXPERTS)[0] for name in names if _IN_EXPERTS in name}):
            experts = [f"{place}{_IN_EXPERTS}{expert}" for expert in range(num_experts)]
            theirs = self.named(self.layout.to_theirs(f"{place}.experts").theirs)
            key = PREFIX + theirs
            for parameter, leaves in reversed(EXPERTS.items()):  # down_proj is the outer one
                size = base[f"{experts[0]}.{leaves[0]}.weight"].size(0)
                rules = [self.layout.rule_of_expert(expert, leaves, size) for expert in experts]
                if any(name in adapter.updates for rule in rules for name in rule.ours):
                    joined = _join_experts(rules, adapter, base, swapped=self.layout.swaps_factors)
                    self._add_parameter(f"{theirs}.{parameter}", key, joined, adapter)
                    key += ".base_layer"

    def _add_parameter(
        self, name: str, key: str, joined: tuple[int, float, Tensor, Tensor], adapter: Adapter
    ) -> None:
        rank, scale, A, B = joined
        self._set_strength(name, rank, scale, adapter)
        self.parameters.append(name)
        self.tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}

    def _set_strength(self, name: str, rank: int, scale: float, adapter: Adapter) -> None:
        self.ranks[name] = rank
        self.alphas[name] = _plain(scale * (math.sqrt(rank) if adapter.config.rslora else rank))

    def add_whole(self, theirs: str, adapter: Adapter, base: Mapping[str, Tensor]) -> None:
        """A tensor that is saved whole, with the rest of its module, as PEFT requires."""
        module, _, leaf = theirs.rpartition(".")
        rule, ours = self.groups[theirs]
        if _IN_EXPERTS in ours[0]:
            raise CheckpointError(
                f"{ours[0]}: PEFT cannot save one expert's layer whole; merge the adapter and export the "
                "merged model"
            )
        if module in self.ranks:
            self.tensors[f"{PREFIX}{module}.base_layer.{leaf}"] = _whole(rule, ours, adapter.whole, base)
            self.has_biases |= leaf == "bias"
        elif module not in self.saved:
            self.saved.append(module)
            for name, (_, parts) in self.groups.items():
                if name.rpartition(".")[0] == module:
                    self.tensors[PREFIX + name] = _whole(rule, parts, adapter.whole, base)

    def add_rows(self, theirs: str, rows: TokenRows) -> None:
        """The rows of added tokens in one weight, which the base must have a place for."""
        module, (_, [ours]) = theirs.rpartition(".")[0], self.groups[theirs]
        self.tensors[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = rows.tensors[ours]
        self.tokens[module.rpartition(".")[2]] = list(rows.ids)

    def config(self, adapter: Adapter, base_name: str) -> dict[str, Any]:
        """adapter_config.json."""
        rank, alpha = (
            Counter(values.values()).most_common(1)[0][0] if values else 1
            for values in (self.ranks, self.alphas)
        )
        modules = [name.rpartition(".")[0] for name in self.groups if name.endswith(".weight")]
        if self.layout.fused:  # a layer of one expert is no module there
            modules = [name for name in modules if _IN_EXPERTS not in name]
        # Gemma 4 has its linear layers of images in modules that are called q_proj and so on.
        modules += [*self.beside, *(name.rpartition(".")[0] for name in self.beside)]
        adapted = [name for name in self.ranks if name not in self.parameters]
        layers = [part for rule, _ in self.groups.values() for part in rule.ours]
        # Other parts of a model may have layers with the same last names.
        parameters = self.parameters if self.beside else _shortened(self.parameters, layers, self.layout)
        parameters = sorted(parameters)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0
            if self.parameters
            else adapter.config.dropout,  # PEFT refuses the two together
            "use_rslora": adapter.config.rslora,
            "use_dora": _is_dora(adapter),
            "target_modules": _targets(adapted, modules) if self.ranks else NO_TARGETS,
            **({"target_parameters": parameters} if parameters else {}),
            "rank_pattern": {name: value for name, value in self.ranks.items() if value != rank},
            "alpha_pattern": {name: value for name, value in self.alphas.items() if value != alpha},
            "modules_to_save": self.saved or None,
            **({"trainable_token_indices": self.tokens} if self.tokens else {}),
            "bias": "lora_only" if self.has_biases else "none",
            "fan_in_fan_out": any(self.groups[f"{name}.weight"][0].transposed for name in adapted),
            "init_lora_weights": True,
        }


def _is_dora(adapter: Adapter) -> bool:
    return adapter.config.variant == "dora"


def magnitude(rule: Rule, adapter: Adapter, base: Mapping[str, Tensor]) -> Tensor:
    """The magnitudes of one module of theirs. A part without an update has the lengths of its rows."""
    parts = []
    for member in rule.ours:
        update = adapter.updates.get(member)
        if update is None:
            weight = base[f"{member}.weight"]
            weight = weight.tensor() if isinstance(weight, Quantized) else weight
            parts.append(torch.linalg.vector_norm(weight.float(), dim=1))
        else:
            parts.append(update.extra[MAGNITUDE])
    return rule.join([part.to(parts[0].dtype) for part in parts])


def write_peft(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write the two files of a PEFT folder."""
    save_safetensors(
        directory / PEFT_WEIGHTS_FILES[0],
        {name: tensor.clone() for name, tensor in tensors.items()},
        {"format": "pt"},
    )
    (directory / PEFT_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_taken_for_expert(name: str, in_mlp: bool) -> bool:
    """Whether PEFT takes a layer for one of an expert, or for the router; `in_mlp`: of a model whose
    MLPs hold experts."""
    return _IN_EXPERTS in name or (in_mlp and ".mlp." in name and name.rpartition(".")[2] in _LEAVES)


def _are_joined_rightly(adapter: Adapter, base: Mapping[str, Tensor]) -> bool:
    """Whether PEFT reads the adapters of single experts rightly, as they were before transformers 5:
    it joins them by the last part of their names, all of them or none, as if all were alike."""
    adapted = {name for name in adapter.updates if ".mlp." in name}
    layers = [name.removesuffix(".weight") for name in base if name.endswith("_proj.weight")]
    sizes = {(update.rank, update.scale) for update in adapter.updates.values()}
    return not adapted or (
        adapted == {name for name in layers if ".mlp." in name}
        and all(_IN_EXPERTS in name for name in adapted)
        and variant_named(adapter.config.variant).is_plain
        and not adapter.config.rslora
        and len(sizes) == 1
    )


def _groups(
    layout: Layout, base: Mapping[str, Tensor], named: Callable[[str], str]
) -> dict[str, tuple[Rule, list[str]]]:
    """Every tensor of the Hugging Face model: the rule of its module, and the tensors of ours that
    it consists of."""
    groups = {}
    for name in (*base, "lm_head.weight"):  # PEFT names a tied head, which is not stored, as any other
        module, _, leaf = name.rpartition(".")
        rule = layout.to_theirs(module)
        # transformers 5 has another name for Mixtral's; it renames only the factors in a PEFT folder
        if rule.theirs.endswith("block_sparse_moe.gate"):
            rule = Rule(module, (module,))
        theirs = named(f"{rule.theirs}.{leaf}")
        groups[theirs] = rule, [f"{part}.{leaf}" for part in rule.ours]
    return groups


def join(rule: Rule, adapter: Adapter, base: Mapping[str, Tensor]) -> tuple[int, float, Tensor, Tensor]:
    """(rank, scale, A, B) of one update that equals those of the members, each on its own rows.

    Members that share one A share its rows; any other member has its own rows of A and columns of
    B.
    """
    updates = {name: adapter.updates[name] for name in rule.ours if name in adapter.updates}
    first = next(iter(updates.values()))
    blocks: list[Tensor] = []
    columns: dict[str, int] = {}
    for name, update in updates.items():
        known = next((index for index, block in enumerate(blocks) if torch.equal(block, update.A)), None)
        columns[name] = len(blocks) if known is None else known
        blocks += [update.A] if known is None else []
    starts = [sum(block.size(0) for block in blocks[:index]) for index in range(len(blocks) + 1)]
    rows = []
    for member in rule.ours:
        update = updates.get(member)
        out = base[f"{member}.weight"].size(0) if update is None else update.B.size(0)
        rows.append(torch.zeros(out, starts[-1], dtype=first.B.dtype))
        if update is not None:
            factor = update.scale / first.scale  # one update has one scale: the rest goes into B
            B, start = update.B, starts[columns[member]]
            rows[-1][:, start : start + B.size(1)] = B if factor == 1 else B * factor
    return starts[-1], first.scale, torch.cat(blocks), rule.join(rows)


def _join_experts(
    rules: list[Rule], adapter: Adapter, base: Mapping[str, Tensor], *, swapped: bool
) -> tuple[int, float, Tensor, Tensor]:
    """(rank, scale, A, B) of one parameter of a layer's experts: a rule for each. An expert of a
    smaller rank, or without an update, is filled up with zeros. `swapped`: the update of its
    transpose."""
    pairs = [
        join(rule, adapter, base) if any(name in adapter.updates for name in rule.ours) else None
        for rule in rules
    ]
    if swapped:
        pairs = [pair and (*pair[:2], pair[3].T, pair[2].T) for pair in pairs]
    first = next(pair for pair in pairs if pair is not None)
    rank, scale = max(pair[0] for pair in pairs if pair is not None), first[1]
    all_A = first[2].new_zeros(len(rules), rank, first[2].size(1))
    all_B = first[3].new_zeros(first[3].size(0), rank, len(rules))
    for expert, pair in enumerate(pairs):
        if pair is not None:
            own_rank, own_scale, A, B = pair
            all_A[expert, :own_rank] = A
            all_B[:, :own_rank, expert] = B if own_scale == scale else B * (own_scale / scale)
    return rank, scale, all_A.flatten(0, 1), all_B.flatten(1)


def _whole(rule: Rule, ours: list[str], whole: dict[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    kept = {name: base[name] for name in ours if name not in whole}
    found = whole | {
        name: tensor.tensor() if isinstance(tensor, Quantized) else tensor for name, tensor in kept.items()
    }
    joined = rule.join([found[name] for name in ours])
    return joined.t() if rule.transposed and joined.ndim == 2 else joined


def _targets(adapted: list[str], modules: list[str]) -> list[str]:
    """target_modules: the last part of a name if every layer with it is adapted, else the whole
    name. A number is the end of other names as well."""
    leaves = {name.rpartition(".")[2] for name in modules if name not in adapted}
    leaves |= {leaf for name in adapted if (leaf := name.rpartition(".")[2]).isdecimal()}
    return sorted({name if (leaf := name.rpartition(".")[2]) in leaves else leaf for name in adapted})


def _shortened(parameters: list[str], layers: list[str], layout: Layout) -> set[str]:
    """target_parameters: a name without its layer, `mlp.experts.down_proj`, if that parameter is
    adapted in every layer of the model that has it, else the whole name."""
    experts = {name.partition(_IN_EXPERTS)[0] for name in layers if _IN_EXPERTS in name}
    experts = {layout.to_theirs(f"{place}{_IN_EXPERTS}"[:-1]).theirs for place in experts}
    names = {f"{place}.{leaf}" for place in experts for leaf in EXPERTS}
    names |= {f"{name}.weight" for name in layers}
    absent = {_LAYER.sub("", name) for name in names - set(parameters)}
    return {name if _LAYER.sub("", name) in absent else _LAYER.sub("", name) for name in parameters}


def _plain(value: float) -> float | int:
    """16.0 as 16, and so 16.000000000000004, a result of dividing and multiplying."""
    return int(round(value)) if abs(value - round(value)) < 1e-9 * abs(value) else value
