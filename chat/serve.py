"""Serve a model and its adapters over HTTP, by OpenAI's interface.

python chat/serve.py --checkpoint_dir $dir/final
python chat/serve.py --checkpoint_dir checkpoints/$repo_id --adapters poet=out/poet/final clerk=out/clerk
"""

import gc
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.cli import run
from litlora.console import say
from litlora.errors import CheckpointError, MissingExtraError, UserError, setting
from litlora.paths import checkpoint_dir
from litlora.settings import Serve, num_bytes

READ_SECONDS = 60
"""A client that reads nothing for so long is cut off: its answers count among max_requests."""

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

    from litlora.checkpoint import Chain
    from litlora.serve.api import Rules
    from litlora.serve.opening import Opened, Opening


def main(settings: Serve) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    named = [entry.partition("=")[::2] for entry in settings.adapters]
    adapters = {name: checkpoint_dir(path) for name, path in named}
    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    if settings.load_from and not Path(settings.load_from).is_dir():
        raise UserError(f"{setting('load_from')} {settings.load_from}: no such directory")
    listening = listen(settings.host, settings.port)
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise MissingExtraError(
            "starlette and uvicorn, which the server is made of, are not installed; "
            "install them with: pip install 'litlora[serve]'"
        )

    from litlora.checkpoint import resolve
    from litlora.serve.opening import Opening

    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    opening = Opening.of(settings, max_batch=settings.batch_size, cache_tokens=settings.cache_tokens)
    opened = opened_live(chain, opening)
    for name, place in adapters.items():
        opened.add_adapter(name, place)
    for notice in dict.fromkeys(opened.notices):
        say(f"note: {notice}", file=sys.stderr)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    models = ", ".join([opened.name, *opened.engine.adapters])
    say(f"{directory} | prompt style {opened.style.title} ({opened.style_reason}) | models: {models}")
    address = f"http://{host}:{listening.getsockname()[1]}"
    say(f"a page to chat: {address} | OpenAI's interface: {address}/v1 | Ctrl-C finishes what runs, and ends")
    serve(opened, rules(settings, directory), listening, settings.shutdown_seconds)
    say("stopped")


def serve(opened: "Opened", rules: "Rules", listening: socket.socket, shutdown_seconds: int) -> None:
    """Answer until Ctrl-C or SIGTERM, and then what has begun."""
    from litlora.serve.api import Computing, Server

    # The command's threshold is for its start: a server would let a hundred MB of garbage pile up.
    gc.freeze()
    gc.set_threshold(2000, 10, 10)
    computing = Computing(opened.engine)
    computing.start()
    # uvicorn ends with the signal that it got: that is no failure.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        http_server(Server(opened, rules).app, shutdown_seconds).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        computing.stop()


def http_server(app: "Starlette", shutdown_seconds: int) -> "uvicorn.Server":
    """What speaks HTTP for an application."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http="h11",  # the other that uvicorn may find, httptools, takes headers without end
        timeout_graceful_shutdown=shutdown_seconds,
    )
    return uvicorn.Server(config)


def opened_live(chain: "Chain", opening: "Opening") -> "Opened":
    """The model with its adapter live, so that its base is there, too; merged, where that cannot be."""
    from litlora.serve.opening import open_model

    try:
        return open_model(chain, opening, live=True)
    except CheckpointError as error:
        opened = open_model(chain, opening, live=False)
        how = "merged in memory" if opened.loaded.quantized is None else "part of the model"
        opened.notices.append(f"{error}; it is {how}, and its base is not served")
        return opened


def rules(settings: Serve, directory: Path) -> "Rules":
    """What clients may do, and see."""
    from litlora.serve.api import LOOPBACK, Rules
    from litlora.serve.asked import Limits
    from litlora.serve.sampling import Sampling

    reports = [place / "report.html" for place in (directory, directory.absolute().parent)]
    longest = min(settings.max_new_tokens, settings.max_answer_tokens)
    defaults = Sampling.of(settings, max_new_tokens=longest)
    return Rules(
        Limits(defaults, settings.max_answer_tokens),
        settings.max_requests,
        num_bytes(settings.max_body),
        settings.api_key or os.environ.get("LITLORA_API_KEY") or None,
        Path(settings.load_from) if settings.load_from else None,
        next(filter(Path.is_file, reports), None),
        hosts=LOOPBACK if settings.host in LOOPBACK else ("*",),
    )


def listen(host: str, port: int, read_seconds: float = READ_SECONDS) -> socket.socket:
    """A socket that listens before anything is loaded, and cuts off clients that read nothing for
    `read_seconds`, where the system can. Raises UserError if it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; all connections inherit it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(read_seconds * 1000))
        bound.bind((host, port))
        bound.listen(1024)  # who comes while the model is loaded waits
    except OSError as error:
        what = f"{setting('host')} {host}, {setting('port')} {port}"
        raise UserError(f"{what}: {error.strerror or error}; choose another") from None
    return bound


if __name__ == "__main__":
    run(main, Serve)
