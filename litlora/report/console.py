"""What a run shows while it trains: a progress bar on a terminal, lines in a file or pipe."""

import sys
import time

from tqdm import tqdm

from litlora.console import shown
from litlora.report.events import Begun, Evaluated, Event, Logged, Note, Step, Validation
from litlora.report.sinks import Sink, say_if_possible

LINE = "step {n_fmt}/{total_fmt} {bar:12} {remaining} left{postfix}"
"""Redrawn at a terminal; where it is narrow, its end is cut."""


class Console(Sink):
    """A bar on a terminal, else a line for each logged step; notes and validations on both."""

    fatal = (BrokenPipeError,)
    """Whoever read the lines is gone, as `| head` is: that ends a command."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._first = self._total = 0
        self._started = time.perf_counter()

    def handle(self, event: Event) -> None:
        match event:
            case Begun():
                self._begin(event)
            case Step():
                if self._bar is not None:
                    self._bar.update()
                if not event.finite:
                    self._say(
                        f"step {event.step}/{self._total} | skipped, as its loss or gradient is not finite: "
                        f"{event.skipped_in_a_row} in a row, {event.skipped} in all"
                    )
            case Logged():
                self._show_figures(event)
            case Validation():
                self._say(f"step {event.step}/{self._total} | validation loss {event.val_loss:.4f}")
            case Evaluated():
                figures = ", ".join(f"{name} {value:.4f}" for name, value in event.figures.items())
                self._say(f"step {event.step}/{self._total} | {figures}")
            case Note():
                self._say(f"note: {event.text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _begin(self, event: Begun) -> None:
        self._first, self._total = event.step, event.total_steps
        self._started = time.perf_counter()
        if sys.stderr.isatty():
            self._bar = tqdm(total=event.total_steps, initial=event.step, bar_format=LINE, dynamic_ncols=True)

    def _show_figures(self, event: Logged) -> None:
        if self._bar is not None:
            more = "".join(f", {name} {value:.4f}" for name, value in event.figures.items())
            self._bar.set_postfix_str(
                f"loss {event.loss:.4f}{more}, lr {event.learning_rate:.2e}, "
                f"{event.tokens_per_second:,.0f} tokens/s, {event.peak_memory / 2**30:.2f} GiB"
            )
            return
        more = "".join(f" | {name} {value:.4f}" for name, value in event.figures.items())
        seconds_a_step = (time.perf_counter() - self._started) / (event.step - self._first)
        self._say(
            f"step {event.step}/{self._total} | loss {event.loss:.4f}{more} | lr {event.learning_rate:.2e} | "
            f"{event.interval_tokens} tokens at {event.tokens_per_second:.0f}/s | "
            f"{duration(seconds_a_step * (self._total - event.step))} left"
        )

    def _say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(shown(line))
        else:
            say_if_possible(line, file=sys.stdout)


def duration(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
