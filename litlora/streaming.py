"""A base that is larger than memory: whether it streams from its file, and a model that does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from litlora.adapters.quantised import block_linears
from litlora.checkpoint import Chain
from litlora.errors import UserError, setting
from litlora.frozen.few_bits import Quantized
from litlora.frozen.linear import FrozenLinear, stored_weights
from litlora.frozen.streamed import TILE_BYTES, Stream, StreamedEmbedding, StreamedHead, stream_linears
from litlora.lora import Adapter
from litlora.model import GPT, kind_of
from litlora.ram import free_ram
from litlora.storage.fingerprint import check_finite
from litlora.storage.pages import mapped, read, release


def streams(
    asked: bool | Literal["auto"],
    chain: Chain,
    device: torch.device,
    computes_in: Callable[[torch.dtype], torch.dtype] = lambda stored: stored,
    hindrance: str | None = None,
    free: Callable[[], int | None] = free_ram,
) -> bool:
    """Whether a model's base is to stream from its file: what was asked, or for auto whether it
    exceeds the free memory in the dtype that `computes_in` gives for the stored one.

    `hindrance` says why the caller could not use such a base. Raises UserError for a base that was
    asked to stream and cannot; auto adds a notice to the chain instead. `free` measures the memory.
    """
    if asked is False:
        return False
    if asked == "auto":
        room = free() if device.type == "cpu" else None
        size = sum(
            tensor.shape.numel() * computes_in(tensor.dtype).itemsize
            for tensor in chain.base.tensors.values()
            if isinstance(tensor, Tensor)
        )
        if room is None or size <= room:
            return False
    hindrance = hindrance or _hindrance(chain, device)
    if hindrance is None:
        return True
    if asked is True:
        raise UserError(f"{setting('stream_base')} true: {hindrance}; leave it out")
    chain.notices.append(
        f"the base takes {gib(size)} of {gib(room)} of free memory, and cannot be streamed: {hindrance}"
    )
    return False


def stream_base(model: GPT, file: Path) -> Stream:
    """Let a model's frozen weights stay in their mapped file: those of the blocks' linear layers, the
    embeddings and the output head. Whatever an adapter put in the place of one stays in memory.

    All of them are read once. Raises CheckpointError, which names `file`, for one that is not finite.
    """
    stream, decoder = Stream(), model.model
    stream_linears(stream, decoder.layers)
    embedding, head = decoder.embed_tokens, model.lm_head
    tied = type(head) is nn.Linear and head.weight is embedding.weight
    if mapped([embedding.weight]):
        decoder.embed_tokens = StreamedEmbedding(stream, embedding.weight.detach())
    inputs = getattr(decoder, "embed_tokens_per_layer", None)
    if inputs is not None and mapped([inputs.weight]):
        decoder.embed_tokens_per_layer = StreamedEmbedding(stream, inputs.weight.detach())
    if type(head) is nn.Linear and mapped([head.weight]):
        shared = isinstance(decoder.embed_tokens, StreamedEmbedding) and tied
        storage = decoder.embed_tokens.storage if shared else StreamedHead(stream, head.weight.detach())
        model.lm_head = FrozenLinear(storage, head.bias)
        stream.head_bytes = head.weight.nbytes
    stream.speed = _read_all(model, file)
    return stream


def _read_all(model: GPT, file: Path) -> float:
    """Bytes a second at which all that streams was read."""
    total, seconds = 0, 0.0
    for name, weight in stored_weights(model).items():
        W = weight.rows()
        for part in W.split(max(1, TILE_BYTES // W[:1].nbytes)):
            started = time.perf_counter()
            read(part)
            seconds += time.perf_counter() - started
            total += part.nbytes
            check_finite({name: part}, file)
            release(part)
    return total / max(seconds, 1e-9)


def _hindrance(chain: Chain, device: torch.device) -> str | None:
    """Why a chain's base cannot stream; None if it can."""
    if device.type != "cpu":
        return f"a base streams on the CPU alone, and this device is {device.type}"
    if not kind_of(chain.config).packs:
        return f"{chain.base.directory} runs through transformers, which needs it in memory"
    top = chain.top
    if len(chain.adapters) > 1:
        inner = chain.adapters[-2].directory
        return f"{top.directory} is an adapter on {inner}, whose merge is in memory (merge that one first)"
    if isinstance(top, Adapter) and top.base and top.base.quantized:
        return f"{top.directory} was trained on a base in few bits, which is in memory"
    tensors = chain.base.tensors
    names = [name for name in block_linears(chain.config) if name in tensors]
    few = next((name for name in names if isinstance(tensors[name], Quantized)), None)
    if few is not None:
        return f"{chain.base.file} holds {few} in few bits"
    found = {id(W) for W in mapped(tensors[name] for name in names)}
    odd = next((name for name in names if id(tensors[name]) not in found), None)
    if odd is not None:
        return f"{chain.base.file} does not hold {odd} in one piece that can be mapped into memory"
    return None


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.2f} GiB"
