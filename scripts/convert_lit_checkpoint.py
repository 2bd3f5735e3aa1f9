"""Write any checkpoint as a complete Hugging Face folder: config, tokenizer, chat template,
generation config, safetensors.

python scripts/convert_lit_checkpoint.py --checkpoint_dir $dir/final --out_dir $dir/hf

An adapter or a chain is merged first. `AutoModelForCausalLM.from_pretrained("$dir/hf")` and
`AutoTokenizer` load the folder without further steps.
"""

from pathlib import Path

from litlora.cli import run
from litlora.console import say
from litlora.paths import HF_NAMES, checkpoint_dir, output_dir
from litlora.settings import ConvertLit


def main(settings: ConvertLit) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    base_dir = checkpoint_dir(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    inputs = [directory, base_dir] if base_dir else [directory]
    out_dir = output_dir(settings.out_dir, overwrite=settings.overwrite, names=HF_NAMES, inputs=inputs)

    from litlora.adapters.merge import merge_chain
    from litlora.card import of_folder, write_card
    from litlora.checkpoint import resolve
    from litlora.formats.huggingface import write_folder
    from litlora.storage.atomic import replacing_directory
    from litlora.storage.fingerprint import check_finite

    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    for notice in chain.notices:
        say(f"note: {notice}")
    tensors, config = merge_chain(chain)
    check_finite(tensors, chain.base.file)
    with replacing_directory(out_dir) as staging:
        what = write_folder(staging, tensors, config, chain.sources, settings.max_shard_bytes, chain.base)
        write_card(staging, chain, of_folder(staging))
    if chain.adapters:
        onto = ", onto dequantized" if chain.top.base.quantized else ""
        say(f"merged: {' + '.join(str(link.directory) for link in (chain.base, *chain.adapters))}{onto}")
    size = sum(file.stat().st_size for file in Path(out_dir).glob("*.safetensors"))
    say(f"result: {out_dir} ({size:,} bytes of weights: {what})")


if __name__ == "__main__":
    run(main, ConvertLit)
