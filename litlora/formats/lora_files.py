"""LoRA files of other tools, for any model: read into plain updates, and written back under the
same names.

    comfyui   <module>.lora_down.weight (r, in), .lora_up.weight (out, r); the modules of a
              diffusion model are prefixed with `diffusion_model.`
    diffusers the names of one of these, and alpha in the header: see lora_header.py
    kohya     the same and <module>.alpha; a module's name is prefixed with `lora_unet_`, and its
              dots are underscores
    peft      a folder: adapter_config.json, and adapter_model.safetensors with
              base_model.model.<module>.lora_A.weight, .lora_B.weight

Besides the factors a file may hold differences of whole tensors: `.diff` of a weight, `.diff_b` of
a bias, `.diff_m` of a modulation. A PEFT folder may hold tensors that replace the base's. The
factors of a convolution are (r, in, *kernel) and (out, r, 1, ...). A module keeps the name that the
file has for it, with its prefix: only the model tells which module that is.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError, setting
from litlora.formats import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILES, Outline, peft, peft_weights
from litlora.formats.lora_header import ADAPTERS, Header, check_understood, read_header, written
from litlora.formats.model_files import open_model
from litlora.lora.update import Update, scale_of
from litlora.settings import check_alpha
from litlora.storage.atomic import replacing_file
from litlora.storage.tensors import at_least_16_bits, open_tensors, write_safetensors

PARTS = ("lora_down", "lora_up")
"""What most tools call A and B."""
PEFT_PARTS = ("lora_A", "lora_B")
SPELLINGS = (PARTS, PEFT_PARTS, ("lora_A.default", "lora_B.default"), ("lora.down", "lora.up"))
"""What a file calls A and B: one of these for each layer."""
DIFF_OF = {".weight": ".diff", ".bias": ".diff_b", ".modulation": ".diff_m"}
"""What the difference of a tensor is called; for any other tensor, its whole name and .diff."""
DIFFS = tuple(DIFF_OF.values())
_FACTOR = r"(.+)\.(lora_(?:down|up|[AB]|[AB]\.default)|lora\.(?:down|up))\.weight|(.+)\.lora_embedding_([AB])"
_DORA = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")


@dataclass(frozen=True)
class LoRAFile:
    """What a LoRA file or PEFT folder holds."""

    path: Path
    """The file, which an error about its content names."""
    updates: dict[str, Update]
    """By the module's name."""
    diffs: dict[str, Tensor] = field(default_factory=dict)
    """Differences of whole tensors, by their keys: `<module>.diff`, `.diff_b`, `.diff_m`."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that replace the model's, by their names with PEFT's prefix."""
    unknown: list[str] = field(default_factory=list)
    """Unrecognised keys. They are not written: whoever goes on without them must say so."""
    config: dict[str, Any] | None = None
    """adapter_config.json of a PEFT folder."""
    parts: tuple[str, str] = PARTS
    """What the keys call A and B."""
    alpha: bool = False
    """Whether the file stores `.alpha`."""
    header: Header = field(default_factory=Header)
    """What a safetensors file says besides its tensors."""
    notices: list[str] = field(default_factory=list)
    """What whoever uses the file should be told."""
    is_8_bit: bool = False
    """Whether factors are stored in 8 bits; they are read, and written again, as 16."""

    @property
    def keeps_scale(self) -> bool:
        """Whether the file can tell the scale of an update; if not, scales are 1."""
        return self.alpha or bool(self.header.adapters)

    def outline(self) -> Outline:
        """What it tells without a model."""
        spelling = f"LoRA file ({', '.join(PEFT_PARTS if PEFT_PARTS[0] in self.parts else PARTS)})"
        settings = {
            "ranks": sorted({update.rank for update in self.updates.values()}),
            "alpha": self._alphas(),
            "differences": len({**self.diffs, **self.whole}),
        }
        return Outline(
            spelling if self.config is None else "PEFT",
            self.path,
            open_tensors(self.path),
            (self.config or {}).get("base_model_name_or_path") or None,
            settings,
            self.updates,
            self.unknown,
            self.notices,
        )

    def _alphas(self) -> list[float]:
        """The values of alpha that occur; none in a file that does not tell them."""
        if not self.keeps_scale and self.config is None:
            return []
        found = set()
        for module, update in self.updates.items():
            rslora = self.config["use_rslora"] if self.config else self.header.is_rslora(self.path, module)
            alpha = update.scale * (math.sqrt(update.rank) if rslora else update.rank)
            value = float(f"{alpha:.9g}")
            found.add(int(value) if value.is_integer() else value)
        return sorted(found)


