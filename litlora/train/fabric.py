"""Fabric, without what it imports to ask one question: `from litlora.train.fabric import Fabric`.

Fabric wants a class of torch._dynamo's, the compiler, to see whether a module was compiled. That
import takes as long as half of torch itself. So while Fabric is imported, a class stands in for it
that answers the same once the compiler is there; until then the answer is no.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

COMPILER = f"{torch.__name__}._dynamo"


class _Compiled(type):
    def __instancecheck__(cls, instance: object) -> bool:
        real = getattr(sys.modules.get(COMPILER), "OptimizedModule", cls)  # not there yet, or this very class
        return real is not cls and isinstance(instance, real)


class OptimizedModule(metaclass=_Compiled):
    """What torch.compile makes of a module, for isinstance."""


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
except (ImportError, AttributeError):  # a version that wants more of it gets all
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_fabric"]:
        del sys.modules[name]
    from lightning_fabric import Fabric

__all__ = ["Fabric"]
