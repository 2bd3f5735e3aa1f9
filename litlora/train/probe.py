"""Probes: what looks at the model while it trains, beside the loss. They change neither weights nor
random numbers, so a run learns the same with and without them."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.sources import read_dataset
from litlora.errors import DataError, UserError, setting
from litlora.evaluate.choices import Choices, read_choices
from litlora.evaluate.measures import (
    Measured,
    last_answer,
    measure_choice,
    measure_exact_match,
    measure_loss,
    prompt_ids,
)
from litlora.evaluate.subject import Subject
from litlora.paths import SAMPLES_FILE
from litlora.report.events import Evaluated, Event, Note, Sample, Sampled
from litlora.settings import EvalConfig, Files, Finetune, ReportConfig
from litlora.storage.atomic import replacing_file
from litlora.storage.untrusted import read_json_object, read_text

MOST_PROMPTS = 50
_FIGURES = {
    "loss": ("loss", "perplexity"),
    "exact_match": ("exact_match",),
    "choice": ("accuracy", "accuracy_per_character"),
}


class Probe(ABC):
    """Looks at the model at some steps, in evaluation mode and without gradients."""

    figures: tuple[str, ...] = ()
    """The names of the figures that it measures, as metrics.csv has them."""

    @abstractmethod
    def begin(self, step: int) -> list[Event]:
        """Training begins, or goes on after so many steps."""

    @abstractmethod
    def after(self, step: int, *, last: bool) -> list[Event]:
        """A step is done; `last`: the model is the result."""


@dataclass
class Evaluation(Probe):
    """A small task, every so many steps (`--eval.every`)."""

    config: EvalConfig
    conversations: list[Conversation]
    questions: list[Choices]
    subject: Subject | None = None

    @property
    def figures(self) -> tuple[str, ...]:
        return tuple(f"eval_{name}" for name in _FIGURES[self.config.measure])

    def begin(self, step: int) -> list[Event]:
        return [self._evaluated(step)] if step == 0 else []

    def after(self, step: int, *, last: bool) -> list[Event]:
        return [self._evaluated(step)] if last or step % self.config.every == 0 else []

    def _evaluated(self, step: int) -> Evaluated:
        found = self._measured()
        figures = {f"eval_{name}": found.figures[name] for name in _FIGURES[self.config.measure]}
        return Evaluated(step, figures)

    def _measured(self) -> Measured:
        config = self.config
        if config.measure == "choice":
            return measure_choice(self.subject, self.questions)
        if config.measure == "loss":
            return measure_loss(self.subject, self.conversations)
        return measure_exact_match(
            self.subject,
            self.conversations,
            pattern=config.pattern,
            max_new_tokens=config.answer_tokens,
        )


@dataclass
class Samples(Probe):
    """Answers to fixed prompts, before training and after it (`--report.prompts`). Those before are
    kept in a file, for a run that resumes."""

    config: ReportConfig
    conversations: list[Conversation]
    directory: Path
    subject: Subject | None = None

    def begin(self, step: int) -> list[Event]:
        file = self.directory / SAMPLES_FILE
        prompts = [conversation.messages[-2].content for conversation in self.conversations]
        if step:
            return self._earlier(file, prompts)
        before = self._sampled(0)
        with replacing_file(file) as staging:
            values = {"before": [vars(sample) for sample in before.samples]}
            staging.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
        return [before]

    def after(self, step: int, *, last: bool) -> list[Event]:
        return [self._sampled(step)] if last else []

    def _earlier(self, file: Path, prompts: list[str]) -> list[Event]:
        try:
            samples = tuple(Sample(**sample) for sample in read_json_object(file)["before"])
            if [sample.prompt for sample in samples] == prompts:
                return [Sampled(0, samples)]
        except (UserError, KeyError, TypeError):
            pass
        return [Note(f"{file}: has no answers to these prompts from before training")]

    def _sampled(self, step: int) -> Sampled:
        prompts = [prompt_ids(self.subject, conversation) for conversation in self.conversations]
        given = self.subject.answers(prompts, self.config.sample_tokens)
        samples = (
            Sample(conversation.messages[-2].content, said, last_answer(conversation))
            for conversation, said in zip(self.conversations, given, strict=True)
        )
        return Sampled(step, tuple(samples))


def read_probes(settings: Finetune, directory: Path) -> list[Evaluation | Samples]:
    """The probes that the settings ask for, before there is a model. Raises UserError for a file that
    cannot be read."""
    probes: list[Evaluation | Samples] = []
    config = settings.eval
    if config.every:
        source = Files(path=config.on, max_examples=config.first, cache=False)
        is_choice = config.measure == "choice"
        questions = read_choices(source) if is_choice else []
        conversations = [] if is_choice else list(read_dataset(source).conversations)
        probes.append(Evaluation(config, conversations, questions))
    if settings.report.prompts is not None:
        probes.append(Samples(settings.report, _prompts(Path(settings.report.prompts)), directory))
    return probes


def _prompts(file: Path) -> list[Conversation]:
    """Of a .txt file each line, else of each record the last question, with its answer."""
    name = f"{setting('prompts')} {file}"
    if file.suffix == ".txt":
        if not file.is_file():
            raise UserError(f"{name}: no such file")
        lines = [line.strip() for line in read_text(file).splitlines()]
        found = [
            Conversation(
                (Message("user", line), Message("assistant", "", train=True)),
                Place(str(file), f"line {number}"),
            )
            for number, line in enumerate(lines, 1)
            if line
        ]
    else:
        found = list(read_dataset(Files(path=str(file), cache=False)).conversations)
    if not 1 <= len(found) <= MOST_PROMPTS:
        raise UserError(f"{name}: has {len(found)} prompts; give from 1 to {MOST_PROMPTS}")
    for conversation in found:
        roles = [message.role for message in conversation.messages[-2:]]
        if roles != ["user", "assistant"]:
            raise DataError(f"{conversation.place}: must end with a question and its answer")
    return found
