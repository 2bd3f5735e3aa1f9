"""Data sets on the Hugging Face Hub, fetched by `datasets` into its own cache. Torch-free; needs the
extra `datasets`."""

from pathlib import Path
from typing import Any

from litlora.data.files.extras import hub_library
from litlora.data.files.kinds import kind_by_name
from litlora.errors import DataError

HUB = "hf://"
FORM = "hf://OWNER/NAME, hf://OWNER/NAME/SPLIT, hf://OWNER/NAME/CONFIG/SPLIT or hf://OWNER/NAME/FILE"


def hub_files(path: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The local files of `hf://owner/name`, which is its split train; of one of its splits, of a
    split of one of its configurations, or of one of its files, by what follows the name; and what
    to say about them. `@revision` may follow the name. Raises DataError and MissingExtraError."""
    parts = path.removeprefix(HUB).removeprefix("datasets/").strip("/").split("/")
    repo_id, _, revision = "/".join(parts[:2]).partition("@")
    rest = parts[2:]
    if len(parts) < 2 or not all(parts):
        raise DataError(f"{path}: a data set on the hub is named {FORM}")
    if rest and kind_by_name(Path(rest[-1])):
        hub = hub_library(path, "huggingface_hub")
        file = _fetched(
            path,
            lambda: hub.hf_hub_download(
                repo_id, "/".join(rest), repo_type="dataset", revision=revision or None
            ),
        )
        return (Path(file),), ()
    if len(rest) > 2:
        raise DataError(f"{path}: a data set on the hub is named {FORM}")
    config, split = ([None, "train"] + rest)[-2:] if len(rest) != 1 else (None, rest[0])
    library = hub_library(path, "datasets")
    found = _fetched(
        path, lambda: library.load_dataset(repo_id, config, split=split, revision=revision or None)
    )
    files = tuple(Path(entry["filename"]) for entry in found.cache_files)
    if not files:
        raise DataError(f"{path}: the library datasets keeps no file of it; name one of its files as {FORM}")
    return files, (f"{path}: its split {split}, kept in {files[0].parent}",)


def _fetched(path: str, fetch: Any) -> Any:
    """What `fetch` returns. These libraries raise errors of twenty classes: for a name that does not
    exist, a login that is missing, a network that is down."""
    try:
        return fetch()
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{path}: cannot be fetched: {reason}") from None
