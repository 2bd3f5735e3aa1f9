"""LoRA files of other tools, for any model: read into plain updates, and written back under the
same names.

    comfyui   <module>.lora_down.weight (r, in), .lora_up.weight (out, r); the modules of a
              diffusion model are prefixed with `diffusion_model.`
    diffusers the names of one of these, and alpha in the header: see lora_header.py
    kohya     the same and <module>.alpha; a module's name is prefixed with `lora_unet_`, and its
              dots are underscores
    peft      a folder: adapter_config.json, and adapter_model.safetensors with
              base_model.model.<module>.lora_A.weight, .lora_B.weight

lora_keys.py lists how else a factor may be spelled; a layer keeps its spelling. Besides the factors
a file may hold LyCORIS's products and DoRA's magnitudes (lycoris.py), and differences of whole
tensors: `.diff` or `.w_norm` of a weight, `.diff_b` or `.b_norm` of a bias, `.diff_m` of a
modulation. A PEFT folder may hold tensors that replace the base's. The
factors of a convolution are (r, in, *kernel) and (out, r, 1, ...). A module keeps the name that the
file has for it, with its prefix: only the model tells which module that is.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError, setting
from litlora.formats import (
    MLX_WEIGHTS_FILE,
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILES,
    WEIGHTS_FILE,
    Outline,
    is_mlx,
    litlora,
    mlx,
    peft,
    peft_weights,
)
from litlora.formats.lora_content import PARTS, PEFT_PARTS, Content, diff_of
from litlora.formats.lora_header import TRAINING_HASHES, Header, read_header, written
from litlora.formats.model_files import open_model
from litlora.lora.adapter import Adapter
from litlora.lora.dense import DenseUpdate
from litlora.lora.update import Update
from litlora.lora.variants import variant_named
from litlora.settings import check_alpha
from litlora.storage.atomic import replacing_file
from litlora.storage.tensors import open_tensors, training_hashes, write_safetensors


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
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The keys of A and B, by the module's name, where they are not spelled as in `parts`."""
    dense: dict[str, DenseUpdate] = field(default_factory=dict)
    """Updates that are not s · B A, by the module's name."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """What is added to a module's bias, by its name: s times the bias of B."""

    @property
    def keeps_scale(self) -> bool:
        """Whether the file can tell the scale of an update; if not, scales are 1."""
        return self.alpha or bool(self.header.adapters)

    def outline(self) -> Outline:
        """What it tells without a model."""
        spelling = f"LoRA file ({', '.join(self._kinds())})"
        updates = self.updates | self.dense
        settings = {
            "ranks": sorted({update.rank for update in updates.values() if update.rank is not None}),
            "alpha": self._alphas(),
            "differences": len({**self.diffs, **self.whole}) + len(self.biases),
        }
        return Outline(
            spelling if self.config is None else "PEFT",
            self.path,
            open_tensors(self.path),
            (self.config or {}).get("base_model_name_or_path") or None,
            settings,
            updates,
            self.unknown,
            self.notices,
        )

    def _alphas(self) -> list[float]:
        """The values of alpha that occur; none in a file that does not tell them."""
        if not self.keeps_scale and self.config is None:
            return []
        found = set()
        for module, update in (self.updates | self.dense).items():
            if update.rank is None:
                continue
            rslora = self.config["use_rslora"] if self.config else self.header.is_rslora(self.path, module)
            alpha = update.scale * (math.sqrt(update.rank) if rslora else update.rank)
            value = float(f"{alpha:.9g}")
            found.add(int(value) if value.is_integer() else value)
        return sorted(found)

    def _kinds(self) -> list[str]:
        """What its factors are called, and the kinds of updates that are not s · B A."""
        parts = PEFT_PARTS if self.parts[0].startswith(PEFT_PARTS[0]) else PARTS
        return [*(parts if self.updates else ()), *sorted({update.name for update in self.dense.values()})]

    def plain(self) -> "LoRAFile":
        """The file itself. Raises CheckpointError if it holds an update that is not s · B A, or that
        has a bias."""
        for module in self.biases:
            raise CheckpointError(
                f"{self.path}: {module} has a bias of lora_B, which only lora_merger.py reads; merge it with "
                "scripts/lora_merger.py, then extract a LoRA with scripts/lora_extractor.py"
            )
        for module, update in self.dense.items():
            raise CheckpointError(
                f"{self.path}: {module} is {update.name}, which is not a product of two factors; merge it "
                "with scripts/lora_merger.py, then extract a LoRA with scripts/lora_extractor.py"
            )
        return self


# ---- reading


