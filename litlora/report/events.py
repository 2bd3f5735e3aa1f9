"""Events: what happens in a run, as plain values that the training loop hands to its sinks."""

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path


@dataclass(frozen=True)
class Begun:
    """Training begins, or continues where an earlier process stopped."""

    step: int
    """Optimizer steps done before."""
    total_steps: int


@dataclass(frozen=True)
class Step:
    """One optimizer step is done."""

    step: int
    """Counted from 1."""
    epoch: int
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    finite: bool
    """Whether loss and gradient were finite; a step that was not is skipped: it changed nothing."""
    skipped: int
    """Skipped steps so far."""
    skipped_in_a_row: int


@dataclass(frozen=True)
class Logged:
    """Means over the steps since the last such event."""

    step: int
    epoch: int
    loss: float
    """Mean over the supervised tokens, in nats."""
    learning_rate: float
    grad_norm: float
    """Of the last step, before clipping."""
    tokens: int
    """Since the run began: real tokens, without padding."""
    interval_tokens: int
    """Since the last such event."""
    tokens_per_second: float
    seconds: float
    """Of training alone, since the run began."""
    skipped: int
    figures: dict[str, float] = field(default_factory=dict)
    """What the objective measures besides its loss, per supervised token."""
    peak_memory: int = 0
    """The most so far, in bytes: of the device if it has memory of its own, else of the process."""


@dataclass(frozen=True)
class Validation:
    """The validation examples were evaluated."""

    step: int
    epoch: int
    val_loss: float
    """Mean over their supervised tokens, in nats."""
    tokens: int
    seconds: float
    skipped: int


@dataclass(frozen=True)
class Evaluated:
    """A task was measured while training goes on."""

    step: int
    """Steps done; 0: before training."""
    figures: dict[str, float]
    """By their columns in metrics.csv: eval_exact_match."""


@dataclass(frozen=True)
class Sample:
    """A prompt, and what the model says to it."""

    prompt: str
    answer: str
    expected: str = ""
    """The record's own answer, if it has one."""


@dataclass(frozen=True)
class Sampled:
    """The model was asked the prompts that the report shows."""

    step: int
    """Steps done; 0: before training."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Saved:
    """A checkpoint directory is complete."""

    step: int
    directory: Path


@dataclass(frozen=True)
class Note:
    """Something that the user should know, in one line."""

    text: str


@dataclass(frozen=True)
class Done:
    """Training has ended; what it did."""

    steps: int
    seconds: float
    """Training alone, without validating and saving."""
    tokens: int
    """Real tokens, prompts included, without padding."""
    loss: float | None
    """Mean over the supervised tokens of the last logged interval, in nats."""
    val_loss: float | None
    """Mean over the supervised tokens of the validation examples, at the end."""
    peak_memory: int
    """In bytes: of the device if it has memory of its own, else of the process."""
    skipped: int
    """Steps whose loss or gradient was not finite: they changed nothing."""
    stopped: IntEnum | None
    """Why it ended before its last step (a litlora.train.interrupts.Stop); None if it did not."""
    checkpoint: Path | None
    """The newest early checkpoint."""
    best_step: int = 0
    """Of the lowest validation loss, if the settings compare them."""
    best_loss: float | None = None
    final_step: int | None = None
    """The step that final/ holds because it is the best; None: the last one, whatever its loss."""
    fruitless: int = 0
    """If early stopping ended the run: the validations in a row without a lower loss."""


Event = Begun | Step | Logged | Validation | Evaluated | Sampled | Saved | Note | Done
