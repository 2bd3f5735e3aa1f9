"""Whether a frozen base stays in its file. Torch-free."""

from typing import Any, Literal

from litlora.errors import setting
from litlora.settings.checks import check

StreamBase = bool | Literal["auto"]


def check_streamed(settings: Any, **others: object) -> None:
    """Raise UserError for stream_base true with any of these settings that has a value: it needs
    the base in memory."""
    for name, value in others.items():
        check(
            settings.stream_base is not True or not value,
            f"{setting('stream_base')} true: {setting(name)} needs the base in memory; leave one of the two "
            "out",
        )
