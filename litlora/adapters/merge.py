"""Merging: the weights that an adapter, or a chain of them, stands for."""

import dataclasses

from torch import Tensor

from litlora.checkpoint import Chain, Checkpoint, adapter_modules, whole_tensors
from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.lora import OUTPUT_HEAD, layer_scale, merged_weight, stored_config

HEAD = f"{OUTPUT_HEAD}.weight"
EMBEDDING = "model.embed_tokens.weight"


def merge_chain(chain: Chain) -> tuple[dict[str, Tensor], ModelConfig]:
    """The weights that a chain stands for: every adapter merged, one after the other, in the base's dtype.

    Tensors without an update are the base's own, still memory-mapped.
    """
    tensors, config = chain.base.tensors, chain.config
    for adapter in chain.adapters:
        tensors, config = merge_adapter(tensors, config, adapter)
    return tensors, config


def merge_adapter(base: dict[str, Tensor], config: ModelConfig, adapter: Checkpoint) -> tuple[dict[str, Tensor], ModelConfig]:
    """W + s · B A for every layer of the adapter, each rounded once to W's dtype; tensors that it holds whole replace the base's.

    An update of a tied output head, or of the embedding that it is tied to, unties them: the result has a head of its own,
    and a config that says so. A whole embedding of more or fewer rows changes the vocabulary's size with it. Raises
    CheckpointError for a layer that the base lacks or whose shape differs.
    """
    merged = dict(base)
    lora, modules, whole = stored_config(adapter.meta["lora"]), adapter_modules(adapter.tensors), whole_tensors(adapter.tensors)
    touched = {HEAD, EMBEDDING} & {*(f"{module}.weight" for module in modules), *whole}
    num_rows = whole[EMBEDDING].size(0) if EMBEDDING in whole else config.vocab_size
    # An embedding that was resized keeps its tie: a head of the old size would not fit it.
    if config.tie_word_embeddings and touched and not (touched == {EMBEDDING} and num_rows != config.vocab_size):
        merged[HEAD], config = base[EMBEDDING], dataclasses.replace(config, tie_word_embeddings=False)
    for name, tensor in whole.items():
        if name not in merged:
            raise CheckpointError(f"{adapter.file}: replaces {name}, which the base does not have")
        resized = name in (HEAD, EMBEDDING) and tensor.shape == (num_rows, config.hidden_size)
        if merged[name].shape != tensor.shape and not resized:
            raise CheckpointError(f"{adapter.file}: replaces {name} by {tuple(tensor.shape)}; the base has {tuple(merged[name].shape)}")
        merged[name] = tensor.to(merged[name].dtype)
    if num_rows != config.vocab_size:
        if HEAD in merged and merged[HEAD].size(0) != num_rows:
            raise CheckpointError(f"{adapter.file}: has an embedding of {num_rows} rows, but no output head to go with it")
        config = dataclasses.replace(config, vocab_size=num_rows)
    for module in modules:
        name = f"{module}.weight"
        weight = merged.get(name)
        A, B = adapter.tensors[f"{module}.lora_A"], adapter.tensors[f"{module}.lora_B"]
        if weight is None:
            raise CheckpointError(f"{adapter.file}: updates {module}, which the base does not have")
        if weight.shape != (B.size(0), A.size(1)):
            raise CheckpointError(f"{adapter.file}: updates {module} as {B.size(0)} x {A.size(1)}; the base has {tuple(weight.shape)}")
        merged[name] = merged_weight(weight, A, B, layer_scale(lora, module))
    return merged, config
