"""Tokens that a run adds: to the tokenizer's files, to the embedding and to the output head.

A new token gets the next number. Where the embedding has a row for it already, as embeddings are often
padded, that row is used; else the embedding and the head get one more.
"""

import dataclasses
import json
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.adapters.merge import EMBEDDING, HEAD
from litlora.errors import CheckpointError, UserError, setting
from litlora.load import Loaded, set_vocabulary
from litlora.lora import Adapter, LoRALinear
from litlora.lora.adapter import names_of
from litlora.lora.rows import RowsEmbedding, RowsHead, new_row
from litlora.model import GPT
from litlora.prompts import PromptStyle, control_tokens
from litlora.settings.tokenizer import AUTO
from litlora.tokenizer import GENERATION_FILE, TOKENIZER_FILE, Tokenizer, find_sidecars

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


class AddedTokens:
    """The tokens that a run adds to its base: none, until `extend`."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.ids: list[int] = []
        self.sources: list[Path] = []
        """A directory with the extended files of the tokenizer, which exists as long as this object."""
        self._below: list[Adapter] = []
        """What the run is on top of."""
        self.base_rows = 0
        """The rows of the base's embedding."""

    def extend(self, loaded: Loaded, tokens: list[str]) -> Loaded:
        """Add tokens that the tokenizer does not have, to it and to the model. Raises CheckpointError
        for a tokenizer without a tokenizer.json."""
        model, known = loaded.model, loaded.tokenizer.vocab_size
        if known > model.config.vocab_size:
            raise CheckpointError(
                f"{loaded.chain.sources[0]}: its tokenizer has {known:,} tokens and its embedding "
                f"{model.config.vocab_size:,} rows; no token can be added"
            )
        rows = getattr(model.config, "vocab_size_per_layer_input", None)
        if rows is not None and known + len(tokens) > rows:
            raise UserError(
                f"{setting('add_tokens')}: this model has inputs of its layers for {rows:,} tokens, and with "
                f"these there were {known + len(tokens):,}; add fewer, or none"
            )
        extended = self.extend_tokenizer(loaded.tokenizer, loaded.chain.sources, tokens)
        self._below = loaded.chain.adapters
        self.base_rows = model.config.vocab_size
        _extend_model(model, self.ids, known)
        return dataclasses.replace(loaded, tokenizer=extended)

    def extend_tokenizer(self, tokenizer: Tokenizer, sources: Sequence[Path], tokens: list[str]) -> Tokenizer:
        """The same for the tokenizer of these directories alone."""
        place = Path(tempfile.mkdtemp(prefix="litlora-"))
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        known = tokenizer.vocab_size
        ids = {token: known + number for number, token in enumerate(tokens)}
        for file in find_sidecars(sources):
            if file.name not in (GENERATION_FILE, "config.json"):
                shutil.copyfile(file, place / file.name)
        _extend_files(place, ids)
        extended = Tokenizer([place, *sources])
        if extended.encode_batch(tokens) != [[number] for number in ids.values()]:
            raise CheckpointError(
                f"{sources[0]}: its tokenizer does not take up new tokens with the next numbers"
            )
        self.tokens, self.ids, self.sources = tokens, list(ids.values()), [place]
        return extended

    def train(self, model: GPT) -> None:
        """Let the rows of the tokens train in a model whose embedding and output head are frozen.
        Raises UserError if an adapter or the settings train these otherwise."""
        if not self.ids:
            return
        for adapter in self._below:
            if touched := {EMBEDDING, HEAD}.intersection(names_of(adapter.updates)):
                raise CheckpointError(
                    f"{adapter.directory}: updates {min(touched)} by LoRA, and a further adapter cannot add "
                    f"rows to that; merge {self._below[-1].directory} with scripts/merge_lora.py, and train "
                    "on the result"
                )
        embedding, head = model.model.embed_tokens, model.lm_head
        adapted = isinstance(head, LoRALinear) or isinstance(embedding, LoRALinear)
        if adapted or any(p.requires_grad for p in (*embedding.parameters(), *head.parameters())):
            name = "targets" if adapted else "modules_to_save"
            raise UserError(
                f"{setting('add_tokens')}: trains rows of embed_tokens and lm_head; leave these out of "
                f"{setting(name)}"
            )
        if head.bias is not None and self.base_rows < model.config.vocab_size:
            raise UserError(
                f"{setting('add_tokens')}: the output head has a bias and no row to spare, which an adapter "
                "cannot extend; a full fine-tune can"
            )
        model.model.embed_tokens = RowsEmbedding(embedding, self.ids)
        tied = model.model.embed_tokens.token_rows if model.config.tie_word_embeddings else None
        model.lm_head = RowsHead(head, self.ids, tied)

    @property
    def notice(self) -> str:
        """What was added, in a line."""
        if not self.tokens:
            return "has all these tokens, none was added"
        added = (f"{token} ({number})" for token, number in zip(self.tokens, self.ids, strict=True))
        return f"added {', '.join(added)}"


def missing_tokens(asked: str | list[str], style: PromptStyle, tokenizer: Tokenizer) -> list[str]:
    """The tokens to add: those asked for, or those that the style needs, without those that the
    tokenizer has. Raises UserError if the style needs none."""
    if asked == AUTO:
        asked = [] if style.template is None else control_tokens(style.template)
        if not asked:
            raise UserError(
                f"{setting('add_tokens')} {AUTO}: the prompt style {style.title} has no control tokens; name "
                "the tokens"
            )
    return tokenizer.cut_up(asked) if asked else []


def cut_notice(tokens: list[str]) -> str:
    """That these tokens of a style are not tokens of the tokenizer."""
    return (
        f"the tokenizer cuts {', '.join(tokens)} into pieces, as they are not tokens of its own; "
        "tokenizer.add_tokens auto adds them"
    )


def _extend_files(place: Path, ids: dict[str, int]) -> None:
    """Add tokens to the files of a tokenizer."""
    file = place / TOKENIZER_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{setting('add_tokens')}: the model has a tokenizer.model and no {TOKENIZER_FILE}; save the "
            "tokenizer with transformers, which makes one"
        )
    tokenizer = _read(file)
    entries = [{"id": number, "content": token, **FLAGS} for token, number in ids.items()]
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *entries]
    _write(file, tokenizer)
    config = place / "tokenizer_config.json"
    if config.is_file() and isinstance((values := _read(config)).get("added_tokens_decoder"), dict):
        values["added_tokens_decoder"] |= {
            str(number): {"content": token, **FLAGS} for token, number in ids.items()
        }
        _write(config, values)
    if (added := place / "added_tokens.json").is_file():
        _write(added, _read(added) | ids)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: cannot be read as JSON: {error}") from None


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def _extend_model(model: GPT, ids: list[int], known: int) -> None:
    """Give each of the tokens a row; the first `known` ones are those of the tokens so far."""
    embedding = _extended(model.model.embed_tokens.weight, ids, known)
    tied = model.config.tie_word_embeddings
    set_vocabulary(model, embedding, embedding if tied else _extended(model.lm_head.weight, ids, known))


def _extended(weight: Tensor, ids: list[int], known: int) -> Tensor:
    rows = torch.cat([weight, weight.new_zeros(max(0, ids[-1] + 1 - len(weight)), weight.size(1))])
    rows[ids] = new_row(weight, known).to(rows)
    return rows