def read_lora(path: Path, *, files: list[Path] | None = None, allow_unknown: bool = False) -> LoRAFile:
    """Read a LoRA file (`.safetensors`, or a torch file of tensors), an adapter's folder of PEFT,
    mlx-lm or litlora, or the weights' file in one.

    `files` are those that any other folder consists of. Tensors are memory-mapped. Raises
    CheckpointError for a broken file, half a pair, factors that do not fit each other, an alpha
    that cannot be a scale, an empty file, and, unless `allow_unknown`, for an unrecognised
    key.
    """
    folder = path if path.is_dir() else path.parent
    if path.name == WEIGHTS_FILE or (path.is_dir() and (path / WEIGHTS_FILE).is_file()):
        return _own_adapter(folder)
    config, tensors = None, None
    if is_mlx(folder) and path in (folder, folder / MLX_WEIGHTS_FILE):
        (tensors, config), path = mlx.as_peft(folder), folder / MLX_WEIGHTS_FILE
    elif (path.is_dir() or path.name in PEFT_WEIGHTS_FILES) and (weights := peft_weights(folder)):
        path, files, config = weights, [weights], peft.read_config(folder)
        peft.refuse_variants(folder / PEFT_CONFIG_FILE, config)
    elif path.is_dir() and not files:
        raise CheckpointError(
            f"{path}: is a directory without {PEFT_CONFIG_FILE}; name a LoRA file or a PEFT folder"
        )
    # A PEFT folder's scale stands in its config alone.
    header = Header() if config is not None else read_header(files or [path])
    content = Content(path, config, header)
    for key, tensor in (tensors or open_model(path, files or [path])).items():
        content.add(key, tensor)
    return _whole(content, allow_unknown=allow_unknown)


def _whole(content: Content, *, allow_unknown: bool) -> LoRAFile:
    """What has been read. Raises CheckpointError for what cannot be used."""
    unknown, parts = content.checked(allow_unknown=allow_unknown), content.parts()
    found = {module: content.update(module) for module in content.layers}
    updates = {module: update for module, update in found.items() if isinstance(update, Update)}
    keys = {module: content.keys_of(module) for module in updates}
    biases = {module: content.bias(module, update) for module, update in found.items()}
    return LoRAFile(
        content.file,
        updates,
        content.diffs,
        content.whole,
        unknown,
        content.config,
        parts,
        alpha=bool(content.alphas),
        header=content.header,
        notices=content.notices(found),
        is_8_bit=content.is_8_bit,
        keys={module: given for module, given in keys.items() if given != _usual_keys(module, parts)},
        dense={module: update for module, update in found.items() if isinstance(update, DenseUpdate)},
        biases={module: bias for module, bias in biases.items() if bias is not None},
    )


def _own_adapter(directory: Path) -> LoRAFile:
    """The adapter in a directory of litlora, under the names that it has there, which are those of
    most Hugging Face models. Raises CheckpointError for a full model, and for a variant."""
    adapter = litlora.open_directory(directory)
    if not isinstance(adapter, Adapter):
        raise CheckpointError(f"{directory}: is a full model, not an adapter")
    if adapter.rows is not None:
        raise CheckpointError(
            f"{directory}: adds tokens, which need its tokenizer; merge it with scripts/merge_lora.py"
        )
    if not variant_named(adapter.config.variant).is_plain:
        raise CheckpointError(
            f"{directory}: has the variant {adapter.config.variant}; merge it with scripts/merge_lora.py"
        )
    notice = (
        f"{directory}: was trained on {adapter.base.absolute_path}; whether the model is that one is not "
        "checked here, as it is by scripts/merge_lora.py"
    )
    return LoRAFile(
        adapter.file, adapter.updates, whole=adapter.whole, parts=PEFT_PARTS, alpha=True, notices=[notice]
    )


def _usual_keys(module: str, parts: tuple[str, str]) -> tuple[str, str]:
    return f"{module}.{parts[0]}.weight", f"{module}.{parts[1]}.weight"


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

    end, diff = diff_of(name)
    return spelled(name.removesuffix(".weight")), spelled(name.removesuffix(end)) + diff


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
        stored = update_tensors(module, kept, lora.parts, alpha=lora.alpha, dtype=dtype)
        if module in lora.keys:
            given = dict(zip(_usual_keys(module, lora.parts), lora.keys[module], strict=True))
            stored = {given.get(key, key): tensor for key, tensor in stored.items()}
        tensors |= stored
    tensors |= {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in (lora.diffs | lora.whole).items()
    }
    if lora.config is None:
        metadata, dropped = written(lora.path, lora.header, lora.updates)
        if not TRAINING_HASHES.isdisjoint(dropped):
            tensors = dict(sorted(tensors.items()))
            metadata |= training_hashes(tensors, metadata)
            dropped = [name for name in dropped if name not in metadata]
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
