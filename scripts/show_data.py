"""Show what a fine-tuning command would learn from: examples token by token, and figures on all.

python scripts/show_data.py --checkpoint_dir checkpoints/$repo_id --data my.jsonl
python scripts/show_data.py --data pairs.jsonl --preference.loss dpo
python scripts/show_data.py --config out/lora/json/hyperparameters.yaml --examples 10

Takes every option of finetune/lora.py, so that its command line shows its data; and those of full.py,
of dpo.py (with --preference) and of distill.py (with --teacher). No weights are loaded and nothing is
written. What is learned is in color at a terminal, and in [[double brackets]] elsewhere; a bar
separates tokens.
"""

import json
from pathlib import Path

from litlora import cli
from litlora.console import say, say_marked
from litlora.data.sources import read_dataset
from litlora.paths import checkpoint_dir
from litlora.settings import ShowData, ShowDistill, ShowPreference


def main(settings: ShowData | ShowDistill | ShowPreference) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    teacher_dir = checkpoint_dir(settings.teacher) if isinstance(settings, ShowDistill) else None
    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    learns = "answers"
    if isinstance(settings, ShowPreference):
        learns = "labels" if settings.preference.learns_labels else "pairs"
    dataset = read_dataset(settings.data, learns)

    from litlora.checkpoint import resolve
    from litlora.train import preview, preview_text

    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    if teacher_dir is not None:
        from litlora.train.distill import find_teacher

        find_teacher(teacher_dir, chain)
    found = preview.preview(settings, dataset, chain, learns)
    if settings.json:
        say(json.dumps(found))
        return
    for conversation in found["conversations"]:
        say(preview_text.title(conversation))
        for heading, tokens in preview_text.answers(conversation):
            if heading:
                say(heading)
            say_marked(preview_text.marked(tokens))
        say("")
    say(*preview_text.table(found))


if __name__ == "__main__":
    cli.run(main, ShowData, ShowPreference, ShowDistill)
