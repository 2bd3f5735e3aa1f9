"""Answers to many prompts: in batches, the longest prompts first, and resumed where it stopped.

What is done stands in OUT.part, a line an answer as it comes, after a line that identifies what is
asked. At the end it becomes OUT, in the order of the prompts.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from litlora.console import printable
from litlora.errors import DataError, UserError, setting
from litlora.serve.answer import Answer, Request
from litlora.serve.engine import Engine
from litlora.serve.prompt import Asker
from litlora.serve.records import ANSWER, Prompt
from litlora.serve.sampling import Sampling
from litlora.serve.schema import Shape, Shapes
from litlora.storage.atomic import replacing_file

Key = tuple[int, int]
"""The number of a prompt, and of an answer to it."""


@dataclass(frozen=True)
class Work:
    """Prompts, and how each is to be answered."""

    prompts: list[Prompt]
    ids: list[list[int]]
    """Of each prompt, in tokens."""
    sampling: Sampling
    count: int
    """Answers to each."""
    stop_ids: frozenset[int]
    shape: Shape | None = None
    """What every answer must be."""

    @property
    def keys(self) -> list[Key]:
        """Every answer, those to the longest prompts first: what does not fit shows early, and those
        that run together are alike."""
        order = sorted(range(len(self.ids)), key=lambda number: -len(self.ids[number]))
        return [(number, sample) for number in order for sample in range(self.count)]

    def request(self, key: Key) -> Request:
        """What an engine is asked for an answer. Its tokens depend on the seed and the key, and not
        on what runs beside it."""
        sampling = self.sampling
        if sampling.seed is not None:
            digest = hashlib.sha256(f"{sampling.seed} {key}".encode()).digest()
            sampling = replace(sampling, seed=int.from_bytes(digest[:7]))
        shape = self.shape and self.shape.another()
        return Request(prompt=self.ids[key[0]], sampling=sampling, stop_ids=self.stop_ids, shape=shape)


def plan(
    prompts: list[Prompt],
    asker: Asker,
    sampling: Sampling,
    count: int,
    context: int,
    grammar: str | None = None,
) -> Work:
    """Encode all prompts. Raises DataError, naming the record, for one that leaves no room for an
    answer, or that the style has no place for."""
    ids = [asker.ids(prompt.conversation) for prompt in prompts]
    for prompt, found in zip(prompts, ids, strict=True):
        if not found or len(found) >= context:
            raise DataError(
                f"{prompt.conversation.place}: has {len(found)} tokens as a prompt; the model's context "
                f"holds {context}, the answer included"
            )
    shape = None if grammar is None else Shapes(asker.tokenizer, asker.stop_ids).shape(grammar)
    return Work(prompts, ids, sampling, count, asker.stop_ids, shape)


class Partial:
    """The answers that are done, on the disk."""

    def __init__(self, out: Path, fingerprint: str, *, overwrite: bool = False) -> None:
        """Reads what an earlier run left. Raises UserError if that was another one."""
        self.out, self.file = out, out.with_name(f"{out.name}.part")
        self._head = {"litlora": "generate", "fingerprint": fingerprint}
        self.done: dict[Key, dict[str, Any]] = {}
        if overwrite:
            self.file.unlink(missing_ok=True)
        if self.file.exists():
            self._read()

    def _read(self) -> None:
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be half of one
        head, *lines = whole.splitlines() or [b"{}"]
        try:
            if whole and json.loads(head) != self._head:
                raise ValueError
            self.done = {
                (found.pop("prompt"), found.pop("sample")): found for found in map(json.loads, lines)
            }
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{self.file}: was left by a run with other prompts, another model or other settings; name "
                f"another {setting('out_path')}, or replace it with {setting('overwrite')}"
            ) from None
        if len(whole) < len(content):
            self.file.write_bytes(whole)

    def add(self, answers: Iterator[tuple[Key, dict[str, Any]]]) -> None:
        """Store answers as they come."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps(self._head) + "\n")
            for (prompt, sample), found in answers:
                file.write(
                    json.dumps({"prompt": prompt, "sample": sample, **found}, ensure_ascii=False) + "\n"
                )
                file.flush()
                self.done[prompt, sample] = found

    def finish(self, work: Work) -> None:
        """Write all records with their answers."""
        with replacing_file(self.out) as staging, staging.open("w", encoding="utf-8") as file:
            for number, prompt in enumerate(work.prompts):
                found = [self.done[number, sample] for sample in range(work.count)]
                added = {name: [one[name] for one in found] for name in ANSWER}
                if work.count == 1:
                    added = {name: values[0] for name, values in added.items()}
                file.write(json.dumps({**prompt.record, **added}, ensure_ascii=False) + "\n")
        self.file.unlink()


def answers(engine: Engine, work: Work, done: dict[Key, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Compute the answers that are not done, as many at a time as the engine takes; yields each once
    it has ended. Those that run are cancelled if nobody waits for more."""
    waiting = [key for key in work.keys if key not in done][::-1]
    running: list[tuple[Key, Answer, list[str]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < engine.max_batch:
                key = waiting.pop()
                running.append((key, engine.submit(work.request(key)), []))
            engine.step()
            for entry in [*running]:
                key, answer, pieces = entry
                while (token := answer.take()) is not None:
                    pieces.append(token.text)
                if answer.ended.is_set():
                    running.remove(entry)
                    text = printable("".join(pieces))
                    yield key, dict(zip(ANSWER, (text, answer.finish, answer.num_tokens), strict=True))
    finally:
        for _, answer, _ in running:
            answer.cancel()
