"""Greedy decoding with a cache: tokens/s of a base, and of the base with its adapter live.

    python benchmarks/generate_speed.py --checkpoint_dir BASE --adapter_dir RUN/final [--dtype bf16]

The prompt is the first 64 ids that the tokenizer gives for a few instructions of the built-in
sample. Every pass prints a line: seconds of the whole pass, tokens/s, and milliseconds of a prefill
with one token. The scripts of the peers print the same lines.
"""

import argparse
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint_dir", type=Path, required=True)
    parser.add_argument("--adapter_dir", type=Path)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    from litlora.data.sources import read_dataset
    from litlora.load import load
    from litlora.serve.engine import Engine
    from litlora.serve.sampling import Sampling
    from litlora.settings import Alpaca
    from litlora.storage.dtypes import DTYPES

    dtype = DTYPES[options.dtype]
    conversations = read_dataset(Alpaca(source="sample")).conversations[:100]
    text = "\n".join(conversation.messages[0].content for conversation in conversations)

    def measure(name: str, directory: Path) -> None:
        loaded = load(directory, live=True)
        model, ids = loaded.model.to(dtype), loaded.tokenizer.encode(text)[: options.prompt_tokens]

        def seconds(count: int) -> float:
            engine = Engine(model, owns_model=True)  # a new one has computed no beginning of the prompt yet
            started = time.perf_counter()
            assert len(list(engine.generate(ids, Sampling(max_new_tokens=count)))) == count
            return time.perf_counter() - started

        seconds(8)
        for _ in range(options.repeats):
            prefill, whole = seconds(1), seconds(options.new_tokens)
            print(
                f"GEN {name} {whole:.3f} s {options.new_tokens / whole:.2f} tok/s "
                f"prefill {prefill * 1e3:.1f} ms",
                flush=True,
            )

    measure("base", options.checkpoint_dir)
    if options.adapter_dir:
        measure("adapter", options.adapter_dir)


if __name__ == "__main__":
    main()
