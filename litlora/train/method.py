"""Method: what distinguishes one way of fine-tuning from another. Its entry file makes one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from litlora.data.examples import Examples, tokenize
from litlora.lora import Adapter
from litlora.model import LanguageModel
from litlora.train.objective import SFT, Objective


@dataclass(frozen=True, kw_only=True)
class Method:
    """What distinguishes one way of fine-tuning from another."""

    prepare: Callable[[LanguageModel], None]
    """Marks what trains with requires_grad."""
    trains_base: bool
    """Whether the base's own weights change. They are then kept in fp32, in memory of their own."""
    dense: Sequence[str] | None = None
    """The modules that must not stay quantized, as they train: see `load`."""
    content: Callable[[LanguageModel], dict[str, Tensor] | Adapter]
    """What a checkpoint stores: every weight, or an adapter."""
    objective: Callable[..., Objective] = SFT
    """Makes what the run minimises, of (model, settings of the loop, contexts)."""
    tokenize: Callable[..., Examples] = tokenize
    """Makes the objective's examples, of (what the data holds, tokenizer, prompt style, longest
    length)."""
    stores: str
    """What the result holds, for the closing words."""
    resume: str
    """What resumes a run, with {command} in place of the running command, and {config} of the file of
    its settings."""
    repeat: str
    """What does the same in another directory, with {command} and {config} likewise."""
    next: str
    """The command that uses the result, with {result} in place of its path."""
