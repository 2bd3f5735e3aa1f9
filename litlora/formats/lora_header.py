"""What the header of a LoRA file says besides its tensors, `__metadata__` in the format's words:
read, and carried on to what is made of the file.

    lora_adapter_metadata   diffusers: JSON of PEFT's LoraConfig of each part of a model, its settings
                            prefixed with the part's name (`transformer.r`, `unet.alpha_pattern`), or
                            without a prefix for the only part. The file then holds no `.alpha`
    ss_*, sshs_*            kohya: how it was trained; hashes of its tensors
    modelspec.*             Stability's model specification

kohya's loaders take a layer's scale from its `.alpha` alone, and 1 without it; ss_network_alpha
describes, and does not scale.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError
from litlora.formats import peft, peft_config
from litlora.lora.update import Update, scale_of
from litlora.storage.tensors import read_metadata
from litlora.storage.untrusted import MAX_JSON_BYTES, parse_json

ADAPTERS = "lora_adapter_metadata"
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Hashes of the tensors: other tools compute them again where they are missing."""
TRAINING_HASHES = {"sshs_model_hash", "sshs_legacy_hash"}
"""Those of kohya's, which are brought up to date."""
KOHYA_DIM, KOHYA_ALPHA, KOHYA_ARGS = "ss_network_dim", "ss_network_alpha", "ss_network_args"
_SIZES_IN_ARGS = (
    *("conv_dim", "conv_alpha", "block_dims", "block_alphas"),
    *("conv_block_dims", "conv_block_alphas"),
)
_ALPHAS = ("alpha", "lora_alpha", "network_alpha", "linear_alpha")
_SCALES = ("scale", "lora_scale", "scaling", "lora_scaling", "network_scale", "multiplier")
_DESCRIPTIONS = ("ss_", "sshs_", "modelspec.")
"""Entries that describe, and that no loader scales by."""
_DENOISERS = ("transformer", "unet")
"""The parts whose layers may also stand without a prefix, or with ComfyUI's."""
_COMFYUI = "diffusion_model."


@dataclass(frozen=True)
class Header:
    """What a LoRA file's header says."""

    metadata: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """LoraConfig's settings as they are written, by the part of the model."""
    checked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same with PEFT's defaults, checked."""
    dropped: tuple[str, ...] = ()
    """Entries that were left out because they no longer hold."""

    def scale(self, file: Path, module: str, rank: int) -> float | None:
        """The factor in front of B A of a layer; None if the header does not tell.

        Raises CheckpointError for a layer of another rank, or of a part that it does not describe.
        """
        if not self.checked:
            return None
        part = self.part_of(file, module)
        config, name = self.checked[part], _inside(module, part)
        stated = peft.by_pattern(config["rank_pattern"], name, config["r"])
        if rank != stated:
            raise CheckpointError(f"{file}: {module} has rank {rank}; {ADAPTERS} in its header says {stated}")
        alpha = float(peft.by_pattern(config["alpha_pattern"], name, config["lora_alpha"]))
        return scale_of(alpha, rank, rslora=config["use_rslora"])

    def is_rslora(self, file: Path, module: str) -> bool:
        """Whether the header divides a layer's alpha by the root of its rank."""
        return bool(self.checked) and self.checked[self.part_of(file, module)]["use_rslora"]

    def uses_dora(self, file: Path, module: str) -> bool:
        """Whether the header says that a layer has DoRA's magnitude."""
        return bool(self.checked) and self.checked[self.part_of(file, module)]["use_dora"]

    def has_bias(self, file: Path, module: str) -> bool:
        """Whether the header says that B of a layer has a bias."""
        return bool(self.checked) and self.checked[self.part_of(file, module)]["lora_bias"]

    def part_of(self, file: Path, module: str) -> str:
        """The part of the model, in `adapters`, that a layer belongs to."""
        found = [part for part in self.checked if part and module.startswith(f"{part}.")]
        if found:
            return max(found, key=len)
        if "" in self.checked:
            return ""
        parts = list(self.checked)
        is_elsewhere = module.startswith("text_encoder")
        if len(parts) == 1 and parts[0] in _DENOISERS and not is_elsewhere:
            config = self.checked[parts[0]]
            if module.startswith(_COMFYUI) and (config["rank_pattern"] or config["alpha_pattern"]):
                raise CheckpointError(
                    f"{file}: {module}: {ADAPTERS} in its header has patterns for the layers of "
                    f"{parts[0]} by diffusers' names, and the file has other names; save it with diffusers"
                )
            return parts[0]
        raise CheckpointError(
            f"{file}: {module}: {ADAPTERS} in its header describes {', '.join(sorted(parts))} only, so its "
            "alpha is not known; add it there, or store .alpha"
        )


