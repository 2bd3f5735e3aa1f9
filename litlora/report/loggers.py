"""Loggers that people know, as sinks: TensorBoard, Weights & Biases, MLflow, trackio. Torch-free.

Each is the library's own client, imported when training begins. What fails in it, a server that
cannot be reached for example, is said once and stops nothing.
"""

import importlib.util
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from litlora.errors import MissingExtraError, setting
from litlora.report.events import Begun, Evaluated, Event, Logged, Validation
from litlora.report.history import flat
from litlora.report.sinks import Sink
from litlora.settings import LogConfig


@dataclass(frozen=True)
class Identity:
    """What a logger is told of a run."""

    directory: Path
    project: str
    name: str
    settings: Mapping[str, Any]
    """By their full names: train.learning_rate."""


class Logger(Sink):
    """A sink that begins when training does. A resumed run is a new one for a logger, whose name says
    from which step it goes on: what it was sent before the interruption may reach beyond that step."""

    def __init__(self, run: Identity) -> None:
        self.run = run
        self._is_open = False

    def handle(self, event: Event) -> None:
        if isinstance(event, Begun):
            name = f"{self.run.name} from step {event.step}" if event.step else self.run.name
            self.open(name, event.step)
            self._is_open = True
        elif self._is_open and (figures := figures_of(event)):
            self.log(figures, event.step)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self.finish()

    @abstractmethod
    def open(self, name: str, step: int) -> None:
        """Begin a run of this name, after so many steps."""

    @abstractmethod
    def log(self, figures: dict[str, float], step: int) -> None:
        """Store figures of a step."""

    @abstractmethod
    def finish(self) -> None:
        """The run has ended; everything is to be stored when this returns."""


def figures_of(event: Event) -> dict[str, float]:
    """The figures of an event by the names that loggers show; none for most events."""
    match event:
        case Logged():
            names = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "epoch", "skipped")
            found = {name: float(getattr(event, name)) for name in names}
            found["peak_memory_gib"] = event.peak_memory / 2**30
            return {f"train/{name}": value for name, value in (found | event.figures).items()}
        case Validation():
            return {"val/loss": event.val_loss}
        case Evaluated():
            return {name.replace("_", "/", 1): value for name, value in event.figures.items()}
    return {}


class TensorBoard(Logger):
    """Event files in OUT_DIR/tensorboard."""

    def open(self, name: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = self.run.directory / "tensorboard"
        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)
        if not step:
            settings = yaml.safe_dump(dict(self.run.settings), sort_keys=False, allow_unicode=True)
            self._writer.add_text("settings", "    " + settings.replace("\n", "\n    "))

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class WandB(Logger):
    """Weights & Biases. What it keeps beside its server lies in OUT_DIR/wandb."""

    def open(self, name: str, step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=self.run.project,
            name=name,
            dir=str(self.run.directory),
            config=dict(self.run.settings),
            settings=wandb.Settings(console="off"),  # it would take over what is printed
        )
        # Not its own step: it drops what comes late, such as a validation after the next line.
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def finish(self) -> None:
        self._run.finish()


class MLflow(Logger):
    """MLflow: the server that MLFLOW_TRACKING_URI names, else a database in OUT_DIR/mlflow.db."""

    def open(self, name: str, step: int) -> None:
        from mlflow import MlflowClient

        file = f"sqlite:///{self.run.directory.absolute() / 'mlflow.db'}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or file)
        found = self._client.get_experiment_by_name(self.run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(self.run.project)
        self._id = self._client.create_run(experiment, run_name=name).info.run_id
        for key, value in self.run.settings.items():
            self._client.log_param(self._id, key, str(value)[:500])  # its limit

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._id, name, value, step=step)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


class Trackio(Logger):
    """trackio, whose files lie where it keeps them (TRACKIO_DIR)."""

    def open(self, name: str, step: int) -> None:
        import trackio

        settings = {key: str(value) for key, value in self.run.settings.items()}
        self._run = trackio.init(
            project=self.run.project, name=name, config=settings, embed=False, auto_log_gpu=False
        )

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def finish(self) -> None:
        self._run.finish()


LOGGERS: dict[str, tuple[type[Logger], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}
"""By the names of the setting, each with the module that it needs."""


def check_loggers(config: LogConfig) -> None:
    """Raise MissingExtraError for a logger whose library is not installed."""
    for name in config.to:
        if importlib.util.find_spec(LOGGERS[name][1]) is None:
            raise MissingExtraError(
                f"{setting('to')} {name}: needs the library {LOGGERS[name][1]}; "
                f"install it with: pip install 'litlora[{name}]'"
            )


def make_loggers(config: LogConfig, directory: Path, hyperparameters: str) -> Sequence[Logger]:
    """Those that are asked for; `hyperparameters` is the text of the run's hyperparameters.yaml."""
    settings = dict(flat(yaml.safe_load(hyperparameters)))
    run = Identity(directory, config.project, config.name or str(directory), settings)
    return [LOGGERS[name][0](run) for name in dict.fromkeys(config.to)]
