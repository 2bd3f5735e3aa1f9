"""The Hugging Face hub: which files of a repository a checkpoint needs, and downloading them.
Torch-free; needs the extra `hub`."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from litlora.errors import CheckpointError, MissingExtraError, UserError, setting
from litlora.formats import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILES
from litlora.formats.families import HF_CONFIG_FILE, is_own, load_config
from litlora.paths import CARD_FILE, LICENCE_FILES
from litlora.storage.untrusted import read_json_object
from litlora.tokenizer import SIDECAR_FILES

ADAPTER_FILES = (PEFT_CONFIG_FILE, *PEFT_WEIGHTS_FILES)
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
STATE_DIR = ".cache"
"""Where huggingface_hub keeps, beside the files, which of them are whole."""
ORIGIN_FILE = Path(STATE_DIR, "huggingface", "repo_id")
"""Where a download notes the repository that a directory's files are from."""
REPO_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)


def needed_files(names: list[str]) -> list[str]:
    """The files of a repository that a checkpoint needs: small files first, and safetensors rather
    than torch files."""
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    safe = [name for name in weights if ".safetensors" in name]
    adapter = [name for name in ADAPTER_FILES if name in names]
    if ADAPTER_FILES[1] in adapter:
        adapter = [name for name in adapter if name != ADAPTER_FILES[2]]
    return [
        *(name for name in (CARD_FILE, *LICENCE_FILES, *SIDECAR_FILES) if name in names),
        *adapter,
        *sorted(safe or weights, key=lambda name: ".index." not in name),
    ]


def origin(directory: Path) -> str | None:
    """The repository that the files of a directory were downloaded from, if that is noted."""
    try:
        noted = (directory / ORIGIN_FILE).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return noted if REPO_ID.fullmatch(noted) else None


def check_directory(directory: Path) -> None:
    """Raise UserError if the directory holds anything that no download put there."""
    where = f"{setting('out_dir')} {directory}"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{where}: is a file; choose a directory")
    there = sorted(child.name for child in directory.iterdir()) if directory.exists() else []
    if there and not (directory / STATE_DIR / "huggingface").is_dir():
        raise UserError(
            f"{where}: already holds {there[0]}, which no download put there; choose another directory"
        )


def download(
    repo_id: str, directory: Path, *, revision: str, token: str | None, say: Callable[[str], None]
) -> None:
    """Download the files of a repository that a checkpoint needs, all from one commit. Files that
    are already there are not downloaded again; one that broke off is.

    A model with an architecture that is not covered is refused before its weights are downloaded.
    Raises UserError, with the way out, for an unknown name, for a model that needs a login, and for
    a broken connection.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError:
        raise MissingExtraError(
            "downloading needs huggingface_hub; install it with: pip install 'litlora[hub]'"
        ) from None
    with _explained(repo_id, revision):
        found = HfApi(token=token).model_info(repo_id, revision=revision)
        names = needed_files([file.rfilename for file in found.siblings or []])
        if not any(WEIGHTS.fullmatch(name) or name in ADAPTER_FILES for name in names):
            raise UserError(
                f"{repo_id}: holds no *.safetensors, no pytorch_model*.bin and no adapter; choose another "
                "repository"
            )
        if (there := origin(directory)) not in (None, found.id):
            raise UserError(
                f"{setting('out_dir')} {directory}: already holds {there}, whose files would be replaced; "
                "choose another directory"
            )
        is_adapter = any(name in names for name in ADAPTER_FILES)
        for name in sorted(names, key=lambda name: name != HF_CONFIG_FILE):
            hf_hub_download(repo_id, name, revision=found.sha, local_dir=directory, token=token)
            if name == HF_CONFIG_FILE and not is_adapter:
                _check_covered(repo_id, directory)
            (directory / ORIGIN_FILE).write_text(found.id, encoding="ascii")
            say(f"{name} ({(directory / name).stat().st_size:,} bytes)")
    # Of downloads that were killed: huggingface_hub begins a file under a new name each time.
    for left in (directory / STATE_DIR).rglob("*.incomplete"):
        left.unlink(missing_ok=True)


@contextmanager
def _explained(repo_id: str, revision: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = f"log in with `hf auth login`, or give a token as {setting('access_token')} or HF_TOKEN"
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repo_id}"
        said = f" (the hub says: {error.server_message})" if error.server_message else ""
        raise UserError(
            f"{repo_id}: its terms must be accepted first, at {page}{said}; then {login}"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repo_id}: no such model at {constants.ENDPOINT}, or a private one: check the name, or {login}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{setting('revision')} {revision}: {repo_id} has no such branch, tag or commit"
        ) from None
    except Exception as error:  # what a broken connection raises depends on the library's version
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(f"{repo_id}: the hub does not accept the token: {reason}; {login}") from None
        raise UserError(
            f"{repo_id}: the download stopped: {reason}; run the same command again to resume it"
        ) from None


def _check_covered(repo_id: str, directory: Path) -> None:
    try:
        if is_own(read_json_object(directory / HF_CONFIG_FILE, "a Hugging Face folder needs it")):
            load_config(directory)
        else:
            from litlora.formats.through_transformers import load_config as load_through

            load_through(directory)
    except CheckpointError as error:
        raise UserError(f"{repo_id}: {error}; its weights were not downloaded") from None
