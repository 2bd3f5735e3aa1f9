"""The settings of chat, and of its answers to many prompts."""

from dataclasses import dataclass, field
from typing import ClassVar

from litlora.settings.checks import check_adapters, check_positive
from litlora.settings.inference import Inference


@dataclass(frozen=True, kw_only=True)
class Chat(Inference):
    """Talk to a model: full, an adapter on its base, or a chain of adapters (merged in memory)."""

    MATTERS: ClassVar[tuple[str, ...]] = (
        *("checkpoint_dir", "prompt", "system"),
        *("max_new_tokens", "temperature"),
    )
    """The five settings that `--help` shows first."""

    adapters: list[str] = field(default_factory=list)
    """Adapters to switch between with /adapter NAME, as NAME=DIRECTORY, all trained on the same base. An
    adapter that is the checkpoint_dir is one of them, and the first in use."""
    prompt: str | None = None
    """Answer this once and exit."""
    system: str | None = None
    """A system message: what the model is told before the conversation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapters(self.adapters)


@dataclass(frozen=True, kw_only=True)
class Generate(Inference):
    """Answer the prompts or conversations of a file: JSON Lines out, in the order of the file."""

    prompts: str
    """The file: JSON, JSON Lines, CSV, Parquet or Arrow, with a record each: messages, as OpenAI has
    them, with tools if need be; or prompt, with an optional system; or instruction and input."""
    out_path: str
    """The file to write, .jsonl: each record as it was, with its answer, why it ended (stop or length)
    and its number of tokens. With n above 1 these are lists."""
    n: int = 1
    """Answers to each."""
    json_schema: str | None = None
    """A file with a JSON schema, .json, that every answer must follow."""
    batch_size: int = 16
    """Answers that are computed together, at most."""
    overwrite: bool = False
    """Replace what out_path holds, and what a run that was stopped left; without this, such a run is
    continued where it stopped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n", "batch_size")
