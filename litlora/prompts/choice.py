"""Which prompt style to use, the chat templates that come with litlora, and the control tokens that a
template needs.

The templates in `templates/` are given the begin- and the end-of-text token of the model by their
names, and as a model's files they hold them: so they render the same everywhere.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from litlora.errors import CheckpointError, UserError, setting
from litlora.prompts.styles import STYLES, TEMPLATE_FILE, PromptStyle
from litlora.prompts.template import ChatTemplate, special_tokens
from litlora.settings.styles import BUILT_IN, TEMPLATE
from litlora.storage.untrusted import read_text
from litlora.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent / "templates"
CONTROL_TOKEN = re.compile(r"<\|[^\s<>|]+\|>|</?[a-z]+_of_[a-z]+>|\[/?[A-Z_]{3,}\]")
"""How the control tokens of chat templates are written: <|im_start|>, <start_of_turn>, [INST]."""


def choose_style(
    named: str | None,
    prompt_style: PromptStyle | None,
    template: PromptStyle | None,
    default: str,
    tokenizer: Tokenizer | None = None,
) -> tuple[PromptStyle, str]:
    """The style to use, and why: the one named by the user, else `prompt_style`, which the model
    was trained with, else its chat template, else the default.

    The user names a style, or a file of a chat template for the model of this tokenizer.
    """
    if named == TEMPLATE:
        if template is None:
            raise UserError(
                f"{setting('prompt_style')} template: the model has no chat template "
                f"({TEMPLATE_FILE}, or one in tokenizer_config.json)"
            )
        return template, "as set"
    if named is not None:
        return STYLES.get(named) or chosen_template(named, tokenizer), "as set"
    if prompt_style is not None:
        return prompt_style, "the model was trained with it"
    if template is not None:
        return template, "the model's own"
    return STYLES[default], "the model names none"


def chosen_template(named: str, tokenizer: Tokenizer) -> PromptStyle:
    """A chat template of ours, or one in a file, as the style of a model. Raises CheckpointError for
    a file that cannot be read."""
    special = {"eos_token": tokenizer.token(tokenizer.eos_id)} | special_tokens(tokenizer.settings)
    if named in BUILT_IN:
        texts = (tokenizer.begin_text, tokenizer.token(tokenizer.eos_id))
        begin, end = (json.dumps(text, ensure_ascii=False) for text in texts)
        source = f"{{%- set begin_of_text, end_of_text = {begin}, {end} -%}}\n"
        source += read_text(TEMPLATES / f"{named}.jinja")
        template, called = ChatTemplate(source, Path(f"prompt style {named}"), special), named
    else:
        file = Path(named)
        try:
            template, called = ChatTemplate(read_text(file), file, special), file.name
        except FileNotFoundError:
            raise CheckpointError(f"{file}: no such file") from None
    return replace(template.style, name=named, called=called)


def lacking_tokens(style: PromptStyle, tokenizer: Tokenizer) -> list[str]:
    """The control tokens that a style needs and a tokenizer cuts into pieces."""
    needed = control_tokens(style.template) if style.template is not None else []
    return tokenizer.cut_up(needed) if needed else []


def control_tokens(template: ChatTemplate) -> list[str]:
    """The control tokens that a chat template writes around a system message, a question and an
    answer. Raises CheckpointError for a template that is broken."""
    asked = [{"role": "user", "content": "?"}]
    talk = [{"role": "system", "content": "."}, *asked, {"role": "assistant", "content": "."}]
    texts = []
    for messages, add_generation_prompt in ((talk, False), (talk[1:], False), (asked, True)):
        try:
            texts.append(template.render(messages, add_generation_prompt=add_generation_prompt))
        except CheckpointError:
            raise
        except UserError:  # it refuses a system message, for example
            continue
    return list(dict.fromkeys(token for text in texts for token in CONTROL_TOKEN.findall(text)))
