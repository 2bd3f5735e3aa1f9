"""How the speed of training grows with the number of devices, on what is there.

    python benchmarks/scaling.py --devices 1 2 --strategies ddp fsdp [OPTION OF finetune/lora.py ...]

Each run trains with LoRA on Alpaca's sample, with one thread for each device on a CPU. It prints the
tokens of a second, from the second half of the steps, and their ratio to those of the first run.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parent.parent


def tokens_per_second(metrics: Path) -> float:
    """Of the second half of the logged steps."""
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    half = rows[len(rows) // 2 - 1]
    tokens, seconds = (float(rows[-1][name]) - float(half[name]) for name in ("tokens", "seconds"))
    return tokens / seconds


def measured(devices: int, strategy: str, steps: int, options: list[str]) -> float:
    with tempfile.TemporaryDirectory() as out:
        words = ["--devices", devices, "--out_dir", out, "--train.max_steps", steps]
        words += ["--train.log_interval", 1, "--train.save_interval", 0, "--data.val_fraction", 0]
        words += ["--strategy", strategy] if devices > 1 else []
        subprocess.run(
            [sys.executable, str(REPO / "finetune/lora.py"), *map(str, words), *options],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return tokens_per_second(Path(out) / "metrics.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--steps", type=int, default=10)
    settings, options = parser.parse_known_args()
    first = None
    for devices in settings.devices:
        for strategy in settings.strategies if devices > 1 else settings.strategies[:1]:
            speed = measured(devices, strategy, settings.steps, options)
            first = first or speed
            name = strategy if devices > 1 else "-"
            print(f"{devices} devices, {name}: {speed:,.0f} tokens/s, {speed / first:.2f} times the first")


if __name__ == "__main__":
    main()
