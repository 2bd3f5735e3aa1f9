"""Hugging Face model folders: opened in place, and written complete.

A folder is a `config.json` with one or many `*.safetensors` or `pytorch_model*.bin`, the many
listed in an index.
"""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.config import CONFIG_FILE, ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.chat_template import add_template
from litlora.formats.families import (
    HF_CONFIG_FILE,
    adapt_config,
    is_own,
    load_config,
    load_storage,
    multimodal_of,
    read_config,
    write_config,
)
from litlora.formats.folder import weight_files
from litlora.formats.full import FullModel
from litlora.formats.layout import layout, unused
from litlora.formats.parts import Parts, divide
from litlora.formats.through_transformers import adapt_config as adapt_through
from litlora.formats.through_transformers import file_tensors, read_tensors
from litlora.formats.through_transformers import load_config as load_through
from litlora.frozen.few_bits import Quantized
from litlora.frozen.stored import find_stored
from litlora.model import shorten
from litlora.prompts import STYLE_FILE
from litlora.stop_tokens import name_stops, stops_of, with_stops
from litlora.storage.dtypes import dtype_name
from litlora.storage.tensors import open_tensors, save_safetensors
from litlora.storage.untrusted import has_file, own_file, read_json_object
from litlora.tokenizer import GENERATION_FILE, Tokenizer, find_sidecars, read_settings
from litlora.transformers_config import Architecture, TransformersConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def architecture_in(directory: Path) -> tuple[str | None, Architecture]:
    """(the family, the architecture) of the config.json in a directory; None for a model that runs
    through transformers. The message of a CheckpointError begins with the file's path."""
    is_ours = is_own(read_json_object(directory / HF_CONFIG_FILE, "a Hugging Face folder needs it"))
    return load_config(directory) if is_ours else (None, load_through(directory))