def _inside(module: str, part: str) -> str:
    """A layer's name within its part of the model."""
    return module.removeprefix(f"{part}." if part else "").removeprefix(_COMFYUI)


# ---- reading


def read_header(files: Iterable[Path]) -> Header:
    """The header of a LoRA that consists of these files. Raises CheckpointError for adapter metadata
    that cannot be used, or that two files tell differently."""
    metadata: dict[str, str] = {}
    adapters, checked = {}, {}
    for file in files:
        found = read_metadata(file)
        if found.get(ADAPTERS, metadata.get(ADAPTERS)) != metadata.get(ADAPTERS, found.get(ADAPTERS)):
            raise CheckpointError(f"{file}: its {ADAPTERS} differs from that of the other files")
        metadata = {**found, **metadata}
        if ADAPTERS in found:
            where = f"{file}, {ADAPTERS} in its header"
            adapters = _adapters(where, found[ADAPTERS])
            checked = {part: _checked(where, part, values) for part, values in adapters.items()}
    return Header(metadata, adapters, checked)


def _adapters(where: str, text: str) -> dict[str, dict[str, Any]]:
    """The settings of each part of the model."""
    try:
        values = parse_json(text) if len(text) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{where}: must hold a JSON object with r and lora_alpha")
    adapters: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, key = name.rpartition(".")
        adapters.setdefault(part, {})[key] = value
    return adapters


def _checked(where: str, part: str, values: dict[str, Any]) -> dict[str, Any]:
    """LoraConfig's settings of one part. Raises CheckpointError for those that mean more than A, B and
    a scale."""
    where = f"{where}, {part or 'without a prefix'}"
    if missing := [name for name in ("r", "lora_alpha") if values.get(name) is None]:
        raise CheckpointError(f"{where}: lacks {missing[0]}, without which the scale is not known")
    config = peft_config.checked_config(where, {"peft_type": "LORA", **values})
    peft_config.refuse_variants(where, config, is_folder=False)
    return config


def check_understood(file: Path, header: Header, ranks: Mapping[str, int]) -> list[str]:
    """Lines about a header whose file has neither `.alpha` nor adapter metadata: its layers, of these
    ranks, have scale 1. Raises CheckpointError for an entry that contradicts this."""
    said = [entry for key, value in header.metadata.items() for entry in _scale_entries(key, value)]
    for name, number in said:
        is_alpha = name.rpartition(".")[2].lower() in _ALPHAS
        if any(not math.isclose(number, rank if is_alpha else 1) for rank in ranks.values()):
            raise CheckpointError(
                f"{file}: its header says {name} {number:g}, by a rule that is not known here, and it holds "
                f"no .alpha; store .alpha for each layer, or {ADAPTERS} as diffusers does"
            )
    alpha = _number(header.metadata.get(KOHYA_ALPHA))
    if alpha is None or all(math.isclose(alpha, rank) for rank in ranks.values()):
        return []
    return [
        f"{file}: its header says {KOHYA_ALPHA} {alpha:g}, but it holds no .alpha; its scale is 1, as in "
        "kohya's own loader"
    ]


def _scale_entries(key: str, value: str) -> list[tuple[str, float]]:
    """What an entry says that looks like a scale or an alpha: itself, or what stands in its JSON."""
    if key.startswith(_DESCRIPTIONS):
        return []
    if key.lower() in (*_ALPHAS, *_SCALES):
        try:
            return [(key, float(value))]
        except ValueError:
            return []
    if not value.lstrip().startswith("{") or len(value) > MAX_JSON_BYTES:
        return []
    try:
        inner = parse_json(value)
    except (ValueError, RecursionError):
        return []
    return [(f"{key}.{name}", number) for name, number in _alphas_in(inner)]


