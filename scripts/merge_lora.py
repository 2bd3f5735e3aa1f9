r"""Merge adapters into their base and verify the result before it gets its name: writes a full
checkpoint that can be trained further.

    python scripts/merge_lora.py --checkpoint_dir checkpoints/$repo_id \
        --lora_path $dir/final/lit_model.pth --out_dir $dir/final_merged
    python scripts/merge_lora.py --lora_path $first/final $second/final --weights 0.7 0.3 \
        --out_dir $dir/sum
"""

from pathlib import Path
from typing import TYPE_CHECKING

from litlora.cli import call, run
from litlora.console import say
from litlora.errors import UserError
from litlora.inputs import check_inputs
from litlora.paths import WEIGHTS_FILE
from litlora.settings import MergeLoRA

if TYPE_CHECKING:
    from litlora.adapters.merge import Plan
    from litlora.adapters.unmerged import Unmerged
    from litlora.checkpoint import Chain
    from litlora.transformers_config import Architecture

DEQUANTIZED, ORIGINAL = "dequantized", "original"


def main(settings: MergeLoRA) -> None:
    inputs = check_inputs(
        settings.lora_path, settings.checkpoint_dir, settings.out_dir, overwrite=settings.overwrite
    )

    import torch

    from litlora.adapters.merge import converted, plan_merge
    from litlora.adapters.unmerged import Unmerged
    from litlora.checkpoint import Beside, write_full
    from litlora.stop_tokens import stops_of
    from litlora.storage.fingerprint import check_finite

    chains = inputs.chains(allow_base_mismatch=settings.allow_base_mismatch)
    for adapter in {link.file: link for chain in chains for link in chain.adapters}.values():
        check_finite(adapter.tensors, adapter.file)
    weights = [settings.strength * weight for weight in settings.weights or [1.0] * len(chains)]
    onto, plans = _plans(settings.onto, chains, weights)
    plan, config = plans[onto]
    tops = [(chain.top, weight) for chain, weight in zip(chains, weights, strict=True) if weight != 0]
    unmerged = Unmerged(*plan_merge(chains[0].inner), tops)
    notices = list(dict.fromkeys(notice for chain in chains for notice in chain.notices))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[settings.dtype]
    at_random = settings.rounding == "stochastic"
    plan = converted(plan, dtype, seed=settings.seed if at_random else None)
    if at_random and all(tensor.dtype.itemsize != 2 for tensor in plan.values()):
        raise UserError(
            "--rounding stochastic: is for bf16 and fp16, and this base is neither; "
            "leave it out or choose a --dtype"
        )
    # A merge that is exactly its chain answers for it: an adapter trained on the chain fits the
    # merge too.
    own_dtypes = all(tensor.dtype == tensor.own for tensor in plan.values())
    as_trained = weights == [1.0] and not at_random and own_dtypes and onto != ORIGINAL
    report: list[str] = []

    def check(written: Path) -> None:
        report.extend(_verified(plan, config, written, unmerged, plans))

    write_full(
        inputs.out_dir,
        plan,
        config,
        sidecars_from=chains[0].sources,
        beside=Beside(stops=tuple(stops_of(chains[0].sources)), base=chains[0].base),
        merged_from=chains[0].top.fingerprint if as_trained else None,
        check=check if settings.verify else None,
    )
    for notice in notices:
        say(f"note: {notice}")
    result = inputs.out_dir / WEIGHTS_FILE
    say(f"merged: {' + '.join(_names(chains, weights))}{f', onto {onto}' if onto else ''}")
    say(*(report if settings.verify else ["not verified: --verify false"]))
    say(f"result: {result} ({result.stat().st_size:,} bytes: the full model)")
    say(f"next: {call('chat/base.py', '--checkpoint_dir', inputs.out_dir)}")


def _plans(
    asked: str | None, chains: "list[Chain]", weights: list[float]
) -> "tuple[str | None, dict[str | None, tuple[Plan, Architecture]]]":
    """What is merged into, and the merge; of adapters that were trained on a quantised base both
    merges, the one that is written first. Raises UserError for a choice where there is none."""
    from litlora.adapters.merge import plan_sum

    top = chains[0].top
    if not (top.base and top.base.quantized):
        if asked is not None:
            raise UserError(
                f"--onto {asked}: {top.directory} was not trained with --quantize, so there is one base to "
                "merge into; leave the option out"
            )
        return None, {None: plan_sum(chains, weights)}
    # By default the model that was trained, as for every adapter: what was validated is what is written.
    onto = asked or DEQUANTIZED
    bases = {DEQUANTIZED: chains}
    if onto == ORIGINAL or not any(chain.top.needs_quantised for chain in chains):
        bases[ORIGINAL] = [chain.on_original for chain in chains]
    order = sorted(bases, key=lambda name: name != onto)
    return onto, {name: plan_sum(bases[name], weights) for name in order}


def _verified(
    plan: "Plan",
    config: "Architecture",
    directory: Path,
    unmerged: "Unmerged",
    plans: "dict[str | None, tuple[Plan, Architecture]]",
) -> list[str]:
    """What verifying a complete directory found, or why it was not verified, and how well each of two
    plans fits. Raises CheckpointError for a merge that is not what was tested."""
    from litlora.adapters.fit import fits, lines_of
    from litlora.adapters.merge import retyped
    from litlora.adapters.verify import bytes_needed, probe_ids, verify
    from litlora.ram import free_ram

    need, free = bytes_needed(plan, config), free_ram()
    if free is not None and need > free:
        return [f"not verified: it takes {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"]
    ids, notice = probe_ids([directory], config)
    report = verify(plan, config, directory, ids, unmerged)
    *lines, rounding = report.lines()
    if report.loses_much:
        rounding += "; --dtype fp32 keeps all of it, --rounding stochastic its mean"
    fit = []
    if len(plans) > 1:
        candidates = {name: retyped(other, like=plan) for name, (other, _) in plans.items()}
        fit = lines_of(fits(plans[DEQUANTIZED][0], candidates, config, ids, unmerged), next(iter(plans)))
    return [*([f"note: {notice}"] if notice else []), *lines, rounding, *fit]


def _names(chains: "list[Chain]", weights: list[float]) -> list[str]:
    """The merged directories, the base's first, each adapter with its factor if that is not 1."""
    tops = (
        f"{chain.top.directory}" + (f" x {weight:g}" if weight != 1 else "")
        for chain, weight in zip(chains, weights, strict=True)
    )
    return [*map(str, chains[0].directories[:-1]), *tops]


if __name__ == "__main__":
    run(main, MergeLoRA)
