"""The process in which pieces of large data become examples, by `litlora.worker`: see
`data/parallel.py`, which asks. Torch-free.

The first question is {"setup": a pickled `Setup`}; its answer is "ready". Each of the others is a
piece of the data: {"reader": a pickled `RecordReader`} with {"file": path, "start": byte, "stop":
byte, "line": number of its first line} of a file of JSON lines, or {"entries": pickled entries}.
The reply is {"part": a pickled `Part`}; or {"refused": [class of the error, message]}, or {"failed":
a traceback} for a mistake of our own. Everything pickled comes from the process that asks, and is
in base64.
"""

import base64
import json
import pickle
import signal
import sys
import traceback
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litlora.data.choosing import Survey
from litlora.data.encode import Encoder
from litlora.data.examples import EVENTS, chunks, examples_of
from litlora.data.files import Entry, line_entries
from litlora.data.parts import Part, Setup, checksum
from litlora.data.records import RecordReader
from litlora.data.skipped import Skipped, reading_files
from litlora.errors import DataError, UserError

CHARACTERS = 2**21
"""That are encoded at a time, about."""


def main() -> None:
    # Ctrl-C is for the process that asks; this one ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup: Setup = _unpickled(json.loads(sys.stdin.readline())["setup"])
    encoder = Encoder(setup.tokenizer, setup.style)
    reply({"ready": True})
    for line in sys.stdin:
        try:
            question = json.loads(line)
            part = made(setup, encoder, _unpickled(question["reader"]), question)
            reply({"part": base64.b64encode(pickle.dumps(part)).decode()})
        except UserError as error:
            reply({"refused": [type(error).__name__, error.args[0]]})
        except Exception:
            reply({"failed": traceback.format_exc()})


def entries(question: dict[str, Any], on_bad: str) -> Iterator[Entry]:
    """The records of a piece."""
    if "entries" in question:
        return iter(_unpickled(question["entries"]))
    file = Path(question["file"])
    try:
        with file.open("rb") as opened:
            opened.seek(question["start"])
            content = opened.read(question["stop"] - question["start"])
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    with reading_files(on_bad):
        return line_entries(file, content, question["start"], question["line"])


def made(setup: Setup, encoder: Encoder, reader: RecordReader, question: dict[str, Any]) -> Part:
    """The examples of the records of a piece."""
    skipped = Skipped()
    survey = Survey(reader.ignore)
    records = entries(question, reader.on_bad)
    if question["source"] is not None:  # else the run itself has seen them
        records = survey.noting(records)
    conversations = list(reader.read(records, skipped))
    examples, (sizes, lengths, numbers, events) = bytearray(), (array("i") for _ in range(4))
    number = 0
    for chunk in chunks(conversations, CHARACTERS):
        for encoded in encoder.encode(chunk, skipped if reader.on_bad == "skip" else None):
            counts: Counter[str] = Counter()
            for example in examples_of(encoded, setup.max_seq_length, counts):
                spans = array("i", [bound for span in example.learned for bound in span])
                content = example.ids.tobytes() + spans.tobytes()
                examples += content + checksum(content)
                sizes.append(len(example.ids) + len(spans) + 1)
                lengths.append(len(example.ids))
                numbers.append(number)
            for event, name in enumerate(EVENTS):
                if counts[name]:
                    events.extend((number, event, counts[name]))
            number += 1
    return Part(
        num_conversations=number,
        examples=bytes(examples),
        sizes=sizes.tobytes(),
        lengths=lengths.tobytes(),
        conversations=numbers.tobytes(),
        events=events.tobytes(),
        first=str(conversations[0].place) if conversations else "",
        num_skipped=skipped.number,
        skipped=skipped.reasons,
        source=question["source"],
        hashes=survey.hashes.tobytes(),
    )


def reply(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _unpickled(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))


if __name__ == "__main__":
    main()
