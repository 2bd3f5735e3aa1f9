"""The loggers of a run."""

from dataclasses import dataclass, field

from litlora.errors import setting
from litlora.settings.checks import check

LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Loggers beside metrics.csv and report.html, which are always written."""

    to: list[str] = field(default_factory=list)
    """Loggers that get the figures too: [tensorboard, wandb, mlflow, trackio]; each needs the extra of
    its name."""
    project: str = "litlora"
    """The project, or experiment, that a logger files the run under."""
    name: str | None = None
    """What a logger calls the run; default: out_dir."""

    def __post_init__(self) -> None:
        for name in self.to:
            check(
                name in LOGGERS,
                f"{setting('to')} {name}: no such logger; there are {', '.join(LOGGERS)}",
            )
        check(bool(self.project.strip()), f"{setting('project')} is empty: name one")
