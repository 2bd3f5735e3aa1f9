"""Every setting of every command, once: its name, default, unit and help text. Torch-free.

The docstring under a field is its `--help` text. A command takes one dataclass.

lora.py         LoRAConfig
data.py         where the training examples come from: DataSource, Alpaca, Files, Mix
known_sets.py   well-known data sets, by name
train.py        TrainConfig, the training loop
preference.py   PreferenceConfig, preference tuning
distill.py      DistillConfig, learning from a teacher
finetune.py     the fine-tuning commands
sampling.py     SamplingSettings, how tokens are chosen
inference.py    Inference, what the commands share that ask a model
chat.py         chat, and answers to a file of prompts
serve.py        the server
adapters.py     one adapter or several: merge, resize, combine, export, inspect
files.py        LoRA files and the models they belong to, whatever models they are
checkpoints.py  whole checkpoints: convert, download
doctor.py       what a machine can do
evaluate.py     evaluation
log.py          LogConfig, the loggers of a run
runs.py         runs that there are: compare
models.py       models that can be fine-tuned: list
other_names.py  what other programs call them
tokenizer.py    TokenizerConfig, the tokens that are added
styles.py       the prompt styles that a setting may name
quantize.py     in what few bits a base can be held
launch.py       what started this process, and how many beside it
streaming.py    whether a base stays in its file
checks.py       what a value must be
stored.py       how files store settings
"""

from litlora.settings.adapters import (
    CombineLoRA,
    ExportGGUF,
    ExportPEFT,
    InspectCheckpoint,
    MergeLoRA,
    ResizeLoRA,
)
from litlora.settings.chat import Chat, Generate
from litlora.settings.checkpoints import ConvertHF, ConvertLit, Download, Upload
from litlora.settings.checks import (
    LEAST_ALPHA,
    SIZE_UNITS,
    check,
    check_alpha,
    check_seed,
    check_size,
    num_bytes,
)
from litlora.settings.data import JSON, Alpaca, DataSource, Files, Mix, MixedSource, all_sources
from litlora.settings.distill import DistillConfig
from litlora.settings.doctor import Doctor
from litlora.settings.evaluate import EvalConfig, Evaluate, HarnessConfig, ReportConfig
from litlora.settings.files import FileType, LoRAExtractor, LoRAMerger, OutputDtype
from litlora.settings.finetune import (
    QUICKSTART,
    REPOSITORY,
    Finetune,
    FinetuneDistill,
    FinetuneDPO,
    FinetuneFull,
    FinetuneLoRA,
    ShowData,
    ShowDistill,
    ShowPreference,
)
from litlora.settings.known_sets import (
    FLAN,
    LIMA,
    AlpacaGPT4,
    Deita,
    Dolly,
    KnownSet,
    LongForm,
    OpenHermes,
    UltraChat,
)
from litlora.settings.log import LogConfig
from litlora.settings.lora import LoRAConfig
from litlora.settings.models import ListModels
from litlora.settings.preference import PreferenceConfig
from litlora.settings.runs import CompareRuns
from litlora.settings.serve import Serve
from litlora.settings.stored import dump, stored_values
from litlora.settings.targets import PRESETS
from litlora.settings.tokenizer import TokenizerConfig
from litlora.settings.train import AUTO, TrainConfig

__all__ = [
    "AUTO",
    "FLAN",
    "JSON",
    "LEAST_ALPHA",
    "LIMA",
    "PRESETS",
    "QUICKSTART",
    "REPOSITORY",
    "SIZE_UNITS",
    "Alpaca",
    "AlpacaGPT4",
    "Chat",
    "CombineLoRA",
    "CompareRuns",
    "ConvertHF",
    "ConvertLit",
    "DataSource",
    "Deita",
    "DistillConfig",
    "Doctor",
    "Dolly",
    "Download",
    "ExportGGUF",
    "EvalConfig",
    "Evaluate",
    "ExportPEFT",
    "FileType",
    "Files",
    "Finetune",
    "FinetuneDPO",
    "FinetuneDistill",
    "FinetuneFull",
    "FinetuneLoRA",
    "HarnessConfig",
    "Generate",
    "InspectCheckpoint",
    "KnownSet",
    "ListModels",
    "LoRAConfig",
    "LoRAExtractor",
    "LoRAMerger",
    "LogConfig",
    "LongForm",
    "MergeLoRA",
    "Mix",
    "MixedSource",
    "OpenHermes",
    "OutputDtype",
    "PreferenceConfig",
    "ReportConfig",
    "ResizeLoRA",
    "Serve",
    "ShowData",
    "ShowDistill",
    "ShowPreference",
    "TokenizerConfig",
    "TrainConfig",
    "Upload",
    "UltraChat",
    "all_sources",
    "check",
    "check_alpha",
    "check_seed",
    "check_size",
    "dump",
    "num_bytes",
    "stored_values",
]
