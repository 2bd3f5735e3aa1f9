"""The Hugging Face hub: which files of a repository a checkpoint needs, and fetching them.
Torch-free; needs the extra `hub`."""

import re
from collections.abc import Callable
from pathlib import Path

from litlora.errors import CheckpointError, MissingExtraError, UserError
from litlora.formats import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILES
from litlora.formats.families import HF_CONFIG_FILE, load_config
from litlora.tokenizer import SIDECAR_FILES

ADAPTER_FILES = (PEFT_CONFIG_FILE, *PEFT_WEIGHTS_FILES)
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
STATE_DIR = ".cache"
"""Where huggingface_hub keeps, beside the files, what it needs to go on with an interrupted
download."""


def wanted_files(names: list[str]) -> list[str]:
    """The files of a repository that a checkpoint needs: small ones first, safetensors rather than
    torch files."""
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    safe = [name for name in weights if ".safetensors" in name]
    adapter = [name for name in ADAPTER_FILES if name in names]
    if ADAPTER_FILES[1] in adapter:
        adapter = [name for name in adapter if name != ADAPTER_FILES[2]]
    return [
        *(name for name in SIDECAR_FILES if name in names),
        *adapter,
        *sorted(safe or weights, key=lambda name: ".index." not in name),
    ]


def check_directory(directory: Path) -> None:
    """Raise UserError if the directory holds something that no download put there."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out_dir {directory}: is a file; name a directory")
    there = sorted(child.name for child in directory.iterdir()) if directory.exists() else []
    if there and not (directory / STATE_DIR / "huggingface").is_dir():
        raise UserError(
            f"--out_dir {directory}: already holds {there[0]}, which no download put there; name another directory"
        )


def download(
    repo_id: str, directory: Path, *, revision: str, token: str | None, say: Callable[[str], None]
) -> None:
    """Fetch what a checkpoint needs of a repository, all of one commit; what is there already is
    not fetched again.

    A model whose architecture is not covered is refused before its weights are fetched. Raises
    UserError for a name that does not exist, a model that needs a login, and a connection that
    breaks, saying how to go on.
    """
    try:
        from huggingface_hub import HfApi, constants, hf_hub_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise MissingExtraError(
            "downloading needs huggingface_hub; install it with: pip install 'litlora[hub]'"
        ) from None
    login = "log in with `hf auth login`, or give a token as --access_token or HF_TOKEN"
    try:
        found = HfApi(token=token).model_info(repo_id, revision=revision)
        names = wanted_files([file.rfilename for file in found.siblings or []])
        if not any(WEIGHTS.fullmatch(name) or name in ADAPTER_FILES for name in names):
            raise UserError(
                f"{repo_id}: holds no *.safetensors, no pytorch_model*.bin and no adapter; there is nothing to use here"
            )
        for name in sorted(names, key=lambda name: name != HF_CONFIG_FILE):
            hf_hub_download(repo_id, name, revision=found.sha, local_dir=directory, token=token)
            if name == HF_CONFIG_FILE and not any(file in names for file in ADAPTER_FILES):
                _check_covered(repo_id, directory)
            say(f"{name} ({(directory / name).stat().st_size:,} bytes)")
    except GatedRepoError:
        raise UserError(
            f"{repo_id}: needs its terms accepted: do so at {constants.ENDPOINT}/{repo_id}, then {login}"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repo_id}: no such model at {constants.ENDPOINT}, or a private one: check the name, or {login}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"--revision {revision}: {repo_id} has no such branch, tag or commit") from None
    except UserError:
        raise
    except Exception as error:  # what a broken connection raises differs between versions of the library
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{repo_id}: the download stopped: {reason}; the same command goes on where it stopped"
        ) from None


def _check_covered(repo_id: str, directory: Path) -> None:
    try:
        load_config(directory)
    except CheckpointError as error:
        raise UserError(f"{repo_id}: {error}; its weights were not fetched") from None