def _alphas_in(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of each alpha in an object, however deep: objects hold objects, as those of a
    configuration of several adapters do."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", number) for inner, number in _alphas_in(value))
        elif name.lower() in _ALPHAS and type(value) in (int, float):
            yield name, float(value)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# ---- carrying on


def in_common(headers: list[Header]) -> Header:
    """What a combination of the files with these headers may say: what all of them say. If the
    first has adapter metadata, so does the combination, for every part of the model."""
    first = headers[0]
    names = dict.fromkeys(name for header in headers for name in header.metadata)
    kept = {
        name: value
        for name, value in first.metadata.items()
        if name in (ADAPTERS, KOHYA_DIM, KOHYA_ALPHA)
        or all(header.metadata.get(name) == value for header in headers)
    }
    dropped = tuple(name for name in names if name not in kept and name != ADAPTERS)
    if not first.adapters:
        return replace(first, metadata=kept, dropped=dropped)
    adapters = {part: values for header in reversed(headers) for part, values in header.adapters.items()}
    checked = {part: values for header in reversed(headers) for part, values in header.checked.items()}
    return Header(kept, adapters, checked, dropped)


def written(path: Path, header: Header, updates: Mapping[str, Update]) -> tuple[dict[str, str], list[str]]:
    """(the metadata of a file that holds these updates instead, the entries that no longer hold and
    are left out): ranks and alphas are brought up to date; hashes are dropped, whoever writes the
    tensors knows the new ones."""
    metadata = {name: value for name, value in header.metadata.items() if name not in HASHES}
    dropped = [*header.dropped, *(name for name in header.metadata if name in HASHES)]
    if header.adapters:
        metadata[ADAPTERS] = _written_adapters(path, header, updates)
    ranks = {update.rank for update in updates.values()}
    alphas = {float(f"{update.scale * update.rank:.9g}") for update in updates.values()}
    if KOHYA_DIM in metadata and ranks:
        # kohya's own resizing writes "Dynamic" where layers differ.
        metadata[KOHYA_DIM] = str(*ranks) if len(ranks) == 1 else "Dynamic"
    if KOHYA_ALPHA in metadata and alphas:
        metadata[KOHYA_ALPHA] = str(*alphas) if len(alphas) == 1 else "Dynamic"
    if sizes := [name for name in _SIZES_IN_ARGS if name in (args := _object(metadata.get(KOHYA_ARGS)))]:
        metadata[KOHYA_ARGS] = json.dumps({name: args[name] for name in args if name not in sizes})
        dropped += [f"{KOHYA_ARGS}.{name}" for name in sizes]
    return metadata, dropped


def _object(text: str | None) -> dict[str, Any]:
    """The JSON object in a text; an empty one if it is something else."""
    try:
        value = parse_json(text or "")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _written_adapters(path: Path, header: Header, updates: Mapping[str, Update]) -> str:
    """lora_adapter_metadata, in diffusers' form, for these updates."""
    settings: dict[str, Any] = {}
    layers: dict[str, dict[str, Update]] = {part: {} for part in header.adapters}
    for module, update in updates.items():
        part = header.part_of(path, module)
        layers[part][_inside(module, part)] = update
    for part, values in header.adapters.items():
        values = values | (peft.stated(layers[part]) if layers[part] else {})
        if isinstance(values.get("target_modules"), list):
            values["target_modules"] = _targets(values["target_modules"], layers[part])
        prefix = f"{part}." if part else ""
        settings |= {f"{prefix}{name}": value for name, value in values.items()}
    return json.dumps(settings, indent=2, sort_keys=True)


def _targets(targets: list[Any], layers: Iterable[str]) -> list[Any]:
    """target_modules that name all of these layers: the same if they do so already."""
    ends = [f".{target}" for target in targets]
    missing = sorted(name for name in layers if not f".{name}".endswith(tuple(ends)))
    return [*targets, *missing]
