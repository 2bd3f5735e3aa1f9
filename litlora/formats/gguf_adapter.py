"""An adapter alone as a GGUF file, which llama.cpp adds to a GGUF file of its base.

A file has one alpha, and llama.cpp multiplies each layer by alpha / its rank; other strengths go into
B. Layers have the names and the order of rows of the base's file (gguf_export.py).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError, setting
from litlora.formats.gguf_delta_net import PLACE
from litlora.formats.gguf_export import PLAIN_KINDS, GGUFModel, gguf_package, name_map, their_name
from litlora.formats.gguf_latent import HALVED
from litlora.formats.peft_export import join
from litlora.lora import Adapter
from litlora.lora.variants import variant_named

_MERGE = "export the merged model instead: leave {} out".format(setting("adapter_only"))


def check_adapter(adapter: Adapter, model: GGUFModel) -> None:
    """Raise CheckpointError for what such a file cannot hold, by name."""
    where = f"{adapter.file}: "
    if adapter.rows is not None:
        raise CheckpointError(f"{where}adds tokens, which an adapter of llama.cpp cannot; {_MERGE}")
    if adapter.whole:
        name = sorted(adapter.whole)[0]
        raise CheckpointError(f"{where}replaces {name}, which an adapter of llama.cpp cannot; {_MERGE}")
    if not variant_named(adapter.config.variant).is_plain:
        raise CheckpointError(
            f"{where}is of the variant {adapter.config.variant}, and llama.cpp has plain LoRA alone; {_MERGE}"
        )
    if adapter.needs_quantised:
        raise CheckpointError(
            f"{where}was started by LoftQ and fits the bits that its base was quantised to alone; {_MERGE}"
        )
    for name in adapter.updates:
        is_apart = any(part in f"{name}.weight" for part in (".mlp.experts.", PLACE, HALVED))
        if is_apart or name.endswith("embed_tokens"):
            raise CheckpointError(f"{where}updates {name}, which is not written alone; {_MERGE}")
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise CheckpointError(
                f"{where}updates the output head, which in llama.cpp is the embedding of this model; {_MERGE}"
            )


def adapter_tensors(
    adapter: Adapter, model: GGUFModel, base: Mapping[str, Tensor]
) -> tuple[float, list[tuple[str, Tensor]]]:
    """(alpha, the tensors of the file) of an adapter that `check_adapter` lets pass."""
    alpha, found = None, []
    for name, rank, scale, A, B in _joined(adapter, model, base):
        alpha = scale * rank if alpha is None else alpha
        share = scale * rank / alpha
        found += [(f"{name}.lora_a", A), (f"{name}.lora_b", B if share == 1 else B * share)]
    assert alpha is not None
    return alpha, found


def _joined(
    adapter: Adapter, model: GGUFModel, base: Mapping[str, Tensor]
) -> Iterator[tuple[str, int, float, Tensor, Tensor]]:
    """(llama.cpp's name, rank, scale, A, B) of each of its layers."""
    names = name_map(model.graph, model.config.num_hidden_layers)
    done: set[str] = set()
    for layer in adapter.updates:
        if layer in done:
            continue
        rule = model.layout.to_theirs(layer)
        done |= {*rule.ours}
        rank, scale, A, B = join(rule, adapter, base)
        B = model.rows(f"{layer}.weight", B)
        yield their_name(names, f"{rule.theirs}.weight"), rank, scale, A.float(), B.float()


def write_adapter_file(
    file: Path, model: GGUFModel, alpha: float, tensors: list[tuple[str, Tensor]], kind: str
) -> None:
    """Write a file, its matrices in `kind`. Raises CheckpointError for values beyond it."""
    gguf = gguf_package()
    writer = gguf.GGUFWriter(file, model.graph.name)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(file.stem)
    for name, tensor in tensors:
        stored = tensor.to(PLAIN_KINDS[kind]).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise CheckpointError(
                f"{name}: has values that {kind} cannot hold; choose {setting('dtype')} F32"
            )
        _add(writer, gguf, name, stored, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add(writer: Any, gguf: Any, name: str, stored: Tensor, kind: str) -> None:
    if kind == "BF16":
        writer.add_tensor(name, stored.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, stored.numpy())
