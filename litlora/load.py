"""From a checkpoint directory to a model and its tokenizer, adapters merged in memory or live."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litlora.adapters import merge_chain
from litlora.checkpoint import Chain, Checkpoint, adapter_modules, resolve
from litlora.config import ModelConfig
from litlora.errors import CheckpointError, UserError
from litlora.lora import LoRAConfig, LoRALinear, attach_lora
from litlora.model import GPT
from litlora.prompts import PromptStyle, load_style
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model ready for use, and what came with it."""

    model: GPT
    tokenizer: Tokenizer
    prompt_style: PromptStyle | None
    """How the model was taught to be asked, if its directory says."""
    chain: Chain


def load(
    directory: Path,
    *,
    live: bool = False,
    base_dir: Path | None = None,
    allow_base_mismatch: bool = False,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Load a full checkpoint, an adapter or a chain; adapters are merged in memory, nothing is written.

    `live` keeps the outermost adapter as LoRALinear layers. The weights stay in the checkpoint's dtype; on the CPU those
    without an update stay memory-mapped. Raises CheckpointError for whatever is missing or does not fit.
    """
    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=allow_base_mismatch)
    top = chain.top
    tokenizer = Tokenizer(top.directory)
    live_adapter = top if live and top.is_adapter else None
    inner = Chain(chain.base, chain.adapters[:-1], chain.config) if live_adapter else chain
    tensors, config = merge_chain(inner)
    model = build(config, tensors, chain.base)
    if live_adapter:
        attach_adapter(model, live_adapter)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{top.directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    return Loaded(model.to(device).eval(), tokenizer, load_style(top.directory), chain)


def build(config: ModelConfig, tensors: dict[str, Tensor], base: Checkpoint) -> GPT:
    """A GPT that holds these tensors; errors name the base's file."""
    try:
        return GPT.from_tensors(config, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{base.file}: {error}") from None


def attach_adapter(model: GPT, adapter: Checkpoint) -> None:
    """Put an adapter's A and B on the model as live LoRALinear layers."""
    lora = adapter.meta["lora"]
    try:
        attach_lora(model, adapter_modules(adapter.tensors), LoRAConfig(rank=lora["rank"], alpha=lora["alpha"]))
    except (AttributeError, UserError) as error:
        raise CheckpointError(f"{adapter.file}: does not fit its base: {error}") from None
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            with torch.no_grad():
                module.lora_A.copy_(adapter.tensors[f"{name}.lora_A"])
                module.lora_B.copy_(adapter.tensors[f"{name}.lora_B"])


def pick_device(accelerator: str) -> torch.device:
    """The device that `--accelerator` means; auto is the fastest there is. Raises UserError for one that is absent."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return torch.device(next(kind for kind, present in there.items() if present))
    if not there[accelerator]:
        raise UserError(f"--accelerator {accelerator}: this machine has none, or this torch cannot use it")
    return torch.device(accelerator)
