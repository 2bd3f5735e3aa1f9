"""Upload an exported folder, with its model card, to the Hugging Face hub. What is uploaded is listed
first, and nothing leaves this machine before you say so.

    python scripts/upload.py --folder $dir/hf --repo_id OWNER/NAME
    python scripts/upload.py --folder $dir/gguf --repo_id OWNER/NAME-GGUF --private false --yes true

A new repository is private unless you say otherwise.
"""

import sys
from pathlib import Path

from litlora.cli import run
from litlora.console import say
from litlora.errors import UserError
from litlora.settings import Upload
from litlora.upload import upload, uploaded_files


def main(settings: Upload) -> None:
    directory = Path(settings.folder)
    files = uploaded_files(directory)
    kind = "private" if settings.private else "public"
    gated = "" if settings.gated == "false" else f", gated ({settings.gated})"
    say(f"to: {settings.repo_id}, {kind} if it is new{gated}")
    for file in files:
        say(f"  {file.name} ({file.stat().st_size:,} bytes)")
    say(f"{len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
    if not settings.yes:
        if not sys.stdin.isatty():
            raise UserError("--yes is false and there is no terminal to ask at: say --yes true to upload")
        if not _agreed():
            say("nothing was uploaded")
            return
    address = upload(
        directory,
        files,
        settings.repo_id,
        private=settings.private,
        gated=settings.gated,
        token=settings.access_token,
    )
    say(f"result: {address}")


def _agreed() -> bool:
    try:
        return input("upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


if __name__ == "__main__":
    run(main, Upload)
