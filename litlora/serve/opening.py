"""From a checkpoint directory to an engine that answers, with adapters on it by name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from litlora.checkpoint import Chain, open_checkpoint, resolve
from litlora.errors import BaseMismatchError, CheckpointError, UserError, setting
from litlora.frozen.few_bits import Quantized
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantized import QuantizedWeight
from litlora.kernels.cpu import has_threads
from litlora.kernels.cpu_build import library, why_none
from litlora.load import Loaded, load_chain, pick_device
from litlora.lora import Adapter, unwrap_lora
from litlora.model import GPT, kind_of
from litlora.prompts import PromptStyle, lacking_tokens
from litlora.ram import free_ram
from litlora.serve.engine import Engine
from litlora.serve.steps import why_no_rows
from litlora.settings.inference import Inference
from litlora.streaming import gib, streams

PLAIN = "base"
"""What people call the model without any adapter."""
IN_A_RUN = ("final", "step-", "best")
"""How the directories in a run's begin, which the run gives their name."""


@dataclass(frozen=True)
class Opening:
    """How a model is to be opened."""

    device: torch.device
    quantize: str | None = None
    """As of `load`."""
    stream: bool | str = "auto"
    """As of `streams`."""
    prompt_style: str | None = None
    """As of `choose_style`."""
    max_batch: int = 16
    cache_tokens: int | None = None
    compile: bool = False
    """Compile the step that computes a token."""

    @classmethod
    def of(cls, settings: Inference, **changes: Any) -> "Opening":
        """As a command's settings say, with changes."""
        names = {name: getattr(settings, name) for name in ("quantize", "prompt_style", "compile")}
        names |= {"device": pick_device(settings.accelerator), "stream": settings.stream_base}
        return cls(**{**names, **changes})


@dataclass
class Opened:
    """A model that answers."""

    engine: Engine
    style: PromptStyle
    style_reason: str
    name: str
    """Of the model without any adapter that can be switched."""
    chain: Chain
    """What that model is, on disk."""
    loaded: Loaded
    default: str | None = None
    """The adapter that the directory itself names, if it is live."""
    notices: list[str] = field(default_factory=list)
    """What the user must know."""

    def add_adapter(self, name: str, directory: Path) -> None:
        """Put one more adapter on the model. Raises UserError for a name that is taken or cannot be
        one, and CheckpointError for an adapter that is not of this model."""
        if name in (PLAIN, self.name) or name in self.engine.adapters:
            raise UserError(f"{name}: this name is taken; choose another")
        if not name or not name.isprintable() or any(mark in name for mark in " \t/="):
            raise UserError(f"{name!r}: must be a name without spaces, / and =")
        base = self.chain.directories[-1]
        if not isinstance(open_checkpoint(directory, base_dir=base), Adapter):
            raise CheckpointError(f"{directory}: is a full model; an adapter is needed")
        chain = resolve(directory, base_dir=base, allow_base_mismatch=self.chain.allow_base_mismatch)
        places = [place.resolve() for place in chain.directories[:-1]]
        if places != [place.resolve() for place in self.chain.directories]:
            raise BaseMismatchError(f"{directory}: was not trained on {base}, the model that is in memory")
        self._check_bits(chain.top)
        self.engine.add_adapter(name, chain.top)
        self.notices += chain.notices

    def _check_bits(self, adapter: Adapter) -> None:
        """Raises CheckpointError for an adapter that was trained on other values of the base."""
        _check_switchable(adapter)
        trained = adapter.base.quantized if adapter.base else None
        held = self.loaded.quantized
        if trained is None or (held is not None and held.quantizer.name == trained.quantizer.name):
            return
        name = trained.quantizer.name
        raise CheckpointError(
            f"{adapter.file}: was trained on its base in {name}; {setting('quantize')} {name} holds it so"
        )


