"""Fine-tune every weight; the result, OUT_DIR/final/lit_model.pth, is a full model in the base's
dtype.

python finetune/full.py --checkpoint_dir checkpoints/$repo_id --data Alpaca --out_dir $dir
"""

from litlora.cli import run
from litlora.data.records import read_records
from litlora.paths import checkpoint_dir
from litlora.settings import FinetuneFull
from litlora.train.run_directory import run_directory


def main(settings: FinetuneFull) -> None:
    base = checkpoint_dir(settings.checkpoint_dir)
    run = run_directory(
        settings.out_dir,
        f"out/full/{settings.data.name}",
        overwrite=settings.overwrite,
        resume=settings.resume,
        inputs=[base],
    )
    records = read_records(settings.data)

    from litlora.train.run import Method, finetune

    method = Method(
        prepare=lambda model: model.requires_grad_(),
        trains_base=True,
        content=lambda model: dict(model.named_parameters()),
        stores="the full model",
    )
    finetune(settings, method, records, run)


if __name__ == "__main__":
    run(main, FinetuneFull)
