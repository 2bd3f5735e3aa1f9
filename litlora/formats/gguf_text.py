"""What a GGUF file says about text: the tokenizer, the chat template, the tokens that end answers. It is
checked before anything is written. Torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.gguf_prompt import Asking, asking_of
from litlora.formats.gguf_tokenizer import Vocabulary, name_for, special_ids, vocabulary_of
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """The text side of a model."""

    sources: list[Path]
    """Its directories, outermost first."""
    config: ModelConfig
    tokenizer: Tokenizer
    asking: Asking
    vocabulary: Vocabulary
    ids: dict[str, int]
    """Special tokens by the names that the metadata has for them."""

    @property
    def stops(self) -> list[str]:
        """The names of the tokens that end answers."""
        return [self.tokenizer.token(stop) for stop in self.asking.stops]

    @property
    def said(self) -> str:
        """How the model is asked, for people."""
        ends = ", ".join(f"`{stop}`" for stop in self.stops)
        return f"Prompt style: {self.asking.style}. Answers end with {ends}."

    def describe(self, writer: Any, name: str) -> None:
        """Write the metadata; `name` is what people call the model."""
        vocabulary = self.vocabulary
        writer.add_type("model")
        writer.add_name(name_for(name, strips=vocabulary.strips))
        writer.add_tokenizer_model(vocabulary.model)
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        if vocabulary.scores:
            writer.add_token_scores(vocabulary.scores)
        if vocabulary.merges:
            writer.add_token_merges(vocabulary.merges)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.asking.begins)
        writer.add_add_eos_token(False)
        if vocabulary.model == "llama":
            writer.add_add_space_prefix(vocabulary.space_prefix)
        writer.add_chat_template(self.asking.template.source)


def text_of(sources: list[Path], config: ModelConfig, prompt_style: str | None) -> Text:
    """The text side of the model of this architecture in directories, those of a chain. Raises
    CheckpointError, or UserError, for what a file cannot say."""
    tokenizer = Tokenizer(sources)
    tokenizer.fit(config.vocab_size)
    asking = asking_of(sources, tokenizer, prompt_style)
    try:
        vocabulary = vocabulary_of(tokenizer, config.vocab_size, asking)
        ids = special_ids(tokenizer, asking.stops)
    except CheckpointError as error:
        raise CheckpointError(f"{sources[0]}: {error}") from None
    return Text(sources, config, tokenizer, asking, vocabulary, ids)
