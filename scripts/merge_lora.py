"""Merge adapters into their base, verified before the result gets its name: writes a full
checkpoint that can be trained further.

python scripts/merge_lora.py --checkpoint_dir checkpoints/$repo_id --lora_path
$dir/final/lit_model.pth --out_dir $dir/final_merged python scripts/merge_lora.py --lora_path
$first/final $second/final --weights 0.7 0.3 --out_dir $dir/sum
"""

from pathlib import Path
from typing import Any

from litlora.cli import run
from litlora.console import say
from litlora.errors import UserError
from litlora.paths import CHECKPOINT_NAMES, WEIGHTS_FILE, checkpoint_dir, keep_inputs, output_dir
from litlora.settings import MergeLoRA


def main(settings: MergeLoRA) -> None:
    adapter_dirs = [checkpoint_dir(path) for path in settings.lora_path]
    base_dir = checkpoint_dir(settings.checkpoint_dir) if settings.checkpoint_dir else None
    inputs = [*adapter_dirs, base_dir] if base_dir else adapter_dirs
    out_dir = output_dir(
        settings.out_dir, overwrite=settings.overwrite, names=CHECKPOINT_NAMES, inputs=inputs
    )

    import torch

    from litlora.adapters.merge import converted, plan_sum
    from litlora.adapters.verify import bytes_needed, probe_ids, verify
    from litlora.checkpoint import write_full
    from litlora.ram import free_ram

    weights = [settings.strength * weight for weight in settings.weights or [1.0] * len(adapter_dirs)]
    plan, config, chains = plan_sum(
        adapter_dirs, weights, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch
    )
    keep_inputs(out_dir, [directory for chain in chains for directory in chain.directories])
    notices = list(dict.fromkeys(notice for chain in chains for notice in chain.notices))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[settings.dtype]
    plan = converted(plan, dtype, seed=settings.seed if settings.rounding == "stochastic" else None)
    if settings.rounding == "stochastic" and all(tensor.dtype.itemsize != 2 for tensor in plan.values()):
        raise UserError(
            "--rounding stochastic: is for bf16 and fp16; this base is neither, so leave it out or name a --dtype"
        )
    # A merge answers for the chain it was made from, so that an adapter trained on the chain fits
    # it too: if it is just that.
    as_trained = (
        weights == [1.0]
        and settings.rounding == "nearest"
        and all(tensor.dtype == tensor.own for tensor in plan.values())
    )

    report = [] if settings.verify else ["not verified: --verify false"]

    def check(directory: Path) -> None:
        need, there = bytes_needed(plan), free_ram()
        if there is not None and need > there:
            report.append(
                f"not verified: it takes {need / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are free"
            )
        else:
            ids, notice = probe_ids([directory], config)
            report.extend([f"note: {notice}"] if notice else [])
            report.extend(verify(plan, config, directory, ids).lines())

    write_full(
        out_dir,
        plan,
        config,
        sidecars_from=chains[0].sources,
        merged_from=chains[0].top.fingerprint if as_trained else None,
        check=check if settings.verify else None,
    )
    for notice in notices:
        say(f"note: {notice}")
    result = out_dir / WEIGHTS_FILE
    say(f"merged: {' + '.join(_names(chains, weights))}")
    say(*report)
    say(f"result: {result} ({result.stat().st_size:,} bytes: the full model)")
    say(f"next: python chat/base.py --checkpoint_dir {out_dir}")


def _names(chains: list[Any], weights: list[float]) -> list[str]:
    """The directories that were merged, the base's first, each adapter with its factor if that is
    not 1."""
    tops = (
        f"{chain.top.directory}" + (f" x {weight:g}" if weight != 1 else "")
        for chain, weight in zip(chains, weights, strict=True)
    )
    return [*map(str, chains[0].directories[:-1]), *tops]


if __name__ == "__main__":
    run(main, MergeLoRA)
