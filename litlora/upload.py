"""Uploads to the Hugging Face hub: what of an exported folder is uploaded, and the upload. Torch-free;
needs the extra `hub`."""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from litlora.errors import CheckpointError, MissingExtraError, UserError, setting
from litlora.formats import PEFT_CONFIG_FILE
from litlora.formats.ollama import MODELFILE
from litlora.paths import CARD_FILE, GGUF_NAMES, HF_NAMES, LICENCE_FILES, MLX_NAMES, PEFT_NAMES, content
from litlora.storage.untrusted import has_file, own_file, read_json_object, read_text

WEIGHTS = ("*.safetensors", "*.gguf")
TEXTS = (".json", ".yaml", ".jinja", ".txt", ".md", "")
"""Suffixes of the files that are looked through for paths of this machine; a Modelfile has none."""
REFERENCES = ("FROM ", "ADAPTER ")
"""What a line of a Modelfile that names a file begins with."""
Gated = Literal["false", "auto", "manual"]


def uploaded_files(directory: Path) -> list[Path]:
    """The files of an exported folder. Raises UserError for a folder without weights or card, for one
    that holds anything that no export wrote, and for an adapter whose base is a directory here."""
    named = f"{setting('folder')} {directory}"
    if not directory.is_dir():
        raise UserError(f"{named}: no such directory")
    names = (*HF_NAMES, *PEFT_NAMES, *MLX_NAMES, *GGUF_NAMES, *LICENCE_FILES, "other_modalities.safetensors")
    ours, others = content(directory, names)
    if others:
        raise UserError(
            f"{named}: holds {others[0]}, which no export wrote; move it elsewhere, or export anew"
        )
    files = [own_file(directory / name) for name in ours if has_file(directory / name)]
    if not any(file.match(pattern) for file in files for pattern in WEIGHTS):
        raise UserError(
            f"{named}: holds no weights of an exported folder (*.safetensors, *.gguf); export it with "
            "scripts/convert_lit_checkpoint.py, scripts/export_peft.py or scripts/export_gguf.py"
        )
    if CARD_FILE not in ours:
        raise UserError(f"{named}: holds no {CARD_FILE}, the model card; export it anew")
    if has_file(directory / PEFT_CONFIG_FILE):
        _check_base(directory)
    for file in files:
        if file.suffix in TEXTS and file.name != "tokenizer.json":
            _check_private(file)
    return files


def _check_base(directory: Path) -> None:
    config = read_json_object(directory / PEFT_CONFIG_FILE)
    base = config.get("base_model_name_or_path", config.get("model"))
    if isinstance(base, str) and (os.path.isabs(base) or base.startswith(".") or base.count("/") > 1):
        raise CheckpointError(
            f"{directory / PEFT_CONFIG_FILE}: names its base as {base}, a directory of this machine; export "
            f"it anew with {setting('base_model')} OWNER/NAME, the base's name on the hub"
        )


def _check_private(file: Path) -> None:
    """Raise CheckpointError for a text that names a place of this machine: below the home directory of
    whoever uploads, or in a Modelfile anywhere outside of the folder."""
    text, home = read_text(file), f"{Path.home()}{os.sep}"
    found = next((place for place in (home, json.dumps(home)[1:-1]) if len(home) > 2 and place in text), None)
    if file.name == MODELFILE:
        named = [line.partition(" ")[2].strip() for line in text.splitlines() if line.startswith(REFERENCES)]
        found = next((place for place in named if place.startswith(("/", "~", ".."))), found)
    if found is not None:
        raise CheckpointError(
            f"{file}: names {found}, a place of this machine; replace it by a name that others have, or "
            "export anew"
        )


def upload(
    directory: Path, files: list[Path], repo_id: str, *, private: bool, gated: Gated, token: str | None
) -> str:
    """Create the repository, unless it exists, and upload the files in one commit; returns its address.

    A name without an owner is one of whoever is logged in. A repository that exists keeps its
    visibility. Raises UserError, with the way out, for a login that is missing or may not write, for a
    card that the hub refuses, and for a broken connection.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingExtraError(
            "uploading needs huggingface_hub; install it with: pip install 'litlora[hub]'"
        ) from None
    api = HfApi(token=token)
    with _explained(repo_id):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = address.repo_id
        if gated != "false":
            api.update_repo_settings(repo_id, gated=gated)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            allow_patterns=[glob.escape(file.name) for file in files],
            commit_message="Upload with litlora",
        )
    return str(address)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    login = (
        "log in with `hf auth login`, or give a token that may write as "
        f"{setting('access_token')} or HF_TOKEN"
    )
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"{repo_id}: uploading needs a login: {login}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            why = f" (the hub says: {error.server_message})" if error.server_message else ""
            raise UserError(
                f"{repo_id}: the hub does not let you write there ({status}){why}: {login}"
            ) from None
        again = "; run the command again" if status >= 500 or status in (408, 409, 429) else ""
        raise UserError(f"{repo_id}: the hub answers {status}: {_said(error)}{again}") from None
    except Exception as error:  # what a broken connection raises depends on the library's version
        if isinstance(error, ValueError) and f"metadata in {CARD_FILE}" in str(error):
            raise UserError(f"{repo_id}: the hub refuses the card: {_said(error)}") from None
        raise UserError(
            f"{repo_id}: the upload stopped: {_said(error)}; run the same command again, what is there stays"
        ) from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
