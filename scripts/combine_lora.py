"""Make one adapter out of several that were trained on the same base.

python scripts/combine_lora.py --lora_path $one/final $other/final --weights 0.7 0.3 --out_dir $dir
"""

from litlora.cli import dump, run
from litlora.paths import CHECKPOINT_NAMES, WEIGHTS_FILE, checkpoint_dir, keep_inputs, output_dir
from litlora.prompts import STYLE_FILE
from litlora.settings import CombineLoRA
from litlora.untrusted import say


def main(settings: CombineLoRA) -> None:
    adapter_dirs = [checkpoint_dir(path) for path in settings.lora_path]
    base_dir = checkpoint_dir(settings.checkpoint_dir) if settings.checkpoint_dir else None
    inputs = [*adapter_dirs, base_dir] if base_dir else adapter_dirs
    out_dir = output_dir(settings.out_dir, overwrite=settings.overwrite, names=CHECKPOINT_NAMES, inputs=inputs)

    import dataclasses

    from litlora.adapters.combine import combine_adapters
    from litlora.adapters.merge import resolve_sharing
    from litlora.adapters.resize import table
    from litlora.checkpoint import adapter_meta, check_finite, write_checkpoint

    chains = resolve_sharing(adapter_dirs, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    for chain in chains:
        keep_inputs(out_dir, chain.directories)
        check_finite(chain.top.tensors, chain.top.file)
    tensors, lora, changes = combine_adapters(chains, settings)
    first = chains[0]
    meta = adapter_meta(dataclasses.asdict(lora), first.inner.top, out_dir)
    write_checkpoint(out_dir, tensors, meta, first.config, sidecars_from=first.sources, hyperparameters=dump(settings))
    for notice in dict.fromkeys(notice for chain in chains for notice in chain.notices):
        say(f"note: {notice}")
    taught = {next((file.read_bytes() for source in chain.sources if (file := source / STYLE_FILE).is_file()), b"") for chain in chains}
    if len(taught) > 1:
        say(f"note: the adapters were taught with different prompt styles; that of {first.top.directory} is kept")
    if settings.density == 1 and settings.mode in ("dare_linear", "magnitude_prune"):
        say(f"note: at --density 1 nothing is dropped, and {settings.mode} is linear")
    say(*table(changes))
    terms = (f"{weight:g} x {path}" for weight, path in zip(settings.each_weight, adapter_dirs, strict=True))
    say(f"{settings.mode}: {' + '.join(terms)}")
    result = out_dir / WEIGHTS_FILE
    say(f"result: {result} ({result.stat().st_size:,} bytes: the adapter only)")
    say(f"next: python chat/base.py --checkpoint_dir {out_dir}")


if __name__ == "__main__":
    run(main, CombineLoRA)
