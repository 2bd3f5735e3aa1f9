"""From a checkpoint directory to a model and its tokenizer, adapters merged in memory or live."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from litlora.adapters.merge import EMBEDDING, HEAD, in_memory, plan_merge, whole_of
from litlora.adapters.quantised import as_trained, block_linears, quantised
from litlora.checkpoint import Chain, resolve
from litlora.errors import CheckpointError, UserError, setting
from litlora.formats.full import FullModel
from litlora.frozen.few_bits import Quantized
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantize import QUANTIZERS, QuantizedBase, fingerprint_of
from litlora.frozen.quantized import QuantizedWeight
from litlora.frozen.streamed import Stream
from litlora.lora import Adapter, attach_lora
from litlora.model import GPT, LanguageModel, Router, TransformersModel, kind_of
from litlora.prompts import PromptStyle, choose_style, load_style, load_template
from litlora.ram import is_lack_of_memory
from litlora.settings.targets import OUTPUT_HEAD
from litlora.storage.blocks import LazyTensor
from litlora.storage.fingerprint import check_finite
from litlora.storage.pages import mapped, release
from litlora.streaming import stream_base
from litlora.tokenizer import Tokenizer, find_sidecars
from litlora.transformers_config import Architecture


@dataclass(frozen=True)
class TextSide:
    """What turns conversations into the token ids of a model, and back."""

    tokenizer: Tokenizer
    prompt_style: PromptStyle | None
    """The prompt style that the model was trained with, if its directory says."""
    template: PromptStyle | None
    """The model's own chat template, if it has one."""

    def style(self, named: str | None, default: str) -> tuple[PromptStyle, str]:
        """How the model is asked, and why; `named` and `default` as of `choose_style`."""
        return choose_style(named, self.prompt_style, self.template, default, self.tokenizer)


@dataclass(frozen=True)
class Loaded(TextSide):
    """A model ready for use, and what came with it."""

    model: LanguageModel
    chain: Chain
    quantized: QuantizedBase | None = None
    """In what few bits the frozen weights of its blocks are, if they were quantised while loading."""
    stream: Stream | None = None
    """What reads the base's weights from their file, if they stay there."""


def load(
    directory: Path,
    *,
    live: bool | None = False,
    base_dir: Path | None = None,
    allow_base_mismatch: bool = False,
    device: torch.device | str = "cpu",
    dense: Sequence[str] | None = None,
    quantize: str | None = None,
) -> Loaded:
    """Load a full checkpoint, an adapter or a chain; adapters are merged in memory, nothing is
    written.

    `live` keeps the outermost adapter as LoRALinear layers; None: if its base is quantised. The
    weights stay in the checkpoint's dtype; on the CPU those without an update stay memory-mapped.
    Quantized weights are dequantised. With `dense`, names or ends of names of modules, only those of
    these modules are, and those outside the blocks: the other linear layers stay as they are stored,
    and frozen.

    `quantize`, the name of one of QUANTIZERS, quantises the linear layers of the blocks, one at a
    time, and freezes them; "none" does not. By default a live adapter's base is what it was when the
    adapter was trained, and nothing else is quantised. Raises CheckpointError for whatever is
    missing or does not fit, and UserError for what cannot be quantised.
    """
    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=allow_base_mismatch)
    return load_chain(chain, live=live, device=device, dense=dense, quantize=quantize)


