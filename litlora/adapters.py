"""Adapter algebra: pure functions over tensors and opened checkpoints."""

import dataclasses

from torch import Tensor

from litlora.checkpoint import Chain, Checkpoint, adapter_modules
from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.lora import OUTPUT_HEAD, merged_weight

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
    """W + (alpha / rank) · B A for every layer of the adapter, each rounded once to W's dtype.

    An update of a tied output head unties it: the result has a head of its own, and a config that says so.
    Raises CheckpointError for a layer that the base lacks or whose shape differs.
    """
    merged = dict(base)
    scale = adapter.meta["lora"]["alpha"] / adapter.meta["lora"]["rank"]
    for module in adapter_modules(adapter.tensors):
        name = f"{module}.weight"
        weight = base.get(name)
        if weight is None and module == OUTPUT_HEAD and config.tie_word_embeddings:
            weight, config = base[EMBEDDING], dataclasses.replace(config, tie_word_embeddings=False)
        A, B = adapter.tensors[f"{module}.lora_A"], adapter.tensors[f"{module}.lora_B"]
        if weight is None:
            raise CheckpointError(f"{adapter.file}: updates {module}, which the base does not have")
        if weight.shape != (B.size(0), A.size(1)):
            raise CheckpointError(f"{adapter.file}: updates {module} as {B.size(0)} x {A.size(1)}; the base has {tuple(weight.shape)}")
        merged[name] = merged_weight(weight, A, B, scale)
    return merged, config
