"""One training step on a base in few bits beside the same step on its 16-bit weights.

    python benchmarks/quantized_step.py --precision bf16 --tokens 790 --rounds 5

Forward and backward of a Llama's blocks (hidden 1,024) with LoRA on all linear layers, random
weights, the kinds in turns. Reports the median of the processor time of a step, which other programs
disturb less than the time on the clock, and the memory of the blocks' weights.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from litlora.adapters.quantised import block_linears
from litlora.config import ModelConfig
from litlora.frozen.linear import stored_weights
from litlora.frozen.native import nf4_of_bitsandbytes
from litlora.frozen.quantize import QUANTIZERS
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT


def make(weights: dict[str, torch.Tensor], config: ModelConfig, kind: str, dtype: torch.dtype) -> GPT:
    """The model with its blocks in `kind`; "dense" keeps them."""
    if kind != "dense":
        names = block_linears(config)
        weights = weights | {n: QUANTIZERS[kind].quantised(weights[n], n, Path("random")) for n in names}
    model = GPT.from_tensors(config, weights).to(dtype)
    add_lora(model, LoRAConfig(targets="all-linear"))
    return model.train()


def step(model: GPT, ids: torch.Tensor) -> float:
    """Seconds of the processor for forward and backward."""
    started = time.process_time()
    model.model(ids).float().square().mean().backward()
    model.zero_grad()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--tokens", type=int, default=790)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=list(QUANTIZERS))
    args = parser.parse_args()
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        max_position_embeddings=max(1024, args.tokens),
    )
    weights = {name: p.detach() for name, p in GPT(config).bfloat16().named_parameters()}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    models = {kind: make(weights, config, kind, dtype) for kind in ["dense", *args.kinds]}
    ids = torch.randint(0, config.vocab_size, (1, args.tokens))
    seconds = {kind: [] for kind in models}
    for turn in range(args.rounds + 1):  # the first warms up
        for kind, model in models.items():
            spent = step(model, ids)
            if turn:
                seconds[kind].append(spent)
    size = sum(weights[name].nbytes for name in block_linears(config))
    native = "with" if nf4_of_bitsandbytes() else "without"
    print(f"{args.precision}, {args.tokens} tokens, {torch.get_num_threads()} threads, {native} bitsandbytes")
    for kind, model in models.items():
        kept = sum(weight.nbytes for weight in stored_weights(model).values()) or size
        median = statistics.median(seconds[kind])
        speed = statistics.median(seconds["dense"]) / median
        print(f"{kind:7} {median:.3f} s, {speed:.2f} x dense; weights {kept / size:.3f} x bf16")


if __name__ == "__main__":
    main()
