"""Show what a checkpoint is: kind, model, base and whether it matches, and how large an adapter's
updates are.

python scripts/inspect_checkpoint.py $dir/final
python scripts/inspect_checkpoint.py $dir/final --json

Takes every checkpoint that the other commands take, and LoRA files of other tools. A base that is
missing or does not match is reported as a problem, with exit status 0: the checkpoint was
inspected. Anything that is not a checkpoint is an error.
"""

import json
from functools import partial
from pathlib import Path

from litlora import cli
from litlora.console import say
from litlora.paths import checkpoint_dir, stands_for_directory
from litlora.settings import InspectCheckpoint


def main(settings: InspectCheckpoint) -> None:
    path = Path(settings.checkpoint_dir)
    if stands_for_directory(path):
        path = checkpoint_dir(path)
    base_dir = checkpoint_dir(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None

    from litlora.adapters.describe import describe, table

    found = describe(path, base_dir=base_dir, option=partial(cli.option_for, InspectCheckpoint))
    if settings.json:
        text = json.dumps(found, indent=2, allow_nan=False)
        say(*text.replace("\x7f", "\\u007f").split("\n"))
    else:
        say(*table(found))


if __name__ == "__main__":
    cli.run(main, InspectCheckpoint)
