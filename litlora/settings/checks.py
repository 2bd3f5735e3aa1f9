"""What the value of a setting must be. Every check raises a UserError that names the setting."""

import math
from collections.abc import Sequence
from typing import Any

from litlora.errors import UserError, setting

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
LEAST_ALPHA = 1e-30
"""The smallest magnitude of an alpha; the largest is its inverse. fp32 can hold both, and every
scale that follows from them."""


def check(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


def check_value(settings: Any, name: str, ok: bool, must: str) -> None:
    """Raise UserError unless ok: the setting's name, its value, and what it must be."""
    check(ok, f"{setting(name)} {getattr(settings, name)}: {must}")


def check_positive(settings: Any, *names: str) -> None:
    """Raise UserError unless these settings are at least 1, or None."""
    for name in names:
        value = getattr(settings, name)
        check_value(settings, name, value is None or value >= 1, "must be at least 1")


def check_alpha(what: str, alpha: float) -> None:
    """Raise UserError unless alpha is finite, is not 0, and scales an update within fp32's range.
    `what` names it in the message."""
    size = f"its size from {LEAST_ALPHA:g} to {1 / LEAST_ALPHA:g}"
    ok = LEAST_ALPHA <= abs(alpha) <= 1 / LEAST_ALPHA
    check(ok, f"{what}: must be a finite number other than 0, {size}")


def check_seed(seed: int, below: int = 2**63) -> None:
    """Raise UserError unless a random number generator accepts the seed."""
    check(0 <= seed < below, f"{setting('seed')} {seed}: must be at least 0 and below {below:,}")


def check_finite(name: str, *values: float) -> None:
    """Raise UserError for a value of the setting `name` that is not finite."""
    for value in values:
        check(math.isfinite(value), f"{setting(name)} {value}: must be a finite number")


def check_weights(weights: Sequence[float], count: int, things: str) -> None:
    """Raise UserError unless there is one finite weight for each of `count` things, or none at
    all."""
    given = " ".join(map(str, weights))
    check(
        len(weights) in (0, count),
        f"{setting('weights')} {given}: {len(weights)} for {count} {things}(s); give one for each",
    )
    check_finite("weights", *weights)


def num_bytes(size: str) -> int:
    """A size such as 500MB in bytes."""
    unit = SIZE_UNITS.get(size[-2:].upper())
    return int(size[:-2]) * unit if unit else int(size)


def check_size(name: str, size: str) -> None:
    """Raise UserError unless the setting `name` is a size such as 500MB."""
    number, unit = size[:-2], size[-2:].upper()
    ok = size.isascii() and (size.isdecimal() or (number.isdecimal() and unit in SIZE_UNITS))
    check(ok and num_bytes(size) >= 1, f"{setting(name)} {size}: must be a size such as 500MB or 5GB")


def check_adapters(adapters: list[str]) -> None:
    """Raise UserError unless each is NAME=DIRECTORY, with a name of its own."""
    names = [entry.partition("=")[0] for entry in adapters]
    for entry, name in zip(adapters, names, strict=True):
        ok = name and entry.partition("=")[2]
        check(bool(ok), f"{setting('adapters')} {entry}: must be NAME=DIRECTORY")
        check(names.count(name) == 1, f"{setting('adapters')} {entry}: the name {name} is given twice")
