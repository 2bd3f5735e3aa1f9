"""What a run tells: console lines, a progress bar, and metrics.csv. Only rank 0 talks."""

import csv
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

COLUMNS = ("step", "epoch", "loss", "val_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds")


class Metrics:
    """metrics.csv: one row a logged step, on the disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()

    def write(self, **row: Any) -> None:
        """Values by the names in COLUMNS; what is not given stays empty."""
        self._writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Progress:
    """Where a run stands: a bar on a terminal, a line every now and then in a file or pipe."""

    def __init__(self, total_steps: int, enabled: bool = True) -> None:
        self._enabled = enabled
        self._total = total_steps
        self._started = time.perf_counter()
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True) if enabled and sys.stderr.isatty() else None

    def step(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, *, loss: float, learning_rate: float, tokens: int, tokens_per_second: float) -> None:
        """Show the figures of the steps since the last report; tokens are real ones, no padding."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens_per_second:,.0f} tokens/s")
        elif self._enabled:
            left = (time.perf_counter() - self._started) / step * (self._total - step)
            self.say(
                f"step {step}/{self._total} | loss {loss:.4f} | lr {learning_rate:.2e} | "
                f"{tokens} tokens at {tokens_per_second:.0f}/s | {duration(left)} left"
            )

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line)
        elif self._enabled:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
