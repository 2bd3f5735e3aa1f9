"""Small tokenizers of the kinds that models have, with the special tokens that a test asks for."""

import functools
import json
from pathlib import Path

from conftest import TEXT
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

BEGIN, END = "<s>", "</s>"
CONTROL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
"""The control tokens of each chat template that comes with litlora."""
KINDS = ("byte-level", "byte-level with a beginning", "metaspace first", "metaspace always")


@functools.cache
def made(kind: str, special: tuple[str, ...]) -> str:
    """The tokenizer.json of a kind."""
    backend = _byte_level(special) if kind.startswith("byte-level") else _metaspace(kind.split()[1], special)
    if kind != "byte-level":
        begin = (BEGIN, backend.token_to_id(BEGIN))
        backend.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[begin])
    return backend.to_str()


def _byte_level(special: tuple[str, ...]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[BEGIN, END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def _metaspace(scheme: str, special: tuple[str, ...]) -> Backend:
    """As `tokenizers` reads a SentencePiece model: ▁ for a space, and one before the text."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # no piece spans words
    added = ["<unk>", BEGIN, END, *special]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*added, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        max_token_length=8,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    file = json.loads(backend.to_str())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] in added]
    backend = Backend.from_str(json.dumps(file))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return backend


def write_tokenizer(directory: Path, kind: str, special: list[str], **settings: object) -> Path:
    """A directory with such a tokenizer and its settings."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(made(kind, tuple(special)))
    settings = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    if kind != "byte-level":
        settings["bos_token"] = BEGIN
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
