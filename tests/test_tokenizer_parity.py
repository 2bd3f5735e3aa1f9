"""Token ids are those of transformers' AutoTokenizer: on real records, on nasty strings, and with a
begin-of-text token."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHARED, TEXT
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from litlora.errors import CheckpointError, UserError
from litlora.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\ttabs\r\nand newlines\n",
    "<|endoftext|>",
    "before<|endoftext|>after <|endoftext|> <|endoftext|",
    "<s>[INST] hello </s><s> <unk> <bos><eos> <|im_start|>user<|im_end|><|begin_of_text|>",
    "emoji 😀👩‍👩‍👧🏳️‍🌈 and 东京 العربية नमस्ते",
    "NUL \0 and \x01\x7f controls \u200b\ufeff\u202e",
    "e\u0301 é ﬁ Å Å",
    "the quick  brown   fox",
    "1234567890 3.14159 1e-10",
    "a" * 100_000,
    " " * 10_000,
    "\ud7ff\ue000\U0010ffff",
]
RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    special: list[str], normalizer: normalizers.Normalizer | None = None, split: str | None = None
) -> Backend:
    backend = Backend(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    from tokenizers import Regex

    backend.pre_tokenizer = (
        whole
        if split is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), whole])
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def sentencepiece_like(special: list[str], prepend: bool) -> Backend:
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prepend else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=pieces, show_progress=False, max_token_length=8
    )
    backend.train_from_iterator(TEXT, trainer)
    file = json.loads(backend.to_str())
    file["added_tokens"] = [
        token for token in file["added_tokens"] if token["content"] in special
    ]  # the bytes are plain pieces
    return Backend.from_str(json.dumps(file))


def begin_with(backend: Backend, token: str, before: processors.PostProcessor | None = None) -> Backend:
    template = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, backend.token_to_id(token))],
    )
    backend.post_processor = template if before is None else processors.Sequence([before, template])
    return backend


def llama2() -> tuple[Backend, dict]:
    backend = begin_with(sentencepiece_like(["<unk>", "<s>", "</s>"], prepend=True), "<s>")
    return backend, {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def llama3() -> tuple[Backend, dict]:
    backend = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], split=RULE)
    backend = begin_with(backend, "<|begin_of_text|>", processors.ByteLevel(trim_offsets=True))
    return backend, {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def gpt_neox() -> tuple[Backend, dict]:
    backend = byte_level(["<|endoftext|>", "<|padding|>"], normalizers.NFC())
    backend.add_tokens(
        [AddedToken("   ", normalized=True), AddedToken("  ", normalized=True)]
    )  # runs of spaces, as the real one has
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend, {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "GPTNeoXTokenizer",
    }


def qwen() -> tuple[Backend, dict]:
    backend = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC(), RULE.replace("{1,3}", "")
    )
    return backend, {"bos_token": None, "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}


def gemma() -> tuple[Backend, dict]:
    backend = begin_with(sentencepiece_like(["<pad>", "<eos>", "<bos>", "<unk>"], prepend=False), "<bos>")
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return backend, {**names, "tokenizer_class": "PreTrainedTokenizerFast"}


def one_token_for_both() -> tuple[Backend, dict]:
    backend = begin_with(byte_level(["<|endoftext|>"]), "<|endoftext|>")
    return backend, {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


@pytest.mark.parametrize("kind", [llama2, llama3, gpt_neox, qwen, gemma, one_token_for_both])
def test_ids_are_those_of_transformers(kind: Callable[[], tuple[Backend, dict]], tmp_path):
    backend, settings = kind()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    compare(tmp_path, NASTY + TEXT)


def test_ids_on_real_records_are_those_of_transformers(tmp_path):
    file = SHARED / "tokenizers/gpt_neox_20b_tokenizer.json"
    records = [SHARED / "data" / name for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json")]
    if missing := [path for path in (file, *records) if not path.is_file()]:
        pytest.skip(f"{missing[0]} is not at hand")
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": "<|endoftext|>",
                "bos_token": "<|endoftext|>",
                "tokenizer_class": "GPTNeoXTokenizer",
            }
        )
    )
    texts = [
        text
        for path in records
        for record in json.loads(path.read_text(encoding="utf-8"))[::4]
        for text in record.values()
        if text
    ]
    assert len(texts) > 1_000
    compare(tmp_path, texts + NASTY)


def compare(directory: Path, texts: list[str]) -> None:
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    with_begin = theirs(texts)["input_ids"]
    plain = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, expected, bare, own, own_bare in zip(
        texts, with_begin, plain, ours.encode_batch(texts, begin=True), ours.encode_batch(texts), strict=True
    ):
        assert own_bare == bare, text[:100]
        assert own == expected, text[:100]
        assert ours.decode(bare) == theirs.decode(
            bare, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ), text[:100]


def test_a_token_without_a_row_in_the_embedding_is_an_error_only_where_it_is_used(tmp_path):
    backend, settings = qwen()
    backend.add_tokens(["<tool>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    rows = tokenizer.vocab_size
    assert tokenizer.fit(rows + 100) is None
    assert "1 of its" in tokenizer.fit(rows - 1)
    assert tokenizer.encode("the quick brown fox")
    with pytest.raises(
        UserError, match=f"'<tool>' .number {rows - 1}., but the model's embedding has {rows - 1} rows"
    ):
        tokenizer.encode("use a <tool> here")
    with pytest.raises(CheckpointError, match="the end-of-text token is number 2"):
        tokenizer.fit(2)


@pytest.mark.parametrize("name", ["bpe", "bpe_user", "unigram", "unigram_spaces"])
def test_a_sentencepiece_model_alone_gives_its_own_ids(name, tmp_path):
    files = Path(__file__).parent / "sentencepiece_files"
    (tmp_path / "tokenizer.model").write_bytes((files / f"{name}.model").read_bytes())
    expected = json.loads((files / f"{name}.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_id == 2
    for text, ids, decoded in zip(expected["texts"], expected["ids"], expected["decoded"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, begin=True) == [1, *ids], text
        assert tokenizer.decode(ids) == decoded, text
    assert tokenizer.encode("</s>") == [2]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert Tokenizer(tmp_path).encode("the", begin=True) == tokenizer.encode("the")


@pytest.mark.parametrize(
    "change", [lambda data: data[:-7], lambda data: b"", lambda data: b"\xff" * 40, lambda data: b"{}" + data]
)
def test_a_broken_sentencepiece_model_is_named(change, tmp_path):
    data = (Path(__file__).parent / "sentencepiece_files/bpe.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(change(data))
    with pytest.raises(CheckpointError, match="tokenizer.model: .*SentencePiece model"):
        Tokenizer(tmp_path)
