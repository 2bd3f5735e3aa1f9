"""Hugging Face model folders: opened in place, and written complete.

A folder is a `config.json` with one or many `*.safetensors` or `pytorch_model*.bin`, the many listed in an index.
"""

import json
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from litlora.config import ModelConfig
from litlora.convert.families import HF_CONFIG_FILE, load_config
from litlora.convert.files import open_tensors
from litlora.convert.folder import weight_files
from litlora.convert.layout import layout
from litlora.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_folder(directory: Path) -> tuple[dict[str, Tensor], ModelConfig, Path]:
    """(tensors under our names, ModelConfig, the file that an error about a weight should name).

    The tensors are views of the mapped files, but for fused ones whose parts are interleaved (GPT-NeoX, Falcon), which are
    copied. Raises CheckpointError for a missing shard, an index that does not fit, duplicate or misshapen tensors.
    """
    kind, config = load_config(directory)
    file, shards = weight_files(directory)
    theirs: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    for shard, listed in shards.items():
        tensors = open_tensors(shard)
        if twice := [name for name in tensors if name in theirs]:
            raise CheckpointError(f"{shard}: {twice[0]} is also in {where[twice[0]].name}; which one counts is not known")
        if absent := sorted(listed - tensors.keys()):
            raise CheckpointError(f"{shard}: lacks {absent[0]}, which {file.name} lists; copy the folder again")
        theirs |= tensors
        where |= dict.fromkeys(tensors, shard)
    try:
        ours = layout(kind, config).read(theirs)
        if config.tie_word_embeddings:
            ours = _without_tied_head(ours)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return ours, config, file


def _without_tied_head(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embedding serves as the head and is stored once; a second copy must be one."""
    head, embedding = ours.get(HEAD), ours.get(EMBEDDING)
    if head is not None and embedding is not None and head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise CheckpointError(f"the output head differs from the embedding, though {HF_CONFIG_FILE} says tie_word_embeddings")
    rest = {name: tensor for name, tensor in ours.items() if name != HEAD}
    return rest if embedding is not None or head is None else {EMBEDDING: head, **rest}


def write_weights(directory: Path, tensors: dict[str, Tensor], config: ModelConfig, model_type: str, max_shard_size: int) -> None:
    """Write our tensors as `model.safetensors`, or as shards of at most `max_shard_size` bytes (or one tensor) with an index.

    Fused tensors are joined again; one shard's worth of them is in memory at a time.
    """
    names = layout(model_type, config)
    sizes = {name: tensor.nbytes for name, tensor in names.write({name: tensor.to("meta") for name, tensor in tensors.items()})}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    stream = names.write(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {name: tensor.detach().contiguous() for name, tensor in islice(stream, len(shard))}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
