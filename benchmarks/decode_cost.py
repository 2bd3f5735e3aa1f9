"""What one decoded token costs: operations of torch, and milliseconds of the processor.

    python benchmarks/decode_cost.py --rows base qv all-linear merged --beside OTHER_TREE
    python benchmarks/decode_cost.py --model llama-3.2-1b --layers 3 --rows base int8 nf4 --dtype bf16

Random weights in the shapes of `train_speed.py`, one sequence, greedy, by the engine. Each row is a
process of its own (of each tree, with --beside), and they take turns: the time of the processor is
what other programs disturb least. Rows: the base; an adapter live on some layers, or merged; the base
in few bits; `streamed` is in stream_speed.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
ROWS = ("base", "qv", "all-linear", "merged", "int8", "nf4", "fp8")
PROMPT = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="75m")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--vocab", type=int, help="fewer tokens than the model knows")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["base"])
    parser.add_argument("--beside", type=Path, help="another checkout of this repository")
    parser.add_argument("--sample", action="store_true", help="temperature 1 instead of greedy")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time")
    parser.add_argument("--tokens", type=int, default=20, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        run_row(options)
        return
    trees = [REPO, *([options.beside.resolve()] if options.beside else [])]
    started = {(tree, row): start(tree, row) for row in options.rows for tree in trees}
    facts = {key: json.loads(process.stdout.readline()) for key, process in started.items()}
    results: dict[Any, list[dict[str, Any]]] = {key: [] for key in started}
    for _ in range(options.rounds):
        for key, process in started.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            results[key].append(json.loads(process.stdout.readline()))
    for process in started.values():
        process.stdin.close()
        process.wait()
    report(facts, results)


def start(tree: Path, row: str) -> subprocess.Popen:
    words = [sys.executable, __file__, *sys.argv[1:], "--row", row]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def report(facts: dict[Any, dict[str, Any]], results: dict[Any, list[dict[str, Any]]]) -> None:
    spent = {key: [one["ms"] for one in found] for key, found in results.items()}
    for (tree, row), times in spent.items():
        fact, median = facts[tree, row], statistics.median(times)
        print(
            f"{row:10} {tree.name:10} {fact['ops']} operations, {median:.2f} ms a token "
            f"[{min(times):.2f}-{max(times):.2f}], {fact['bytes'] / median / 1e6:.1f} GB/s of weights; "
            f"ids {results[tree, row][-1]['ids']}"
        )
        if tree == REPO:
            continue
        ratios = [theirs / ours for ours, theirs in zip(spent[REPO, row], times, strict=True)]
        print(f"{row:10} speed beside it: {statistics.median(ratios):.2f} {[round(r, 2) for r in ratios]}")


def run_row(options: argparse.Namespace) -> None:
    """Answers each line of its input by some tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(op)] += 1
            return op(*args, **(kwargs or {}))

    counts: Counter[str] = Counter()
    step, size = decoder(options)
    for _ in range(3):
        step()
    with Counted():
        step()
    print(json.dumps({"ops": counts.total(), "bytes": size, "counts": counts.most_common()}), flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        ids = [step() for _ in range(options.tokens)]
        ms = (time.process_time() - started) / options.tokens * 1e3
        print(json.dumps({"ms": ms, "ids": ids[-4:]}), flush=True)


def decoder(options: argparse.Namespace) -> tuple[Any, int]:
    """(What gives the next token of the first sequence, bytes of weights that a token reads)."""
    import torch
    from train_speed import COMMON, SHAPES

    from litlora.config import ModelConfig
    from litlora.frozen.linear import stored_weights
    from litlora.lora import adapter_of, add_lora, merge_lora, unwrap_lora
    from litlora.lora.live import BASE, Way
    from litlora.model import GPT
    from litlora.serve.answer import Request
    from litlora.serve.engine import Engine
    from litlora.serve.sampling import Sampling
    from litlora.settings import LoRAConfig

    torch.manual_seed(0)
    shape = {**SHAPES[options.model], **COMMON, "rope_scaling": None}
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    if options.vocab:
        shape["vocab_size"] = options.vocab
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    model, way, row = GPT.without_weights(ModelConfig(**shape)), BASE, options.row
    tensors = {name: random(parameter).to(dtype) for name, parameter in model.named_parameters()}
    model = GPT.from_tensors(model.config, tensors).eval()
    adapter = None
    if row in ("qv", "all-linear", "merged"):
        config = LoRAConfig(targets="qv" if row == "qv" else "all-linear")
        add_lora(model, config)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.normal_(std=0.02)
        adapter = adapter_of(model, config)
        if row == "merged":
            merge_lora(model)
        unwrap_lora(model)
    elif row != "base":
        model = in_few_bits(model, row)
    size = sum(p.nbytes for n, p in model.named_parameters() if "embed_tokens" not in n)
    size += sum(weight.nbytes for weight in stored_weights(model).values())
    size += model.model.embed_tokens.weight.nbytes if model.config.tie_word_embeddings else 0
    engine = Engine(model, owns_model=True)
    if adapter is not None and row != "merged":
        engine.add_adapter("adapter", adapter)
        way = Way("adapter")
    count = (options.rounds + 1) * options.tokens + 8
    sampling = Sampling(max_new_tokens=count, temperature=float(options.sample), seed=0)
    prompts = [[1 + n, *range(2, PROMPT + 1)] for n in range(options.batch)]
    answers = [
        engine.submit(Request(prompt=prompt, sampling=sampling, way=way, text=False)) for prompt in prompts
    ]

    def step() -> int:
        while (token := answers[0].take()) is None:
            engine.step()
        return token.id

    return step, size


def random(like: Any) -> Any:
    """Random values of this shape, quickly: a million of them, again and again."""
    import torch

    if like.ndim == 1:
        return torch.ones(like.shape)
    values = torch.randn(1_000_003).mul_(0.03)
    return values.repeat(-(-like.numel() // len(values)))[: like.numel()].view(like.shape).clone()


def in_few_bits(model: Any, kind: str) -> Any:
    from litlora.adapters.quantised import block_linears
    from litlora.frozen.quantize import QUANTIZERS
    from litlora.model import GPT

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    names = block_linears(model.config)
    few = {name: QUANTIZERS[kind].quantised(tensors[name], name, Path("random")) for name in names}
    return GPT.from_tensors(model.config, {**tensors, **few}).eval()


if __name__ == "__main__":
    main()
