"""A chat template for a model that has none: other programs then ask it in the prompt style of its
training. Torch-free."""

import json
from pathlib import Path

from litlora.prompts import PromptStyle, load_style, load_template
from litlora.prompts.styles import TEMPLATE_FILE
from litlora.tokenizer import Tokenizer, find_sidecars


def add_template(directory: Path, sources: list[Path], tokenizer: Tokenizer) -> str:
    """Write a chat template into a directory with the files of a model in `sources`, those of a chain,
    if it was trained in a prompt style and has no chat template. Returns what people must know, as
    the end of a line."""
    template = load_template({file.name: file for file in find_sidecars(sources)})
    own = template.style if template is not None else None
    style = next(filter(None, (load_style(source, own) for source in sources)), None)
    if style is None or style.template is not None:
        return ""
    if template is not None:
        return f"; trained with the prompt style {style.name}, but its chat template differs"
    text, exact = template_of(style, tokenizer)
    (directory / TEMPLATE_FILE).write_text(text, encoding="utf-8")
    if exact:
        return ""
    return f"; its chat template cannot give the very tokens of the prompt style {style.name}"


def template_of(style: PromptStyle, tokenizer: Tokenizer) -> tuple[str, bool]:
    """A chat template that asks each question in a prompt style without one, and ends each answer as
    training does; and whether its text has the token ids of training.

    Some tokenizers put a space before a text, but not before what follows a special token: there the
    template writes it.
    """
    before, after = style.render("\0", "").split("\0")
    begin, end = tokenizer.begin_text, tokenizer.token(tokenizer.eos_id)
    leads = [_lead(tokenizer, before or "a", behind) for behind in ("", f"a{end}")]
    first, later = (lead or "" for lead in leads)
    lead = _quoted(first) if first == later else f"({_quoted(first)} if loop.first else {_quoted(later)})"
    if not before and (first or later):  # a question that begins with a space has it already
        lead = f"('' if message['content'].startswith(' ') else {lead})"
    asked = f"{_quoted(begin)} + {lead} + {_quoted(before)} + message['content'] + {_quoted(after)}"
    return (
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
        f"{{{{ {asked} }}}}"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{ message['content'] + {_quoted(end)} }}}}"
        "{%- else -%}{{ raise_exception('this model knows the roles user and assistant only') }}"
        "{%- endif -%}{%- endfor -%}"
    ), None not in leads


def _lead(tokenizer: Tokenizer, text: str, behind: str) -> str | None:
    """What must stand between the begin-of-text token and a text, behind other text, so that it has
    the ids that it has alone; None if nothing does it."""
    ids = tokenizer.encode(behind) + tokenizer.encode(text, begin=True)
    tries = ("", " ")
    return next((t for t in tries if tokenizer.encode(behind + tokenizer.begin_text + t + text) == ids), None)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
