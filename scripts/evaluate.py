"""Measure a model: loss and perplexity, exact match, multiple choice, tasks of lm-evaluation-harness.

python scripts/evaluate.py --checkpoint_dir $dir/final --data heldout.jsonl
python scripts/evaluate.py --checkpoint_dir $dir/final --data qa.jsonl --measure exact_match
python scripts/evaluate.py --checkpoint_dir $dir/final --data choices.jsonl --measure choice
python scripts/evaluate.py --checkpoint_dir $dir/final --harness.tasks '[arc_easy]'

The results are added to evaluation.json in the checkpoint directory, and to the report.html of the run
that made it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from litlora import cli
from litlora.console import say
from litlora.data.sources import read_dataset
from litlora.evaluate.choices import Choices, read_choices
from litlora.evaluate.results import HEAD, Result, add_results, read_results
from litlora.paths import EVALUATION_FILE, checkpoint_dir, output_file
from litlora.report.compare import text
from litlora.report.page import PAGE_FILE, Table, add_table
from litlora.settings import Evaluate

if TYPE_CHECKING:
    from litlora.data.conversation import Conversation
    from litlora.evaluate.measures import Measured
    from litlora.evaluate.subject import Subject
    from litlora.load import Loaded

SHOWN = 3
"""Wrong answers of a measure that are printed."""


def main(settings: Evaluate) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    output = output_file(settings.output or str(directory / EVALUATION_FILE), (".json",), [])
    read_results(output)  # it may be another file, which must stay
    measures = settings.measures
    questions = read_choices(settings.data) if "choice" in measures else []
    conversations = _conversations(settings) if {*measures} - {"choice"} else []

    if settings.harness.tasks:  # before the model is loaded: it may not be installed
        from litlora.evaluate.harness import run_tasks

    from litlora.evaluate.subject import Subject
    from litlora.load import load, pick_device

    loaded = load(
        directory,
        live=settings.live,
        base_dir=base_dir,
        allow_base_mismatch=settings.allow_base_mismatch,
        device=pick_device(settings.accelerator),
        quantize=settings.quantize,
    )
    style, reason = loaded.style(settings.prompt_style, default="plain")
    for notice in loaded.chain.notices:
        say(f"note: {notice}", file=sys.stderr)
    subject = Subject(loaded.model, loaded.tokenizer, style, settings.batch_tokens)
    how = _how(loaded, style.title)
    say(f"{directory} | prompt style {style.title} ({reason}) | {', '.join(map(str, how.values()))}")
    results = []
    for measure in measures:
        found = _measure(subject, measure, settings, conversations, questions)
        for notice in found.notices:
            say(f"note: {notice}", file=sys.stderr)
        more = {"pattern": settings.pattern, "ignore_case": settings.ignore_case}
        more |= {"max_new_tokens": settings.max_new_tokens}
        more = more if measure == "exact_match" else {}
        where = getattr(settings.data, "path", settings.data.name)
        results.append(
            Result(
                measure=measure,
                data=where,
                how=how | more,
                records=found.records,
                figures=found.figures,
                wrong=found.wrong,
            )
        )
    if settings.harness.tasks:
        results += run_tasks(subject, settings.harness, how)
    _tell(directory, output, results)


def _conversations(settings: Evaluate) -> "list[Conversation]":
    """All records, in memory: each is measured on."""
    dataset = read_dataset(dataclasses.replace(settings.data, cache=False))
    for notice in (dataset.notice, *dataset.notices):
        if notice:
            say(f"data: {notice}")
    return list(dataset.conversations)


def _how(loaded: "Loaded", style: str) -> dict[str, str]:
    """What the figures depend on besides the measure."""
    from litlora.lora.layer import lora_layers

    dtype = str(loaded.model.like.dtype).removeprefix("torch.")
    how = {"prompt_style": style, "dtype": dtype}
    if loaded.quantized is not None:
        how["base"] = f"base in {loaded.quantized.quantizer.name}"
    if loaded.chain.adapters:
        how["adapter"] = "adapter live" if lora_layers(loaded.model) else "adapter merged"
    return how


def _measure(
    subject: "Subject",
    measure: str,
    settings: Evaluate,
    conversations: "list[Conversation]",
    questions: list[Choices],
) -> "Measured":
    from litlora.evaluate.measures import measure_choice, measure_exact_match, measure_loss

    if measure == "loss":
        return measure_loss(subject, conversations)
    if measure == "choice":
        return measure_choice(subject, questions)
    return measure_exact_match(
        subject,
        tqdm(conversations, disable=None, leave=False, unit="record"),  # None: on a terminal alone
        pattern=settings.pattern,
        ignore_case=settings.ignore_case,
        max_new_tokens=settings.max_new_tokens,
    )


def _tell(directory: Path, output: Path, results: list[Result]) -> None:
    """Print the results, and add them to the file and to the report of the run."""
    say("", *text(Table(title="", head=HEAD, rows=[row for result in results for row in result.rows()])), "")
    for result in results:
        for wrong in result.wrong[:SHOWN]:
            said, expected = wrong["answer"][:200], wrong["expected"][:200]
            say(f"{result.measure}, wrong: {wrong['place']}: {said!r}, expected {expected!r}")
    everything = add_results(output, results)
    say(f"results: {output}")
    page = directory.parent / PAGE_FILE
    rows = [row for result in everything for row in result.rows()]
    if page.is_file() and directory.resolve().parent == page.resolve().parent:
        if add_table(page, Table(title=f"Evaluation of {directory.name}", head=HEAD, rows=rows)):
            say(f"report: {page}")


if __name__ == "__main__":
    cli.run(main, Evaluate)
