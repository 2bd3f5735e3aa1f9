"""Fine-tune with LoRA; the result, OUT_DIR/final/lit_model.pth, holds the adapter only.

python finetune/lora.py --checkpoint_dir checkpoints/$repo_id --data Alpaca --out_dir $dir
"""

from litlora.cli import run
from litlora.data.records import read_records
from litlora.paths import checkpoint_dir
from litlora.settings import FinetuneLoRA
from litlora.train.run_directory import run_directory


def main(settings: FinetuneLoRA) -> None:
    base = checkpoint_dir(settings.checkpoint_dir)
    run = run_directory(
        settings.out_dir,
        f"out/lora/{settings.data.name}",
        overwrite=settings.overwrite,
        resume=settings.resume,
        inputs=[base],
    )
    records = read_records(settings.data)

    from litlora.lora import adapter_of, add_lora
    from litlora.train.run import Method, finetune

    method = Method(
        prepare=lambda model: add_lora(model, settings.lora),
        trains_base=False,
        content=lambda model: adapter_of(model, settings.lora),
        stores="the adapter only",
    )
    finetune(settings, method, records, run)


if __name__ == "__main__":
    run(main, FinetuneLoRA)
