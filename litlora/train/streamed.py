"""What a base that stays in its file costs a run, and packs so large that computing hides it."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from litlora.checkpoint import Chain, resolve
from litlora.errors import setting
from litlora.frozen.streamed import Stream
from litlora.load import Loaded, load_chain
from litlora.settings import Finetune, FinetuneLoRA, TrainConfig
from litlora.settings.targets import embedding_among
from litlora.streaming import gib, streams
from litlora.train.method import Method
from litlora.train.parallel import Parallel
from litlora.train.plan import pack_tokens
from litlora.train.precision import bf16_speedup, decide

LARGEST_PACK = 8192
"""Tokens that a pack is enlarged to at most: its activations have to be in memory."""


def load_base(settings: Finetune, method: Method, parallel: Parallel) -> Loaded:
    """The model that a run starts from; it streams from its file where `base_streams` says so."""
    base_dir = settings.base_checkpoint_dir
    chain = resolve(
        Path(settings.checkpoint_dir),
        base_dir=Path(base_dir) if base_dir else None,
        allow_base_mismatch=settings.allow_base_mismatch,
    )
    return load_chain(
        chain,
        device="cpu" if parallel.is_sharded else parallel.device,
        dense=method.dense,
        quantize=settings.quantize,
        stream=base_streams(settings, method, chain, parallel),
        late=parallel.is_sharded,
    )


def base_streams(settings: Finetune, method: Method, chain: Chain, parallel: Parallel) -> bool:
    """Whether the base of a run streams from its file; the same on all ranks. Raises UserError if it
    was asked to and cannot."""
    hindrance = None
    if chain.adapters:
        hindrance = f"{chain.top.directory} is an adapter, whose merge is in memory (merge it first)"
    kept = {"modules_to_save": method.dense, "add_tokens": settings.tokenizer.add_tokens}
    if isinstance(settings, FinetuneLoRA):
        lora = settings.lora
        kept |= {"targets": embedding_among(lora.targets)}
        kept |= {"bias": lora.bias != "none", "lora_bias": lora.lora_bias}
    kept |= {"quantize": settings.quantize, "compile": settings.train.compiles}
    # What the settings refuse where the base was asked to stream.
    if name := next((name for name, value in kept.items() if value), None):
        hindrance = f"{setting(name)} needs it in memory"
    if parallel.is_sharded:
        hindrance = f"{setting('strategy')} fsdp divides it among the devices"
    if method.trains_base:
        hindrance = "all of it trains"
    device = parallel.device

    def computes_in(stored: torch.dtype) -> torch.dtype:
        asked = settings.precision
        return decide(asked, stored, lambda: bf16_speedup(device), trains_base=False, device=device).dtype

    return bool(parallel.broadcast(streams(settings.stream_base, chain, device, computes_in, hindrance)))


def settle_packs(
    stream: Stream,
    config: TrainConfig,
    dtype: torch.dtype,
    parallel: Parallel,
    say: Callable[[str], None],
) -> TrainConfig:
    """Say what streaming costs, as measured on this machine, and return the settings with packs in
    which a micro-batch takes longer to compute than to read, unless their size was set."""
    # Up through the blocks and down again; the loss computes the head's gradient on the way.
    size = 2 * stream.nbytes + stream.head_bytes
    seconds = size / stream.speed
    # Each value of a matrix takes a multiplication and an addition, forward and backward.
    values = sum(W.numel() for block in stream.blocks for W in block)
    enough = parallel.broadcast(math.ceil(seconds * matmul_speed(dtype) / (4 * values)))
    say(
        f"base: stays in its file; a micro-batch reads {gib(size)}, which takes {seconds:.2g} s at the "
        f"{gib(stream.speed)} a second just measured, and is hidden from about {enough:,} tokens on"
    )
    if config.packing and not config.auto_batch and config.micro_batch_tokens is None:
        larger = min(-(-enough // 256) * 256, LARGEST_PACK)
        if larger > pack_tokens(config):
            say(f"micro-batch: {larger:,} tokens instead of {pack_tokens(config):,}, to hide the reading")
            config = dataclasses.replace(config, micro_batch_tokens=larger)
    return config


def matmul_speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product on the CPU, the best of a few."""
    size, best = 1024, math.inf
    square = torch.ones(size, size, dtype=dtype)
    for _ in range(4):
        started = time.perf_counter()
        F.linear(square, square)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