def open_folder(directory: Path) -> FullModel:
    """The model in a folder, under our names.

    The tensors are views of the mapped files, with two exceptions: fused tensors whose parts are
    interleaved (GPT-NeoX, Falcon) are copied, and tensors in few bits are dequantised when they are
    read. Raises CheckpointError for a missing shard, an index that does not fit, and duplicate
    or misshapen tensors.
    """
    kind, config = architecture_in(directory)
    file, shards = weight_files(directory)
    theirs: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    for shard, listed in shards.items():
        tensors = open_tensors(shard)
        if twice := [name for name in tensors if name in theirs]:
            raise CheckpointError(
                f"{shard}: {twice[0]} is also in {where[twice[0]].name}; a tensor must be in one shard only"
            )
        if absent := sorted(listed - tensors.keys()):
            raise CheckpointError(
                f"{shard}: lacks {absent[0]}, which {file.name} lists; copy the folder again"
            )
        theirs |= tensors
        where |= dict.fromkeys(tensors, shard)
    if isinstance(config, TransformersConfig):
        return _through(directory, file, theirs, config, tuple(shards))
    theirs = find_stored(theirs, where, load_storage(directory))
    try:
        theirs, parts = divide(file, read_json_object(directory / HF_CONFIG_FILE), theirs)
        theirs, left_out = _without_unused(kind, config, theirs)
        names = layout(kind, config)
        ours, apart = names.read(theirs), names.is_apart(theirs)
        if config.tie_word_embeddings:
            ours, config = _tied(ours, config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    beside = {"parts": parts, "apart": apart, "left_out": left_out}
    return FullModel(directory, file, ours, config, shards=tuple(shards), **beside).checked()


def _without_unused(
    kind: str, config: ModelConfig, tensors: dict[str, Tensor | Quantized]
) -> tuple[dict[str, Tensor | Quantized], tuple[str, ...]]:
    """(the tensors without those that no model here has, what is said of these)."""
    said = []
    for what, names in unused(kind, config).items():
        found = [name for name in tensors if names.fullmatch(name)]
        if found:
            size = sum(tensors[name].nbytes for name in found)
            said.append(f"{what} ({shorten(found, 1)}; {size / 1e6:,.1f} MB)")
            tensors = {name: tensor for name, tensor in tensors.items() if name not in set(found)}
    return tensors, tuple(said)


def _through(
    directory: Path,
    file: Path,
    theirs: dict[str, Tensor],
    config: TransformersConfig,
    shards: tuple[Path, ...],
) -> FullModel:
    """A model that runs through transformers, from the tensors of its folder."""
    try:
        ours, config = read_tensors(config, theirs)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return FullModel(directory, file, ours, config, shards=shards).checked()


def _tied(
    ours: dict[str, Tensor | Quantized], config: ModelConfig
) -> tuple[dict[str, Tensor | Quantized], ModelConfig]:
    """The tensors with the embedding only, which serves as the head, too. A head that is not a copy
    of it stays, and the config says so: transformers does not tie them either. Raises
    CheckpointError if only one of them is in few bits, which does not tell whether they are tied."""
    head, embedding = ours.get(HEAD), ours.get(EMBEDDING)
    if head is not None and embedding is not None and not _same(head, embedding):
        if not (isinstance(head, Tensor) and isinstance(embedding, Tensor)):
            raise CheckpointError(
                f"the output head or the embedding is in few bits, and {HF_CONFIG_FILE} says "
                "tie_word_embeddings; set that to false to use both as they are"
            )
        return ours, dataclasses.replace(config, tie_word_embeddings=False)
    rest = {name: tensor for name, tensor in ours.items() if name != HEAD}
    return (rest if embedding is not None or head is None else {EMBEDDING: head, **rest}), config


def _same(one: Tensor | Quantized, other: Tensor | Quantized) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False  # one of them was rounded to few bits
    return one.data_ptr() == other.data_ptr() or (one.dtype == other.dtype and torch.equal(one, other))


def write_folder(
    directory: Path,
    tensors: dict[str, Tensor],
    config: Architecture,
    sources: list[Path],
    max_shard_size: int,
    base: FullModel,
) -> str:
    """Write a complete folder: config.json, tokenizer, chat template, generation config and
    weights; returns a line that describes it.

    The files beside the weights come from `sources`, as `find_sidecars` finds them. A config.json
    among them is used if it describes this model, except for the vocabulary's size and whether the
    head is tied; otherwise one is written from `config`. Both it and the generation config name
    every token that the model was taught to end its answers with. A model without a chat template gets one
    that asks in the prompt style of its training. What `base`, which the tensors were made from, has
    beside its language model goes along, and its experts lie as they did there.
    """
    files = {file.name: file for file in find_sidecars(sources)}
    tokenizer = Tokenizer(sources)
    styles = [own_file(place / STYLE_FILE) for place in sources if has_file(place / STYLE_FILE)]
    for file in (*files.values(), *styles[:1]):
        shutil.copyfile(file, directory / file.name)
    hint = add_template(directory, sources, tokenizer)
    values, origin = _config_of(files.get(HF_CONFIG_FILE), config, base.parts)
    parts = base.parts if multimodal_of(values) is not None else None
    stops = stops_of(sources, tokenizer)
    values = with_stops(values, stops)
    [(dtype, _)] = Counter(tensor.dtype for tensor in tensors.values()).most_common(1)
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype_name(dtype)
    write_json(directory / HF_CONFIG_FILE, values)
    if GENERATION_FILE not in files:
        write_json(directory / GENERATION_FILE, {"eos_token_id": sorted(tokenizer.stop_ids)})
    name_stops(directory, stops)
    settings = read_settings(files.get("tokenizer_config.json"))
    if "tokenizer_class" not in settings:  # otherwise AutoTokenizer takes the architecture's class
        settings = {
            "eos_token": tokenizer.token(tokenizer.eos_id),
            **settings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        write_json(directory / "tokenizer_config.json", settings)
    if isinstance(config, TransformersConfig):
        write_weights(directory, file_tensors(config, tensors), config, config.model_type, max_shard_size)
    else:
        kind = read_config(values)[0]
        write_weights(directory, tensors, config, kind, max_shard_size, parts, base.apart)
    return f"{values['architectures'][0]}, {HF_CONFIG_FILE} {origin}{hint}"


def _config_of(
    original: Path | None, config: Architecture, parts: Parts | None
) -> tuple[dict[str, Any], str]:
    """(the config.json to write, where it comes from)."""
    values = read_settings(original)
    if isinstance(config, TransformersConfig):
        own = adapt_through(values, config)
        same = all(own.get(name) == value for name, value in values.items() if name in config.settings)
        return own, f"as in {original}" if values and same else f"made from {CONFIG_FILE}"
    adapted = adapt_config(values, config) if values else None
    whole = values and multimodal_of(values) is not None
    if adapted is not None and not (whole and parts is None):
        return adapted, f"as in {original}"
    origin = "made from model_config.yaml"
    if whole:
        why = "they are not beside the weights" if parts is None else "the language model is another one now"
        origin += f", without the other parts of {multimodal_of(values).architecture}: {why}"
    return {**write_config(config), "eos_token_id": None}, origin


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    directory: Path,
    tensors: dict[str, Tensor],
    config: Architecture,
    model_type: str,
    max_shard_size: int,
    parts: Parts | None = None,
    apart: bool = False,
) -> None:
    """Write our tensors, and the parts beside them if there are any, as `model.safetensors`, or as
    shards with an index, each of at most `max_shard_size` bytes or one tensor.

    Fused tensors are joined again, but experts where they may be `apart`, as `FullModel.apart`; those
    of one shard are in memory at a time.
    """
    names = layout(model_type, config)

    def written(ours: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        theirs = names.write(ours, apart=apart)
        return theirs if parts is None else parts.named(theirs)

    sizes = {
        name: tensor.nbytes
        for name, tensor in written({name: tensor.to("meta") for name, tensor in tensors.items()})
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    stream = iter(written(tensors))
    umask = os.umask(0)
    os.umask(umask)
    mode = 0o666 & ~umask
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        save_safetensors(
            directory / file,
            {name: tensor.detach().contiguous() for name, tensor in islice(stream, len(shard))},
            {"format": "pt"},
        )
        (directory / file).chmod(mode)  # safetensors makes its files unreadable for others
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
