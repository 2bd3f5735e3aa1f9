"""Where the training examples come from: one dataclass a source."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from litlora.settings.checks import check_value

RecordFormat = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text", "preference"]
UNLESS_DEFAULT = {"stored": "unless default"}


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where the training examples come from."""

    val_fraction: float = 0.05
    """Fraction of the examples held out of training to measure the validation loss; 0: none."""
    split_seed: int = 42
    """Seed of the choice of the examples that are held out."""
    ignore: tuple[str, ...] = field(default=(), metadata=UNLESS_DEFAULT)
    """Fields of the records to leave out; those of messages as messages.NAME. Any other field that
    is not known is an error."""
    format: RecordFormat | None = field(default=None, metadata=UNLESS_DEFAULT)
    """The form of the records; default: what the first of them show. alpaca: instruction, input,
    output. messages: OpenAI's, with tools. sharegpt: conversations of from and value.
    prompt_completion: each as text or messages. text: plain documents, all learned. preference:
    chosen and rejected, which no command learns yet."""
    columns: dict[str, str] = field(default_factory=dict, metadata=UNLESS_DEFAULT)
    """What the records call the fields of their form, where that is another name: {prompt: question,
    completion: answer}."""
    on_bad: Literal["error", "skip"] = field(default="error", metadata=UNLESS_DEFAULT)
    """What becomes of a record that cannot be trained on: error ends the run before it begins; skip
    leaves the record out, and says so."""
    learn: Literal["all", "last"] = field(default="all", metadata=UNLESS_DEFAULT)
    """Which answers of a conversation are learned: all of them, or the last alone. A message with
    "train": false or "weight": 0 never is."""
    system: str | None = field(default=None, metadata=UNLESS_DEFAULT)
    """The system message of records that have none."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The data's part in the default out_dir."""

    def __post_init__(self) -> None:
        check_value(self, "val_fraction", 0 <= self.val_fraction < 1, "must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Alpaca(DataSource):
    """Stanford Alpaca's 52,002 instructions, or the small sample in the same form that comes with
    litlora."""

    source: Literal["auto", "full", "sample"] = "auto"
    """auto: the downloaded file; if there is none, download it; if that fails, take the sample.
    full: never the sample. sample: always the sample."""
    download_dir: str = "data/alpaca"
    """Where the full file is kept."""
    url: str = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
    """Where the full file comes from."""

    @property
    def name(self) -> str:
        return "alpaca"


@dataclass(frozen=True, kw_only=True)
class JSON(DataSource):
    """Your own records, in one of the forms that format names."""

    path: str
    """A .json or .jsonl file, or a directory of them: a list of records, or one record a line."""

    @property
    def name(self) -> str:
        return "json"
