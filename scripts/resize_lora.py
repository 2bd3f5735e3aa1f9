"""Give an adapter another rank: exactly where it can be done, else with the least possible error,
which is reported.

python scripts/resize_lora.py --lora_path $dir/final/lit_model.pth --rank 4 --out_dir $dir/small
python scripts/resize_lora.py --lora_path some_style.safetensors --energy 0.99 --out_dir small
"""

from pathlib import Path

from litlora import formats
from litlora.cli import dump, run
from litlora.console import say
from litlora.errors import CheckpointError
from litlora.paths import (
    CHECKPOINT_NAMES,
    WEIGHTS_FILE,
    checkpoint_dir,
    keep_inputs,
    output_dir,
)
from litlora.settings import ResizeLoRA, check


def main(settings: ResizeLoRA) -> None:
    file = Path(settings.lora_path)
    if formats.is_lora_file(file):
        _resize_file(file, settings)
        return
    adapter_dir = checkpoint_dir(settings.lora_path)
    base_dir = checkpoint_dir(settings.checkpoint_dir) if settings.checkpoint_dir else None
    inputs = [adapter_dir, base_dir] if base_dir else [adapter_dir]
    out_dir = output_dir(
        settings.out_dir, overwrite=settings.overwrite, names=CHECKPOINT_NAMES, inputs=inputs
    )

    import torch

    from litlora.adapters.merge import plan_merge
    from litlora.adapters.resize import plain_updates, resize_all, settings_for, table
    from litlora.checkpoint import Beside, reference_to, resolve, write_adapter
    from litlora.lora import Adapter
    from litlora.storage.fingerprint import check_finite

    chain = resolve(adapter_dir, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    keep_inputs(out_dir, chain.directories)
    if not chain.adapters:
        raise CheckpointError(f"{adapter_dir}: is a full model; --lora_path needs an adapter")
    check_finite(chain.top.tensors, chain.top.file)
    plan_merge(chain)  # whether it fits its base
    generator = torch.Generator().manual_seed(settings.seed)
    adapter = chain.top
    resized, changes = resize_all(
        plain_updates(adapter), rank=settings.rank, max_error=settings.error_bound, generator=generator
    )
    config, base = settings_for(resized, adapter.config), reference_to(chain.inner.top, out_dir)
    beside = Beside(hyperparameters=dump(settings))
    write_adapter(
        out_dir,
        Adapter(config, resized, adapter.whole, base),
        chain.config,
        sidecars_from=chain.sources,
        beside=beside,
    )
    for notice in chain.notices:
        say(f"note: {notice}")
    if adapter.whole:
        say(f"note: {', '.join(adapter.whole)}: saved whole, kept as they are")
    say(*table(changes))
    result = out_dir / WEIGHTS_FILE
    say(f"result: {result} ({result.stat().st_size:,} bytes: the adapter only)")
    say(f"next: python chat/base.py --checkpoint_dir {out_dir}")


def _resize_file(file: Path, settings: ResizeLoRA) -> None:
    """A LoRA file of another tool: names, format and dtype stay, and so does what it holds beside
    factors."""
    check(settings.checkpoint_dir is None, f"{file}: needs no base; leave --checkpoint_dir out")
    out_dir = output_dir(
        settings.out_dir, overwrite=settings.overwrite, names=(file.name,), inputs=[file], replaced=False
    )

    import dataclasses
    import functools

    import torch

    from litlora.adapters.resize import resize_all, table
    from litlora.formats.lora_files import as_stored, read_lora, write_lora
    from litlora.storage.fingerprint import check_finite

    lora = read_lora(file)
    factors = {
        f"{name}, {part}": getattr(update, part) for name, update in lora.updates.items() for part in "AB"
    }
    check(bool(factors), f"{file}: holds no factors, so there is no rank to change")
    check_finite(factors | lora.diffs, file)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in factors.values()))
    generator = torch.Generator().manual_seed(settings.seed)
    resized, changes = resize_all(
        lora.updates,
        rank=settings.rank,
        max_error=settings.error_bound,
        generator=generator,
        form=lambda update: as_stored(update, alpha=lora.alpha, dtype=dtype),
    )
    result = out_dir / file.name
    write_lora(result, dataclasses.replace(lora, updates=resized), dtype)
    if lora.diffs:
        say(f"note: {', '.join(lora.diffs)}: kept as they are")
    say(*table(changes))
    say(f"result: {result} ({result.stat().st_size:,} bytes)")


if __name__ == "__main__":
    run(main, ResizeLoRA)
