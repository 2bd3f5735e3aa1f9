"""What a run tells: console lines, a progress bar, and metrics.csv. Only rank 0 talks."""

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from litlora.atomic import replacing_file

COLUMNS = ("step", "epoch", "loss", "val_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds", "skipped")


class Metrics:
    """metrics.csv: one row a logged step, on its way to the disk as soon as it is written."""

    def __init__(self, path: Path, earlier: str | None = None) -> None:
        """`earlier`: the text of the file as it was where the run is resumed."""
        self.text = earlier or self._line(dict(zip(COLUMNS, COLUMNS, strict=True)))
        self._path = path
        with replacing_file(path) as staging:
            staging.write_text(self.text, encoding="utf-8", newline="")
        self._stored = len(self.text.encode())
        self._failed = False

    def write(self, **row: Any) -> None:
        """Values by the names in COLUMNS; what is not given stays empty. On a full disk it says so and keeps the rows for later."""
        self.text += self._line({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        rows = self.text.encode()[self._stored :]
        try:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(self._stored)
                if file.write(rows) < len(rows):
                    raise OSError("only a part could be written")
            self._stored, self._failed = self._stored + len(rows), False
        except OSError as error:
            if not self._failed:
                _tell(f"note: {self._path} cannot be written ({error.strerror or error}); its rows are kept in memory", sys.stderr)
            self._failed = True

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        line = io.StringIO()
        csv.DictWriter(line, COLUMNS).writerow(row)
        return line.getvalue()


class Progress:
    """Where a run stands: a bar on a terminal, a line every now and then in a file or pipe."""

    def __init__(self, total_steps: int, enabled: bool = True, first: int = 0) -> None:
        """`first`: the steps done before this process."""
        self._enabled = enabled
        self._total = total_steps
        self._first = first
        self._started = time.perf_counter()
        self._bar = tqdm(total=total_steps, initial=first, unit="step", dynamic_ncols=True) if enabled and sys.stderr.isatty() else None

    def step(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, *, loss: float | None, learning_rate: float, tokens: int, tokens_per_second: float) -> None:
        """Show the figures of the steps since the last report; tokens are real ones, no padding."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens_per_second:,.0f} tokens/s")
        elif self._enabled:
            left = (time.perf_counter() - self._started) / (step - self._first) * (self._total - step)
            self.say(
                f"step {step}/{self._total} | loss {loss:.4f} | lr {learning_rate:.2e} | "
                f"{tokens} tokens at {tokens_per_second:.0f}/s | {duration(left)} left"
            )

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line)
        elif self._enabled:
            _tell(line, sys.stdout)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _tell(line: str, stream: TextIO) -> None:
    """Print a line if there is room for it: a log on a full disk is no reason to lose the run."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def duration(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
