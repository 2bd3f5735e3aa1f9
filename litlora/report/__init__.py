"""What a run shows: events, and the sinks that show or store them. Torch-free.

events.py   what happens in a run
sinks.py    Sink, and how events reach several of them
console.py  lines or a progress bar
metrics.py  metrics.csv
page.py     report.html
loggers.py  TensorBoard, Weights & Biases, MLflow, trackio

To add a logger, write a `Sink` and append a factory to SINKS:

    litlora.report.SINKS.append(lambda run_dir: MyLogger(run_dir / "my.log"))
"""

from collections.abc import Callable
from pathlib import Path

from litlora.report.sinks import Sink

SINKS: list[Callable[[Path], Sink]] = []
"""Factories of additional sinks: each fine-tuning run of this process calls them with its
directory."""