def load_chain(
    chain: Chain,
    *,
    live: bool | None = False,
    device: torch.device | str = "cpu",
    dense: Sequence[str] | None = None,
    quantize: str | None = None,
    stream: bool = False,
    late: bool = False,
) -> Loaded:
    """As `load`. With `stream`, which `streams` allows, the base's weights stay in their file, and the
    outermost adapter is live. With `late`, what is to be merged or quantised of the layers that are not
    `dense` is a `LateWeight`."""
    top = chain.top
    text = load_text(chain)
    live_adapter = None
    if isinstance(top, Adapter) and (stream or (_is_quantised(top, quantize) if live is None else live)):
        live_adapter = top
    tensors, config, quantized = _weights(chain, live_adapter, dense, quantize, late=late)
    model = build(config, tensors, chain.base)
    if quantized is None:
        for weight in stored_weights(model).values():
            if isinstance(weight, QuantizedWeight):
                weight.rounds = True  # as everything else sees what the file stores
    if isinstance(model, TransformersModel):
        model.check_causal(str(chain.base.directory))
    if live_adapter:
        attach_adapter(model, live_adapter)
    if notice := text.tokenizer.fit(model.config.vocab_size):
        chain.notices.append(notice)
    model = model.to(device).eval()
    streamed = stream_base(model, chain.base.file) if stream else None
    for name, weight in model.stored().items():
        check_finite({name: weight}, top.file)
        if late and mapped([weight]):
            release(weight)  # read, and not needed before it is divided
    return Loaded(text.tokenizer, text.prompt_style, text.template, model, chain, quantized, streamed)


def load_text(chain: Chain) -> TextSide:
    """The tokenizer of a chain, and how its model is asked."""
    tokenizer = Tokenizer(chain.sources)
    found = load_template({file.name: file for file in find_sidecars(chain.sources)})
    template = found.style if found is not None else None
    styles = (load_style(directory, template) for directory in chain.sources)
    return TextSide(tokenizer, next(filter(None, styles), None), template)


def _is_quantised(adapter: Adapter, quantize: str | None) -> bool:
    """Whether the base of a live adapter is to be in few bits."""
    trained = adapter.base is not None and adapter.base.quantized is not None
    return trained if quantize is None else quantize != "none"


def _weights(
    chain: Chain,
    live: Adapter | None,
    dense: Sequence[str] | None,
    quantize: str | None,
    *,
    late: bool = False,
) -> tuple[dict[str, Tensor | LazyTensor], Architecture, QuantizedBase | None]:
    """The weights of a model without its live adapter, its architecture, and how they were
    quantised; see `load`."""
    if quantize == "none" and chain.adapters:
        chain = chain.on_original
    plan, config = plan_merge(chain if live is None else chain.inner)
    trained = live.base.quantized if live is not None and live.base else None
    quantizer = None
    if trained is not None and quantize in (None, trained.quantizer.name):
        quantizer, plan = trained.quantizer, as_trained(plan, config, live, chain)
    elif quantize not in (None, "none"):
        if live is not None and live.needs_quantised:
            raise CheckpointError(
                f"{live.file}: was started by LoftQ on a base in {trained.quantizer.name}; leave "
                f"{setting('quantize')} {quantize} out"
            )
        quantizer = QUANTIZERS[quantize]
        _check_frozen(config, dense or (), quantize)
        kept = live.whole if live is not None else ()
        plan = quantised(plan, config, quantizer, chain.base.file, kept=kept)
    if quantizer is None and dense is None:
        return in_memory(plan), config, None
    linears = {name for name in block_linears(config) if not _is_in(name, dense or ())}
    tensors = in_memory(plan, as_stored=linears.__contains__, late=late)
    if quantizer is None or late:
        return tensors, config, quantizer and QuantizedBase(quantizer, None)
    matrices = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Quantized)}
    return tensors, config, QuantizedBase(quantizer, fingerprint_of(matrices))


def _check_frozen(config: Architecture, dense: Sequence[str], quantize: str) -> None:
    """Raise UserError if one of the modules that train is to be quantised."""
    trains = [name for name in block_linears(config) if _is_in(name, dense)]
    if trains:
        layer = trains[0].removesuffix(".weight")
        target = next(target for target in dense if _is_in(trains[0], [target]))
        raise UserError(
            f"{setting('modules_to_save')} {target}: {setting('quantize')} {quantize} quantises {layer}, and "
            "quantised weights cannot be trained; leave one of the two out"
        )


