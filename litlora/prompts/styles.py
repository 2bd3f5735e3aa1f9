"""Prompt styles: named ways to ask, and the choice between them.

A style turns a question into the prompt; the answer follows the prompt directly and ends with the
end-of-text token. `prompt_style.yaml` in a checkpoint directory names the style that the model was
trained with. The style `template` is the model's own chat template (`template.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.errors import CheckpointError, UserError, setting
from litlora.storage.untrusted import read_yaml

if TYPE_CHECKING:
    from litlora.prompts.template import ChatTemplate

STYLE_FILE = "prompt_style.yaml"
TEMPLATE = "template"
"""The name of the style that is the model's chat template."""


@dataclass(frozen=True)
class PromptStyle:
    """A named way to ask."""

    name: str
    render: Callable[[str, str], str]
    """(instruction, input or "") -> the prompt."""
    template: "ChatTemplate | None" = None
    """For the style `template`: what renders whole conversations. Its text includes the
    begin-of-text token, if the model has one."""


def _alpaca(instruction: str, input: str) -> str:
    """The prompt of Stanford Alpaca (Taori et al. 2023), verbatim."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def _plain(instruction: str, input: str) -> str:
    """The bare text, for a base model that only continues it."""
    return f"{instruction}\n{input}" if input else instruction


STYLES = {style.name: style for style in (PromptStyle("alpaca", _alpaca), PromptStyle("plain", _plain))}


def load_style(directory: Path, template: PromptStyle | None = None) -> PromptStyle | None:
    """The style that a checkpoint directory names, or None. `template` is the model's chat
    template, if it has one."""
    path = directory / STYLE_FILE
    try:
        value = read_yaml(path)
    except FileNotFoundError:
        return None
    if isinstance(value, dict) and str(value.get("class_path")).startswith("litgpt."):
        # litgpt names its many styles by class; we have one of them.
        return STYLES["alpaca"] if value["class_path"] == "litgpt.prompts.Alpaca" else None
    name = value.get("style") if isinstance(value, dict) else None
    if name == TEMPLATE:
        if template is None:
            raise CheckpointError(
                f"{path}: names the model's chat template as the style, but there is no chat template "
                f"beside it"
            )
        return template
    if not isinstance(name, str) or name not in STYLES:
        known = ", ".join((*STYLES, TEMPLATE))
        raise CheckpointError(f"{path}: unknown style {name!r}; choose one of {known}")
    return STYLES[name]


def choose_style(
    named: str | None, prompt_style: PromptStyle | None, template: PromptStyle | None, default: str
) -> tuple[PromptStyle, str]:
    """The style to use, and why: the one named by the user, else `prompt_style`, which the model
    was trained with, else its chat template, else the default."""
    if named == TEMPLATE:
        if template is None:
            raise UserError(
                f"{setting('prompt_style')} template: the model has no chat template "
                "(chat_template.jinja, or one in tokenizer_config.json)"
            )
        return template, "as set"
    if named is not None:
        return STYLES[named], "as set"
    if prompt_style is not None:
        return prompt_style, "the model was trained with it"
    if template is not None:
        return template, "the model's own"
    return STYLES[default], "the model names none"
