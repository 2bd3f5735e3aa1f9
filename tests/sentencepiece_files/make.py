"""Write the SentencePiece models beside this file, and the ids that SentencePiece itself gives.

pip install sentencepiece==0.2.3
python tests/sentencepiece_files/make.py
"""

import io
import json
from pathlib import Path

import sentencepiece

HERE = Path(__file__).resolve().parent
TEXT = "the quick brown fox jumps over a lazy dog; who knows one two three four five 123 and 456 of them?"
WORDS = TEXT.split()
LINES = [" ".join(WORDS[(n * k) % len(WORDS)] for n in range(9)) for k in range(1, 40)] + [
    "naïve café, 东京 и Москва"
] * 3
TEXTS = [
    "",
    " ",
    "the quick brown fox",
    "  leading, two  spaces   and trailing  ",
    "line one\nline two\n\n\ttab",
    "東京 naïve 😀 Москва\x01",
    "USER:<|user|> the dog",
    "a" * 300,
    "(x)+[y]={z}\\n",
]
LLAMA = {
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "byte_fallback": True,
}
MODELS = {
    "bpe": {"model_type": "bpe", **LLAMA},
    "bpe_user": {
        "model_type": "bpe",
        **LLAMA,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<|user|>"],
    },
    "unigram": {"model_type": "unigram", **LLAMA},
    "unigram_spaces": {"model_type": "unigram", **LLAMA, "remove_extra_whitespaces": True},
}


def main() -> None:
    for name, settings in MODELS.items():
        stream = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=stream,
            vocab_size=340,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
        (HERE / f"{name}.model").write_bytes(stream.getvalue())
        own = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
        ids = own.encode(TEXTS)
        result = {"texts": TEXTS, "ids": ids, "decoded": own.decode(ids)}
        (HERE / f"{name}.json").write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
