r"""Make one adapter out of several that were trained on the same base.

    python scripts/combine_lora.py --lora_path $one/final $other/final --weights 0.7 0.3 \
        --out_dir $dir
    python scripts/combine_lora.py --lora_path style.safetensors other.safetensors \
        --mode svd --rank 16 --out_dir $dir
"""

from pathlib import Path
from typing import TYPE_CHECKING

from litlora import cli, formats
from litlora.console import say
from litlora.inputs import check_inputs
from litlora.paths import WEIGHTS_FILE, output_dir
from litlora.prompts import STYLE_FILE
from litlora.settings import CombineLoRA, check, dump

if TYPE_CHECKING:
    from litlora.adapters.combine_entries import Recipe
    from litlora.adapters.resize import Change
    from litlora.checkpoint import Chain


def main(settings: CombineLoRA) -> None:
    files = [Path(path) for path in settings.lora_path if formats.is_lora_file(Path(path))]
    if files:
        check(
            len(files) == len(settings.lora_path),
            f"--lora_path {files[0]}: is a LoRA file, but not all are; name files or directories",
        )
        _combine_files(files, settings)
        return
    inputs = check_inputs(
        settings.lora_path, settings.checkpoint_dir, settings.out_dir, overwrite=settings.overwrite
    )

    from litlora.adapters.combine import combine_adapters
    from litlora.adapters.merge import plan_merge
    from litlora.checkpoint import Beside, reference_to, write_adapter
    from litlora.storage.fingerprint import check_finite

    chains = inputs.chains(allow_base_mismatch=settings.allow_base_mismatch)
    for chain in chains:
        check_finite(chain.top.tensors, chain.top.file)
        plan_merge(chain)  # whether it fits its base
    combined, changes = combine_adapters(chains, _recipe(settings))
    first = chains[0]
    write_adapter(
        inputs.out_dir,
        combined.trained_on(reference_to(first.inner.top, inputs.out_dir, first.top.base.quantized)),
        first.config,
        sidecars_from=first.sources,
        beside=Beside(hyperparameters=dump(settings)),
    )
    for notice in dict.fromkeys(notice for chain in chains for notice in chain.notices):
        say(f"note: {notice}")
    if len({_prompt_style(chain) for chain in chains}) > 1:
        say(
            "note: the adapters were trained with different prompt styles; "
            f"that of {first.top.directory} is kept"
        )
    _say_how(settings, changes, inputs.adapter_dirs)
    result = inputs.out_dir / WEIGHTS_FILE
    say(f"result: {result} ({result.stat().st_size:,} bytes: the adapter only)")
    say(f"next: {cli.call('chat/base.py', '--checkpoint_dir', inputs.out_dir)}")


def _prompt_style(chain: "Chain") -> bytes:
    """The file of the prompt style that a chain was trained with; empty if there is none."""
    files = (source / STYLE_FILE for source in chain.sources)
    return next((file.read_bytes() for file in files if file.is_file()), b"")


def _say_how(settings: CombineLoRA, changes: "list[Change]", paths: list[Path]) -> None:
    """What became of each layer, and the formula."""
    from litlora.adapters.resize import table

    if settings.density == 1 and settings.mode in ("dare_linear", "magnitude_prune"):
        say(f"note: at --density 1 nothing is dropped, and {settings.mode} is linear")
    say(*table(changes))
    terms = (f"{weight:g} x {path}" for weight, path in zip(settings.each_weight, paths, strict=True))
    say(f"{settings.mode}: {' + '.join(terms)}")


def _combine_files(files: list[Path], settings: CombineLoRA) -> None:
    """LoRA files of another tool: names and format stay those of the first."""
    check(settings.checkpoint_dir is None, f"{files[0]}: needs no base; leave --checkpoint_dir out")
    out_dir = output_dir(
        settings.out_dir, overwrite=settings.overwrite, names=(files[0].name,), inputs=files, replaced=False
    )

    from litlora.adapters.combine import combine_files
    from litlora.adapters.factored import common_dtype
    from litlora.adapters.resize import factors_of
    from litlora.formats.lora_files import read_lora, write_lora
    from litlora.model import shorten
    from litlora.storage.dtypes import dtype_name
    from litlora.storage.fingerprint import check_finite

    check(
        len({file.resolve() for file in files}) == len(files),
        "--lora_path: names a file twice; give it a weight instead",
    )
    loras = [read_lora(file) for file in files]
    tensors = [factors_of(lora) | lora.diffs for lora in loras]
    for file, found in zip(files, tensors, strict=True):
        check_finite(found, file)
    dtype = common_dtype(tensor for found in tensors for tensor in found.values())
    combined, changes = combine_files(loras, _recipe(settings), dtype)
    result = out_dir / files[0].name
    dropped = write_lora(result, combined, dtype)
    for notice in (notice for lora in loras for notice in lora.notices):
        say(f"note: {notice}")
    if dropped:
        say(f"note: left out of the header, as it no longer holds: {shorten(dropped)}")
    _say_how(settings, changes, files)
    kind = dtype_name(dtype)
    is_8_bit = any(lora.is_8_bit for lora in loras)
    why = ", which holds what the files have in 8 bits" if is_8_bit else " as the files are"
    say(f"result: {result} ({result.stat().st_size:,} bytes, in {kind}{why})")


def _recipe(settings: CombineLoRA) -> "Recipe":
    from litlora.adapters.combine_entries import Recipe

    return Recipe(
        weights=settings.each_weight,
        mode=settings.mode,
        density=settings.density,
        rank=settings.rank,
        max_error=settings.error_bound,
        seed=settings.seed,
    )


if __name__ == "__main__":
    cli.run(main, CombineLoRA)
