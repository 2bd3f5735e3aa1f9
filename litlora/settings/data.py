"""Where the training examples come from: one dataclass a source."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from litlora.errors import setting
from litlora.settings.checks import check, check_value


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where the training examples come from."""

    val_fraction: float = 0.05
    """Fraction of the examples held out of training to measure the validation loss; 0: none."""
    split_seed: int = 42
    """Seed of the choice of the examples that are held out."""
    ignore: tuple[str, ...] = field(default=(), metadata={"stored": "unless default"})
    """Fields of the records to leave out. Any other field that is not known is an error."""
    cache: bool = field(default=True, metadata={"stored": "unless default"})
    """Data above 16 MB is tokenised once, into files that later runs find again. false: keep it in
    memory, and tokenise it in every run."""
    cache_dir: str | None = field(default=None, metadata={"stored": "unless default"})
    """Where these files are kept; what no run has used for 30 days is removed. Default:
    litlora/data in XDG_CACHE_HOME, or in ~/.cache."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The data's part in the default out_dir."""

    def __post_init__(self) -> None:
        check_value(self, "val_fraction", 0 <= self.val_fraction < 1, "must be at least 0 and below 1")
        needed = ", ".join(name for name in ("instruction", "output") if name in self.ignore)
        check(not needed, f"{setting('ignore')} {needed}: a record cannot be trained on without it")


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
    """Your own records: instruction and output; optionally input, system and history."""

    path: str
    """A .json or .jsonl file, or a directory of them: a list of records, or one record a line."""

    @property
    def name(self) -> str:
        return "json"
