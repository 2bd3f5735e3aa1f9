"""Answers that are JSON of a given schema: of each token, whether it may come next. The extra `schema`
(llguidance) follows the grammar; tokens that would leave it get the logit -inf."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from litlora.console import one_line
from litlora.errors import MissingExtraError, UserError
from litlora.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

SPACE = r"( |\n {0,20}|\n\t{0,10})?"
"""What may stand between two parts of a document: a space, or a line break and the next line's
indentation. With more freedom, a model that does not know JSON fills its answer with line breaks."""


def grammar_of(schema: dict[str, Any]) -> str:
    """The grammar of the documents of a JSON schema, as llguidance has it. Raises MissingExtraError,
    and UserError for a schema that is wrong or has what llguidance does not know."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise MissingExtraError(
            "llguidance, which holds answers to a JSON schema, is not installed; install it with: "
            "pip install 'litlora[schema]'"
        ) from None
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACE})
    except ValueError as error:  # such as an integer of more than 64 bits
        raise UserError(f"the JSON schema cannot be used: {one_line(str(error))[:200]}") from None
    is_wrong, reasons = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_wrong:
        reason = "oneOf is not known; write anyOf" if "oneOf" in reasons[0] else one_line(reasons[0])
        raise UserError(f"the JSON schema cannot be used: {reason}")
    return grammar


class Shapes:
    """What answers may be, in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        """`stop_ids` may come once a document is complete. Takes about a second for a large
        vocabulary. Raises UserError for a tokenizer that llguidance cannot read."""
        from llguidance import LLTokenizer

        try:
            self._vocabulary = LLTokenizer(
                json.dumps(tokenizer.source()), n_vocab=tokenizer.vocab_size, eos_token=sorted(stop_ids)
            )
        except ValueError as error:
            raise UserError(
                f"this tokenizer cannot be held to a JSON schema: {one_line(str(error))}"
            ) from None

    def shape(self, grammar: str) -> "Shape":
        """An answer of a grammar, before its first token. Raises UserError."""
        from llguidance import LLMatcher

        return Shape(LLMatcher(self._vocabulary, grammar, log_level=0))


class Shape:
    """What one answer may be, and how far it is."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher
        self._check("the JSON schema cannot be used")

    def another(self) -> "Shape":
        """The same, for a further answer from its beginning on."""
        copy = self._matcher.deep_copy()
        copy.reset()
        return Shape(copy)

    def masked(self, logits: Tensor) -> Tensor:
        """Logits (V,) with -inf for each token that cannot come next. Raises UserError if none can."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check("the answer cannot be held to the JSON schema")
        allowed = torch.zeros(logits.numel(), dtype=torch.bool)
        known = torch.from_numpy(bits[: logits.numel()]).bool()
        allowed[: known.numel()] = known
        if not allowed.any():
            raise UserError("the tokenizer has no token with which the JSON schema could go on")
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def add(self, token: int) -> None:
        """The next token of the answer, one that `masked` left."""
        self._matcher.consume_token(token)
        self._check("the answer cannot be held to the JSON schema")

    @property
    def is_complete(self) -> bool:
        """Whether the document is whole and nothing can follow."""
        return self._matcher.is_stopped()

    def _check(self, failure: str) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("<state>")[0]
            raise UserError(f"{failure}: {one_line(reason)}")
