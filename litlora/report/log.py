"""What a run tells: console lines, a progress bar, and metrics.csv. Only rank 0 talks."""

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from litlora.console import say, shown
from litlora.storage.atomic import replacing_file

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "val_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "seconds",
    "skipped",
)


class Metrics:
    """metrics.csv: one row a logged step, on its way to the disk as soon as it is written."""

    def __init__(self, path: Path, earlier: str | None = None) -> None:
        """`earlier`: the text of the file as it was where the run is resumed."""
        self._path = path
        self._rows = [earlier or _csv(dict(zip(COLUMNS, COLUMNS, strict=True)))]
        with replacing_file(path) as staging:
            staging.write_text(self.text, encoding="utf-8", newline="")
        self._size = path.stat().st_size
        self._pending: list[str] = []

    @property
    def text(self) -> str:
        """The whole file, as it is or should be."""
        return "".join(self._rows)

    def write(self, **row: Any) -> None:
        """Values by the names in COLUMNS; what is not given stays empty. On a full disk it says so
        and keeps the rows for later."""
        line = _csv(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        )
        self._rows.append(line)
        self._pending.append(line)
        rows = "".join(self._pending).encode()
        try:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(self._size)  # over a part of a row, should one have been written
                if file.write(rows) < len(rows):
                    raise OSError("only a part could be written")
            self._size += len(rows)
            self._pending.clear()
        except OSError as error:
            if len(self._pending) == 1:
                _tell(
                    f"note: {self._path} cannot be written ({error.strerror or error}); its rows are kept in memory",
                    sys.stderr,
                )


class Progress:
    """Where a run stands: a bar on a terminal, a line every now and then in a file or pipe."""

    def __init__(self, total_steps: int, enabled: bool = True, first: int = 0) -> None:
        """`first`: the steps done before this process."""
        self._enabled = enabled
        self._total = total_steps
        self._first = first
        self._started = time.perf_counter()
        self._bar = (
            tqdm(total=total_steps, initial=first, unit="step", dynamic_ncols=True)
            if enabled and sys.stderr.isatty()
            else None
        )

    def step(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update()

    def report(
        self, step: int, *, loss: float | None, learning_rate: float, tokens: int, tokens_per_second: float
    ) -> None:
        """Show the figures of the steps since the last report; tokens are real ones, no padding."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens_per_second:,.0f} tokens/s"
            )
        elif self._enabled:
            left = (time.perf_counter() - self._started) / (step - self._first) * (self._total - step)
            self.say(
                f"step {step}/{self._total} | loss {loss:.4f} | lr {learning_rate:.2e} | "
                f"{tokens} tokens at {tokens_per_second:.0f}/s | {duration(left)} left"
            )

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(shown(line))
        elif self._enabled:
            _tell(line, sys.stdout)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _csv(row: dict[str, Any]) -> str:
    line = io.StringIO()
    csv.DictWriter(line, COLUMNS).writerow(row)
    return line.getvalue()


def _tell(line: str, stream: TextIO) -> None:
    """Print a line if there is room for it: a log on a full disk is no reason to lose the run."""
    try:
        say(line, file=stream)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def duration(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
