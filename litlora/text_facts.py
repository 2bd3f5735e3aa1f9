"""Whether an adapter's tokenizer and prompt style are still those of its training: both determine
the text that it sees. Torch-free."""

import hashlib
from pathlib import Path

from litlora.prompts import STYLE_FILE
from litlora.storage.untrusted import has_file, read_yaml
from litlora.tokenizer import TOKENIZER_FILE


def text_facts(directory: Path) -> dict[str, str]:
    """A digest of a checkpoint directory's tokenizer, and the name of its prompt style."""
    found = {}
    if has_file(file := directory / TOKENIZER_FILE):
        with file.open("rb") as stream:
            found["tokenizer"] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    if has_file(file := directory / STYLE_FILE):
        values = read_yaml(file)
        found["prompt_style"] = str(values.get("style") if isinstance(values, dict) else values)
    return found


def changed_text(then: dict[str, str], adapter: Path, base: Path, *, adds_tokens: bool = False) -> list[str]:
    """Notices if an adapter's tokenizer or prompt style has changed since training, or its
    tokenizer is not its base's: either may be intended. `then` are the facts that the adapter
    stores. With `adds_tokens` its tokenizer is another than its base's by intention."""
    now, below, notices = text_facts(adapter), text_facts(base), []
    trained = then.get("tokenizer")
    if now.get("tokenizer", trained) != trained:
        notices.append(f"{adapter / TOKENIZER_FILE}: is not the tokenizer that this adapter was trained with")
    elif not adds_tokens and below.get("tokenizer", trained) != trained:
        notices.append(
            f"{base / TOKENIZER_FILE}: is not the tokenizer that {adapter} was trained with, whose "
            "own is used"
        )
    if (style := now.get("prompt_style")) != (other := then.get("prompt_style")):
        notices.append(
            f"{adapter / STYLE_FILE}: says {style}, but this adapter was trained with the prompt "
            f"style {other}"
        )
    return notices
