"""Give an adapter another rank: exactly where possible, else with the least possible error, which
is reported.

    python scripts/resize_lora.py --lora_path $dir/final/lit_model.pth --rank 4 --out_dir $dir/small
    python scripts/resize_lora.py --lora_path some_style.safetensors --energy 0.99 --out_dir small
"""

from pathlib import Path

from litlora import cli, formats
from litlora.console import say
from litlora.inputs import check_inputs
from litlora.paths import WEIGHTS_FILE, output_dir
from litlora.settings import ResizeLoRA, check, dump


def main(settings: ResizeLoRA) -> None:
    file = Path(settings.lora_path)
    if formats.is_lora_file(file):
        _resize_file(file, settings)
        return
    inputs = check_inputs(
        [settings.lora_path], settings.checkpoint_dir, settings.out_dir, overwrite=settings.overwrite
    )

    import torch

    from litlora.adapters.merge import plan_merge
    from litlora.adapters.resize import resize_adapter, table
    from litlora.checkpoint import Beside, reference_to, write_adapter
    from litlora.storage.fingerprint import check_finite

    (chain,) = inputs.chains(allow_base_mismatch=settings.allow_base_mismatch)
    adapter = chain.top
    check_finite(adapter.tensors, adapter.file)
    plan_merge(chain)  # whether it fits its base
    generator = torch.Generator().manual_seed(settings.seed)
    resized, changes = resize_adapter(
        adapter, rank=settings.rank, max_error=settings.error_bound, generator=generator
    )
    write_adapter(
        inputs.out_dir,
        resized.trained_on(reference_to(chain.inner.top, inputs.out_dir, adapter.base.quantized)),
        chain.config,
        sidecars_from=chain.sources,
        beside=Beside(hyperparameters=dump(settings)),
    )
    for notice in chain.notices:
        say(f"note: {notice}")
    if adapter.whole:
        say(f"note: {', '.join(adapter.whole)}: saved whole, kept unchanged")
    say(*table(changes))
    result = inputs.out_dir / WEIGHTS_FILE
    say(f"result: {result} ({result.stat().st_size:,} bytes: the adapter only)")
    say(f"next: {cli.call('chat/base.py', '--checkpoint_dir', inputs.out_dir)}")


def _resize_file(file: Path, settings: ResizeLoRA) -> None:
    """A LoRA file of another tool: its names, format and dtype stay, and so does what it holds
    besides factors."""
    check(settings.checkpoint_dir is None, f"{file}: needs no base; leave --checkpoint_dir out")
    out_dir = output_dir(
        settings.out_dir, overwrite=settings.overwrite, names=(file.name,), inputs=[file], replaced=False
    )

    import torch

    from litlora.adapters.factored import common_dtype
    from litlora.adapters.resize import factors_of, resize_file, table
    from litlora.formats.lora_files import read_lora, write_lora
    from litlora.model import shorten
    from litlora.storage.dtypes import dtype_name
    from litlora.storage.fingerprint import check_finite

    lora = read_lora(file)
    factors = factors_of(lora)
    check(bool(factors), f"{file}: holds no factors, so there is no rank to change")
    check_finite(factors | lora.diffs, file)
    dtype, generator = common_dtype(factors.values()), torch.Generator().manual_seed(settings.seed)
    resized, changes = resize_file(
        lora, dtype, rank=settings.rank, max_error=settings.error_bound, generator=generator
    )
    result = out_dir / file.name
    dropped = write_lora(result, resized, dtype)
    for notice in lora.notices:
        say(f"note: {notice}")
    if lora.is_8_bit:
        say(f"note: factors in 8 bits are written as {dtype_name(dtype)}, which holds the result")
    if dropped:
        say(f"note: left out of the header, as it no longer holds: {shorten(dropped)}")
    if lora.diffs:
        say(f"note: {', '.join(lora.diffs)}: kept unchanged")
    say(*table(changes))
    say(f"result: {result} ({result.stat().st_size:,} bytes)")


if __name__ == "__main__":
    cli.run(main, ResizeLoRA)
