"""LoRA files of other tools, whatever model they are for: read into plain updates, and written back
under the same names.

    comfyui   <module>.lora_down.weight (r, in), .lora_up.weight (out, r); the modules of a diffusion model behind `diffusion_model.`
    kohya     the same with <module>.alpha; dots of the module's name are underscores, behind `lora_unet_`
    peft      a folder: adapter_config.json, and adapter_model.safetensors with base_model.model.<module>.lora_A.weight, .lora_B.weight

Beside the factors a file may hold differences of whole tensors, `.diff` of a weight, `.diff_b` of a
bias, `.diff_m` of a modulation, and a PEFT folder tensors that replace the base's. A convolution's
factors are (r, in, *kernel) and (out, r, 1, ...). A module's name is kept as the file has it,
prefix included: only beside a model is it known which module it means.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILES, peft, peft_weights
from litlora.formats.model_files import open_model
from litlora.lora.update import Update, scale_of
from litlora.settings import check_alpha
from litlora.storage.atomic import replacing_file
from litlora.storage.tensors import at_least_16_bits, write_safetensors

PARTS = ("lora_down", "lora_up")
"""What most tools call A and B."""
PEFT_PARTS = ("lora_A", "lora_B")
SPELLINGS = (PARTS, PEFT_PARTS, ("lora_A.default", "lora_B.default"), ("lora.down", "lora.up"))
"""What A and B are called in a file, one of these for each layer."""
DIFF_OF = {".weight": ".diff", ".bias": ".diff_b", ".modulation": ".diff_m"}
"""What the difference of a tensor is called: of any other, its whole name and .diff."""
DIFFS = tuple(DIFF_OF.values())
_FACTOR = r"(.+)\.(lora_(?:down|up|[AB]|[AB]\.default)|lora\.(?:down|up))\.weight|(.+)\.lora_embedding_([AB])"
_DORA = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")


@dataclass(frozen=True)
class LoRAFile:
    """What a LoRA file or PEFT folder holds."""

    path: Path
    """The file, which an error about its content should name."""
    updates: dict[str, Update]
    """By the module's name."""
    diffs: dict[str, Tensor] = field(default_factory=dict)
    """Differences of whole tensors, by their keys: `<module>.diff`, `.diff_b`, `.diff_m`."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that replace the model's, by their names with PEFT's prefix."""
    unknown: list[str] = field(default_factory=list)
    """Keys that mean nothing to us: whoever goes on without them must say so; they are not
    written."""
    config: dict[str, Any] | None = None
    """adapter_config.json of a PEFT folder."""
    parts: tuple[str, str] = PARTS
    """What the keys call A and B."""
    alpha: bool = False
    """Whether the file tells alpha; if not, its updates have scale 1."""


# ---- reading


