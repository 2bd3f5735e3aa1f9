"""The command for the models that can be fine-tuned."""

from dataclasses import dataclass
from typing import ClassVar

from litlora.errors import setting
from litlora.settings.checks import check


@dataclass(frozen=True, kw_only=True)
class ListModels:
    """Say which models can be fine-tuned, what the presets of targets adapt in each, and what memory a
    fine-tune takes."""

    memory: str | None = None
    """A checkpoint directory, a config.json or a model_config.yaml: the memory that its fine-tuning
    takes, with LoRA, QLoRA and in full. It may stand alone, without --memory."""
    rank: int = 16
    """Of the LoRA, on all linear layers."""
    seq: int = 2048
    """Tokens in a micro-batch."""
    json: bool = False
    """Print the figures as JSON, in bytes."""

    positional: ClassVar[str] = "memory"

    def __post_init__(self) -> None:
        check(self.rank > 0, f"{setting('rank')} must be at least 1, not {self.rank}")
        check(self.seq > 1, f"{setting('seq')} must be at least 2, not {self.seq}")