def _is_in(name: str, targets: Sequence[str]) -> bool:
    """Whether a weight belongs to one of these modules, given by their names or the ends of them."""
    parts = name.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(f".{module}".endswith(f".{target}") for module in modules for target in targets)


def build(config: Architecture, tensors: dict[str, Tensor | LazyTensor], base: FullModel) -> LanguageModel:
    """A model that holds these tensors; errors name the base's file."""
    try:
        return kind_of(config).from_tensors(config, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{base.file}: {error}") from None


def attach_adapter(model: LanguageModel, adapter: Adapter) -> None:
    """Put an adapter's updates on the model as live LoRALinear layers."""
    parameters = model.stored() | dict(model.named_parameters(remove_duplicate=False))
    whole = whole_of(adapter, model.config)
    made = adapter.rows.tensors if adapter.rows else {}
    touched = {*adapter.updates, *(name.rpartition(".")[0] for name in whole if name not in made)}
    try:
        if made:
            set_vocabulary(model, whole[EMBEDDING], whole.get(HEAD, whole[EMBEDDING]))
            whole = {name: tensor for name, tensor in whole.items() if name not in made}
        # An embedding is looked up, not multiplied, and a router is small: live they would gain nothing.
        others = {
            name
            for name in adapter.updates
            if name.rpartition(".")[2].startswith("embed_") or isinstance(model.get_submodule(name), Router)
        }
        linears = [name for name in adapter.updates if name not in others]
        if model.config.tie_word_embeddings and {OUTPUT_HEAD, "model.embed_tokens"} & touched:
            _untie(model)
        for name, tensor in whole.items():
            _replace(model, name, tensor, like=parameters[name])
        for name in others:
            weight = model.get_parameter(f"{name}.weight")
            _replace(model, f"{name}.weight", adapter.updates[name].added_to(weight), like=weight)
        attach_lora(model, linears, adapter.config)
        for name in linears:
            model.get_submodule(name).load_update(adapter.updates[name])
    except (AttributeError, KeyError, RuntimeError, UserError) as error:
        if is_lack_of_memory(error):
            raise
        raise CheckpointError(
            f"{adapter.file}: does not fit its base: {' '.join(str(error).split())}"
        ) from None


def set_vocabulary(model: GPT, embedding: Tensor, head: Tensor) -> None:
    """Give a model an embedding and an output head of other rows; the same tensor if they are tied."""
    bias = model.lm_head.bias
    model.model.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = len(embedding)
    tied = head is embedding
    model.lm_head.weight = (
        model.model.embed_tokens.weight if tied else nn.Parameter(head, requires_grad=False)
    )
    if bias is not None and len(bias) < len(head):
        added = bias.detach().mean().expand(len(head) - len(bias))
        model.lm_head.bias = nn.Parameter(torch.cat([bias.detach(), added]), requires_grad=False)
    model.config = dataclasses.replace(model.config, vocab_size=len(embedding))
    model.model.config = model.config


def _untie(model: GPT) -> None:
    """Give the output head a weight of its own."""
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False)


def _replace(model: LanguageModel, name: str, tensor: Tensor, *, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise UserError(
            f"{name} is {tuple(tensor.shape)}; the base has {tuple(like.shape)} (merging may resize a "
            "vocabulary)"
        )
    module, _, leaf = name.rpartition(".")
    new = tensor.to(like.dtype)
    new = nn.Parameter(new, requires_grad=False) if isinstance(like, nn.Parameter) else new
    setattr(model.get_submodule(module), leaf, new)


def pick_device(accelerator: str) -> torch.device:
    """The device of that name; "auto" is the fastest available. Raises UserError for one that is
    absent."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return torch.device(next(kind for kind, present in available.items() if present))
    if not available[accelerator]:
        raise UserError(
            f"{setting('accelerator')} {accelerator}: this machine has none, or this torch cannot use it"
        )
    return torch.device(accelerator)
