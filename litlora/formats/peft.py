"""PEFT adapter folders, read: `adapter_config.json` beside `adapter_model.safetensors` or
`adapter_model.bin`. peft_export.py writes them.

PEFT names the layers of the Hugging Face model. Where that model fuses layers which are separate
here (query, key and value; gate and up), an adapter of the fused layer becomes one of each part: A
is shared, and the rows of B are divided. In the other direction the adapters of the parts are
joined: A is stacked, B is block-diagonal and the ranks add up, unless the parts share one A. An
update of the embedding, E + s · (B' A')^T in PEFT's file, is A = B'^T and B = A'^T here.

Since transformers 5 the experts of a layer are two 3-D parameters, which PEFT adapts as such
(`target_parameters`): the adapter of one becomes one of each expert's layers. The weight of any layer
may be such a parameter, too. Rows of single tokens
and biases of B become tensors that replace the base's. An adapter of a model with other modalities
names the language model inside it.
"""

import dataclasses
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
from litlora.formats.peft_config import (
    EXPERTS,
    by_pattern,
    is_parameter,
    read_config,
    refuse_variants,
    tokens_of,
)
from litlora.formats.peft_keys import PREFIX as PREFIX
from litlora.formats.peft_keys import PeftTensors, sort_out
from litlora.lora import Adapter, Update
from litlora.lora.update import scale_of
from litlora.lora.variants import MAGNITUDE
from litlora.model import shorten
from litlora.settings import LoRAConfig
from litlora.storage.tensors import open_tensors
from litlora.transformers_config import Architecture, TransformersConfig

_FAMILIES = (
    (r"(^|\.)layers\.\d+\.(attention\.|mlp\.dense_)|^gpt_neox\.|^embed_(in|out)$", "gpt_neox"),
    (r"(^|\.)h\.\d+\.(attn|mlp)\.c_|^transformer\.(wte|wpe)$|(^|\.)h\.\d+\.ln_[12]", "gpt2"),
    (r"(^|\.)h\.\d+\.|^transformer\.", "falcon"),
    (r"(^|\.)layers\.\d+\.mlp\.c_(fc|proj)", "starcoder2"),
    (r"self_attn\.qkv_proj|mlp\.gate_up_proj", "phi3"),
    (r"self_attn\.(dense|[qk]_layernorm)$|mlp\.fc[12]", "phi"),
    (r"block_sparse_moe", "mixtral"),
    (r"\.feed_forward\.", "llama4_text"),
)
"""(pattern of a module's name, family) for families whose names differ from Llama's; the first
match counts."""
# ---- reading


def base_of(directory: Path) -> tuple[str, Path | None]:
    """What a PEFT folder calls its base, and the directory of that name if there is one."""
    name = read_config(directory).get("base_model_name_or_path") or ""
    places = [Path(name), directory / name] if name else []
    return name, next((place for place in places if place.is_dir()), None)


def read_adapter(
    directory: Path, model: Architecture, base: Mapping[str, Tensor], *, base_is_full: bool = True
) -> Adapter:
    """The adapter in a PEFT folder, under our names; `model` and `base` describe its base.

    `base_is_full`: whether `base` has the very values that the adapter was trained on, and not those
    of a base below further adapters. Raises CheckpointError for a setting or tensor that cannot be
    expressed here, and for a tensor that has no place in the base.
    """
    config = read_config(directory)
    refuse_variants(directory / CONFIG_FILE, config)
    file = peft_weights(directory)
    tensors = open_tensors(file)
    return adapter_of(file, tensors, config, model, base, base_is_full=base_is_full)


def adapter_of(
    file: Path,
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    model: Architecture,
    base: Mapping[str, Tensor],
    *,
    base_is_full: bool = True,
) -> Adapter:
    """The adapter of these tensors, by PEFT's keys, that a file holds. See `read_adapter`."""
    stored = sort_out(file, tensors)
    _check_settings(file.parent / CONFIG_FILE, config, stored)
    found = _Found(file, config, _Names(model, base, stored.modules), model, base)
    decomposed = {name for name in stored.embeddings if "magnitude" in stored.pairs[name]}
    if (stored.rows or config["lora_bias"] or decomposed) and not base_is_full:
        raise CheckpointError(
            f"{file}: replaces rows, biases or an embedding of its base, which is an adapter itself; merge "
            "the base first"
        )
    for name, tensor in stored.whole.items():
        found.add_whole(name, tensor)
    for module, pair in stored.pairs.items():
        if (place := experts_of(module)) is not None and config.get("target_parameters"):
            found.add_experts(module, place, pair)
        else:
            found.add_pair(module, pair, by_columns=module in decomposed)
    for module, rows in stored.rows.items():
        found.add_rows(module, rows)
    return found.adapter()


