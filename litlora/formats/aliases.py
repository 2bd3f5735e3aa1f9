"""What a name in another layout of a model means: tensors, or rows of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]
"""The shapes of a model's tensors, by name."""
Rows = tuple[int | None, int | None]
"""The first row and the one after the last."""
ALL: Rows = (None, None)


@dataclass(frozen=True)
class Part:
    """Rows of one tensor of a model, and which rows of a change of the named layer go there."""

    tensor: str
    rows: Rows = ALL
    of: Rows = ALL


Aliases = dict[str, tuple[Part, ...]]
"""What a tensor's name in the other layout means."""
