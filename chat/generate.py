"""Answer a file of prompts or conversations with a model, in batches.

python chat/generate.py --checkpoint_dir $dir/final --prompts questions.jsonl --out_path answers.jsonl
python chat/generate.py --checkpoint_dir $dir/final --prompts chats.jsonl --out_path a.jsonl --n 4 --seed 1
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.cli import run
from litlora.console import say
from litlora.errors import MissingExtraError, UserError, setting
from litlora.paths import checkpoint_dir, output_file
from litlora.settings import Generate

if TYPE_CHECKING:
    from litlora.checkpoint import Chain
    from litlora.serve.records import Prompt


def main(settings: Generate) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    from litlora.serve.records import read_prompts

    out = output_file(settings.out_path, (".jsonl",), [Path(settings.prompts)], named="out_path")
    if out.exists() and not settings.overwrite:
        raise UserError(
            f"{setting('out_path')} {out}: exists; name another, or replace it with {setting('overwrite')}"
        )
    prompts = read_prompts(settings.prompts)
    grammar = read_grammar(Path(settings.json_schema)) if settings.json_schema else None

    import time

    from tqdm import tqdm

    from litlora.checkpoint import resolve
    from litlora.serve.many import Partial, answers, plan
    from litlora.serve.opening import Opening, open_model
    from litlora.serve.prompt import Asker
    from litlora.serve.sampling import Sampling

    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    partial = Partial(out, identity(settings, prompts, chain, grammar), overwrite=settings.overwrite)
    opened = open_model(chain, Opening.of(settings, max_batch=settings.batch_size), live=False)
    for notice in opened.notices:
        say(f"note: {notice}", file=sys.stderr)
    asker = Asker(opened.engine.tokenizer, opened.style)
    work = plan(prompts, asker, Sampling.of(settings), settings.n, opened.engine.context, grammar)
    if partial.done:
        say(f"{len(partial.done)} of {len(work.keys)} answers are there already: {partial.file}")
    started, before = time.perf_counter(), len(partial.done)
    with tqdm(total=len(work.keys), initial=before, unit="answer", dynamic_ncols=True, disable=None) as bar:

        def counted():
            for key, found in answers(opened.engine, work, partial.done):
                yield key, found
                bar.update()

        partial.add(counted())
    seconds = time.perf_counter() - started
    partial.finish(work)
    num_tokens = sum(found["tokens"] for found in list(partial.done.values())[before:])
    say(
        f"{len(work.keys)} answers to {len(prompts)} prompts: {out} "
        f"({num_tokens:,} tokens in {seconds:.1f} s, {num_tokens / max(seconds, 1e-9):,.0f} a second)"
    )


def read_grammar(file: Path) -> str:
    """What answers may be, by a file with a JSON schema. Raises UserError, naming the file."""
    from litlora.serve.schema import grammar_of
    from litlora.storage.untrusted import read_json_object

    schema = read_json_object(file)
    try:
        return grammar_of(schema)
    except MissingExtraError:
        raise
    except UserError as error:
        raise UserError(f"{file}: {error.args[0]}") from None


FREE = (
    *("prompts", "out_path", "overwrite", "batch_size", "checkpoint_dir", "base_checkpoint_dir"),
    "json_schema",
)
"""Settings that may change between a run that was stopped and the one that goes on with it."""


def identity(settings: Generate, prompts: "list[Prompt]", chain: "Chain", grammar: str | None) -> str:
    """Identifies what is asked, how, and of which model."""
    from litlora.serve.records import fingerprint

    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE}
    shape = {} if grammar is None else {"json_schema": grammar}
    return fingerprint(prompts, {**facts, **shape, "model": chain.top.fingerprint})


if __name__ == "__main__":
    run(main, Generate)
