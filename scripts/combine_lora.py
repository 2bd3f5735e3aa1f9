"""Make one adapter out of several that were trained on the same base.

python scripts/combine_lora.py --lora_path $one/final $other/final --weights 0.7 0.3 --out_dir $dir
python scripts/combine_lora.py --lora_path style.safetensors other.safetensors --mode svd --rank 16
--out_dir $dir
"""

from pathlib import Path
from typing import TYPE_CHECKING

from litlora import formats
from litlora.cli import dump, run
from litlora.console import say
from litlora.paths import (
    CHECKPOINT_NAMES,
    WEIGHTS_FILE,
    checkpoint_dir,
    keep_inputs,
    output_dir,
)
from litlora.prompts import STYLE_FILE
from litlora.settings import CombineLoRA, check

if TYPE_CHECKING:
    from litlora.adapters.combine import Recipe


def main(settings: CombineLoRA) -> None:
    files = [Path(path) for path in settings.lora_path if formats.is_lora_file(Path(path))]
    if files:
        check(
            len(files) == len(settings.lora_path),
            f"--lora_path {files[0]}: is a LoRA file, but not all are; name files or directories",
        )
        _combine_files(files, settings)
        return
    adapter_dirs = [checkpoint_dir(path) for path in settings.lora_path]
    base_dir = checkpoint_dir(settings.checkpoint_dir) if settings.checkpoint_dir else None
    inputs = [*adapter_dirs, base_dir] if base_dir else adapter_dirs
    out_dir = output_dir(
        settings.out_dir, overwrite=settings.overwrite, names=CHECKPOINT_NAMES, inputs=inputs
    )

    from litlora.adapters.combine import combine_adapters
    from litlora.adapters.merge import plan_merge, resolve_sharing
    from litlora.adapters.resize import table
    from litlora.checkpoint import Beside, reference_to, write_adapter
    from litlora.storage.fingerprint import check_finite

    chains = resolve_sharing(
        adapter_dirs, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch
    )
    for chain in chains:
        keep_inputs(out_dir, chain.directories)
        check_finite(chain.top.tensors, chain.top.file)
        plan_merge(chain)  # whether it fits its base
    combined, changes = combine_adapters(chains, _recipe(settings))
    first = chains[0]
    write_adapter(
        out_dir,
        combined.trained_on(reference_to(first.inner.top, out_dir)),
        first.config,
        sidecars_from=first.sources,
        beside=Beside(hyperparameters=dump(settings)),
    )
    for notice in dict.fromkeys(notice for chain in chains for notice in chain.notices):
        say(f"note: {notice}")
    taught = {
        next((file.read_bytes() for source in chain.sources if (file := source / STYLE_FILE).is_file()), b"")
        for chain in chains
    }
    if len(taught) > 1:
        say(
            f"note: the adapters were taught with different prompt styles; that of {first.top.directory} is kept"
        )
    if settings.density == 1 and settings.mode in ("dare_linear", "magnitude_prune"):
        say(f"note: at --density 1 nothing is dropped, and {settings.mode} is linear")
    say(*table(changes))
    terms = (f"{weight:g} x {path}" for weight, path in zip(settings.each_weight, adapter_dirs, strict=True))
    say(f"{settings.mode}: {' + '.join(terms)}")
    result = out_dir / WEIGHTS_FILE
    say(f"result: {result} ({result.stat().st_size:,} bytes: the adapter only)")
    say(f"next: python chat/base.py --checkpoint_dir {out_dir}")


def _combine_files(files: list[Path], settings: CombineLoRA) -> None:
    """LoRA files of another tool: names and format stay those of the first."""
    check(settings.checkpoint_dir is None, f"{files[0]}: needs no base; leave --checkpoint_dir out")
    out_dir = output_dir(
        settings.out_dir, overwrite=settings.overwrite, names=(files[0].name,), inputs=files, replaced=False
    )

    import functools

    import torch

    from litlora.adapters.combine import combine_files
    from litlora.adapters.resize import table
    from litlora.formats.lora_files import read_lora, write_lora
    from litlora.storage.fingerprint import check_finite

    check(
        len({file.resolve() for file in files}) == len(files),
        "--lora_path: names a file twice; give it a weight instead",
    )
    loras, dtypes = [read_lora(file) for file in files], []
    for file, lora in zip(files, loras, strict=True):
        tensors = {
            f"{name}, {part}": getattr(update, part) for name, update in lora.updates.items() for part in "AB"
        } | lora.diffs
        check_finite(tensors, file)
        dtypes += [tensor.dtype for tensor in tensors.values()]
    result, dtype = out_dir / files[0].name, functools.reduce(torch.promote_types, dtypes)
    combined, changes = combine_files(loras, _recipe(settings), dtype)
    write_lora(result, combined, dtype)
    say(*table(changes))
    terms = (f"{weight:g} x {file}" for weight, file in zip(settings.each_weight, files, strict=True))
    say(f"{settings.mode}: {' + '.join(terms)}")
    say(
        f"result: {result} ({result.stat().st_size:,} bytes, in {str(dtype).removeprefix('torch.')} as the files are)"
    )


def _recipe(settings: CombineLoRA) -> "Recipe":
    from litlora.adapters.combine import Recipe

    return Recipe(
        weights=settings.each_weight,
        mode=settings.mode,
        density=settings.density,
        rank=settings.rank,
        max_error=settings.error_bound,
        seed=settings.seed,
    )


if __name__ == "__main__":
    run(main, CombineLoRA)
