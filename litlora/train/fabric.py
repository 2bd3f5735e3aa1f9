"""Fabric, imported without the compiler: `from litlora.train.fabric import Fabric`.

Fabric imports a class of torch._dynamo, the compiler, to tell whether a module was compiled. That
import takes half as long as torch itself. So a class stands in for it while Fabric is imported: it
answers no until the compiler is imported, and then the same as the real class.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

COMPILER = f"{torch.__name__}._dynamo"


class _Compiled(type):
    def __instancecheck__(cls, instance: object) -> bool:
        real = getattr(
            sys.modules.get(COMPILER), "OptimizedModule", cls
        )  # not imported yet, or this very class
        return real is not cls and isinstance(instance, real)


class OptimizedModule(metaclass=_Compiled):
    """Stands in for the class of compiled modules, for isinstance."""


@contextmanager
def _compiler_left_out() -> Iterator[None]:
    if COMPILER in sys.modules:
        yield
        return
    stand_in = ModuleType(COMPILER)
    stand_in.OptimizedModule = OptimizedModule
    sys.modules[COMPILER] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(COMPILER) is stand_in:
            del sys.modules[COMPILER]


try:
    with _compiler_left_out():
        from lightning_fabric import Fabric
except (ImportError, AttributeError):  # this version needs more of the compiler
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_fabric"]:
        del sys.modules[name]
    from lightning_fabric import Fabric

# What it logs of every start would stand before the messages of a command.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

__all__ = ["Fabric"]
