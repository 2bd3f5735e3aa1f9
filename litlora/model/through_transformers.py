"""A causal language model of transformers, behind the questions that the rest of litlora asks of a
`GPT`. Its modules and weights have transformers' own names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from litlora.errors import CheckpointError
from litlora.frozen.few_bits import Quantized
from litlora.frozen.linear import LINEAR
from litlora.lora import Adapter, LoRAEmbedding
from litlora.model.gpt import hold, shorten, skipping_init
from litlora.ram import is_lack_of_memory
from litlora.storage.dtypes import dtype_name
from litlora.transformers_config import TransformersConfig, causal_class, library

MOST_BUFFERS = 2**31
"""Bytes of what a model computes once and keeps, such as masks and tables of positions, at most."""
_FUSED = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Model types of which PEFT adapts no out_proj."""
_KINDS = {
    "attention": ("attention", "attn"),
    "mlp": ("mlp", "feedforward", "ffn", "moe", "expert"),
    "mixer": ("mamba", "mixer", "conv", "recurrent", "lru", "ssm", "delta", "rwkv", "lstm"),
}
"""What the name of a module's class contains, by kind; the first counts."""


class TransformersModel(nn.Module):
    """Token ids (B, T) -> logits (B, T, V), computed by a `PreTrainedModel`.

    It shares that model's dicts of modules and parameters, so that names are the same on both.
    """

    packs = False
    """Sequences are computed one by one, those of equal length together: nothing is padded, and none
    sees another's keys or state."""
    plain_head = None

    def __init__(self, config: TransformersConfig, inner: Any) -> None:
        super().__init__()
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            object.__setattr__(self, name, getattr(inner, name))
        object.__setattr__(self, "inner", inner)  # not a submodule: it would show in the names
        self.config = config
        self.block_prefix = _block_prefix(inner)
        self.read_only: dict[str, str] = {}
        """Linear layers whose weights are read instead, and why no adapter fits there."""

    def forward(self, input_ids: Tensor, cache: "StateCache | None" = None) -> Tensor:
        return self.logits(self.hidden(input_ids, cache))

    def hidden(
        self,
        input_ids: Tensor,
        cache: "StateCache | None" = None,
        lengths: list[int] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C), as the head takes them. With `lengths` or `positions` as
        `Decoder.forward`: (1, N, C) of a pack, (1, M, C) at these positions."""
        if lengths is None:
            hidden = self._decode(input_ids, cache)
        else:
            hidden = self._apart(input_ids, lengths)
        return hidden if positions is None else hidden.flatten(0, 1).index_select(0, positions)[None]

    def _apart(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """The hidden states (1, N, C) of a pack, of which sequences of equal length make a batch."""
        sequences = input_ids[0].split(lengths)
        found: list[Tensor | None] = [None] * len(lengths)
        for length in dict.fromkeys(lengths):
            same = [number for number, other in enumerate(lengths) if other == length]
            rows = self._decode(torch.stack([sequences[number] for number in same]), None)
            for number, row in zip(same, rows, strict=True):
                found[number] = row
        return torch.cat(found)[None]

    def _decode(self, input_ids: Tensor, cache: "StateCache | None") -> Tensor:
        kept = {"use_cache": False} if cache is None else {cache.argument: cache.state, "use_cache": True}
        return self.inner.base_model(input_ids=input_ids, **kept)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V): transformers' own head, with whatever it does
        before and after the product."""
        shape = hidden.shape
        rows = hidden if hidden.ndim == 3 else hidden.reshape(1, -1, shape[-1])
        head = _copied(self.inner)
        prefix = head.base_model_prefix
        head._modules = {name: module for name, module in head._modules.items() if name != prefix}
        object.__setattr__(head, prefix, _Given(getattr(self.inner, prefix), rows))
        # Its decoder is not called: the hidden states are there already.
        logits = head(inputs_embeds=rows, use_cache=False).logits
        return logits if hidden.ndim == 3 else logits.reshape(*shape[:-1], -1)

    def new_cache(self, max_length: int) -> "StateCache":
        """An empty cache for one sequence. It grows: `max_length` is not needed."""
        return StateCache(self.inner)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.get_submodule(self.block_prefix.removesuffix("."))

    @property
    def embedding(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    @property
    def head(self) -> nn.Module | None:
        """The output head, if the model has one of its own."""
        return self.inner.get_output_embeddings()

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device in which the model computes."""
        embedding = self.embedding
        return embedding.like if isinstance(embedding, LoRAEmbedding) else embedding.weight

    def train(self, mode: bool = True) -> "TransformersModel":
        self.inner.training = mode
        return super().train(mode)

    def in_preset(self, name: str, preset: str) -> bool:
        """Whether a preset means the linear layer of this name: by the kind of module that it is in,
        and only if it is called."""
        if not name.startswith(self.block_prefix) or name in self.read_only or preset == "experts":
            return False
        kind = self.kind_of(name)
        if preset == "qv":
            return kind == "attention" and name.rpartition(".")[2] in ("q_proj", "v_proj")
        return preset in ("all-linear", kind)

    def kind_of(self, name: str) -> str:
        """attention, mixer (a state-space, recurrent or convolution layer) or mlp: what a linear layer
        of a block belongs to."""
        number, *inside, _ = name.removeprefix(self.block_prefix).split(".")
        family = type(self.inner).__name__.removesuffix("ForCausalLM").lower()
        place, named, classes = f"{self.block_prefix}{number}", [], []
        for part in inside:
            place += f".{part}"
            named.append(part.lower())
            classes.append(type(self.get_submodule(place)).__name__.lower().removeprefix(family))
        for kind, marks in _KINDS.items():
            if any(mark in one for one in classes for mark in marks):
                return kind
        return "mixer" if any(mark in one for one in named for mark in _KINDS["mixer"]) else "mlp"

    def why_not(self, name: str) -> str | None:
        """Why the layer of this name takes no adapter; None if it can."""
        if isinstance(self.get_submodule(name), nn.Embedding):
            return "it is an embedding, which a model that runs through transformers trains whole"
        if name in self.read_only:
            return self.read_only[name]
        tied = {other for pair in tied_names(self.inner).items() for other in pair}
        return "it shares its weight with the embedding" if f"{name}.weight" in tied else None

    def not_adapted(self) -> dict[str, int]:
        """What has weights of two or more dimensions and takes no adapter, by kind, with its count."""
        found: dict[str, int] = {}
        for name, module in self.named_modules():
            if isinstance(module, (*LINEAR, nn.Embedding)) or not name.startswith(self.block_prefix):
                continue
            for leaf, weight in module.named_parameters(recurse=False):
                if weight.ndim > 1 and not leaf.startswith("lora_"):
                    kind = f"{type(module).__name__}.{leaf}"
                    found[kind] = found.get(kind, 0) + 1
        return found

    def renew_buffers(self, dtype: torch.dtype) -> None:
        """What the model computes once, as if it had been built in this dtype."""
        persistent = self.inner.state_dict().keys()
        for name, buffer in skeleton(self.config, dtype).named_buffers():
            if name not in persistent:
                place, _, leaf = name.rpartition(".")
                owner = self.get_submodule(place)
                setattr(owner, leaf, buffer.to(getattr(owner, leaf).device))

    def stored(self) -> dict[str, Tensor]:
        """What a file of the model holds: weights, and buffers that are stored."""
        stored = self.inner.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.inner.named_buffers() if name in stored}
        return {**dict(self.named_parameters()), **buffers}

    def in_fp32(self) -> "TransformersModel":
        """The same model, every weight of which it converts to fp32."""
        self.float()
        self.renew_buffers(torch.float32)
        return self

    def check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        """As `GPT.check_fit`."""
        expected = expected_tensors(self.inner)
        if missing := sorted(expected.keys() - tensors.keys()):
            raise CheckpointError(f"weight(s) missing: {shorten(missing)}")
        if unexpected := sorted(tensors.keys() - expected.keys()):
            raise CheckpointError(f"weight(s) that the architecture does not have: {shorten(unexpected)}")
        for name, tensor in expected.items():
            if tensors[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensors[name].shape)}; the architecture needs "
                    f"{tuple(tensor.shape)}"
                )
            if (dtype := tensors[name].dtype).is_floating_point != tensor.is_floating_point():
                kind = "floating-point numbers" if tensor.is_floating_point() else "integers"
                raise CheckpointError(f"{name} is {dtype_name(dtype)}; the architecture needs {kind} there")

    @classmethod
    def without_weights(cls, config: TransformersConfig) -> "TransformersModel":
        """The model on the meta device: names and shapes only."""
        return cls(config, skeleton(config, torch.float32, with_buffers=False))

    @classmethod
    def from_tensors(
        cls, config: TransformersConfig, tensors: Mapping[str, Tensor | Quantized]
    ) -> "TransformersModel":
        """As `GPT.from_tensors`."""
        dtypes = [tensor.dtype for tensor in tensors.values()]
        model = cls(config, skeleton(config, max(set(dtypes), key=dtypes.count, default=torch.float32)))
        model.check_fit(tensors)
        hold(model, tensors)
        if tied_names(model.inner):
            model.inner.tie_weights()
        model.requires_grad_(True)
        return model

    @torch.no_grad()
    def check_causal(self, name: str) -> None:
        """Compute a few tokens and compare with transformers' own forward. Raises CheckpointError,
        which names `name`, for a model whose tokens see later ones, or that is not its decoder and a
        head. Also finds out which linear layers are never called."""
        ids = torch.arange(8, device=self.like.device).remainder(self.config.vocab_size)[None]
        what = f"{name}: {type(self.inner).__name__}"
        try:
            with _calls(self) as called:
                whole = self.inner(input_ids=ids, use_cache=False).logits.float()
        except Exception as error:  # of any kind: the code is not ours
            if is_lack_of_memory(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(
                f"{what} cannot be computed by transformers ({reason}); look at what its config.json says"
            ) from error
        alone = f"{what} is not a decoder and a head alone, so it cannot be trained here"
        try:
            hidden = self.hidden(ids)
            logits = self.logits(hidden).float()
        except Exception as error:
            if is_lack_of_memory(error):
                raise
            raise CheckpointError(alone) from error
        spread = whole.std().clamp_min(1e-6)
        near = 2e-3 if self.like.dtype in (torch.float32, torch.float64) else 0.15
        if not (logits - whole).abs().max() <= near * spread:
            raise CheckpointError(alone)
        if not (self(ids[:, :5]).float() - whole[:, :5]).abs().max() <= near * spread:
            raise CheckpointError(f"{what} is not a causal decoder: its tokens see later ones")
        experts = [part for part in dict(self.named_modules()) if part.rpartition(".")[2].isdecimal()]
        for layer, module in self.named_modules():
            is_expert = sum(layer.startswith(f"{part}.") for part in experts) > 1
            if isinstance(module, LINEAR) and module not in called and not is_expert:
                self.read_only[layer] = "its weight is read, and the layer itself is never called"
            elif layer.endswith(".out_proj") and self.config.model_type in _FUSED:
                self.read_only[layer] = "fused kernels read its weight, so PEFT would refuse the adapter"
            elif isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
                kind = type(module).__name__
                self.read_only[layer] = f"its class {kind} computes something else than W x + b"
            elif _picks(self, layer):
                self.read_only[layer] = "it only picks which tokens are seen, and no gradient reaches it"


def _picks(model: nn.Module, layer: str) -> bool:
    """Whether a layer belongs to an indexer of sparse attention (DeepSeek-V3.2, arXiv:2512.02556)."""
    parts = layer.split(".")[:-1]
    inside = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any("Indexer" in type(model.get_submodule(part)).__name__ for part in inside)


class StateCache:
    """What transformers keeps of the tokens seen so far: keys and values, or the states of layers."""

    def __init__(self, inner: Any) -> None:
        import inspect

        taken = inspect.signature(type(inner.base_model).forward).parameters
        self.argument = "cache_params" if "cache_params" in taken else "past_key_values"
        self.state = library().DynamicCache(config=inner.config)


class _Output(tuple):
    """What a decoder returns: hidden states, and nothing else that it might have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


class _Given:
    """Stands in for a decoder whose hidden states are known: calling it gives them, and so does
    calling a decoder inside of it. Whatever else is asked of it, the real one answers."""

    def __init__(self, real: nn.Module, hidden: Tensor) -> None:
        self._real, self._hidden = real, hidden

    def __call__(self, *_: object, **__: object) -> Any:
        return _Output([self._hidden])

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        return _Given(found, self._hidden) if isinstance(found, nn.Module) else found


def _copied(module: nn.Module) -> nn.Module:
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


@contextmanager
def _calls(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The linear layers that are called within the block."""
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: called.add(module))
        for module in model.modules()
        if isinstance(module, LINEAR)
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _block_prefix(inner: Any) -> str:
    """What the names of all that lies in a model's layers begin with. Raises CheckpointError if
    it has none."""
    for name, module in inner.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return f"{name}."
    raise CheckpointError(f"{type(inner).__name__} has no list of layers, so it cannot be trained here")


def check_adapter(config: TransformersConfig, adapter: Adapter) -> None:
    """Raise CheckpointError for what no adapter of such a model does: add tokens, or change an output
    head and an embedding that are one tensor."""
    if adapter.rows is not None:
        raise CheckpointError(
            f"{adapter.file}: adds tokens, and a model that runs through transformers keeps its own"
        )
    model = TransformersModel.without_weights(config)
    tied = {name for pair in tied_names(model.inner).items() for name in pair}
    changed = {f"{name}.weight" for name in adapter.updates} | set(adapter.whole)
    if both := sorted(tied & changed):
        raise CheckpointError(
            f"{adapter.file}: changes {both[0]}, which this model's output head and embedding share"
        )
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    if found := [name for name in embeddings if name in adapter.updates]:
        raise CheckpointError(
            f"{adapter.file}: updates the embedding {found[0]}; of a model that runs through transformers an "
            "embedding is trained whole or not at all"
        )


def tied_names(inner: Any) -> dict[str, str]:
    """{the name of a weight that is another's: that one's name}."""
    return dict(inner.all_tied_weights_keys)


def expected_tensors(inner: Any) -> dict[str, Tensor]:
    """The tensors that a file of the model holds, each once: weights, and buffers that are stored."""
    tied = tied_names(inner)
    return {name: tensor for name, tensor in inner.state_dict().items() if name not in tied}


def skeleton(config: TransformersConfig, dtype: torch.dtype, *, with_buffers: bool = True) -> Any:
    """A `PreTrainedModel` with its weights on the meta device. With `with_buffers`, what it computes
    once and does not store is there. Raises CheckpointError for settings that it cannot be built of,
    and for a class that is not a causal decoder."""
    transformers, kind = library(), config.model_type
    if causal_class(kind) is None or config.built.is_encoder_decoder:
        raise CheckpointError(f"model_type {kind!r} is not a causal decoder of transformers")
    try:
        with torch.device("meta"), skipping_init():
            inner = transformers.AutoModelForCausalLM.from_config(
                config.built, trust_remote_code=False, dtype=dtype
            )
    except Exception as error:  # each model fails in its own way on settings that contradict each other
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"not a usable configuration ({type(error).__name__}: {reason})") from None
    if inner.base_model is inner:
        raise CheckpointError(
            f"{type(inner).__name__} has no decoder of its own, so it cannot be trained here"
        )
    for module in inner.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # training has its own setting
    if with_buffers:
        _compute_buffers(inner)
    return inner.eval()


def _compute_buffers(inner: Any) -> None:
    """Give a model on the meta device the buffers that are not stored, as transformers does when it
    loads one."""
    stored = inner.state_dict().keys()
    buffers = {name: buffer for name, buffer in inner.named_buffers() if name not in stored}
    if (size := sum(buffer.nbytes for buffer in buffers.values())) > MOST_BUFFERS:
        raise CheckpointError(f"its configuration asks for {size:,} bytes of tables; no model has that many")
    for tensor in inner.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in buffers.items():
        place, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(place), leaf, torch.empty_like(buffer, device="cpu"))
    inner.initialize_weights()
