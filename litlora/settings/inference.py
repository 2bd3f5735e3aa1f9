"""What the commands share that ask a model."""

from dataclasses import dataclass
from typing import Literal

from litlora.settings.quantize import Quantization
from litlora.settings.sampling import SamplingSettings, check_sampling
from litlora.settings.streaming import StreamBase, check_streamed
from litlora.settings.styles import check_prompt_style


@dataclass(frozen=True, kw_only=True)
class Inference(SamplingSettings):
    """What the commands share that ask a model."""

    checkpoint_dir: str = "out/lora/alpaca/final"
    """Any checkpoint directory."""
    prompt_style: str | None = None
    """How the model is asked. alpaca: Stanford Alpaca's instructions; plain: the bare text; template:
    the model's own chat template; chatml: ChatML; llama3: Llama 3's headers; mistral: [INST]; gemma:
    Gemma 1 to 3's turns; phi: Phi 3's roles; FILE.jinja: a chat template of your own. Default: the
    style that the model was trained with, else its own chat template, else plain."""
    quantize: Quantization | Literal["none"] | None = None
    """Hold the linear layers of the blocks in few bits: nf4, nf4-dq, int8, fp8; none: in the base's
    number format. Default: what an adapter was trained on, else none."""
    stream_base: StreamBase = "auto"
    """Leave the base in its file: its layers are read ahead of their use and dropped behind it. An
    adapter is then live instead of merged. true, false, or auto: where the base exceeds the free
    memory."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; auto takes the fastest available."""
    compile: bool = False
    """On a CUDA device: compile the step that computes a token, and let the device repeat it as it was
    recorded (CUDA graphs). The first answer waits for it, and so does each larger batch."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it is no longer where the adapter says."""
    allow_base_mismatch: bool = False
    """Use a base even if its weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_sampling(self)
        check_prompt_style(self.prompt_style)
        check_streamed(self, quantize=self.quantize not in (None, "none"))
