"""Fine-tune with LoRA; the result, OUT_DIR/final/lit_model.pth, holds the adapter only.

python finetune/lora.py --checkpoint_dir checkpoints/$repo_id --data Alpaca --out_dir $dir
python finetune/lora.py --checkpoint_dir checkpoints/$repo_id --data my_records.jsonl --quantize nf4
python finetune/lora.py --config $dir/hyperparameters.yaml --resume auto
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

    from litlora.train.adapter_method import adapter_method
    from litlora.train.run import finetune

    finetune(settings, adapter_method(settings), dataset, place)


if __name__ == "__main__":
    cli.run(main, FinetuneLoRA)