@dataclass
class _Found:
    """What a folder holds, under our names, as it is found."""

    file: Path
    config: dict[str, Any]
    names: "_Names"
    model: Architecture
    base: Mapping[str, Tensor]
    updates: dict[str, Update] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def add_pair(self, module: str, pair: dict[str, Tensor], *, by_columns: bool) -> None:
        """The factors of one module of theirs, and what belongs to them. `by_columns`: whether its
        magnitudes are those of an embedding's columns."""
        rule, as_parameter = self.names.rule_of(module), is_parameter(f"{module}.weight", self.config)
        rank, alpha, scale = self._strength(f"{module}.weight" if as_parameter else module)
        A, B = _checked_pair(self.file, module, pair, rank)
        if as_parameter and rule.transposed:  # what PEFT adds to a parameter lies as the parameter does
            A, B = B.T, A.T
        if not self.names.all_known(rule, "weight"):
            self.lost.append(module)
            return
        if by_columns:
            self._add_decomposed_embedding(module, rule, Update(A, B, scale), pair["magnitude"])
            return
        magnitudes = [None] * len(rule.ours)
        if (magnitude := pair.get("magnitude")) is not None:
            magnitudes = rule.split(self._checked_magnitude(module, magnitude, B.size(0)))
        for ours, rows, part in zip(rule.ours, rule.split(B), magnitudes, strict=True):
            plain = Update(A, rows, scale)
            extra = {} if part is None else {"variant": "dora", "extra": {MAGNITUDE: part}}
            self.updates[ours], self.alphas[ours] = dataclasses.replace(plain, **extra), alpha
        if (bias := pair.get("bias")) is not None:
            self._add_bias(module, rule, scale * bias.to(torch.promote_types(bias.dtype, torch.float32)))

    def _strength(self, module: str) -> tuple[int, float, float]:
        """(rank, alpha, scale) of a module or parameter of theirs."""
        rank = by_pattern(self.config["rank_pattern"], module, self.config["r"])
        alpha = float(by_pattern(self.config["alpha_pattern"], module, self.config["lora_alpha"]))
        return rank, alpha, scale_of(alpha, rank, rslora=self.config["use_rslora"])

    def _checked_magnitude(self, module: str, magnitude: Tensor, count: int) -> Tensor:
        magnitude = magnitude.flatten()
        if magnitude.size(0) != count or not magnitude.is_floating_point():
            raise CheckpointError(
                f"{self.file}: {module}: its {MAGNITUDE} has {magnitude.size(0)} values; it must have {count}"
            )
        return magnitude

    def _add_decomposed_embedding(self, module: str, rule: Rule, update: Update, magnitude: Tensor) -> None:
        """DoRA of an embedding: as PEFT computes it, with a magnitude and a norm for each column, so
        that it is no DoRA here, and the result replaces the base's tensor."""
        if self.config["ensure_weight_tying"] and self.model.tie_word_embeddings:
            raise CheckpointError(
                f"{self.file}: {module}: DoRA of an embedding with ensure_weight_tying is not supported; "
                "merge the adapter in PEFT (merge_and_unload) and use the merged model"
            )
        [ours] = rule.ours
        before = self._before(f"{ours}.weight")
        if update.shape != tuple(before.shape):
            raise CheckpointError(f"{self.file}: {module}: {update.shape} does not fit {tuple(before.shape)}")
        magnitude = self._checked_magnitude(module, magnitude, before.size(1))
        after = update.add_product(before.to(torch.promote_types(before.dtype, torch.float32), copy=True))
        after *= magnitude.to(after.dtype) / after.norm(dim=0).clamp_min(torch.finfo(after.dtype).tiny)
        self.whole[f"{ours}.weight"] = after.to(before.dtype)
        self.replaced.append(ours)

    def _before(self, name: str) -> Tensor:
        """The tensor that an adapter's own change starts from: what it replaces the base's with, or the
        base's."""
        return self.whole.get(name, self.base[name])

    def _add_bias(self, module: str, rule: Rule, added: Tensor) -> None:
        """What the bias of B adds to the layer's own."""
        if not all(f"{ours}.bias" in self.base for ours in rule.ours):
            raise CheckpointError(
                f"{self.file}: {module}: its lora_B has a bias, but the base's layer has none; only layers "
                "with a bias can take lora_bias"
            )
        for ours, part in zip(rule.ours, rule.split(added), strict=True):
            before = self._before(f"{ours}.bias")
            if part.shape != before.shape:
                raise CheckpointError(
                    f"{self.file}: {module}: the bias of lora_B is {tuple(added.shape)}, which does not fit "
                    "the base"
                )
            self.whole[f"{ours}.bias"] = (before.to(part.dtype) + part).to(before.dtype)
            self.replaced.append(ours)

    def add_experts(self, module: str, place: str, pair: dict[str, Tensor]) -> None:
        """The factors of one parameter of a layer's experts, A (E · r, in) and B (out, r · E), which are
        called `place` there."""
        experts = range(self.model.num_experts or 0)
        [place], swapped = self.names.rule_of(place).ours, self.names.layout.swaps_factors
        up = self.base.get(f"{place}.0.up_proj.weight")
        if up is None:
            self.lost.append(place)
            return
        inside, width = up.shape
        forms = {(width, 2 * inside): "gate_up_proj", (inside, width): "down_proj"}
        if swapped:
            forms = {form[::-1]: name for form, name in forms.items()}
        form = (pair["A"].shape[-1], pair["B"].shape[0]) if pair.keys() == {"A", "B"} else None
        if (parameter := forms.get(form)) is None:
            raise CheckpointError(
                f"{self.file}: {place}: its lora_A and lora_B fit neither gate_up_proj nor down_proj of the "
                "base's experts"
            )
        rank, alpha, scale = self._strength(f"{module.partition('.base_layer')[0]}.{parameter}")
        _checked_pair(self.file, f"{place}.{parameter}", pair, rank * len(experts))
        A = pair["A"].unflatten(0, (len(experts), rank))  # (E, r, in)
        B = pair["B"].unflatten(1, (rank, len(experts)))  # (out, r, E)
        if swapped:
            A, B = B.permute(2, 1, 0), A.permute(2, 1, 0)
        leaves = EXPERTS[parameter]
        for expert in experts:
            rule = self.names.layout.rule_of_expert(f"{place}.{expert}", leaves, len(B) // len(leaves))
            for ours, rows in zip(rule.ours, rule.split(B[:, :, expert]), strict=True):
                if ours in self.updates:
                    raise CheckpointError(f"{self.file}: {place} has two updates of {parameter}")
                self.updates[ours], self.alphas[ours] = (
                    Update(A[expert].contiguous(), rows.contiguous(), scale),
                    alpha,
                )

    def add_rows(self, module: str, rows: Tensor) -> None:
        """Rows of an embedding or of the head that replace those of some tokens; where the two are
        tied, of both."""
        wanted = tokens_of(module, self.config)
        [ours] = self.names.rule_of(module).ours
        before = self.base.get(f"{ours}.weight")
        if before is None and ours == "lm_head":
            before = self.base.get("model.embed_tokens.weight")
        if before is None:
            self.lost.append(module)
            return
        fits = rows.ndim == 2 and rows.shape == (len(wanted), before.size(1))
        if not fits or not rows.is_floating_point() or max(wanted) >= before.size(0):
            raise CheckpointError(
                f"{self.file}: {module}: its rows {tuple(rows.shape)} do not fit trainable_token_indices and "
                f"the base's {tuple(before.shape)}"
            )
        after = before.clone()
        after[torch.tensor(wanted)] = rows.to(after.dtype)
        ends = ("model.embed_tokens", "lm_head")
        tied = self.model.tie_word_embeddings and ours in ends
        for name in ends if tied else (ours,):
            if f"{name}.weight" in self.whole and not torch.equal(self.whole[f"{name}.weight"], after):
                raise CheckpointError(
                    f"{self.file}: holds {name} both whole and as rows of tokens, or rows that differ though "
                    "the base ties them"
                )
            self.whole[f"{name}.weight"] = after
            self.replaced.append(name)

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
        fused = [name for name in self.lost if name.endswith(".experts")]
        if fused and isinstance(self.model, TransformersConfig):
            raise CheckpointError(
                f"{self.file}: adapts {fused[0]}, experts in one tensor, which take no adapter in a model "
                "that runs through transformers; merge it with PEFT, or train without them (PEFT adapts them "
                "where target_modules names gate_proj, up_proj or down_proj)"
            )
        if self.lost:
            raise CheckpointError(
                f"{self.file}: the base has no place for {shorten(self.lost)}; is it the base that this "
                "adapter was trained on?"
            )
        if not self.updates and not self.replaced:
            raise CheckpointError(f"{self.file}: the adapter is empty")
        if self.config["ensure_weight_tying"] and self.model.tie_word_embeddings:
            self._tie()
        return Adapter(self._settings(), self.updates, self.whole, file=self.file)

    def _tie(self) -> None:
        """What the embedding has, the head has, and the other way round. Raises CheckpointError if
        both are there and differ."""
        embedding, head = "model.embed_tokens", "lm_head"
        for one, other in ((embedding, head), (head, embedding)):
            if one in self.updates and other not in self.updates:
                self.updates[other], self.alphas[other] = self.updates[one], self.alphas[one]
            if f"{one}.weight" in self.whole and f"{other}.weight" not in self.whole:
                self.whole[f"{other}.weight"] = self.whole[f"{one}.weight"]
                self.replaced.append(other)
        updates = [self.updates[name].tensors() for name in (embedding, head) if name in self.updates]
        whole = [{"": self.whole[f"{name}.weight"]} for name in (embedding, head) if name in self.replaced]
        for tensors in (updates, whole):
            if tensors and not all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0]):
                raise CheckpointError(
                    f"{self.file}: its embedding and its output head differ, but {CONFIG_FILE} says "
                    "ensure_weight_tying; set it to false to use both as they are"
                )

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
            variant="dora" if self.config["use_dora"] else "lora",
            rank_pattern={name: value for name, value in ranks.items() if value != rank},
            alpha_pattern={name: value for name, value in self.alphas.items() if value != alpha},
            modules_to_save=list(dict.fromkeys(self.replaced)),
        )


