"""Where the training examples come from: one dataclass a source."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from litlora.errors import setting
from litlora.settings.checks import check, check_positive, check_value

RecordFormat = Literal[
    "alpaca", "messages", "sharegpt", "prompt_completion", "text", "preference", "labelled"
]
UNLESS_DEFAULT = {"stored": "unless default"}
OF_THE_WHOLE = (
    *("val_fraction", "split_seed", "val_path"),
    *("max_examples", "shuffle", "drop_duplicates", "cache", "cache_dir"),
)
"""Settings that choose among the records of all sources, not how records are read."""
MOST_WEIGHT = 100


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where the training examples come from."""

    val_fraction: float = 0.05
    """Fraction of the examples held out of training to measure the validation loss; 0: none."""
    split_seed: int = 42
    """Seed of the choice of the examples that are held out; also of those that max_examples takes
    of shuffled records and of a mixture."""
    ignore: tuple[str, ...] = field(default=(), metadata=UNLESS_DEFAULT)
    """Fields of the records to leave out; those of messages as messages.NAME. Any other field that
    is not known is an error."""
    format: RecordFormat | None = field(default=None, metadata=UNLESS_DEFAULT)
    """The form of the records; default: what the first of them show. alpaca: instruction, input,
    output. messages: OpenAI's, with tools. sharegpt: conversations of from and value.
    prompt_completion: each as text or messages. text: plain documents, all learned. preference:
    chosen and rejected, for finetune/dpo.py. labelled: prompt, completion and label, likewise."""
    columns: dict[str, str] = field(default_factory=dict, metadata=UNLESS_DEFAULT)
    """What the records call the fields of their form, where that is another name: {prompt: question,
    completion: answer}; and those of messages: {role: speaker, content: text}."""
    roles: dict[str, str] = field(default_factory=dict, metadata=UNLESS_DEFAULT)
    """Who speaks in messages, by the records' own names: {CUSTOMER: user, AGENT: assistant}. The roles
    are system, user, assistant, tool, and function_call for a call as text."""
    on_bad: Literal["error", "skip"] = field(default="error", metadata=UNLESS_DEFAULT)
    """What becomes of a record that cannot be trained on: error ends the run before it begins; skip
    leaves the record out, and says so. A file that cannot be read is an error with both."""
    learn: Literal["all", "last"] = field(default="all", metadata=UNLESS_DEFAULT)
    """Which answers of a conversation are learned: all of them, or the last alone. A message with
    "train": false or "weight": 0 never is."""
    system: str | None = field(default=None, metadata=UNLESS_DEFAULT)
    """The system message of records that have none."""
    val_path: str | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Validation data of your own: a path as for training data. No example is then held out."""
    max_examples: int | None = field(default=None, metadata=UNLESS_DEFAULT)
    """At most so many records are used, the first ones, for training and validation together."""
    shuffle: bool = field(default=False, metadata=UNLESS_DEFAULT)
    """Let max_examples take any records, chosen by split_seed, not the first ones. The order of
    training is random in any case."""
    drop_duplicates: bool = field(default=False, metadata=UNLESS_DEFAULT)
    """Leave out records that repeat others exactly, and training records that val_path has too.
    Without this they are counted."""
    cache: bool = field(default=True, metadata=UNLESS_DEFAULT)
    """Data above 16 MB is tokenised once, into files that later runs find again. false: keep it in
    memory, and tokenise it in every run."""
    cache_dir: str | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Where these files are kept; what no run has used for 30 days is removed. Default:
    litlora/data in XDG_CACHE_HOME, or in ~/.cache."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The data's part in the default out_dir."""

    def __post_init__(self) -> None:
        check_value(self, "val_fraction", 0 <= self.val_fraction < 1, "must be at least 0 and below 1")
        check_positive(self, "max_examples")
        check(
            not self.shuffle or self.max_examples is not None,
            f"{setting('shuffle')}: chooses the records that {setting('max_examples')} takes, and has no "
            "effect without it; training shuffles by itself in every epoch",
        )
        is_default = self.val_fraction == DataSource.val_fraction
        check(
            self.val_path is None or is_default or self.val_fraction == 0,
            f"{setting('val_fraction')} {self.val_fraction}: {setting('val_path')} names the validation "
            "data already; use only one",
        )

    def of_files(self, path: str) -> "Files":
        """The same settings of records, for other files."""
        return Files(path=path, **self.of_records())

    def of_records(self) -> dict[str, Any]:
        """The settings that say how records are read, as far as they were set."""
        values = {field.name: (getattr(self, field.name), default(field)) for field in fields(DataSource)}
        return {
            name: value
            for name, (value, usual) in values.items()
            if name not in OF_THE_WHOLE and value != usual
        }


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
class Files(DataSource):
    """Your own records, in files of JSON, CSV, Parquet or Arrow, in one of the forms that format names."""

    path: str
    """A file (.json, .jsonl, .ndjson, .csv or .tsv, each also .gz or .zst; .parquet, .arrow), a
    directory or a quoted pattern of them ('data/*.jsonl'), a data set saved by save_to_disk, or
    hf://OWNER/NAME, also with /SPLIT or /FILE, on the Hugging Face Hub."""

    @property
    def name(self) -> str:
        return "files"


