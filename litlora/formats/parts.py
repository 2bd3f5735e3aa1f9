"""The parts of a multimodal model beside its language model, such as an image encoder: they are not
used, and every full model that is written keeps them.

In a litlora directory they lie in `other_modalities.safetensors`, under the names of the model that
they come from. A Hugging Face folder is written whole.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats.families import HF_CONFIG_FILE, multimodal_of
from litlora.formats.families.multimodal import Multimodal, Spelling
from litlora.formats.folder import PARTS_FILE
from litlora.frozen.few_bits import Quantized
from litlora.storage.tensors import open_tensors, read_metadata, write_safetensors
from litlora.storage.untrusted import has_file, read_json_object


@dataclass(frozen=True)
class Parts:
    """What a multimodal model has beside its language model."""

    file: Path
    """Where they lie."""
    outer: Multimodal
    spelling: Spelling
    """How the names of the language model's tensors begin there."""
    tensors: Mapping[str, Tensor | Quantized]
    """By their names there, memory-mapped."""

    @property
    def notice(self) -> str:
        """A line about them."""
        sizes: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            sizes[name.removeprefix("model.").partition(".")[0]] += tensor.nbytes
        largest = [f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.most_common(4)]
        more = [f"{len(sizes) - 4} more"] if len(sizes) > 4 else []
        listed = ", ".join(largest + more) or "none"
        return (
            f"{self.file.parent}: only the language model of {self.outer.architecture} is used; its other "
            f"parts ({listed}) stay as they are, and every full model made from it keeps them"
        )

    def named(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the whole model, of its language model's by the names that they have alone."""
        for name, tensor in tensors:
            yield self.spelling.outer(name), tensor
        for name, tensor in self.tensors.items():
            yield name, tensor.tensor() if isinstance(tensor, Quantized) else tensor

    def write(self, directory: Path) -> None:
        """Put them into a litlora directory."""
        target = directory / PARTS_FILE
        if self.file.name == PARTS_FILE:
            shutil.copyfile(self.file, target)
            return
        dense = {
            name: tensor.tensor() if isinstance(tensor, Quantized) else tensor
            for name, tensor in self.tensors.items()
        }
        write_safetensors(target, dense, {"decoder": self.spelling.decoder})


def divide(
    file: Path, values: dict[str, Any], tensors: Mapping[str, Tensor | Quantized]
) -> tuple[dict[str, Tensor | Quantized], Parts | None]:
    """(the language model's tensors by the names that they have alone, the other parts) of a folder
    with this config.json; (the tensors, None) of a model without other parts.

    Raises CheckpointError if there are no weights of a language model.
    """
    if (outer := multimodal_of(values)) is None:
        return dict(tensors), None
    if (spelling := outer.spelling(tensors)) is None:
        expected = " or ".join(f"{one.decoder}*" for one in outer.spellings)
        raise CheckpointError(f"holds no weights of the language model ({expected})")
    inside, beside = {}, {}
    for name, tensor in tensors.items():
        inner = spelling.inner(name)
        if inner is None:
            beside[name] = tensor
        elif inner in inside:
            raise CheckpointError(f"{name} and another tensor are both read as {inner}")
        else:
            inside[inner] = tensor
    return inside, Parts(file, outer, spelling, beside)


def kept_parts(directory: Path) -> Parts | None:
    """The parts that a litlora directory keeps; None if it has none. Raises CheckpointError for a
    file that cannot be used."""
    file = directory / PARTS_FILE
    if not has_file(file):
        return None
    values = read_json_object(directory / HF_CONFIG_FILE, f"{PARTS_FILE} beside it needs it")
    outer, decoder = multimodal_of(values), read_metadata(file).get("decoder")
    spelling = next((one for one in outer.spellings if one.decoder == decoder), None) if outer else None
    if outer is None or spelling is None:
        raise CheckpointError(f"{file}: does not fit the architecture that {HF_CONFIG_FILE} beside it names")
    return Parts(file, outer, spelling, open_tensors(file))
