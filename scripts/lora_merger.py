r"""Merge LoRA files into a model's files, a tensor at a time, whatever model it is.

    python scripts/lora_merger.py --source-model base.safetensors --lora-model lora.safetensors \
        --output merged.safetensors
    python scripts/lora_merger.py --source-model base/ --lora-model a.pt b.pt --lora-type pytorch \
        --weights 0.7 0.3 --output merged.safetensors
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.cli import run
from litlora.console import say
from litlora.errors import CheckpointError
from litlora.formats import PEFT_CONFIG_FILE, WEIGHTS_FILE
from litlora.formats.folder import WRITTEN_SUFFIXES, files_beside, model_files
from litlora.paths import output_file
from litlora.settings import LoRAMerger, num_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from litlora.adapters.apply import Addition
    from litlora.formats.lora_files import LoRAFile


def main(settings: LoRAMerger) -> None:
    source, loras = Path(settings.source_model), [Path(path) for path in settings.lora_model]
    files = model_files(source, settings.source_type, "source_model")
    lora_files = {
        path: [path] if _is_adapter(path) else model_files(path, settings.lora_type, "lora_model")
        for path in loras
    }
    output = output_file(settings.output, WRITTEN_SUFFIXES[settings.output_format], [source, *loras])

    from litlora.adapters.apply import match
    from litlora.adapters.merged_model import MergedModel
    from litlora.formats.lora_files import read_lora
    from litlora.formats.model_files import carried_metadata, open_model, write_model
    from litlora.formats.scaled import shapes
    from litlora.model import shorten
    from litlora.storage.dtypes import DTYPES

    # Without a dtype, a tensor keeps the form in which it is stored.
    model, dtype = open_model(source, files), DTYPES.get(settings.output_dtype)
    weights = settings.weights or [1.0] * len(loras)
    read = [
        (read_lora(path, files=lora_files[path], allow_unknown=True), settings.alpha * weight)
        for path, weight in zip(loras, weights, strict=True)
    ]
    for notice in (notice for lora, _ in read for notice in lora.notices):
        say(f"note: {notice}")
    additions, unmatched = match(read, shapes(model))
    if unmatched and not settings.allow_unmatched:
        raise CheckpointError(
            f"{shorten(unmatched, 4, '; ')}{_known_names(read)}; leave them out with --allow_unmatched"
        )
    if not additions:
        raise CheckpointError(
            f"{', '.join(map(str, loras))}: nothing of it fits {source}; is it for another model?"
        )
    tied = {lora.path for lora, _ in read if lora.config and lora.config["ensure_weight_tying"]}
    _check_ties(source, model, additions, tied)
    for line in unmatched:
        say(f"left out: {line}")
    for file in files_beside(source, settings.source_type, files):
        say(f"left out: {file}: the index of the folder does not list it")
    merged = MergedModel(model, additions, dtype)
    metadata, dropped = carried_metadata(files, dequantised=dtype is not None)
    largest = num_bytes(settings.max_shard_size) if settings.max_shard_size else None
    read_files = [*files, *(file for each in lora_files.values() for file in each)]
    written = write_model(
        output,
        settings.output_format,
        merged.sizes,
        merged.tensor,
        largest,
        inputs=read_files,
        metadata=metadata,
    )
    if dropped:
        say(f"note: left out of the header, as it no longer holds: {shorten(dropped)}")
    if settings.output_format == "pytorch" and (lost := [name for name in metadata if name != "format"]):
        say(f"note: left out, as torch files have no header: {shorten(lost)}")
    _sum_up(settings, model, additions, written)


def _known_names(read: "list[tuple[LoRAFile, float]]") -> str:
    """Of which models the names of both layouts are known, if files are for a diffusion model."""
    from litlora.formats.diffusion_names import FLAT_PREFIXES, KNOWN, UNET

    prefixes = (*FLAT_PREFIXES, UNET, "transformer.", "diffusion_model.")
    if not any(key.startswith(prefixes) for lora, _ in read for key in lora.updates | lora.dense):
        return ""
    return f"; which names of diffusers and of the original mean one layer is known of {KNOWN} only"


def _check_ties(
    source: Path, model: "Mapping[str, Tensor]", changed: "Mapping[str, list[Addition]]", tied: set[Path]
) -> None:
    """Raise CheckpointError for an embedding that changes while the model's output head has no
    tensor of its own: whoever loads the result would give the head the change, too. That is right of
    the files in `tied`, and of rows of tokens; then a head with an equal tensor is a question."""
    import torch

    from litlora.lora.dense import ReplacedRows

    heads = ("lm_head.weight", "embed_out.weight", "score.weight", "classifier.weight")
    is_embedding = re.compile(r"(.*\.)?(embed_tokens|wte)\.weight")
    embedding = next(filter(is_embedding.fullmatch, changed), None)
    if embedding is None:
        return
    head = next((name for name in model if name.endswith(heads)), None)
    for_both = [
        isinstance(addition.value, ReplacedRows) or addition.file in tied for addition in changed[embedding]
    ]
    if head is None and not all(for_both):
        raise CheckpointError(
            f"{source}: {embedding} changes, and an output head tied to it would change with it, which the "
            "adapter did not learn; scripts/merge_lora.py unties them"
        )
    if any(for_both) and head not in (None, *changed) and torch.equal(model[head], model[embedding]):
        raise CheckpointError(
            f"{source}: {embedding} changes, and {head} holds the same values: whether the two are tied, the "
            "files do not tell; use scripts/merge_lora.py"
        )


def _is_adapter(path: Path) -> bool:
    """Whether it is an adapter's folder of PEFT, mlx-lm or litlora, or the file of the last, which
    say themselves what they are made of."""
    if path.name == WEIGHTS_FILE and path.is_file():
        return True
    return any((path / name).is_file() for name in (PEFT_CONFIG_FILE, WEIGHTS_FILE))


def _sum_up(
    settings: LoRAMerger,
    model: "Mapping[str, Tensor]",
    additions: "Mapping[str, list[Addition]]",
    written: list[Path],
) -> None:
    """Say what was added to what, and where the result is."""
    from torch import Tensor

    from litlora.formats.scaled import ScaledModel
    from litlora.storage.dtypes import DTYPES, dtype_name

    others = sum(isinstance(addition.value, Tensor) for each in additions.values() for addition in each)
    updates = sum(map(len, additions.values())) - others
    scaled = isinstance(model, ScaledModel)
    stored = model.stored if scaled else model
    before = {tensor.dtype for name, tensor in stored.items() if name in model and tensor.is_floating_point()}
    converted = before - {DTYPES.get(settings.output_dtype)}
    if converted and settings.output_dtype != "fp8":
        kinds = ", ".join(sorted(dtype_name(dtype) for dtype in converted))
        without = f" without its {len(stored) - len(model)} scales and the like" if scaled else ""
        say(
            f"note: the model's {kinds} is written as {settings.output_dtype}{without}; "
            "--output_dtype chooses another"
        )
    say(f"merged: {updates} updates and {others} whole tensors into {len(additions)} of {len(model)} tensors")
    size = sum(file.stat().st_size for file in written)
    say(f"result: {written[0]} ({size:,} bytes in {len(written)} file(s))")


if __name__ == "__main__":
    run(main, LoRAMerger)
