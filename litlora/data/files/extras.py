"""The libraries that some files need, imported when such a file is met. Torch-free."""

import importlib
from pathlib import Path
from types import ModuleType

from litlora.errors import MissingExtraError


def pyarrow(file: Path, what: str, module: str = "pyarrow") -> ModuleType:
    """pyarrow, or a module of it. Raises MissingExtraError, which says what `file` is."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(
            f"{file}: is {what}, and pyarrow, which reads it, is not installed; "
            "install it with: pip install 'litlora[data]'"
        ) from None


def hub_library(path: str, module: str) -> ModuleType:
    """`datasets`, or what it uses of the hub. Raises MissingExtraError."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(
            f"{path}: data sets of the hub need the library datasets, which is not installed; "
            "install it with: pip install 'litlora[datasets]'"
        ) from None
