"""Building cpu.c by the machine's C compiler, when it is first needed; the result is kept in the user's
cache."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.c")
INCLUDED = [SOURCE.with_name(name) for name in ("cpu_formats.h", "cpu_groups.h", "cpu_block.h")]
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-w", "-shared", "-fPIC")
TRIED = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""Further flags: the first that the compiler takes. torch's own OpenMP runtime is in memory already, and
serves both."""
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 300
"""Seconds for the compiler."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, `is_new` if this process had to build it; None where no compiler makes it:
    `why_none` says why."""
    try:
        built, built.is_new = _load()
    except (OSError, subprocess.SubprocessError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    built.has_threads.argtypes = []
    built.format_number.argtypes, built.format_number.restype = [ctypes.c_char_p], number
    built.values.argtypes = [number, pointer, number, pointer, number, number]
    built.project.argtypes = [pointer, number, pointer, number, pointer, number]
    built.gated_mlp.argtypes = [pointer, number, pointer, number, pointer, pointer, number]
    built.rms_norm.argtypes = [pointer] * 3 + [ctypes.c_int64] * 2 + [number]
    built.attend.argtypes = [pointer, number]
    built.blocks.argtypes = [pointer, number, pointer, number, pointer, pointer, pointer, number]
    built.block_memory.argtypes, built.block_memory.restype = [pointer, number], ctypes.c_int64
    for name in ("values", "project", "gated_mlp", "rms_norm", "attend", "blocks"):
        getattr(built, name).restype = None
    return built


def kept(name: str, measure: Callable[[], float]) -> float:
    """A number that belongs to this machine and code: measured once, and kept beside what was built."""
    try:
        place = _place()
    except RuntimeError:  # no home
        return measure()
    file = place / f"{_key(_compiler() or [])}.{name}"
    with suppress(OSError, ValueError):
        return float(file.read_text())
    number = measure()
    with suppress(OSError):  # where nothing can be written, it is measured each time
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = file.with_name(f".{file.name}.{os.getpid()}")
        new.write_text(repr(number))
        new.replace(file)
    return number


def why_none() -> str | None:
    """Why there is no compiled code, in a line; None if there is."""
    if library() is not None:
        return None
    if (compiler := _compiler()) is None:
        return f"no C compiler was found ({', '.join(COMPILERS)}, or $CC)"
    tried = f"the C compiler {shlex.join(compiler)} could not build {SOURCE.name}"
    return f"{tried}, or its result could not be loaded"


def _compiler() -> list[str] | None:
    if own := os.environ.get("CC"):
        return shlex.split(own)
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def _load() -> tuple[ctypes.CDLL, bool]:
    """The code, and whether it was built now, since the cache had nothing for this code, compiler and
    processor. Raises OSError or SubprocessError."""
    if (compiler := _compiler()) is None:
        raise OSError("no compiler")
    name = f"{_key(compiler)}.so"
    try:
        place = _place()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (file := place / name).is_file():
            return ctypes.CDLL(str(file)), False
        folder = tempfile.mkdtemp(prefix=f".{name}.", dir=place)
    except (OSError, RuntimeError):  # no home, or none that can be written
        place, folder = None, tempfile.mkdtemp(prefix="litlora-")
    new = Path(folder) / name
    try:
        _compile(compiler, new)
        # Once in memory, a library needs its file no more.
        return ctypes.CDLL(str(new if place is None else new.replace(file))), True
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _key(compiler: Sequence[str]) -> str:
    sources = [file.read_bytes() for file in (SOURCE, *INCLUDED)]
    facts = (sources, [*compiler], FLAGS, TRIED, platform.machine(), _processor())
    return f"cpu-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}"


def _place() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "litlora/kernels"


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    return next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])


def _compile(compiler: Sequence[str], to: Path) -> None:
    """Raises SubprocessError."""
    errors = []
    for more in TRIED:
        command = [*compiler, *FLAGS, *more, "-o", str(to), str(SOURCE)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT)
        try:
            if done.returncode == 0:
                ctypes.CDLL(str(to))  # clang links without an OpenMP runtime that is not there
                return
        except OSError as error:
            errors.append(str(error))
        errors.append(done.stderr.decode(errors="replace"))
    raise subprocess.SubprocessError("\n".join(errors))