# ---- reading


def read_lora(path: Path, *, files: list[Path] | None = None, allow_unknown: bool = False) -> LoRAFile:
    """Read a LoRA file (`.safetensors`, or a torch file of tensors), a PEFT folder, or the weights'
    file in one.

    `files` are those that any other folder consists of. Tensors are memory-mapped. Raises
    CheckpointError for a broken file, half a pair, factors that do not fit each other, an alpha
    that cannot be a scale, an empty file, DoRA, and, unless `allow_unknown`, for an unrecognised
    key.
    """
    folder = path if path.is_dir() else path.parent if path.name in PEFT_WEIGHTS_FILES else None
    weights = peft_weights(folder) if folder is not None else None
    config = None
    if weights is not None:
        path, files, config = weights, [weights], peft.read_config(folder)
        peft.refuse_variants(folder / PEFT_CONFIG_FILE, config)
    elif path.is_dir() and not files:
        raise CheckpointError(
            f"{path}: is a directory without {PEFT_CONFIG_FILE}; name a LoRA file or a PEFT folder"
        )
    # A PEFT folder's scale stands in its config alone.
    header = Header() if config is not None else read_header(files or [path])
    content = _Content(path, config, header)
    for key, tensor in open_model(path, files or [path]).items():
        content.add(key, tensor)
    return content.lora(allow_unknown=allow_unknown)


@dataclass
class _Pair:
    """The factors of one module, as they are found."""

    spelling: tuple[str, str]
    factors: dict[str, Tensor] = field(default_factory=dict)
    is_embedding: bool = False