def _checked_pair(file: Path, module: str, pair: dict[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of one module. Raises CheckpointError if they are not the factors of an update."""
    if not {"A", "B"} <= pair.keys() <= {"A", "B", "magnitude", "bias"}:
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

    def __init__(self, model: Architecture, base: Mapping[str, Tensor], modules: list[str]) -> None:
        modules = [_of_language_model(name) for name in modules]
        self.layout = layout_of(_family(modules, model), model)
        # An adapter of the decoder without its head has names without the prefix.
        self._bare = not any(name.startswith(self.layout.prefix) for name in modules)
        # A tied head is stored once, under the embedding's name.
        self._known = {*base, "lm_head.weight"}

    def rule_of(self, module: str) -> Rule:
        """Which of our modules a module of theirs consists of."""
        module = _of_language_model(module)
        is_bare = self._bare and module != "lm_head"
        return self.layout.to_ours(self.layout.prefix + module if is_bare else module)

    def all_known(self, rule: Rule, leaf: str) -> bool:
        """Whether the base has this tensor for each of the rule's modules."""
        return all(f"{ours}.{leaf}" in self._known for ours in rule.ours)


def _of_language_model(module: str) -> str:
    """The name that a module has in the language model alone; `module` may be that of a model which
    takes images or sound as well."""
    for inside, alone in (
        ("model.language_model.", "model."),
        ("model.text_model.", "model."),
        ("language_model.", ""),
    ):
        if module.startswith(inside):
            return alone + module.removeprefix(inside)
    return module


def experts_of(module: str) -> str | None:
    """`model.layers.0.mlp.experts`, if that is what a module is: the name of a layer's experts. PEFT
    wraps one parameter of theirs in the other."""
    name = _of_language_model(module)
    return found[1] if (found := re.fullmatch(r"(.+\.experts)(\.base_layer)*", name)) else None


def _family(modules: list[str], model: Architecture) -> str:
    """The Hugging Face family whose layers have names like these, or are like those of this model."""
    if isinstance(model, ModelConfig) and model.attention_sinks:
        return "gpt_oss"
    return next(
        (family for pattern, family in _FAMILIES for name in modules if re.search(pattern, name)), "llama"
    )


def _check_settings(path: Path, config: dict[str, Any], stored: PeftTensors) -> None:
    """Raise CheckpointError where the settings and the tensors do not tell the same."""
    extras = (("use_dora", "magnitude", MAGNITUDE), ("lora_bias", "bias", "lora_B.bias"))
    for setting, part, called in extras:
        for module, pair in stored.pairs.items():
            is_linear = "embed" not in module and experts_of(module) is None
            if part in pair and not config[setting]:
                raise CheckpointError(f"{stored.file}: {module} has {called}, but {path.name} no {setting}")
            if config[setting] and part not in pair and (is_linear or part == "magnitude"):
                raise CheckpointError(
                    f"{stored.file}: {module} has no {called}, but {path.name} has {setting}"
                )
    tokens = config.get("trainable_token_indices")
    if bool(stored.rows) != bool(tokens):
        there, absent = (CONFIG_FILE, stored.file.name) if tokens else (stored.file.name, CONFIG_FILE)
        raise CheckpointError(f"{path.parent}: {there} has rows of single tokens, but {absent} has none")


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
