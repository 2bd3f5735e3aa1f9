"""The settings of the tokenizer."""

from dataclasses import dataclass, field

from litlora.errors import setting
from litlora.settings.checks import check

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer."""

    add_tokens: str | list[str] = field(default_factory=list)
    """Special tokens to add, as a list: the embedding and the output head get a row for each, which
    trains. auto: those that the prompt style needs and the tokenizer lacks."""

    def __post_init__(self) -> None:
        tokens = self.add_tokens
        if isinstance(tokens, str):
            if tokens != AUTO:
                object.__setattr__(self, "add_tokens", [tokens])
            return
        what = setting("add_tokens")
        for token in tokens:
            check(token.strip() == token != "", f"{what} {token!r}: a token has no spaces around it")
        check(len(set(tokens)) == len(tokens), f"{what} {', '.join(tokens)}: names a token twice")
