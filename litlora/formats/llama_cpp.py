"""llama.cpp in a process of its own, by llama-cpp-python: runs GGUF files, and quantises them.
Torch-free."""

import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError, MissingExtraError
from litlora.worker import Worker

PROGRAM = Path(__file__).with_name("llama_cpp_process.py")
QUANTISED_KINDS = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
"""The number formats that llama.cpp's own quantiser makes of a file in a plain one."""


def is_installed() -> bool:
    """Whether llama-cpp-python is."""
    return find_spec("llama_cpp") is not None


class LlamaCpp:
    """A GGUF file in llama.cpp, perhaps with an adapter on it."""

    def __init__(self, model: Path, adapter: Path | None = None, *, context: int) -> None:
        self.file = adapter or model
        first = {
            "model": str(model.absolute()),
            "adapter": None if adapter is None else str(adapter.absolute()),
            "context": context,
        }
        self._worker = Worker(PROGRAM, first, **_environment())
        self.version: str = self._answer(self._worker.start(), "cannot be loaded")["version"]
        """Of llama-cpp-python."""

    def tokens(self, texts: list[str], *, begin: bool) -> list[list[int]]:
        """The ids of texts; `begin` adds what the file says comes before a text."""
        return self._ask("tokens", [texts, begin])

    def stops(self, ids: list[int]) -> list[int]:
        """Those of the ids that end generation."""
        return self._ask("stops", ids)

    def logits(self, ids: list[int]) -> Any:
        """The logits after each of the ids, (ids, vocabulary) in fp32, as an array of numpy's."""
        import numpy as np

        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "logits.npy"
            self._ask("logits", [ids, str(file)])
            return np.load(file)

    def close(self) -> None:
        self._worker.stop()

    def _ask(self, method: str, argument: Any) -> Any:
        return self._answer(self._worker.ask([method, argument]), f"fails ({method})")

    def _answer(self, reply: dict[str, Any] | None, failure: str) -> Any:
        return _answer(reply, self.file, failure)


def check_quantiser(kind: str) -> None:
    """Raise MissingExtraError without llama.cpp's quantiser."""
    if shutil.which("llama-quantize") is None and not is_installed():
        raise MissingExtraError(
            f"{kind} needs llama.cpp's quantiser: llama-quantize on the PATH, or the package "
            "llama-cpp-python; install it with: pip install 'litlora[llama-cpp]'"
        )


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write a file again, in one of QUANTISED_KINDS; see `check_quantiser`."""
    if (tool := shutil.which("llama-quantize")) is not None:
        done = subprocess.run([tool, str(source), str(target), kind], capture_output=True, text=True)
        if done.returncode:
            raise CheckpointError(f"{source}: llama-quantize fails: {' '.join(done.stderr.split())[-300:]}")
        return
    first = {"quantise": [str(source.absolute()), str(target.absolute()), kind]}
    worker = Worker(PROGRAM, first, **_environment())
    _answer(worker.start(), source, f"cannot be written as {kind}")
    worker.stop()


def _environment() -> dict[str, str]:
    """Where people have another build of llama.cpp, by the name that llama-cpp-python gives it."""
    return {name: os.environ[name] for name in ("LLAMA_CPP_LIB_PATH",) if name in os.environ}


def _answer(reply: dict[str, Any] | None, file: Path, failure: str) -> Any:
    if reply is None:
        raise CheckpointError(f"{file}: {failure}: llama.cpp ended its process")
    if "error" in reply:
        raise CheckpointError(f"{file}: {failure} by llama.cpp: {reply['error']}")
    return reply["answer"]
