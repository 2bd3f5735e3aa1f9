"""Greedy decoding with a cache: tokens/s of a base, of the base with its adapter live, and merged.

    python benchmarks/generate_speed.py --checkpoint_dir BASE --adapter_dir RUN/final [--dtype bf16]

A prompt is 64 of the ids that the tokenizer gives for the instructions of the built-in sample. Every
pass prints a line: seconds of the whole pass, tokens/s, and milliseconds of a prefill with one token.
The scripts of the peers print the same lines.
"""

import argparse
import itertools
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint_dir", type=Path, required=True)
    parser.add_argument("--adapter_dir", type=Path)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--quantize", choices=["nf4", "nf4-dq", "int8", "fp8"], help="hold the base so")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    from litlora.checkpoint import resolve
    from litlora.data.sources import read_dataset
    from litlora.load import load_chain
    from litlora.lora import unwrap_lora
    from litlora.lora.live import BASE, Way
    from litlora.serve.engine import Engine
    from litlora.serve.sampling import Sampling
    from litlora.settings import Alpaca
    from litlora.storage.dtypes import DTYPES

    dtype = DTYPES[options.dtype]
    conversations = read_dataset(Alpaca(source="sample")).conversations[:100]
    text = "\n".join(conversation.messages[0].content for conversation in conversations)
    rows = {"base": False, **({"adapter": True, "merged": False} if options.adapter_dir else {})}

    def opened(row: str) -> tuple[Engine, list[int], Way]:
        chain = resolve(options.checkpoint_dir if row == "base" else options.adapter_dir)
        loaded = load_chain(chain, live=rows[row] or None, quantize=options.quantize)
        model, ids = loaded.model.to(dtype), loaded.tokenizer.encode(text)
        if not rows[row]:
            return Engine(model, owns_model=True), ids, BASE
        unwrap_lora(model)  # and the adapter beside it, as chat has it
        engine = Engine(model, owns_model=True)
        engine.add_adapter("adapter", chain.top)
        return engine, ids, Way("adapter")

    engines, places = {row: opened(row) for row in rows}, itertools.count()

    def seconds(row: str, count: int) -> float:
        engine, ids, way = engines[row]
        first = next(places)  # another beginning, of which nothing was computed before
        prompt = ids[first : first + options.prompt_tokens]
        started = time.perf_counter()
        assert len(list(engine.generate(prompt, Sampling(max_new_tokens=count), way=way))) == count
        return time.perf_counter() - started

    for row in rows:
        seconds(row, 8)
    for _ in range(options.repeats):
        for row in rows:  # in turns: what the machine does meanwhile meets all of them
            prefill, whole = seconds(row, 1), seconds(row, options.new_tokens)
            print(
                f"GEN {row} {whole:.3f} s {options.new_tokens / whole:.2f} tok/s "
                f"prefill {prefill * 1e3:.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
