"""In what few bits a frozen base can be held. Torch-free."""

from typing import Literal

Quantization = Literal["nf4", "nf4-dq", "int8", "fp8"]
