"""How a model in a GGUF file is asked: the chat template that the file holds, and the tokens at which
answers end. Torch-free.

The file has one template, and programs use it without being told: so it asks as the model was
trained, also where the base came with another template.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from litlora.errors import CheckpointError, UserError, setting
from litlora.formats.chat_template import template_of
from litlora.prompts import STYLE_FILE, load_style, load_template
from litlora.prompts.choice import choose_style, lacking_tokens
from litlora.prompts.template import ChatTemplate, Refusal, special_tokens, template_message
from litlora.stop_tokens import taught_stops
from litlora.tokenizer import Tokenizer, find_sidecars


@dataclass(frozen=True)
class Asking:
    """How a model is asked."""

    template: ChatTemplate
    style: str
    """What people call it."""
    stops: list[int]
    """The tokens that end its answers."""
    begins: bool
    """Every prompt begins with the begin-of-text token."""
    marked: bool
    """Every prompt begins with a special token."""
    written: frozenset[str]
    """The special and other added tokens in the text of a conversation."""


def asking_of(sources: list[Path], tokenizer: Tokenizer, named: str | None = None) -> Asking:
    """How the model in directories, those of a chain, is asked: as it was trained, or in the prompt
    style that the user named.

    Raises UserError if nothing says how, and CheckpointError for a template that the tokenizer cannot
    write: whose control tokens are cut into pieces, or that gives other tokens than in training.
    """
    own = load_template({file.name: file for file in find_sidecars(sources)})
    template = own.style if own is not None else None
    taught = next(filter(None, (load_style(source, template) for source in sources)), None)
    if named is None and taught is None and template is None:
        raise UserError(
            f"{sources[0]}: nothing says how to ask this model: it has no chat template and was not trained "
            f"in a prompt style; name one with {setting('prompt_style')} (plain: it continues a text)"
        )
    style, _ = choose_style(named, taught, template, "plain", tokenizer)
    if style.template is not None:
        chat = style.template
        if lacking := lacking_tokens(style, tokenizer):
            raise CheckpointError(
                f"{chat.path}: the chat template needs {', '.join(lacking)}, which the tokenizer cuts into "
                "pieces: llama.cpp would never see a turn end; choose another with "
                f"{setting('prompt_style')}, or train with the tokens added"
            )
    else:
        text, exact = template_of(style, tokenizer)
        if not exact:
            raise CheckpointError(
                f"{sources[0]}: no chat template gives the very tokens of the prompt style {style.name} with "
                "this tokenizer; train in the model's own chat template"
            )
        chat = ChatTemplate(text, Path(STYLE_FILE), special_tokens(tokenizer.settings))
    shown = chat.render([template_message("user", "?")])
    begin = tokenizer.begin_text
    talk = [template_message(role, "?") for role in ("user", "assistant", "user")]
    with suppress(Refusal):
        shown += chat.render(talk)
    return Asking(
        chat,
        style.title,
        taught_stops(tokenizer, style),
        bool(begin) and shown.startswith(begin),
        bool(tokenizer.leading_added(shown)),
        frozenset(map(tokenizer.token, tokenizer.added_tokens(shown))),
    )