@dataclass(frozen=True, kw_only=True)
class JSON(Files):
    """Files, by the name that they had when they were JSON only."""

    @property
    def name(self) -> str:
        return "json"


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """One source of a mixture: its path, or its name."""

    path: str | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Files, as for Files."""
    source: str | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Or the name of a source, such as Alpaca."""
    weight: float = field(default=1.0, metadata=UNLESS_DEFAULT)
    """How many times its records are taken in an epoch; of a fraction, the same ones in each epoch,
    chosen by split_seed."""
    ignore: tuple[str, ...] | None = field(default=None, metadata=UNLESS_DEFAULT)
    """As for every source, where this one differs from the mixture."""
    format: RecordFormat | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Likewise."""
    columns: dict[str, str] | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Likewise."""
    roles: dict[str, str] | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Likewise."""
    system: str | None = field(default=None, metadata=UNLESS_DEFAULT)
    """Likewise."""

    def __post_init__(self) -> None:
        entry = f"{setting('sources')} {self.path or self.source or '{}'}"
        check((self.path is None) != (self.source is None), f"{entry}: needs path or source, one of them")
        ok = 0 < self.weight <= MOST_WEIGHT
        check(ok, f"{entry}: weight {self.weight:g} must be above 0 and at most {MOST_WEIGHT}")
        named = ", ".join(sorted(_by_name()))
        check(
            self.source is None or self.source in _by_name(),
            f"{entry}: no such data source; there are {named}, and path",
        )


@dataclass(frozen=True, kw_only=True)
class Mix(DataSource):
    """Several sources together.

    max_examples takes any of their records. What is held out for validation is not trained on,
    however often its source is taken.
    """

    sources: list[MixedSource]
    """[{path: a.jsonl, weight: 2}, {source: Alpaca, weight: 0.1}]; weight is how many times the
    records of a source are taken in an epoch (default 1). They may differ in format,
    columns, roles, ignore and system."""

    @property
    def name(self) -> str:
        return "mix"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.sources), f"{setting('sources')} is empty: name a path or a source")

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each source."""
        return tuple(entry.weight for entry in self.sources)

    def parts(self) -> list[DataSource]:
        """Each source by itself."""
        return [self._part(entry) for entry in self.sources]

    def _part(self, entry: MixedSource) -> DataSource:
        own = {name: value for name, value in vars(entry).items() if name not in ("source", "weight")}
        own = {name: value for name, value in own.items() if value is not None}
        kind = _by_name()[entry.source] if entry.source else Files
        return kind(**(self.of_records() | own))


def _by_name() -> dict[str, type[DataSource]]:
    """The sources that a name alone stands for."""
    return {
        kind.__name__: kind
        for kind in all_sources()
        if not any(field.default is field.default_factory is MISSING for field in fields(kind))
    }


def all_sources(kind: type[DataSource] = DataSource) -> list[type[DataSource]]:
    """Every class of data sources that can be named."""
    found = [each for inner in kind.__subclasses__() for each in (inner, *all_sources(inner))]
    return [each for each in dict.fromkeys(found) if "IS_FAMILY" not in vars(each)]


def default(field: Field) -> Any:
    """The default of a setting."""
    return field.default if field.default_factory is MISSING else field.default_factory()