@dataclass
class _Content:
    """What a file or PEFT folder holds, key by key."""

    file: Path
    config: dict[str, Any] | None
    header: Header
    pairs: dict[str, _Pair] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    diffs: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, tensor: Tensor) -> None:
        """Sort out one tensor by its key."""
        if factor := re.fullmatch(_FACTOR, key):
            self._add_factor(factor, tensor)
        elif key.endswith(".alpha"):
            if tensor.numel() != 1 or not math.isfinite(value := tensor.item()) or value == 0:
                raise CheckpointError(f"{self.file}: {key} must be one finite number other than 0")
            self.alphas[key.removesuffix(".alpha")] = float(value)
        elif key.endswith(_DORA) or ".lora_mid." in key:
            raise CheckpointError(
                f"{self.file}: {key} is not supported: only plain LoRA's factors, .alpha and differences are"
            )
        elif key.endswith(DIFFS):
            self.diffs[key] = at_least_16_bits(tensor)
        elif self.config is not None and not re.search(r"\.lora_|\.token_adapter\.", key):
            if ".original_module." not in key:  # what a module was before training, which has no effect
                name = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                self.whole[name] = tensor
        else:
            self.unknown.append(key)

    def _add_factor(self, factor: re.Match[str], tensor: Tensor) -> None:
        is_embedding = factor[3] is not None
        module, name = (factor[3], f"lora_{factor[4]}") if is_embedding else (factor[1], factor[2])
        spelling = next(spelling for spelling in SPELLINGS if name in spelling)
        pair = self.pairs.setdefault(module, _Pair(spelling))
        if pair.spelling != spelling:
            raise CheckpointError(
                f"{self.file}: {module} has factors of two kinds, {pair.spelling[0]} and {spelling[0]}; "
                "keep one"
            )
        pair.factors["AB"[spelling.index(name)]] = tensor
        pair.is_embedding |= is_embedding

    def lora(self, *, allow_unknown: bool) -> LoRAFile:
        """The whole. Raises CheckpointError for what cannot be used."""
        unknown = [*self.unknown, *(f"{module}.alpha" for module in self.alphas if module not in self.pairs)]
        if unknown and not allow_unknown:
            raise CheckpointError(
                f"{self.file}: {unknown[0]}: unrecognised key; the keys of factors, .alpha, .diff, .diff_b "
                "and .diff_m are supported"
            )
        updates = {module: self._update(module, pair) for module, pair in self.pairs.items()}
        if not (updates or self.diffs or self.whole):
            first = f"; {unknown[0]}: unrecognised key" if unknown else ""
            raise CheckpointError(
                f"{self.file}: holds no LoRA: no lora_down and lora_up, no lora_A and lora_B, no .diff{first}"
            )
        return LoRAFile(
            self.file,
            updates,
            self.diffs,
            self.whole,
            unknown,
            self.config,
            next((pair.spelling for pair in self.pairs.values()), PARTS),
            alpha=bool(self.alphas),
            header=self.header,
            notices=self._notices(),
            is_8_bit=any(
                factor.itemsize == 1 for pair in self.pairs.values() for factor in pair.factors.values()
            ),
        )

    def _notices(self) -> list[str]:
        """What the header says besides. Raises CheckpointError if that contradicts scale 1, which a
        layer has without `.alpha`."""
        if self.config is not None or self.header.adapters or self.alphas:
            return []
        ranks = {module: pair.factors["A"].size(0) for module, pair in self.pairs.items()}
        return check_understood(self.file, self.header, ranks)

    def _update(self, module: str, pair: _Pair) -> Update:
        if pair.factors.keys() != {"A", "B"}:
            raise CheckpointError(f"{self.file}: {module} has only one of its two factors")
        A, B = pair.factors["A"], pair.factors["B"]
        are_factors = A.ndim >= 2 and B.ndim in (2, A.ndim) and A.size(0) == B.size(1)
        if not (are_factors and A.numel() and B.numel() and B[0, 0].numel() == 1) or not (
            A.is_floating_point() and B.is_floating_point()
        ):
            raise CheckpointError(
                f"{self.file}: {module}: {tuple(A.shape)} and {tuple(B.shape)} do not form an update"
            )
        A, B, rank = at_least_16_bits(A), at_least_16_bits(B), A.size(0)
        kind = "embedding" if pair.is_embedding else "linear"
        if self.config is None:
            return Update(A, B, self._scale(module, rank), kind)
        if kind == "linear" and self.config.get("fan_in_fan_out"):
            kind = "conv1d"
        return Update(A, B, self._peft_scale(module, rank), kind)

    def _scale(self, module: str, rank: int) -> float:
        """What `.alpha`, or else the header, says about a module; 1 if neither does. Raises
        CheckpointError if they contradict each other."""
        stored = self.alphas[module] / rank if module in self.alphas else None
        stated = self.header.scale(self.file, module, rank)
        if stored is not None and stated is not None and not math.isclose(stored, stated, rel_tol=1e-3):
            raise CheckpointError(
                f"{self.file}: {module}.alpha is {self.alphas[module]:g}, but {ADAPTERS} in the header says "
                f"{stated * rank:g}; keep the one that is right"
            )
        return next((scale for scale in (stored, stated) if scale is not None), 1.0)

    def _peft_scale(self, module: str, rank: int) -> float:
        """What adapter_config.json says about a module. Raises CheckpointError for another rank."""
        config, name = self.config, module.removeprefix(peft.PREFIX)
        if rank != (stated := peft.by_pattern(config["rank_pattern"], name, config["r"])):
            raise CheckpointError(f"{self.file}: {module} has rank {rank}; {PEFT_CONFIG_FILE} says {stated}")
        alpha = float(peft.by_pattern(config["alpha_pattern"], name, config["lora_alpha"]))
        return scale_of(alpha, rank, rslora=config["use_rslora"])


# ---- writing


