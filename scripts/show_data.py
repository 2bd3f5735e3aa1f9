"""Show what a fine-tuning command would learn from: examples token by token, and figures on all.

python scripts/show_data.py --checkpoint_dir checkpoints/$repo_id --data my.jsonl
python scripts/show_data.py --config out/lora/json/hyperparameters.yaml --examples 10

Takes every option of finetune/lora.py, so that its command line shows its data. No weights are
loaded and nothing is written. What is learned is in color at a terminal, and in [[double brackets]]
elsewhere; a bar separates tokens.
"""

import json
from pathlib import Path

from litlora import cli
from litlora.console import say, say_marked
from litlora.data.sources import read_dataset
from litlora.paths import checkpoint_dir
from litlora.settings import ShowData


def main(settings: ShowData) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    dataset = read_dataset(settings.data)

    from litlora.checkpoint import resolve
    from litlora.train import preview

    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    found = preview.preview(settings, dataset, chain)
    if settings.json:
        say(json.dumps(found))
        return
    for conversation in found["conversations"]:
        say(preview.title(conversation))
        for tokens in conversation["examples"]:
            say_marked(preview.marked(tokens))
        say("")
    say(*preview.table(found))


if __name__ == "__main__":
    cli.run(main, ShowData)