def read_lora(path: Path, *, files: list[Path] | None = None, allow_unknown: bool = False) -> LoRAFile:
    """Read a LoRA file (`.safetensors`, or a torch file of tensors), or a PEFT folder or the
    weights' file in one.

    Of another folder, `files` are what it is made of. Tensors are memory-mapped. Raises
    CheckpointError for a broken file, half a pair, factors that do not fit each other, an alpha
    that is no scale, an empty file, DoRA, and, unless `allow_unknown`, for a key that means nothing
    to us.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / PEFT_CONFIG_FILE).is_file() and (path.is_dir() or path.name in PEFT_WEIGHTS_FILES):
        file, config = peft_weights(folder), peft.read_config(folder)
        peft.refuse_variants(folder / PEFT_CONFIG_FILE, config)
        files = [file]
    elif path.is_dir() and not files:
        raise CheckpointError(
            f"{path}: is a directory without {PEFT_CONFIG_FILE}; a LoRA file or a PEFT folder is needed"
        )
    else:
        file, config, files = path, None, files or [path]
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    found = LoRAFile(file, {}, config=config)
    spelled: dict[str, tuple[str, str]] = {}
    embeddings: set[str] = set()
    for key, tensor in open_model(file, files).items():
        if part := re.fullmatch(_FACTOR, key):
            module, name = (part[1], part[2]) if part[1] else (part[3], f"lora_{part[4]}")
            spelling = next(spelling for spelling in SPELLINGS if name in spelling)
            if spelled.setdefault(module, spelling) != spelling:
                raise CheckpointError(
                    f"{file}: {module} has factors of two kinds, {spelled[module][0]} and {spelling[0]}; keep one"
                )
            pairs.setdefault(module, {})["AB"[spelling.index(name)]] = tensor
            embeddings |= {module} if part[3] else set()
        elif key.endswith(".alpha"):
            if tensor.numel() != 1 or not math.isfinite(value := tensor.item()) or value == 0:
                raise CheckpointError(f"{file}: {key} must be one finite number other than 0")
            alphas[key.removesuffix(".alpha")] = float(value)
        elif key.endswith(_DORA) or ".lora_mid." in key:
            raise CheckpointError(
                f"{file}: {key} is not supported: only a plain LoRA's factors, .alpha and differences are"
            )
        elif key.endswith(DIFFS):
            found.diffs[key] = at_least_16_bits(tensor)
        elif config is not None and not re.search(r"\.lora_|\.token_adapter\.", key):
            if ".original_module." not in key:  # what a module was before it was trained, without effect
                found.whole[key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
        else:
            found.unknown.append(key)
    found.unknown.extend(f"{module}.alpha" for module in alphas if module not in pairs)
    if found.unknown and not allow_unknown:
        raise CheckpointError(
            f"{file}: {found.unknown[0]} means nothing to us; factors, .alpha, .diff, .diff_b and .diff_m do"
        )
    for module, pair in pairs.items():
        found.updates[module] = _update(found, module, pair, alphas.get(module), module in embeddings)
    if not (found.updates or found.diffs or found.whole):
        first = f"; its {found.unknown[0]} means nothing to us" if found.unknown else ""
        raise CheckpointError(
            f"{file}: holds no LoRA: no lora_down and lora_up, no lora_A and lora_B, no .diff{first}"
        )
    return replace(found, parts=next(iter(spelled.values()), PARTS), alpha=bool(alphas))


def _update(
    found: LoRAFile, module: str, pair: dict[str, Tensor], alpha: float | None, embedding: bool
) -> Update:
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{found.path}: {module} has only one of its two factors")
    A, B = pair["A"], pair["B"]
    fits = (
        A.ndim >= 2
        and B.ndim in (2, A.ndim)
        and A.size(0) == B.size(1)
        and A.numel()
        and B.numel()
        and B[0, 0].numel() == 1
    )
    if not fits or not (A.is_floating_point() and B.is_floating_point()):
        raise CheckpointError(f"{found.path}: {module}: {tuple(A.shape)} and {tuple(B.shape)} make no update")
    A, B, rank = at_least_16_bits(A), at_least_16_bits(B), A.size(0)
    if found.config is None:
        return Update(A, B, 1.0 if alpha is None else alpha / rank, "embedding" if embedding else "linear")
    config, name = found.config, module.removeprefix(peft.PREFIX)
    if rank != (told := peft.by_pattern(config["rank_pattern"], name, config["r"])):
        raise CheckpointError(f"{found.path}: {module} has rank {rank}; {PEFT_CONFIG_FILE} says {told}")
    alpha = float(peft.by_pattern(config["alpha_pattern"], name, config["lora_alpha"]))
    kind = "embedding" if embedding else "conv1d" if config.get("fan_in_fan_out") else "linear"
    return Update(A, B, scale_of(alpha, rank, rslora=config["use_rslora"]), kind)


# ---- writing


def result_tensors(name: str, result: Update | Tensor, format: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The keys and tensors that comfyui or kohya have for the update, or the whole difference, of
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
    """What comfyui or kohya call the layer whose weight is the tensor `name` of a model, and what
    the difference of that tensor."""

    def spelled(text: str) -> str:
        return f"diffusion_model.{text}" if format == "comfyui" else "lora_unet_" + text.replace(".", "_")

    end = next((end for end in DIFF_OF if name.endswith(end)), "")
    return spelled(name.removesuffix(".weight")), spelled(name.removesuffix(end)) + DIFF_OF.get(end, ".diff")


def as_stored(update: Update, *, alpha: bool, dtype: torch.dtype) -> Update:
    """The update as a file holds it: in `dtype`, and without `alpha` (the format has none) with its
    scale in B."""
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
        told = update.scale * update.rank
        check_alpha(f"{module}.alpha {told:g}", told)
        rounded = torch.tensor(told, dtype=dtype)
        tensors[f"{module}.alpha"] = (
            rounded if rounded.item() == told else torch.tensor(told, dtype=torch.float32)
        )
    return tensors


def write_lora(path: Path, lora: LoRAFile, dtype: torch.dtype) -> None:
    """Write a LoRA in the format that it has: a safetensors file, or, if it has a config, a PEFT
    folder. Appears whole or not at all.

    Of a folder that is there already, the two files are replaced.
    """
    tensors: dict[str, Tensor] = {}
    for module, update in lora.updates.items():
        kept = replace(update, scale=1.0) if lora.config is not None else update  # the config tells the scale
        tensors |= update_tensors(module, kept, lora.parts, alpha=lora.alpha, dtype=dtype)
    tensors |= {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in (lora.diffs | lora.whole).items()
    }
    if lora.config is None:
        with replacing_file(path) as staging:
            write_safetensors(staging, tensors)
        return
    with replacing_file(path / PEFT_WEIGHTS_FILES[0]) as staging:
        write_safetensors(staging, {_peft_key(key, lora): tensor for key, tensor in tensors.items()})
    with replacing_file(path / PEFT_CONFIG_FILE) as staging:
        staging.write_text(json.dumps(peft_config(lora), indent=2) + "\n", encoding="utf-8")


def _peft_key(key: str, lora: LoRAFile) -> str:
    """A layer that has an adapter keeps what else is saved of it, its bias, in its base_layer."""
    module, _, leaf = key.rpartition(".")
    return f"{module}.base_layer.{leaf}" if key in lora.whole and module in lora.updates else key


def peft_config(lora: LoRAFile) -> dict[str, Any]:
    """adapter_config.json for these updates: what lora.config says otherwise stays."""
    names = {module: module.removeprefix(peft.PREFIX) for module in lora.updates}
    ranks = {names[module]: update.rank for module, update in lora.updates.items()}
    alphas = {names[module]: update.scale * update.rank for module, update in lora.updates.items()}
    rank, alpha = _commonest(ranks.values(), 1), _commonest(alphas.values(), 1)
    saved = {name.removeprefix(peft.PREFIX).rpartition(".")[0] for name in lora.whole} - ranks.keys()
    if not ranks:
        raise CheckpointError(
            "no matrix differs, and PEFT loads no adapter without factors; choose another --format"
        )
    if "" in saved:
        raise CheckpointError(
            "a tensor outside of any module differs, and PEFT saves modules only; choose another --format"
        )

    def pattern(name: str) -> str:
        """PEFT takes a name for the end of one, too."""
        return f"^{re.escape(name)}" if any(other.endswith(f".{name}") for other in ranks) else name

    told = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern(name): value for name, value in alphas.items() if value != alpha},
        "modules_to_save": sorted(saved) or None,
        "bias": "lora_only"
        if any(name.rpartition(".")[0] in lora.updates for name in lora.whole)
        else "none",
    }
    return {"target_modules": sorted(ranks)} | (lora.config or {}) | told


def _commonest(values: Iterable[Any], default: Any) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default
