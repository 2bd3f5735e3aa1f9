"""Peak memory and time of the output head and its loss with a large vocabulary, forward and backward,
compared with the plain way.

    python benchmarks/head_memory.py
    python benchmarks/head_memory.py --tokens 4096

By default it takes 1,024 learned tokens, a hidden size of 2,048 and a vocabulary of 128,256, in
bf16. Every row is a process of its own. It shows the peak resident memory beyond that before the
first multiplication, and the seconds of the second of two passes. ours is
`litlora.kernels.cross_entropy.head_loss`; plain is torch's cross-entropy of the logits of all
tokens in fp32; recomputed is `litlora.train.objective.summed_cross_entropy`, which trainable heads
use.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROWS = ("ours", "recomputed", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--row", choices=ROWS, help="run one row in this process")
    options = parser.parse_args()
    if options.row:
        measure(options)
        return
    for row in ROWS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", row], check=True)


def measure(options: argparse.Namespace) -> None:
    import torch

    from litlora.kernels.cross_entropy import chunk_rows, head_loss, plain_head_loss
    from litlora.train.objective import summed_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden).bfloat16().requires_grad_()
    weight = torch.randn(options.vocabulary, options.hidden, dtype=torch.bfloat16)
    targets = torch.randint(options.vocabulary, (options.tokens,))
    rows = chunk_rows(options.vocabulary, hidden.device)
    ways = {
        "ours": lambda: head_loss(hidden, targets, weight),
        "recomputed": lambda: summed_cross_entropy(
            hidden, targets, lambda x: torch.nn.functional.linear(x, weight), rows
        ),
        "plain": lambda: plain_head_loss(hidden, targets, weight),
    }
    before = resident("VmRSS:")
    for _ in range(2):
        started = time.perf_counter()
        loss = ways[options.row]()
        loss.backward()
        seconds = time.perf_counter() - started
    peak = (resident("VmHWM:") - before) / 2**20
    norm = hidden.grad.float().norm().item()
    print(
        f"{options.row:<10} | {peak:6.2f} GiB | {seconds:6.2f} s "
        f"| loss {loss.item():.2f} | gradient's norm {norm:.4f}"
    )


def resident(field: str) -> int:
    """A field of the process's status, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
