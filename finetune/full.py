"""Fine-tune every weight; the result, OUT_DIR/final/lit_model.pth, is a full model in the base's
dtype.

python finetune/full.py --checkpoint_dir checkpoints/$repo_id --data Alpaca --out_dir $dir
"""

from litlora import cli
from litlora.data.sources import read_dataset
from litlora.paths import checkpoint_dir
from litlora.settings import FinetuneFull
from litlora.train.run_directory import run_directory


def main(settings: FinetuneFull) -> None:
    base = checkpoint_dir(settings.checkpoint_dir)
    place = run_directory(
        settings.out_dir,
        f"out/full/{settings.data.name}",
        overwrite=settings.overwrite,
        resume=settings.resume,
        inputs=[base],
    )
    dataset = read_dataset(settings.data)

    from litlora.train.freeze import train_all_but
    from litlora.train.method import Method
    from litlora.train.run import finetune

    frozen, adds_tokens = settings.train.freeze, bool(settings.tokenizer.add_tokens)
    full = Method(
        prepare=lambda model: train_all_but(model, frozen, adds_tokens=adds_tokens),
        trains_base=True,
        content=lambda model: model.stored(),
        stores="the full model",
        resume=cli.RESUME,
        repeat=cli.REPEAT,
        next=cli.chat_with_result(),
    )
    finetune(settings, full, dataset, place)


if __name__ == "__main__":
    cli.run(main, FinetuneFull)
