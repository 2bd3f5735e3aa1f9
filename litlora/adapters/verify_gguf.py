"""Is a GGUF file the model that was tested? llama.cpp runs it on real tokens beside the live model;
without llama.cpp, the file is read back and its values are compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from litlora.adapters.verify import PROBE, compared
from litlora.errors import CheckpointError
from litlora.formats.gguf_export import PLAIN_KINDS, gguf_package
from litlora.formats.gguf_prompt import Asking
from litlora.formats.gguf_text import Text
from litlora.formats.llama_cpp import LlamaCpp
from litlora.prompts.template import Refusal, template_message

LIMIT = 1e-2
"""Live logits and those of a file in a plain number format may differ by this, relative to how far
logits spread: llama.cpp has activations in fp16 in places, and GELU in a table of fp16."""
HARD_TEXTS = (
    *(
        "",
        " ",
        "a",
        " a",
        "  two  spaces ",
        "\n",
        "\n\n\nlines\r\nand\ttabs\t",
        "     indented:\n        more",
    ),
    *("I'm you're THEY'LL he'D", "don't. DON'T!", "1234567890 3.14159 1,000,000 ١٢٣ ½ ²", "0x1F, 1e-9"),
    *("def f(x):\n    return {'a': [x ** 2, not x]}  # ok", '<div class="a">&amp;</div>', "a_b-c.d/e\\f:g"),
    *("Füchse, naïve café, Ærøskøbing, Œuvre, STRASSE straße", "Привет, мир! Съешь ещё", "Γειά σου Κόσμε"),
    *(
        "你好，世界。今天天气很好",
        "こんにちは世界 カタカナ ﾊﾝｶｸ",
        "안녕하세요 세계",
        "مرحبا بالعالم",
        "שלום עולם",
    ),
    *(
        "नमस्ते दुनिया",
        "สวัสดีชาวโลก",
        "🙂🙃 👨‍👩‍👧‍👦 🇫🇷 ❤️",
        "zero\u200bwidth\u00a0space\u3000wide",
        "∑∫√≠ €£¥ ‘’“”…—",
    ),
    *(
        "aaaaaaaaaaaaaaaaaaaaaaaa",
        "ALLCAPS CamelCase snake_case",
        "!!!???...",
        "http://example.org/?q=1&r=2#x",
    ),
    "\u0001\u007f control",
)
"""Texts that tokenizers divide in different ways. None has accents that are decomposed."""


@dataclass(frozen=True)
class Comparison:
    """llama.cpp's logits beside those of the live model."""

    tokens: int
    error: float
    """Root of the mean square of the difference, relative to how far live logits spread, of the
    median position: a router that picks another expert at a tie is not an error."""
    kl: float
    """Of the file's predictions from the live ones, nats a token."""
    agreement: float
    """Share of positions at which both put the same token first."""

    def line(self, what: str) -> str:
        return (
            f"verified {what} on {self.tokens} tokens, llama.cpp beside live: logits differ by "
            f"{self.error:.2g} of their spread, KL {self.kl:.1e} nats, same first choice {self.agreement:.1%}"
        )


def compare(live: Tensor, file: LlamaCpp, ids: list[int]) -> Comparison:
    """The logits (T, V) of the live model beside those of a file. Raises CheckpointError for values
    that are not finite."""
    theirs = torch.from_numpy(file.logits(ids))
    if not bool(torch.isfinite(theirs).all()):
        raise CheckpointError(f"{file.file}: llama.cpp computes values that are not finite")
    found = [compared(*pair) for pair in zip(live, theirs, strict=True)]
    errors = sorted((difference / max(spread, 1e-30)) ** 0.5 for spread, difference, *_ in found)
    kl = sum(one[3] for one in found) / len(found)
    return Comparison(len(ids), errors[len(errors) // 2], kl, sum(one[4] for one in found) / len(found))


def check_plain(found: Comparison, file: Path) -> None:
    """Raise CheckpointError if a file in a plain number format is not the live model."""
    if not found.error <= LIMIT:
        raise CheckpointError(
            f"{file}: llama.cpp's logits differ from the live model's by {found.error:.2g} of their spread, "
            f"more than {LIMIT:g} (KL {found.kl:.2g} nats, same first choice {found.agreement:.1%}); nothing "
            "was written; please report this with the model's name"
        )


def check_text(text: Text, file: LlamaCpp) -> str:
    """Raise CheckpointError unless llama.cpp reads texts and prompts as the tokens of training, and
    stops where answers end; returns what was compared."""
    tokenizer, asking = text.tokenizer, text.asking
    lead = " " if text.vocabulary.lacks_space else ""
    raw = file.tokens([hard if hard[:1] in ("", " ") else lead + hard for hard in HARD_TEXTS], begin=False)
    prompts = [*_prompts(asking)]
    begin = tokenizer.begin_text if asking.begins else ""
    pairs = [*zip(HARD_TEXTS, tokenizer.encode_batch([*HARD_TEXTS]), raw, strict=True)]
    asked = file.tokens([prompt.removeprefix(begin) for prompt in prompts], begin=True)
    pairs += zip(prompts, tokenizer.encode_batch(prompts), asked, strict=True)
    if odd := [pair for pair in pairs if pair[1] != pair[2]]:
        shown, ours, theirs = odd[0]
        raise CheckpointError(
            f"{file.file}: llama.cpp reads {len(odd)} of {len(pairs)} texts as other tokens than the "
            f"model's tokenizer, {shown[:60]!r} as {theirs[:12]}, not {ours[:12]}; nothing was written; "
            "please report this with the model's name"
        )
    if lacking := {*asking.stops} - {*file.stops(asking.stops)}:
        names = ", ".join(map(tokenizer.token, sorted(lacking)))
        raise CheckpointError(f"{file.file}: llama.cpp does not stop at {names}, with which answers end")
    return (
        f"verified text: {len(HARD_TEXTS)} hard texts and {len(prompts)} prompts are the same tokens in "
        f"llama.cpp, which stops at {', '.join(text.stops)}"
    )


def _prompts(asking: Asking) -> Iterable[str]:
    """Conversations as the template writes them."""
    user, answer = template_message("user", PROBE), template_message("assistant", "Paris.")
    system = template_message("system", "You are brief.")
    for talk in ([user], [user, answer, user], [system, user]):
        try:
            yield asking.template.render(talk)
        except Refusal:
            continue


def read_back(file: Path, expected: Iterable[tuple[str, Tensor]]) -> str:
    """Raise CheckpointError unless a file holds these tensors, each within its own number format;
    returns what was compared."""
    gguf = gguf_package()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    count = 0
    for name, tensor in expected:
        found = stored.pop(name, None)
        if found is None:
            raise CheckpointError(f"{file}: lacks {name}; the disk may be full or broken")
        kind = found.tensor_type.name
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        values = torch.from_numpy(np.array(values, dtype=np.float32)).view(tensor.shape)
        exact = tensor.float()
        if kind in PLAIN_KINDS:
            same = torch.equal(values, exact.to(PLAIN_KINDS[kind]).float())
        else:  # half a step of the block's scale, which itself is rounded to fp16
            steps = exact.view(-1, 32).abs().amax(1, keepdim=True) / 127
            same = bool(((values - exact).view(-1, 32).abs() <= 0.6 * steps + 1e-7).all())
        if not same:
            raise CheckpointError(f"{file}: {name} was not written as it is; the disk may be broken")
        count += tensor.numel()
    if stored:
        raise CheckpointError(f"{file}: holds {next(iter(stored))}, which the model does not have")
    return f"read back: all {count:,} values are the model's, within their number format"
