"""One spelling for the layers of several LoRA files, which may name the same ones differently."""

import re
from collections.abc import Collection
from pathlib import Path

from litlora.errors import CheckpointError
from litlora.formats.diffusion_names import UNET, Spelling, spelling

_ORIGINAL = r"(input_blocks|middle_block|output_blocks|double_blocks|single_blocks)_.*"
_DIFFUSERS = r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks)_.*"


def in_first_spelling(files: list[tuple[Path, Collection[str]]]) -> list[dict[str, str]]:
    """{a module's name in a file: what the first file calls that layer, or would} for each of
    `files`, with the names that each holds.

    Raises CheckpointError for a file that names a layer twice, for one that names layers as the
    original files do beside one that names them as diffusers does, and for a layer whose name is
    spelled with underscores and that a first file spelled with dots lacks.
    """
    first = files[0][0]
    known: dict[str, str] = {}
    styles: dict[str, Spelling] = {}
    layouts: dict[bool, Path] = {}
    found = []
    for file, names in files:
        own: dict[str, str] = {}
        renamed = {}
        for name in names:
            read = spelling(name)
            if read.part == UNET:
                _note_layout(read, file, layouts)
            twin = own.setdefault(read.flat, name)
            if twin != name and not _are_two(spelling(twin), read):
                raise CheckpointError(f"{file}: {twin} and {name} name one layer; keep one of them")
            if file == first:
                styles.setdefault(read.part, read)
                known.setdefault(read.flat, name)
                renamed[name] = name
            elif name in files[0][1]:
                renamed[name] = name
            else:
                same = known.get(read.flat)
                renamed[name] = same or _in_style(name, read, styles.get(read.part), file, first)
                known.setdefault(read.flat, renamed[name])
        found.append(renamed)
    return found


def _are_two(one: Spelling, other: Spelling) -> bool:
    """Whether two names that are equal without dots are those of two layers: a.b_c and a_b.c."""
    return not one.is_flat and not other.is_flat and one.name != other.name


def _note_layout(read: Spelling, file: Path, layouts: dict[bool, Path]) -> None:
    """Note which layout a name is of, if it tells. Raises CheckpointError if both are found."""
    name = read.name.replace(".", "_")
    for is_original, pattern in ((True, _ORIGINAL), (False, _DIFFUSERS)):
        if re.fullmatch(pattern, name):
            layouts.setdefault(is_original, file)
    if len(layouts) == 2:
        raise CheckpointError(
            f"{layouts[False]}: names layers as diffusers does, and {layouts[True]} as the original files "
            "do; only their model tells which are the same: merge both into it with scripts/lora_merger.py"
        )


def _in_style(name: str, read: Spelling, style: Spelling | None, file: Path, first: Path) -> str:
    """A name as the first file would spell it."""
    if style is None or (read.is_flat, read.prefix) == (style.is_flat, style.prefix):
        return name
    if read.is_flat and not style.is_flat:
        raise CheckpointError(
            f"{file}: {name}: {first} lacks this layer and spells names with dots, which this name does not "
            f"tell; name {file} first"
        )
    return style.prefix + (read.name.replace(".", "_") if style.is_flat else read.name)