def result_tensors(name: str, result: Update | Tensor, format: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The keys and tensors that comfyui or kohya use for the update, or the whole difference, of
    the tensor `name` of a model."""
    layer, diff = _keys(name, format)
    if isinstance(result, Update):
        return update_tensors(layer, result, PARTS, alpha=format == "kohya", dtype=dtype)
    return {diff: result.to(dtype)}


def possible_keys(tensors: Mapping[str, Tensor], format: str) -> list[str]:
    """Every key that `result_tensors` may give for tensors of these names."""
    keys: dict[str, None] = {}
    for name, tensor in tensors.items():
        layer, diff = _keys(name, format)
        keys[diff] = None
        if tensor.ndim > 1:
            keys |= dict.fromkeys(f"{layer}.{part}.weight" for part in PARTS)
            keys |= {f"{layer}.alpha": None} if format == "kohya" else {}
    return list(keys)


def _keys(name: str, format: str) -> tuple[str, str]:
    """What comfyui or kohya call the layer whose weight is the tensor `name` of a model, and the
    difference of that tensor."""

    def spelled(text: str) -> str:
        return f"diffusion_model.{text}" if format == "comfyui" else "lora_unet_" + text.replace(".", "_")

    end = next((end for end in DIFF_OF if name.endswith(end)), "")
    return spelled(name.removesuffix(".weight")), spelled(name.removesuffix(end)) + DIFF_OF.get(end, ".diff")


def as_stored(update: Update, *, alpha: bool, dtype: torch.dtype) -> Update:
    """The update as a file holds it: in `dtype`; in a format without `alpha`, its scale is in B."""
    B = update.B if alpha or update.scale == 1 else update.B.float() * update.scale
    return replace(update, A=update.A.to(dtype), B=B.to(dtype), scale=update.scale if alpha else 1.0)


def update_tensors(
    module: str, update: Update, parts: tuple[str, str], *, alpha: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The keys and tensors of one update, in `dtype`; its alpha in fp32 if `dtype` cannot hold it.
    See `as_stored`."""
    stored = as_stored(update, alpha=alpha, dtype=dtype)
    if update.kind == "embedding":
        return {f"{module}.lora_embedding_A": stored.A, f"{module}.lora_embedding_B": stored.B}
    tensors = {f"{module}.{parts[0]}.weight": stored.A, f"{module}.{parts[1]}.weight": stored.B}
    if alpha:
        value = update.scale * update.rank
        check_alpha(f"{module}.alpha {value:g}", value)
        rounded = torch.tensor(value, dtype=dtype)
        is_exact = rounded.item() == value
        tensors[f"{module}.alpha"] = rounded if is_exact else torch.tensor(value, dtype=torch.float32)
    return tensors


def write_lora(path: Path, lora: LoRAFile, dtype: torch.dtype) -> list[str]:
    """Write a LoRA in its own format: a safetensors file, or, if it has a config, a PEFT folder. It
    appears whole or not at all. Returns the entries of its header that no longer hold, and are left
    out.

    In an existing folder, the two files are replaced.
    """
    tensors: dict[str, Tensor] = {}
    # In a PEFT folder the config tells the scale, and with diffusers' metadata the header does.
    is_elsewhere = lora.config is not None or (lora.keeps_scale and not lora.alpha)
    for module, update in lora.updates.items():
        kept = replace(update, scale=1.0) if is_elsewhere else update
        tensors |= update_tensors(module, kept, lora.parts, alpha=lora.alpha, dtype=dtype)
    tensors |= {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in (lora.diffs | lora.whole).items()
    }
    if lora.config is None:
        metadata, dropped = written(lora.path, lora.header, lora.updates)
        with replacing_file(path) as staging:
            write_safetensors(staging, tensors, metadata)
        return dropped
    with replacing_file(path / PEFT_WEIGHTS_FILES[0]) as staging:
        write_safetensors(staging, {_peft_key(key, lora): tensor for key, tensor in tensors.items()})
    with replacing_file(path / PEFT_CONFIG_FILE) as staging:
        staging.write_text(json.dumps(peft_config(lora), indent=2) + "\n", encoding="utf-8")
    return []


def _peft_key(key: str, lora: LoRAFile) -> str:
    """What else is saved of a layer that has an adapter, its bias, belongs to its base_layer."""
    module, _, leaf = key.rpartition(".")
    return f"{module}.base_layer.{leaf}" if key in lora.whole and module in lora.updates else key


def peft_config(lora: LoRAFile) -> dict[str, Any]:
    """adapter_config.json for these updates; what else lora.config says stays."""
    layers = {module.removeprefix(peft.PREFIX): update for module, update in lora.updates.items()}
    saved = {name.removeprefix(peft.PREFIX).rpartition(".")[0] for name in lora.whole} - layers.keys()
    if not layers:
        raise CheckpointError(
            "no matrix differs, and PEFT needs at least one pair of factors; choose another "
            f"{setting('format')}"
        )
    if "" in saved:
        raise CheckpointError(
            "a tensor outside every module differs, and PEFT saves modules only; choose another "
            f"{setting('format')}"
        )
    has_biases = any(name.rpartition(".")[0] in lora.updates for name in lora.whole)
    stated = {
        "peft_type": "LORA",
        **peft.stated(layers),
        "modules_to_save": sorted(saved) or None,
        "bias": "lora_only" if has_biases else "none",
    }
    return {"target_modules": sorted(layers)} | (lora.config or {}) | stated
