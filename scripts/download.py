"""Download a model from the Hugging Face hub. It needs no conversion. After an interruption the same
command goes on: files that are whole stay, and the one that broke off begins anew.

python scripts/download.py --repo_id EleutherAI/pythia-70m
"""

from pathlib import Path

from litlora.cli import call, run
from litlora.console import say
from litlora.hub import check_directory, download
from litlora.settings import Download


def main(settings: Download) -> None:
    directory = Path(settings.out_dir or f"checkpoints/{settings.repo_id}")
    check_directory(directory)
    download(settings.repo_id, directory, revision=settings.revision, token=settings.access_token, say=print)
    say(f"result: {directory}")
    say(f"next: {call('finetune/lora.py', '--checkpoint_dir', directory)}")


if __name__ == "__main__":
    run(main, Download)