def open_model(chain: Chain, opening: Opening, *, live: bool) -> Opened:
    """Load a chain. With `live`, its outermost adapter can be switched on and off, by the name of its
    directory; else all are merged. Raises CheckpointError for one that can only be merged."""
    if opening.compile and (hindrance := _no_compile(chain, opening.device)):
        raise UserError(f"{setting('compile')} true: {hindrance}; leave it out")
    few_bits = opening.quantize not in (None, "none")
    stream = streams(False if few_bits else opening.stream, chain, opening.device)
    live = live and isinstance(chain.top, Adapter)
    if live:
        _check_switchable(chain.top)
    loaded = load_chain(
        chain,
        device=opening.device,
        quantize=opening.quantize,
        live=live or None,
        stream=stream,
        dense=None if stream else _dense(chain, opening),
    )
    style, reason = loaded.style(opening.prompt_style, default="plain")
    below = chain.inner if live else chain
    if live:
        unwrap_lora(loaded.model)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch=opening.max_batch,
        cache_tokens=opening.cache_tokens,
        owns_model=True,
        compiled=opening.compile,
    )
    opened = Opened(engine, style, reason, short_name(below.directories[-1]), below, loaded)
    if live:
        opened.default = short_name(chain.top.directory)
        if opened.default in (PLAIN, opened.name):
            opened.default = "adapter"
        engine.add_adapter(opened.default, chain.top)
    opened.notices = _notices(opened, opening)
    return opened


def _dense(chain: Chain, opening: Opening) -> list[str] | None:
    """The layers that are dequantised of a base that is stored in few bits: all of them, for which this is
    None, if their values fit into the free memory, since 16 bits are read sooner than most others on few
    cores; else those that no compiled code reads."""
    if opening.device.type != "cpu" or opening.quantize is not None or kind_of(chain.config) is not GPT:
        return None
    if chain.config.num_experts is not None or not has_threads():
        return None
    stored = {name: one for name, one in chain.base.tensors.items() if isinstance(one, Quantized)}
    size, room = sum(one.shape.numel() * one.dtype.itemsize for one in stored.values()), free_ram()
    if room is None or size <= room:
        return None
    return [name.removesuffix(".weight") for name, one in stored.items() if not one.is_readable]


def _check_switchable(adapter: Adapter) -> None:
    """Raises CheckpointError for an adapter whose base answers with this adapter alone."""
    if adapter.has_own_base:
        raise CheckpointError(
            f"{adapter.file}: was started by LoftQ in several iterations, which took a part out of its base: "
            "without the adapter that base is no model, and no other adapter fits it; open it alone"
        )


def _no_compile(chain: Chain, device: torch.device) -> str | None:
    """Why the step that computes a token cannot be compiled; None if it can."""
    if device.type != "cuda":
        return f"only a CUDA device repeats a recorded step, and this device is {device.type}"
    return why_no_rows(chain.config)


def _notices(opened: Opened, opening: Opening) -> list[str]:
    loaded, style = opened.loaded, opened.style
    notices = list(loaded.chain.notices)
    if opening.prompt_style and style.called and (lacking := lacking_tokens(style, loaded.tokenizer)):
        notices.append(f"the tokenizer cuts {', '.join(lacking)} into pieces")
    if loaded.quantized is not None:
        notices.append(f"the linear layers of the blocks are in {loaded.quantized.quantizer.describe()}")
    if any(isinstance(one, QuantizedWeight) for one in stored_weights(loaded.model).values()):
        if loaded.quantized is None:
            notices.append("their values would not fit into memory: they stay in these bits")
    if opening.device.type == "cpu" and (why := why_none()):
        notices.append(f"{why}, so a token takes at least twice as long")
    elif opening.device.type == "cpu" and library().is_new:
        notices.append("code for this processor was compiled, which takes a few seconds, once")
    if (streamed := loaded.stream) is not None:
        size = streamed.nbytes + streamed.head_bytes
        notices.append(
            f"the base stays in its file; a token reads {gib(size)}, which takes "
            f"{size / streamed.speed:.2g} s at the {gib(streamed.speed)} a second just measured"
        )
    if not opened.engine.batches:
        kind = type(loaded.model.inner).__name__
        notices.append(f"{kind} runs through transformers: requests are computed in turn, not in batches")
    return notices


def short_name(directory: Path) -> str:
    """What people would call a checkpoint directory: its own name, or of a run's result the run's."""
    place = directory.absolute()
    while place.name.startswith(IN_A_RUN) and place.parent.name:
        place = place.parent
    return place.name.replace(" ", "-") or "model"
