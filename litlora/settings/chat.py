"""The settings of chat."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from litlora.settings.checks import check_positive, check_seed, check_value
from litlora.settings.quantize import Quantization
from litlora.settings.streaming import StreamBase, check_streamed
from litlora.settings.styles import check_prompt_style


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a model: full, an adapter on its base, or a chain of adapters (merged in memory)."""

    MATTERS: ClassVar[tuple[str, ...]] = (
        *("checkpoint_dir", "prompt", "system"),
        *("max_new_tokens", "temperature"),
    )
    """The five settings that `--help` shows first."""

    checkpoint_dir: str = "out/lora/alpaca/final"
    """Any checkpoint directory."""
    prompt: str | None = None
    """Answer this once and exit."""
    system: str | None = None
    """A system message: what the model is told before the conversation."""
    prompt_style: str | None = None
    """How the model is asked. alpaca: Stanford Alpaca's instructions; plain: the bare text; template:
    the model's own chat template; chatml: ChatML; llama3: Llama 3's headers; mistral: [INST]; gemma:
    Gemma 1 to 3's turns; phi: Phi 3's roles; FILE.jinja: a chat template of your own. Default: the
    style that the model was trained with, else its own chat template, else plain."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.8
    """0 always takes the likeliest token; higher is more random."""
    top_k: int | None = 50
    """Sample among the k likeliest tokens only."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Seed of the sampling; default: a different answer each time."""
    quantize: Quantization | Literal["none"] | None = None
    """Hold the linear layers of the blocks in few bits: nf4, nf4-dq, int8, fp8; none: in the base's
    number format. Default: what an adapter was trained on, else none."""
    stream_base: StreamBase = "auto"
    """Leave the base in its file: its layers are read ahead of their use and dropped behind it. An
    adapter is then live instead of merged. true, false, or auto: where the base exceeds the free
    memory."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; auto takes the fastest available."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it is no longer where the adapter says."""
    allow_base_mismatch: bool = False
    """Use a base even if its weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_seed(self.seed or 0)
        check_prompt_style(self.prompt_style)
        check_positive(self, "max_new_tokens", "top_k")
        usable = math.isfinite(self.temperature) and self.temperature >= 0
        check_value(self, "temperature", usable, "must be 0 or more, and finite")
        check_value(self, "top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1")
        check_streamed(self, quantize=self.quantize not in (None, "none"))
