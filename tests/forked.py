"""Commands run as a user runs them, hundreds in the time of a few: a process that has imported
everything forks for each.

    python tests/forked.py [MODULE ...]

It imports IMPORTS, or the modules of litlora that are named, and makes the PARSERS.
One JSON value a line, both ways: {"words": [script, ...], "cwd": ...} is answered by {"status",
"stdout", "stderr"}; "input" is what the command reads, "environment" what its variables are besides
those of this process. A command gets no more than `memory` bytes beyond what the imports take, and
`seconds` of computing, by default MEMORY and SECONDS: what needs more is killed, and fails its test.
"""

import gc
import importlib
import json
import os
import resource
import runpy
import sys
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path

REPO = Path(__file__).parent.parent
MEMORY = 2 * 2**30
SECONDS = 20
IMPORTS = (
    "train.run",
    "load",
    "serve.conversation",
    "serve.many",
    "serve.opening",
    "serve.records",
    "adapters.merge",
    "formats.huggingface",
    "formats.peft",
    "tokenizer",
    "cli",
)
PARSERS = [("FinetuneLoRA", False), ("FinetuneFull", False), ("Chat", False), ("MergeLoRA", False)]
PARSERS += [(name, True) for name in ("FinetuneLoRA", "FinetuneFull", "FinetuneDPO", "ShowData")]
"""Those that every fork has at hand: making one takes longer than most refusals."""


def child(asked: dict, into: int, out: int, err: int) -> None:
    """Run one command and exit as it does."""
    os.environ.update(asked.get("environment", {}))
    os.dup2(into, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
    os.chdir(asked["cwd"])
    memory, seconds, words = asked.get("memory", MEMORY), asked.get("seconds", SECONDS), asked["words"]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    sys.argv = [str(REPO / words[0]), *words[1:]]
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    sys.path.insert(0, str(REPO))
    for name in sys.argv[1:] or IMPORTS:
        importlib.import_module(f"litlora.{name}")
    cli, settings = sys.modules["litlora.cli"], sys.modules["litlora.settings"]
    for base in (settings.QUICKSTART, str(REPO / settings.QUICKSTART)):  # as from here, and from elsewhere
        for command, names_source in PARSERS:
            cli.make_parser(getattr(settings, command), base, names_source)
    # A collection in a fork would touch, and so copy, all that was imported.
    gc.collect()
    gc.freeze()
    print('"ready"', flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with ExitStack() as files:
            into, out, err = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            into.write(asked.get("input", "").encode())
            into.seek(0)
            process = os.fork()
            if process == 0:
                child(asked, into.fileno(), out.fileno(), err.fileno())
            _, status = os.waitpid(process, 0)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        reply = {"status": os.waitstatus_to_exitcode(status), "stdout": texts[0], "stderr": texts[1]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
