"""Write a Hugging Face model folder as a litlora checkpoint directory. No command needs this: every
one reads such folders directly.

python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/$repo_id \\
    --out_dir checkpoints/$repo_id-lit
"""

from pathlib import Path

from litlora import cli, formats
from litlora.console import say
from litlora.errors import CheckpointError
from litlora.paths import CHECKPOINT_NAMES, WEIGHTS_FILE, checkpoint_dir, output_dir
from litlora.settings import ConvertHF


def main(settings: ConvertHF) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    if formats.detect(directory).name != "Hugging Face":
        raise CheckpointError(
            f"{directory}: not a Hugging Face model folder; --checkpoint_dir needs a config.json with its "
            "weights"
        )
    out_dir = output_dir(
        settings.out_dir, overwrite=settings.overwrite, names=CHECKPOINT_NAMES, inputs=[directory]
    )

    from litlora.checkpoint import Beside, resolve, write_full
    from litlora.storage.fingerprint import check_finite
    from litlora.tokenizer import Tokenizer

    chain = resolve(directory)
    source = chain.base
    check_finite(source.tensors, source.file)
    Tokenizer(directory)  # a checkpoint directory needs one: raises if there is none
    write_full(out_dir, source.tensors, source.config, sidecars_from=[directory], beside=Beside(base=source))
    for notice in chain.notices:
        say(f"note: {notice}")
    result = Path(out_dir) / WEIGHTS_FILE
    size = result.stat().st_size
    say(f"result: {result} ({size:,} bytes: the full model, fingerprint {source.fingerprint})")
    say(f"next: {cli.call('finetune/lora.py', '--checkpoint_dir', out_dir)}")


if __name__ == "__main__":
    cli.run(main, ConvertHF)
