"""Hugging Face folders of models that are not litlora's own: their tensors under the names of
transformers' modules, and back under those of its files."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats.families import HF_CONFIG_FILE, architecture_of, why_not_covered
from litlora.formats.layout import NOT_WEIGHTS
from litlora.model.through_transformers import expected_tensors, skeleton, tied_names
from litlora.storage.untrusted import read_json_object
from litlora.transformers_config import TransformersConfig, causal_class


def read_config(values: dict[str, Any]) -> TransformersConfig:
    """The architecture of a config.json. Raises CheckpointError for one that transformers does not
    have as a causal decoder, or only with code beside the weights."""
    kind, named = values.get("model_type"), architecture_of(values)
    config = TransformersConfig(values)
    built = causal_class(kind)
    if built is None:
        why = f"{why_not_covered(kind, named, values)}; transformers has no causal decoder of this type"
    elif named not in (None, built):
        why = f"through transformers only {built} of this type runs"
    if built is None or named not in (None, built):
        raise CheckpointError(f"architecture {named or kind!r} (model_type {kind!r}) is not covered: {why}")
    if values.get("quantization_config"):
        raise CheckpointError(
            f"architecture {built}: it runs through transformers, with weights in 16 or 32 bits alone; these "
            "are quantized"
        )
    return config


def load_config(directory: Path) -> TransformersConfig:
    """The architecture in a directory. The message of a CheckpointError begins with the file's
    path."""
    path = directory / HF_CONFIG_FILE
    try:
        return read_config(read_json_object(path, "a Hugging Face folder needs it"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_tensors(
    config: TransformersConfig, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], TransformersConfig]:
    """The tensors of a folder under the names of the model's modules, and the architecture: with an
    output head of its own, if the folder holds one that differs from the embedding.

    They are the mapped tensors themselves, but for those that transformers joins (the experts of a
    layer), which are copied. Raises CheckpointError for names that it cannot place.
    """
    if (least := config.least_modules) > len(tensors):  # before so many are built
        raise CheckpointError(
            f"holds {len(tensors)} weights; its configuration describes {least:,} modules or more"
        )
    inner = skeleton(config, torch.float32, with_buffers=False)
    expected, tied = inner.state_dict(), tied_names(inner)
    ignored = [name for name in tensors if name not in expected and NOT_WEIGHTS.search(name)]
    found = _converted(inner, {name: t for name, t in tensors.items() if name not in ignored})
    for name, source in tied.items():
        head, embedding = found.get(name), found.get(source)
        if head is None:
            continue
        if embedding is None:
            found[source] = found.pop(name)
        elif head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding):
            del found[name]
        else:
            return found, config.untied()
    order = expected_tensors(inner)
    return {name: found[name] for name in (*order, *(found.keys() - order.keys())) if name in found}, config


def _converted(inner: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the modules, as transformers converts them when it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    expected, changes = inner.state_dict(), get_model_conversion_mapping(inner)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, Tensor] = {}
    joined: dict[str, Any] = {}
    for name in sorted(tensors, key=_natural):
        if name in expected:
            target, pattern = name, None
        else:
            prefix = inner.base_model_prefix
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if pattern is not None:
            one = joined.setdefault(target, copy.deepcopy(by_pattern[pattern]))
            one.add_tensor(target, name, pattern, tensors[name])
        elif target in found:
            raise CheckpointError(f"two tensors are both read as {target}")
        else:
            found[target] = tensors[name]
    for target, one in joined.items():
        for name, tensor in one.convert(target, model=inner, config=inner.config).items():
            found[name] = tensor[0] if isinstance(tensor, list) else tensor
    return found


def file_tensors(config: TransformersConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `read_tensors`: by the names of files. What transformers had joined is apart
    again, as views."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(skeleton(config, torch.float32, with_buffers=False), dict(tensors))


def adapt_config(values: dict[str, Any], config: TransformersConfig) -> dict[str, Any]:
    """The config.json to write: the base's own, where it describes this very model, else the facts."""
    kept = {name: value for name, value in values.items() if name != "auto_map"}
    try:
        if read_config(kept) == config:
            return kept
    except CheckpointError:
        pass
    return {"architectures": [causal_class(config.model_type)], **config.settings}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts experts.2 before experts.10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
