"""Extraction compared with the reference tool, as whole processes: seconds, peak memory, and the
error of base + LoRA.

    python benchmarks/extract_speed.py --reference REFERENCE/lora_extractor.py
        [--pair BASE TUNED ...] [--layer 4096 4096 ...] [--count 8]

A `--pair` is two model files. A `--layer` is a pair that is made here: `--count` weights of that
size in bf16, whose differences have rank 32 and noise of a tenth of their norm. The tools take
turns. What they write is added to the base here, in fp64, and compared with the tuned model.
Without --reference only ours runs.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

REPO = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def make_layers(rows: int, columns: int, count: int, folder: Path) -> tuple[Path, Path]:
    """Two files of bf16 weights."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    files = folder / "base.safetensors", folder / "tuned.safetensors"
    before, after = {}, {}
    for number in range(count):
        base = 0.02 * torch.randn(rows, columns, generator=generator)
        change = (
            torch.randn(rows, 32, generator=generator)
            @ torch.randn(32, columns, generator=generator)
            / 32**0.5
        )
        change += 0.1 * torch.randn(rows, columns, generator=generator)
        before[f"layers.{number}.weight"], after[f"layers.{number}.weight"] = (
            base.bfloat16(),
            (base + 0.01 * change).bfloat16(),
        )
    save_file(before, files[0])
    save_file(after, files[1])
    return files


def run(script: Path, base: Path, tuned: Path, output: Path, more: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MiB) of one process."""
    words = ["--source-model", base, "--target-model", tuned, "--output", output, *more]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def relative_error(base: Path, tuned: Path, lora: Path) -> float:
    """The error of all weights together, in the Frobenius norm."""
    from safetensors.torch import load_file

    before, after, found = load_file(base), load_file(tuned), load_file(lora)
    lost = total = 0.0
    for name, weight in before.items():
        difference = after[name].double() - weight.double()
        total += difference.square().sum().item()
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_up.weight" in found:
            difference -= (
                found[f"{layer}.lora_up.weight"].double() @ found[f"{layer}.lora_down.weight"].double()
            )
        elif f"{layer}.diff" in found:
            difference -= found[f"{layer}.diff"].double()
        lost += difference.square().sum().item()
    return (lost / total) ** 0.5


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own: a process that has grown would pass its peak memory on
    to the processes that it starts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, help="the reference tool's lora_extractor.py")
    parser.add_argument("--pair", nargs=2, type=Path, action="append", default=[], metavar=("BASE", "TUNED"))
    parser.add_argument(
        "--layer", nargs=2, type=int, action="append", default=[], metavar=("ROWS", "COLUMNS")
    )
    parser.add_argument("--count", type=int, default=1, help="weights of each --layer")
    parser.add_argument("--rank", default="32")
    parser.add_argument("--dtype", default="fp32", help="number format of the result")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="run ours with --svd exact as well")
    given = parser.parse_args()
    tools = {"reference": (given.reference, [])} if given.reference else {}
    tools["ours"] = (REPO / "scripts/lora_extractor.py", [])
    tools |= (
        {"ours, --svd exact": (REPO / "scripts/lora_extractor.py", ["--svd", "exact"])} if given.exact else {}
    )
    print("| pair | tool | seconds | peak MiB | relative error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pairs = {str(base.parent.name): (base, tuned) for base, tuned in given.pair}
        for rows, columns in given.layer:
            place = Path(folder) / f"{given.count} of {rows} x {columns}"
            place.mkdir()
            pairs[place.name] = apart(make_layers, rows, columns, given.count, place)
        for pair, (base, tuned) in pairs.items():
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
            for _ in range(given.rounds):
                for name, (script, more) in tools.items():
                    output = Path(folder) / f"{name.replace(' ', '')}.safetensors"
                    options = ["--rank", given.rank, "--output-dtype", given.dtype, *more]
                    taken[name].append(run(script, base, tuned, output, options))
            for name, figures in taken.items():
                seconds, memory = (statistics.median(column) for column in zip(*figures, strict=True))
                error = apart(
                    relative_error, base, tuned, Path(folder) / f"{name.replace(' ', '')}.safetensors"
                )
                print(f"| {pair} | {name} | {seconds:.2f} | {memory:.0f} | {error:.4e} |", flush=True)


if __name__ == "__main__":
    main()
