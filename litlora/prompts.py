"""Prompt styles: how a question is put to the model, in training and in chat alike. Torch-free.

A style turns one exchange into text; the answer follows the prompt directly and ends with the end-of-text token.
`prompt_style.yaml` in a checkpoint directory says which style the model was taught with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from litlora.errors import CheckpointError

STYLE_FILE = "prompt_style.yaml"


@dataclass(frozen=True)
class PromptStyle:
    """A named way to ask."""

    name: str
    render: Callable[[str, str], str]
    """(instruction, input or "") -> the prompt."""


def _alpaca(instruction: str, input: str) -> str:
    """The prompt of Stanford Alpaca (Taori et al. 2023), to the letter."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def _plain(instruction: str, input: str) -> str:
    """The bare text, for a base model that merely continues."""
    return f"{instruction}\n{input}" if input else instruction


STYLES = {style.name: style for style in (PromptStyle("alpaca", _alpaca), PromptStyle("plain", _plain))}


def load_style(directory: Path) -> PromptStyle | None:
    """The style that a checkpoint directory names; None if it names none."""
    path = directory / STYLE_FILE
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    name = value.get("style") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in STYLES:
        raise CheckpointError(f"{path}: style {name!r} is not known; there are {', '.join(STYLES)}")
    return STYLES[name]
