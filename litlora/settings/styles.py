"""The prompt styles that a setting may name."""

from pathlib import Path

from litlora.errors import setting
from litlora.settings.checks import check

TEMPLATE = "template"
"""The name of the style that is the model's own chat template."""
TEXT_STYLES = ("alpaca", "plain")
"""Styles of our own, without a place for a system message."""
BUILT_IN = ("chatml", "llama3", "mistral", "gemma", "phi")
"""Chat templates that come with litlora."""
STYLE_NAMES = (*TEXT_STYLES, TEMPLATE, *BUILT_IN)
TEMPLATE_SUFFIX = ".jinja"


def check_prompt_style(value: str | None) -> None:
    """Raise UserError for what is neither the name of a style nor a file of a chat template."""
    if value is None or value in STYLE_NAMES:
        return
    check(
        value.endswith(TEMPLATE_SUFFIX),
        f"{setting('prompt_style')} {value}: no such style; there are {', '.join(STYLE_NAMES)}, and your own "
        f"chat template in a file FILE{TEMPLATE_SUFFIX}",
    )
    check(Path(value).is_file(), f"{setting('prompt_style')} {value}: no such file")
