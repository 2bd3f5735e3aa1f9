"""A program of ours in a process of its own, for what a stranger's file may make endless or huge.
Torch-free.

Both sides send one JSON value a line. The program limits itself before it reads anything of the
stranger's; whatever it does, this process goes on.
"""

import contextlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ")
"""What a worker gets of the environment, which may hold tokens and keys."""


class Worker:
    """A process that answers questions. It is started by the first question, and again after one
    that it did not survive."""

    def __init__(self, program: Path, first: Any, **environment: str) -> None:
        """`first` is what the program is asked first whenever it starts."""
        self._program, self._first, self._environment = program, first, environment
        self._process: subprocess.Popen | None = None

    def start(self) -> Any:
        """Start the process anew; returns its answer to the first question, None if it did not
        survive."""
        self.stop()
        known = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        # Where litlora is, if it is not installed; last, so that it hides nothing.
        paths = [known.get("PYTHONPATH"), str(Path(__file__).parent.parent)]
        known["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", str(self._program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=known | self._environment,
        )
        weakref.finalize(self, _stop, process)
        self._process = process
        return self._exchange(self._first)

    def ask(self, question: Any) -> Any:
        """The answer; None if the process ended instead."""
        if self._process is None and self.start() is None:
            return None
        return self._exchange(question)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            _stop(self._process)
            self._process = None

    def _exchange(self, question: Any) -> Any:
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # after Ctrl-C, a late answer must not be taken for the next one
            self.stop()
            raise
        if line.endswith(b"\n"):
            return json.loads(line)
        self.stop()
        return None


def limit(kind: int, amount: int) -> None:
    """For a worker's program: lower a limit of the operating system, one of `resource`'s; one that
    is lower already stays."""
    import resource

    _, most = resource.getrlimit(kind)
    amount = amount if most == resource.RLIM_INFINITY else min(amount, most)
    with contextlib.suppress(ValueError, OSError):  # macOS does not limit the address space
        resource.setrlimit(kind, (amount, most))


def shared_length(first: str, second: str) -> int:
    """For a worker's program: how many characters two texts have in common before they differ."""
    if second.startswith(first):
        return len(first)
    least, most = 0, min(len(first), len(second))
    while least < most:
        middle = (least + most + 1) // 2
        if first[least:middle] == second[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # unsent input has no reader
            pipe.close()
