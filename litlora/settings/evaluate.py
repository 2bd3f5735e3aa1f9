"""The settings of an evaluation."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from litlora.errors import setting
from litlora.settings.checks import check, check_positive, check_value
from litlora.settings.data import JSON, DataSource
from litlora.settings.quantize import Quantization
from litlora.settings.styles import check_prompt_style

MEASURES = ("loss", "exact_match", "choice")
HELD_OUT = Path(__file__).parent.parent / "data" / "alpaca_sample_heldout.json"
"""Instructions about entities that the built-in sample leaves out."""


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """Tasks of lm-evaluation-harness; needs the extra eval."""

    tasks: list[str] = field(default_factory=list)
    """Names of its tasks or groups of tasks: [arc_easy, hellaswag]."""
    include_path: str | None = None
    """A directory of your own tasks, in the harness's YAML files."""
    num_fewshot: int | None = None
    """Solved examples in front of each question; default: what the task says."""
    limit: int | None = None
    """At most so many questions of each task, the first ones."""
    chat_template: bool = False
    """Ask in the model's own chat template instead of the bare text."""

    def __post_init__(self) -> None:
        check_positive(self, "limit")
        check(
            bool(self.tasks) or (self.include_path, self.num_fewshot, self.limit) == (None,) * 3,
            f"{setting('tasks')} is empty: name a task of the harness",
        )
        ok = self.include_path is None or Path(self.include_path).is_dir()
        check(ok, f"{setting('include_path')} {self.include_path}: no such directory")


def check_measures(measures: list[str], pattern: str | None, name: str) -> None:
    """Raise UserError for an unknown measure in the setting `name`, and for a pattern that is none."""
    for measure in measures:
        known = ", ".join(MEASURES)
        check(measure in MEASURES, f"{setting(name)} {measure}: no such measure; there are {known}")
    if pattern is None:
        return
    check(
        "exact_match" in measures,
        f"{setting('pattern')}: finds the answer in what a model writes, for {setting(name)} exact_match, "
        "which is not measured",
    )
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        groups, problem = -1, str(error)
        check(False, f"{setting('pattern')} {pattern}: not a regular expression: {problem}")
    check(groups <= 1, f"{setting('pattern')} {pattern}: has {groups} groups; mark one, the answer")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A small task that is measured while training goes on."""

    every: int = 0
    """Steps between two measurements; also before training, and at its end. 0: none."""
    on: str | None = None
    """The file of the task: records as for training; for choice, of prompt, choices and answer."""
    measure: Literal["exact_match", "choice", "loss"] = "exact_match"
    """What is measured, as by scripts/evaluate.py."""
    pattern: str | None = None
    """For exact_match: a regular expression that finds the answer to compare."""
    first: int = 100
    """At most so many records are used, the first ones."""
    answer_tokens: int = 64
    """For exact_match: longest answer in tokens."""

    def __post_init__(self) -> None:
        check_value(self, "every", self.every >= 0, "must be at least 0")
        check_positive(self, "first", "answer_tokens")
        check(
            not self.every or self.on is not None,
            f"{setting('every')} {self.every}: needs a task; name its file as {setting('on')}",
        )
        check(
            bool(self.every) or self.on is None,
            f"{setting('on')}: has no effect without {setting('every')}",
        )
        check_measures([self.measure], self.pattern, "measure")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What report.html shows besides curves and settings."""

    prompts: str | None = None
    """A file of prompts that the model answers before and after training: a .txt file with one a line,
    or records as for training."""
    sample_tokens: int = 64
    """Longest answer in tokens."""

    def __post_init__(self) -> None:
        check_positive(self, "sample_tokens")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model on a file, or on tasks of lm-evaluation-harness."""

    checkpoint_dir: str = "out/lora/alpaca/final"
    """Any checkpoint directory."""
    data: DataSource = field(default_factory=lambda: JSON(path=str(HELD_OUT)))
    """What to measure on: a file of records as for training; for choice, records of prompt, choices
    and answer. Default: instructions about what the built-in sample leaves out."""
    measure: list[str] = field(default_factory=list)
    """loss: of the answers, per token, with the perplexity; exact_match: whether the model's own
    answer is the record's; choice: whether the right choice is the likeliest. Default: loss, unless
    there are tasks of the harness."""
    pattern: str | None = None
    """For exact_match: a regular expression. Its group, or all of it, in its last match is the answer
    that is compared, of the model's text and of the record's: '#### (-?[0-9.]+)'."""
    ignore_case: bool = False
    """For exact_match: compare answers in lower case."""
    max_new_tokens: int = 256
    """For exact_match: longest answer in tokens."""
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    live: bool | None = None
    """Keep an adapter beside its base instead of merging it in memory. Default: merged, unless the
    base is held in few bits."""
    prompt_style: str | None = None
    """How the model is asked, as in chat. Default: the style that it was trained with, else its own
    chat template, else plain."""
    batch_tokens: int = 4096
    """Tokens that are computed at a time."""
    quantize: Quantization | Literal["none"] | None = None
    """Hold the linear layers of the blocks in few bits: nf4, nf4-dq, int8, fp8; none: in the base's
    number format. Default: what an adapter was trained on, else none."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; auto takes the fastest available."""
    output: str | None = None
    """The file of results; those of other measures in it are kept. Default: evaluation.json in
    checkpoint_dir."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it is no longer where the adapter says."""
    allow_base_mismatch: bool = False
    """Use a base even if its weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_positive(self, "max_new_tokens", "batch_tokens")
        check_prompt_style(self.prompt_style)
        check_measures(self.measures, self.pattern, "measure")
        check(
            self.data.val_path is None,
            f"{setting('val_path')}: all records are measured on; name the file as {setting('data')}",
        )

    @property
    def measures(self) -> list[str]:
        """What is measured on the data."""
        return self.measure or ([] if self.harness.tasks else ["loss"])
