"""Prompt styles: named ways to ask, and the file that names the one that a model was trained with.

A style turns a question into the prompt; the answer follows the prompt directly and ends with the
end-of-text token. `prompt_style.yaml` in a checkpoint directory names the style that the model was
trained with. The style `template` is the model's own chat template (`template.py`). A chat template
that the user chose, one of ours or a file, becomes the model's own: it is written into the directory.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from litlora.errors import CheckpointError
from litlora.settings.styles import TEMPLATE as TEMPLATE
from litlora.settings.styles import TEXT_STYLES
from litlora.storage.untrusted import read_json_object, read_yaml

if TYPE_CHECKING:
    from litlora.prompts.template import ChatTemplate

STYLE_FILE = "prompt_style.yaml"
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class PromptStyle:
    """A named way to ask."""

    name: str
    render: Callable[[str, str], str]
    """(instruction, input or "") -> the prompt."""
    template: "ChatTemplate | None" = None
    """What renders whole conversations, if the style is a chat template. Its text includes the
    begin-of-text token, if the model has one."""
    called: str | None = None
    """What people call a chat template that the model did not come with: chatml, or a file's name."""

    @property
    def title(self) -> str:
        """What people are told that the style is."""
        return self.called or self.name


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


STYLES = dict(zip(TEXT_STYLES, (PromptStyle("alpaca", _alpaca), PromptStyle("plain", _plain)), strict=True))


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
        called = value.get("name")
        return replace(template, called=called) if isinstance(called, str) else template
    if not isinstance(name, str) or name not in STYLES:
        known = ", ".join((*STYLES, TEMPLATE))
        raise CheckpointError(f"{path}: unknown style {name!r}; choose one of {known}")
    return STYLES[name]


def write_style(directory: Path, style: PromptStyle) -> None:
    """Store a style with a model whose other files are in the directory. A chat template that the
    user chose takes the place of the model's own: for every program, of whatever version, it is the
    model's."""
    values = {"style": style.name if style.template is None else TEMPLATE}
    if style.called is not None:
        values["name"] = style.called
        (directory / TEMPLATE_FILE).write_text(style.template.source, encoding="utf-8", newline="")
        (directory / "chat_template.json").unlink(missing_ok=True)
        settings = directory / "tokenizer_config.json"
        if settings.is_file() and (stored := read_json_object(settings)).pop("chat_template", None):
            text = json.dumps(stored, indent=2, ensure_ascii=False)
            settings.write_text(text + "\n", encoding="utf-8")
    (directory / STYLE_FILE).write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
