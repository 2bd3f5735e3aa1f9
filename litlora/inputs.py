"""The adapters that a command reads, the base that it names for them, and the directory that it
writes. Torch-free until the chains are resolved."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.errors import BaseMismatchError, CheckpointError, UserError, setting
from litlora.paths import CHECKPOINT_NAMES, checkpoint_dir, keep_inputs, output_dir

if TYPE_CHECKING:
    from litlora.checkpoint import Chain
    from litlora.lora import BaseReference


@dataclass(frozen=True)
class Inputs:
    """Directories whose names were checked; nothing large was opened yet."""

    adapter_dirs: list[Path]
    base_dir: Path | None
    """Replaces the base that the adapters name."""
    out_dir: Path

    def chains(self, *, allow_base_mismatch: bool = False) -> "list[Chain]":
        """The chain of each adapter; see `resolve_sharing`. Raises UserError if writing to out_dir
        would destroy a link of one."""
        chains = resolve_sharing(
            self.adapter_dirs, base_dir=self.base_dir, allow_base_mismatch=allow_base_mismatch
        )
        for chain in chains:
            keep_inputs(self.out_dir, chain.directories)
        return chains


def check_inputs(
    adapters: list[str],
    base: str | None,
    out_dir: str,
    *,
    overwrite: bool,
    names: tuple[str, ...] = CHECKPOINT_NAMES,
) -> Inputs:
    """The directories of a command that makes something of adapters. Raises UserError for one that
    cannot be read or written; `names` are those that the command writes, see `output_dir`."""
    adapter_dirs = [checkpoint_dir(path) for path in adapters]
    base_dir = checkpoint_dir(base) if base else None
    read = [*adapter_dirs, base_dir] if base_dir else adapter_dirs
    written = output_dir(out_dir, overwrite=overwrite, names=names, inputs=read)
    return Inputs(adapter_dirs, base_dir, written)


def resolve_sharing(
    paths: list[Path], *, base_dir: Path | None = None, allow_base_mismatch: bool = False
) -> "list[Chain]":
    """The chains of adapters that share their base, which may be an adapter itself.

    Raises CheckpointError for a path that is not an adapter, BaseMismatchError for adapters of
    different bases.
    """
    from litlora.checkpoint import open_checkpoint, resolve
    from litlora.lora import Adapter

    chains: list[Chain] = []
    for path in paths:
        if any(path.resolve() == chain.top.directory.resolve() for chain in chains):
            raise UserError(f"{setting('lora_path')} {path}: named twice; give it a weight instead")
        below = chains[0].directories[:-1] if chains else []
        if path.resolve() in (place.resolve() for place in below):
            raise BaseMismatchError(
                f"{path}: is what {paths[0]} was trained on; adapters that are added up must share their base"
            )
        # The others must have been trained on the base of the first.
        expected = below[-1] if base_dir is None and below else base_dir
        if not isinstance(open_checkpoint(path, base_dir=expected), Adapter):
            raise CheckpointError(f"{path}: is a full model; {setting('lora_path')} needs an adapter")
        chain = resolve(path, base_dir=expected, allow_base_mismatch=allow_base_mismatch)
        if below and not _same_places(chain.directories[:-1], below):
            raise BaseMismatchError(
                f"{path}: was trained on {chain.directories[-2]}, but {paths[0]} on {below[-1]}; "
                "adapters that are added up must share their base"
            )
        if chains and chain.top.base.quantized != (first := chains[0].top.base).quantized:
            ours, theirs = map(_bits, (chain.top.base, first))
            raise BaseMismatchError(
                f"{path}: was trained on its base {ours}, but {paths[0]} {theirs}; "
                "adapters that are added up must share their base"
            )
        chains.append(chain)
    return chains


def _bits(base: "BaseReference") -> str:
    """In how many bits a base was trained on."""
    return f"in {base.quantized.quantizer.name}" if base.quantized else "as it is stored"


def _same_places(directories: list[Path], others: list[Path]) -> bool:
    return [place.resolve() for place in directories] == [place.resolve() for place in others]
