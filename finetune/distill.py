"""Learn the predictions of another model, the teacher, with LoRA; the result,
OUT_DIR/final/lit_model.pth, holds the adapter only.

python finetune/distill.py --checkpoint_dir checkpoints/$repo_id --teacher $teacher_dir --data my.jsonl
"""

from functools import partial
from pathlib import Path

from litlora import cli
from litlora.data.sources import read_dataset
from litlora.errors import UserError, setting
from litlora.paths import checkpoint_dir, keep_inputs
from litlora.settings import FinetuneDistill
from litlora.train.run_directory import run_directory


def main(settings: FinetuneDistill) -> None:
    base, teacher_dir = checkpoint_dir(settings.checkpoint_dir), checkpoint_dir(settings.teacher)
    place = run_directory(
        settings.out_dir,
        f"out/distill/{settings.data.name}",
        overwrite=settings.overwrite,
        resume=settings.resume,
        inputs=[base, teacher_dir],
    )
    dataset = read_dataset(settings.data)
    if not isinstance(dataset.conversations, list):
        raise UserError(
            f"{setting('teacher')} {teacher_dir}: its predictions are kept in memory, and this data is so "
            f"large that it stays on the disk; take a part of it, or set {setting('cache')} false if all fits"
        )

    from litlora.checkpoint import resolve
    from litlora.train.adapter_method import adapter_method
    from litlora.train.distill import Distill, find_teacher
    from litlora.train.run import finetune

    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    student = resolve(base, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    teacher = find_teacher(teacher_dir, student, settings.teacher_quantize)
    keep_inputs(place.path, teacher.chain.directories)
    objective = partial(Distill, teacher=teacher, distill=settings.distill)
    finetune(settings, adapter_method(settings, objective), dataset, place)


if __name__ == "__main__":
    cli.run(main, FinetuneDistill)
