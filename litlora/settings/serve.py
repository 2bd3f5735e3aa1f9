"""The settings of the server."""

from dataclasses import dataclass, field

from litlora.errors import setting
from litlora.settings.checks import check, check_adapters, check_positive, check_size, check_value
from litlora.settings.inference import Inference


@dataclass(frozen=True, kw_only=True)
class Serve(Inference):
    """Serve a model and its adapters over HTTP, by OpenAI's interface, with a page to chat on."""

    adapters: list[str] = field(default_factory=list)
    """Adapters beside that of checkpoint_dir, as NAME=DIRECTORY, trained on the same base. Each is a
    model of its own name; the base is one, too."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """The port to listen on; 0: one that is free."""
    api_key: str | None = None
    """What clients must send as their key; default: LITLORA_API_KEY in the environment, else none is
    asked for."""
    load_from: str | None = None
    """Let clients load adapters that lie below this directory, and unload them; default: they cannot."""
    batch_size: int = 16
    """Answers that are computed together, at most."""
    cache_tokens: int | None = None
    """Tokens of all prompts and answers that memory is taken for; default: what fits a quarter of the
    free memory."""
    max_requests: int = 128
    """Answers that run or wait, at most; a request beyond them gets 429."""
    max_answer_tokens: int = 8192
    """Most tokens that a request may ask for."""
    max_body: str = "4MB"
    """Size of the largest request."""
    shutdown_seconds: int = 60
    """How long running answers may take after Ctrl-C or SIGTERM before they are cut off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "batch_size", "cache_tokens", "max_requests", "max_answer_tokens")
        check_value(self, "port", 0 <= self.port < 2**16, "must be from 0 to 65535")
        check_value(self, "shutdown_seconds", self.shutdown_seconds >= 0, "must be 0 or more")
        check_size("max_body", self.max_body)
        check_adapters(self.adapters)
        check(self.api_key is None or self.api_key.isascii(), f"{setting('api_key')}: must be ASCII text")
