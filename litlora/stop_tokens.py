"""The tokens that a model was taught to end its answers with, and the files that tell other
programs. Torch-free."""

import json
from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError
from litlora.prompts import PromptStyle, load_style, load_template
from litlora.storage.untrusted import has_file
from litlora.tokenizer import GENERATION_FILE, Tokenizer, find_sidecars, read_settings


def taught_stops(tokenizer: Tokenizer, style: PromptStyle | None) -> list[int]:
    """The tokens that end an answer in this prompt style: the end-of-text token, and a chat
    template's ends of a turn."""
    ends = style.template.turn_ends(tokenizer) if style is not None and style.template else ()
    return list(dict.fromkeys([tokenizer.eos_id, *(end.id for end in ends if end is not None)]))


def usable_tokenizer(sources: list[Path]) -> Tokenizer | None:
    """The tokenizer of a model in directories; None if it is missing or broken."""
    find_sidecars(sources)  # raises CheckpointError for what is not a file
    try:
        return Tokenizer(sources)
    except CheckpointError:
        return None


def stops_of(sources: list[Path], tokenizer: Tokenizer | None = None) -> list[int]:
    """The same of a model in directories, those of a chain, outermost first; `tokenizer` is theirs, if
    it runs already. Empty if they have none that can be used, as its ids mean nothing then."""
    if (tokenizer := tokenizer or usable_tokenizer(sources)) is None:
        return []
    found = load_template({file.name: file for file in find_sidecars(sources)})
    template = found.style if found is not None else None
    styles = (load_style(directory, template) for directory in sources)
    return taught_stops(tokenizer, next(filter(None, styles), None))


def named_stops(directory: Path) -> list[int]:
    """The tokens at which transformers stops: those that generation_config.json names, without it
    those that config.json names."""
    file = directory / GENERATION_FILE
    return _named(read_settings(file if has_file(file) else directory / "config.json"))


def with_stops(values: dict[str, Any], stops: list[int]) -> dict[str, Any]:
    """A generation_config.json or a config.json that names these tokens beside its own; itself if it
    names them all."""
    named = _named(values)
    both = [*named, *(token for token in stops if token not in named)]
    return values if both == named else {**values, "eos_token_id": both if len(both) > 1 else both[0]}


def _named(values: dict[str, Any]) -> list[int]:
    stored = values.get("eos_token_id")
    return stored if isinstance(stored, list) else [] if stored is None else [stored]


def name_stops(directory: Path, stops: list[int]) -> None:
    """Let the generation_config.json in a directory name these tokens. Without one, every program
    stops at the tokenizer's end-of-text token; a file is made if there is another."""
    file = directory / GENERATION_FILE
    if file.is_file() or len(stops) > 1:
        values = read_settings(file)
        if (named := with_stops(values, stops)) != values:
            file.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
