"""Data sets on the Hugging Face Hub, fetched by `datasets` into its own cache. Torch-free; needs the
extra `datasets`."""

import os
import socket
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from litlora.data.files.extras import hub_library
from litlora.data.files.kinds import kind_by_name
from litlora.errors import DataError

HUB = "hf://"
FORM = "hf://OWNER/NAME, hf://OWNER/NAME/SPLIT, hf://OWNER/NAME/CONFIG/SPLIT or hf://OWNER/NAME/FILE"

OFFLINE = "HF_HUB_OFFLINE"
PATIENCE = 4.0
"""Seconds that the hub has to take a connection. Its libraries would try for half a minute."""


def hub_files(path: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The local files of `hf://owner/name`, which is its split train; of one of its splits, of a
    split of one of its configurations, or of one of its files, by what follows the name; and what
    to say about them. `@revision` may follow the name. Raises DataError and MissingExtraError."""
    parts = path.removeprefix(HUB).removeprefix("datasets/").strip("/").split("/")
    repo_id, _, revision = "/".join(parts[:2]).partition("@")
    rest = parts[2:]
    if len(parts) < 2 or not all(parts):
        raise DataError(f"{path}: a data set on the hub is named {FORM}")
    if len(rest) > 2 and not kind_by_name(Path(rest[-1])):
        raise DataError(f"{path}: a data set on the hub is named {FORM}")
    hub_library(path, "datasets" if not (rest and kind_by_name(Path(rest[-1]))) else "huggingface_hub")
    unreachable = None if os.environ.get(OFFLINE) else _unreachable()
    if unreachable:
        _go_offline()
    try:
        return _files(path, repo_id, revision, rest)
    except DataError:
        if not unreachable:
            raise
        raise DataError(
            f"{path}: cannot be fetched: {unreachable} cannot be reached, and it is not in the cache; name "
            "files that are here, or try again with a network"
        ) from None


def _go_offline() -> None:
    """Let the libraries, which may have been imported, look into their cache alone, from now on."""
    os.environ[OFFLINE] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True


def _unreachable() -> str | None:
    """The host of the hub, or of the proxy before it, that takes no connection; None if it does."""
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    host, port = address.hostname, address.port or {"http": 80, "socks5": 1080}.get(address.scheme, 443)
    connected = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((host, port), timeout=PATIENCE).close()
            connected.set()

    # A thread, as looking up a name has no limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return None if connected.is_set() else host


def _files(
    path: str, repo_id: str, revision: str, rest: list[str]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of a data set, and what to say about them."""
    if rest and kind_by_name(Path(rest[-1])):
        hub = hub_library(path, "huggingface_hub")
        file = _fetched(
            path,
            lambda: hub.hf_hub_download(
                repo_id, "/".join(rest), repo_type="dataset", revision=revision or None
            ),
        )
        return (Path(file),), ()
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
