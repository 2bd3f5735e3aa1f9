"""Well-known data sets: where each is, and what its records look like."""

from dataclasses import dataclass, field
from typing import ClassVar

from litlora.settings.data import UNLESS_DEFAULT, DataSource, RecordFormat


@dataclass(frozen=True, kw_only=True)
class KnownSet(DataSource):
    """A well-known data set. What it says about its records holds beside what is set."""

    IS_FAMILY: ClassVar[bool] = True
    """Its subclasses are what can be named."""
    ADDRESSES: ClassVar[tuple[str, ...]]
    """Its files: https://..., or hf://datasets/OWNER/NAME/FILE on the Hugging Face hub, where FILE may
    be a pattern."""
    FORM: ClassVar[RecordFormat]
    COLUMNS: ClassVar[dict[str, str]] = {}
    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Fields of its records that training does not need."""

    data_dir: str | None = None
    """Where its files are kept; default: data/NAME. Files that are there are not downloaded."""
    urls: tuple[str, ...] = field(default=(), metadata=UNLESS_DEFAULT)
    """Where its files come from, instead of their own place: https:// addresses, or
    hf://datasets/OWNER/NAME/FILE, where FILE may be a pattern."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, kw_only=True)
class AlpacaGPT4(KnownSet):
    """Alpaca's 52,002 instructions, answered by GPT-4."""

    ADDRESSES = (
        "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/"
        "alpaca_gpt4_data.json",
    )
    FORM = "alpaca"


@dataclass(frozen=True, kw_only=True)
class LIMA(KnownSet):
    """1,030 conversations chosen by hand. Its terms must be accepted on the hub first."""

    ADDRESSES = ("hf://datasets/GAIR/lima/train.jsonl",)
    FORM = "sharegpt"
    UNUSED = ("source",)


@dataclass(frozen=True, kw_only=True)
class Dolly(KnownSet):
    """Databricks' 15,000 instructions, written by people."""

    ADDRESSES = ("hf://datasets/databricks/databricks-dolly-15k/databricks-dolly-15k.jsonl",)
    FORM = "alpaca"
    COLUMNS = {"input": "context", "output": "response"}
    UNUSED = ("category",)


@dataclass(frozen=True, kw_only=True)
class Deita(KnownSet):
    """Deita's conversations, 10,000 that were chosen automatically."""

    ADDRESSES = ("hf://datasets/HuggingFaceH4/deita-10k-v0-sft/data/train_sft-*.parquet",)
    FORM = "messages"
    UNUSED = ("prompt", "prompt_id")


@dataclass(frozen=True, kw_only=True)
class LongForm(KnownSet):
    """23,652 long texts, each with an instruction that would lead to it."""

    ADDRESSES = ("https://raw.githubusercontent.com/akoksal/LongForm/main/dataset/train.json",)
    FORM = "alpaca"
    COLUMNS = {"instruction": "input"}
    UNUSED = ("source", "subset")


@dataclass(frozen=True, kw_only=True)
class FLAN(KnownSet):
    """FLAN's tasks, in ten wordings each; large, so name some of the files in data.urls.

    hf://datasets/Muennighoff/flan/train/cola_10templates_train.jsonl is one of them."""

    ADDRESSES = ("hf://datasets/Muennighoff/flan/train/*_10templates_train.jsonl",)
    FORM = "prompt_completion"
    COLUMNS = {"prompt": "inputs", "completion": "targets"}
    UNUSED = ("task",)


@dataclass(frozen=True, kw_only=True)
class OpenHermes(KnownSet):
    """OpenHermes 2.5: a million conversations, most of them by GPT-4, in one file of 1.9 GB."""

    ADDRESSES = ("hf://datasets/teknium/OpenHermes-2.5/openhermes2_5.json",)
    FORM = "sharegpt"
    COLUMNS = {"system": "system_prompt"}
    UNUSED = (
        *("custom_instruction", "topic", "model_name", "model", "skip_prompt_formatting", "category"),
        *("views", "language", "id", "title", "idx", "hash", "avatarUrl", "source"),
    )


@dataclass(frozen=True, kw_only=True)
class UltraChat(KnownSet):
    """UltraChat 200k: 207,865 filtered conversations of several turns."""

    ADDRESSES = ("hf://datasets/HuggingFaceH4/ultrachat_200k/data/train_sft-*.parquet",)
    FORM = "messages"
    UNUSED = ("prompt", "prompt_id")
