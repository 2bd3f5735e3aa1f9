"""Merge an adapter, or a chain of them, into its base: writes a full checkpoint that can be trained further.

python scripts/merge_lora.py --checkpoint_dir checkpoints/$repo_id --lora_path $dir/final/lit_model.pth --out_dir $dir/final_merged
"""

from litlora.cli import run
from litlora.errors import CheckpointError
from litlora.paths import CHECKPOINT_NAMES, WEIGHTS_FILE, checkpoint_dir, keep_inputs, output_dir
from litlora.settings import MergeLoRA


def main(settings: MergeLoRA) -> None:
    adapter_dir = checkpoint_dir(settings.lora_path)
    base_dir = checkpoint_dir(settings.checkpoint_dir) if settings.checkpoint_dir else None
    inputs = [adapter_dir, base_dir] if base_dir else [adapter_dir]
    out_dir = output_dir(settings.out_dir, overwrite=settings.overwrite, names=CHECKPOINT_NAMES, inputs=inputs)

    from litlora.adapters.merge import merge_chain
    from litlora.checkpoint import fingerprint, full_meta, open_checkpoint, resolve, write_checkpoint

    if not open_checkpoint(adapter_dir, base_dir=base_dir).is_adapter:
        raise CheckpointError(f"{adapter_dir}: is a full model already; --lora_path needs an adapter")
    chain = resolve(adapter_dir, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    keep_inputs(out_dir, chain.directories)
    tensors, config = merge_chain(chain)
    # The merge answers for the chain it was made from: an adapter trained on the chain fits it too.
    merged = {"chain": chain.top.fingerprint, "result": fingerprint(tensors)}
    write_checkpoint(out_dir, tensors, full_meta(merged=merged), config, sidecars_from=chain.sources)
    for notice in chain.notices:
        print(f"note: {notice}")
    result = out_dir / WEIGHTS_FILE
    print(f"merged: {' + '.join(map(str, chain.directories))}")
    print(f"result: {result} ({result.stat().st_size:,} bytes: the full model)")
    print(f"next: python chat/base.py --checkpoint_dir {out_dir}")


if __name__ == "__main__":
    run(main, MergeLoRA)
