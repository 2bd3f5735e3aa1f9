"""Resizing a LoRA update, compared with the full singular value decomposition of its ΔW, which gives
the same result.

    python benchmarks/resize_speed.py [--side 2048] [--rank 64] [--to 32] [--rounds 3]

Each round times ours (the mean of many repetitions) and one torch.linalg.svd of the whole matrix,
in the dtype in which it is stored and in float64. The table shows medians, and how far each result
is from the float64 one and from ΔW.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from litlora.adapters.resize import resize
from litlora.lora import Update

REPEATS = 20


def timed(work, repeats: int = 1) -> tuple[float, Tensor]:
    """(seconds of one call, what the last call returned)."""
    started = time.perf_counter()
    for _ in range(repeats):
        result = work()
    return (time.perf_counter() - started) / repeats, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("side", 2048), ("rank", 64), ("to", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()

    torch.manual_seed(0)
    # Singular values that fall by a factor of a thousand, as those of a trained update may.
    spread = torch.logspace(0, -3, asked.rank)
    update = Update(torch.randn(asked.rank, asked.side), torch.randn(asked.side, asked.rank) * spread, 2.0)
    generator = torch.Generator()

    def product(small: Update) -> Tensor:
        return small.scale * (small.B.double() @ small.A.double())

    def ours() -> Tensor:
        return resize(update, rank=asked.to, max_error=None, generator=generator)

    def full(dtype: torch.dtype) -> Tensor:
        U, S, Vt = torch.linalg.svd(
            update.scale * (update.B.to(dtype) @ update.A.to(dtype)), full_matrices=False
        )
        return Update(Vt[: asked.to], U[:, : asked.to] * S[: asked.to], 1.0)

    delta = product(update)
    ours()
    rows = {"ours": [], "torch.linalg.svd, fp32": [], "torch.linalg.svd, float64": []}
    results = {}
    for _ in range(asked.rounds):
        for name, work, repeats in (
            ("ours", ours, REPEATS),
            ("torch.linalg.svd, fp32", lambda: full(torch.float32), 1),
            ("torch.linalg.svd, float64", lambda: full(torch.float64), 1),
        ):
            seconds, results[name] = timed(work, repeats)
            rows[name].append(seconds)
    exact = product(results["torch.linalg.svd, float64"])
    print(
        f"{asked.side} x {asked.side}, rank {asked.rank} -> {asked.to}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("| | seconds, median [min-max] | times ours | from the float64 result | error of ΔW |")
    print("| --- | --- | --- | --- | --- |")
    best = statistics.median(rows["ours"])
    for name, seconds in rows.items():
        got, median = product(results[name]), statistics.median(seconds)
        away, error = (
            (torch.linalg.norm(got - other) / torch.linalg.norm(delta)).item() for other in (exact, delta)
        )
        print(
            f"| {name} | {median:.4f} [{min(seconds):.4f}-{max(seconds):.4f}] "
            f"| {median / best:,.0f} | {away:.1e} | {error:.8f} |"
        )


if __name__ == "__main__":
    main()
