"""Fine-tune with LoRA; the result, OUT_DIR/final/lit_model.pth, holds the adapter only.

python finetune/lora.py --checkpoint_dir checkpoints/$repo_id --data Alpaca --out_dir $dir
"""

from litlora import cli
from litlora.data.sources import read_dataset
from litlora.paths import checkpoint_dir
from litlora.settings import FinetuneLoRA
from litlora.train.run_directory import run_directory


def main(settings: FinetuneLoRA) -> None:
    base = checkpoint_dir(settings.checkpoint_dir)
    place = run_directory(
        settings.out_dir,
        f"out/lora/{settings.data.name}",
        overwrite=settings.overwrite,
        resume=settings.resume,
        inputs=[base],
    )
    dataset = read_dataset(settings.data)

    from litlora.lora import adapter_of, add_lora
    from litlora.train.method import Method
    from litlora.train.run import finetune

    lora = Method(
        prepare=lambda model: add_lora(model, settings.lora),
        trains_base=False,
        dense=settings.lora.modules_to_save,
        content=lambda model: adapter_of(model, settings.lora),
        stores="the adapter only",
        resume="python {script} --config {config} --resume auto",
        next=f"{cli.call('chat/base.py')} --checkpoint_dir {{result}}",
    )
    finetune(settings, lora, dataset, place)


if __name__ == "__main__":
    cli.run(main, FinetuneLoRA)
