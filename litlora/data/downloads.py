"""Files of data from the network: an https address, or a file of a data set on the Hugging Face hub.
Torch-free.

A download appears under its name when it is complete. `HF_ENDPOINT` names another hub.
"""

import fnmatch
import http.client
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath

TIMEOUT = 30
"""Seconds without an answer after which a download is given up."""
CHUNK = 2**20
HUB = "hf://datasets/"
SAID = 10**8
"""Of a large file, every so many bytes are said."""


def file_name(address: str) -> str:
    """The name, or the pattern of names, under which the files of an address are kept."""
    return PurePosixPath(address).name


def download_all(addresses: list[str], directory: Path, say: Callable[[str], None]) -> None:
    """Fetch the files of all addresses into the directory, where all of them appear at once, or none.
    Raises OSError."""
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    try:
        staging.mkdir(parents=True)
        for address in addresses:
            for url, token in _located(address):
                download(url, staging / file_name(url), say, token)
        if not directory.exists() or not any(directory.iterdir()):
            os.replace(staging, directory)
            return
        for file in sorted(staging.iterdir()):
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def download(url: str, file: Path, say: Callable[[str], None], token: str | None = None) -> None:
    """Fetch a JSON or Parquet file. Raises OSError if it does not come whole, or is none."""
    request = urllib.request.Request(url) if "://" in url else None
    if request is None:
        raise OSError(f"{url} is not an address")
    if token:  # for this address only: where it redirects to needs no token, and should not see it
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, file.open("wb") as opened:
            length = answer.headers.get("Content-Length")
            size = int(length) if length else None
            say(f"downloading {url}" + (f" ({size:,} bytes)" if size is not None else ""))
            done = 0
            while chunk := answer.read(CHUNK):
                opened.write(chunk)
                if done // SAID < (done + len(chunk)) // SAID:
                    say(
                        f"downloading {file.name}: {done + len(chunk):,} bytes"
                        + (f" of {size:,}" if size else "")
                    )
                done += len(chunk)
    except (ValueError, http.client.HTTPException) as error:  # a malformed address, a broken connection
        raise OSError(str(error) or type(error).__name__) from None
    if size is not None and done != size:
        raise OSError(f"the connection ended after {done:,} of {size:,} bytes")
    with file.open("rb") as opened:
        start = opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith((b"PAR1",) if file.suffix == ".parquet" else (b"[", b"{")):
        raise OSError(f"the answer is not a {file.suffix.lstrip('.') or 'JSON'} file")


def _located(address: str) -> list[tuple[str, str | None]]:
    """The addresses of the files that an address means, and the token that each needs."""
    if not address.startswith(HUB):
        return [(address, None)]
    owner, name, pattern = address.removeprefix(HUB).split("/", 2)
    hub, token = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"), _token()
    names = [pattern]
    if "*" in pattern:
        names = sorted(fnmatch.filter(_listed(f"{hub}/api/datasets/{owner}/{name}", token), pattern))
        if not names:
            raise OSError(f"{hub}/datasets/{owner}/{name} has no {pattern}")
    return [(f"{hub}/datasets/{owner}/{name}/resolve/main/{file}", token) for file in names]


def _listed(url: str, token: str | None) -> list[str]:
    """The names of all files of a repository."""
    request = urllib.request.Request(url)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return [file["rfilename"] for file in json.load(answer)["siblings"]]
    except (ValueError, KeyError, TypeError, http.client.HTTPException):
        raise OSError(f"{url} does not list files") from None


def _token() -> str | None:
    """The hub's token, as its own tools find it."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return os.environ.get("HF_TOKEN") or None
    return get_token()


def needs_login(error: OSError) -> bool:
    """Whether the hub keeps a file for those who have accepted its terms."""
    return isinstance(error, urllib.error.HTTPError) and error.code in (401, 403)


def reason(error: OSError) -> str:
    """Why a download failed, for a message."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(getattr(cause, "strerror", None) or cause)
