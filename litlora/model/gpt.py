"""One GPT for every family, driven by `ModelConfig`.

Module names are Hugging Face Llama's, so that such a file loads without renaming and LoRA targets
are the names people know.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.frozen.few_bits import Quantized
from litlora.frozen.later import LateWeight
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.quantize import ToQuantize
from litlora.frozen.quantized import QuantizedWeight
from litlora.frozen.streamed import StreamedEmbedding
from litlora.kernels.attention import Pack, Shared, causal_mask
from litlora.kernels.rotary import Rope, RotaryTable
from litlora.lora import LoRAEmbedding
from litlora.model.altup import WithStreams
from litlora.model.block import Block
from litlora.model.cache import Cache, CacheBatch, KVCache, StaticCache
from litlora.model.compiled import CompiledBlocks
from litlora.model.context import Context
from litlora.model.norms import make_norm
from litlora.model.per_layer import WithLayerInputs
from litlora.storage.blocks import LazyTensor


class Decoder(WithLayerInputs, WithStreams):
    """Embedding, blocks and the final norm: token ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.add_layer_inputs(config)
        self.add_streams(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        layers = range(config.num_hidden_layers)
        self._reaches = [(config.window(layer), config.chunk(layer)) for layer in layers]
        self._ropes = [config.rope(layer) for layer in layers]
        self._compiled = CompiledBlocks(self.layers)
        # Filled on first use, and not part of a checkpoint, since they are computed.
        self._tables = {
            rope: RotaryTable(*rope, config.max_position_embeddings) for rope in self._ropes if rope
        }

    @property
    def tables(self) -> list[RotaryTable]:
        """The tables of its rotations, which grow with the longest sequence."""
        return list(self._tables.values())

    def forward(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        lengths: list[int] | None = None,
        positions: Tensor | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """With a `CacheBatch` or a `StaticCache`, input_ids (B, 1) are the next tokens of B sequences of
        any lengths.

        With `lengths`, input_ids (1, N) is a pack of sequences of these lengths, each of which
        sees itself alone; with `shared`, input_ids (1, N') are the tokens of these sequences that
        differ, as `shares_tokens` allows.

        With `positions` (M,) of the flattened input_ids, only the hidden states there are returned,
        (1, M, C).
        """
        T = input_ids.size(1)
        apart = cache.lengths if isinstance(cache, CacheBatch | StaticCache) else None
        start = cache.length if isinstance(cache, KVCache) else 0
        pack = Pack(lengths, shared, input_ids.device) if lengths is not None else None
        places = Places(start, T, pack, apart)
        x = self._embed(input_ids, places)
        masks = {}
        if isinstance(cache, StaticCache):
            masks = {reach: cache.mask(*reach) for reach in set(self._reaches)}
        elif pack is None and apart is None:
            masks = {
                (window, chunk): causal_mask(T, start, window, x.device, chunk)
                for window, chunk in set(self._reaches)
            }
        ropes = {rope: places.rotations(table, x) for rope, table in self._tables.items()}
        context = Context(cache=cache, pack=pack, query_scale=self._query_scale(places, x))
        if self.config.num_kv_shared_layers:
            context = context._replace(keys={})
        inputs, x = self.layer_inputs(input_ids, x), self.spread(x)
        own = [
            context._replace(rope=ropes.get(rope), mask=masks.get(reach))
            for rope, reach in zip(self._ropes, self._reaches, strict=True)
        ]
        if inputs is not None:
            own = [one._replace(per_layer=given) for one, given in zip(own, inputs, strict=True)]
        own[-1] = own[-1]._replace(positions=positions)
        x = self._through_blocks(x, own)
        if cache is not None:
            cache.advance(T)
        # Here, so that whatever multiplies by the head's weight has scaled logits.
        x, factor = self.norm(self.gathered(x)), self.config.logit_scale
        return x if factor is None else x * factor

    def _through_blocks(self, x: Tensor, contexts: list[Context]) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (1, M, C) at the last context's positions; one for each block."""
        if x.ndim == 3 and x.size(1) == 1 and (y := self._compiled(x, contexts)) is not None:
            return y
        for block, context in zip(self.layers, contexts, strict=True):
            x = block(x, context)
        return x

    def _query_scale(self, places: "Places", like: Tensor) -> Tensor | None:
        """(T, 1), or (B, 1, 1, 1) of sequences apart: the factors of the queries at each position;
        None if the architecture has none."""
        beta, floor = self.config.query_scale_beta, self.config.floor_scale
        if beta is None:
            return None
        numbers = places.numbers(like.device)
        if floor is not None:
            turns = (numbers + 1) // floor
        else:
            turns = numbers // self.config.rope_scaling.original_max_position_embeddings
        factors = (1 + beta * torch.log1p(turns.to(torch.float32)))[..., None].to(like.dtype)
        return factors if places.apart is None else factors[:, None]

    def _embed(self, input_ids: Tensor, places: "Places") -> Tensor:
        """(B, T) -> (B, T, C)."""
        x = self.embed_tokens(input_ids)
        if self.config.scale_embeddings:
            # rounded to the embedding's dtype, as in training
            x = x * float(torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype))
        if self.config.embedding_multiplier is not None:
            x = x * self.config.embedding_multiplier
        if self.embed_positions is not None:
            x = x + self.embed_positions(places.numbers(x.device))
        return x


class Places(NamedTuple):
    """The position of each token in its sequence."""

    start: int
    """Of the first token of each row,"""
    T: int
    """and how many tokens a row has;"""
    pack: Pack | None
    """or those of a pack;"""
    apart: list[int] | Tensor | None
    """or of B rows of one token, each with a position of its own."""

    def numbers(self, device: torch.device) -> Tensor:
        """(T,), or (B, 1) of rows apart."""
        if isinstance(self.apart, Tensor):
            return self.apart[:, None]
        if self.apart is not None:
            return torch.tensor(self.apart, device=device)[:, None]
        if self.pack is None:
            return torch.arange(self.start, self.start + self.T, device=device)
        return self.pack.places

    def rotations(self, table: RotaryTable, like: Tensor) -> Rope:
        """Their rows of a table."""
        if self.apart is not None:
            return table.rows_apart(self.apart, like)
        return (
            table.rows(self.start, self.T, like) if self.pack is None else table.packed_rows(self.pack, like)
        )


class GPT(nn.Module):
    """A decoder-only language model: token ids (B, T) -> logits (B, T, V).

    What the rest of litlora asks of a model: `hidden`, `logits`, `new_cache`, `like`, `blocks` and
    `block_prefix`, `embedding`, `head` and `plain_head`, `packs`, `check_fit`. A `TransformersModel`
    answers the same.
    """

    packs = True
    """A pack of sequences is computed as one row of tokens, and the next tokens of several in one go
    (`CacheBatch`)."""
    block_prefix = "model.layers."
    """What the names of all that lies in a block begin with."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.logits(self.model(input_ids, cache))

    def hidden(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        lengths: list[int] | None = None,
        positions: Tensor | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """As `Decoder.forward`."""
        return self.model(input_ids, cache, lengths=lengths, positions=positions, shared=shared)

    @property
    def shares_tokens(self) -> bool:
        """Whether sequences that begin alike can share these tokens: not where the rotation of a token
        depends on the length of its sequence, nor in linear attention, whose state is a sequence's."""
        scaling = self.config.rope_scaling
        if scaling is not None and scaling.rope_type in ("dynamic", "longrope"):
            return False
        return not self.config.linear_attention_layers

    def new_cache(self, max_length: int) -> KVCache:
        """An empty cache for one sequence of at most so many tokens."""
        like = self.like
        return KVCache(self.config, 1, max_length, dtype=like.dtype, device=like.device)

    def new_static_cache(self, batch_size: int, room: int) -> StaticCache:
        """One for so many sequences of at most so many tokens. Not of a model with linear attention, or
        whose rotations depend on the length of a sequence."""
        like = self.like
        for rope in self.model.tables:
            rope.rows(room - 1, 1, like)  # computed now: a compiled step looks them up
        return StaticCache(self.config, batch_size, room, dtype=like.dtype, device=like.device)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def embedding(self) -> nn.Module:
        return self.model.embed_tokens

    @property
    def head(self) -> nn.Module:
        return self.lm_head

    @property
    def plain_head(self) -> nn.Module | None:
        """The output head, if logits are its product and a cap alone."""
        return self.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        logits = self.lm_head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device in which the model computes."""
        embedding = self.model.embed_tokens
        inner = isinstance(embedding, StreamedEmbedding | LoRAEmbedding)
        return embedding.like if inner else embedding.weight

    @classmethod
    def without_weights(cls, config: ModelConfig) -> "GPT":
        """The model on the meta device: names and shapes only."""
        with torch.device("meta"), skipping_init():
            return cls(config)

    def stored(self) -> dict[str, Tensor]:
        """What a file of the model holds: weights, and what its routers add to scores."""
        kept = self.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in kept}
        return {**dict(self.named_parameters()), **buffers}

    def check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless names and shapes are exactly those of this model's weights;
        a tied head has no name of its own."""
        expected = {name: tensor.shape for name, tensor in self.stored().items()}
        if missing := sorted(expected.keys() - tensors.keys()):
            raise CheckpointError(f"weight(s) missing: {shorten(missing)}")
        if unexpected := sorted(tensors.keys() - expected.keys()):
            raise CheckpointError(f"weight(s) that the architecture does not have: {shorten(unexpected)}")
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensors[name].shape)}; the architecture needs {tuple(shape)}"
                )

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor | LazyTensor]) -> "GPT":
        """A model that holds these very tensors: nothing is initialised or copied. A linear layer
        with a quantized weight, or one that is still to be computed, is frozen.

        A tied head is stored once, under the embedding's name. Raises CheckpointError unless names
        and shapes fit exactly.
        """
        model = cls.without_weights(config)
        model.check_fit(tensors)
        hold(model, tensors)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


def hold(model: nn.Module, tensors: Mapping[str, Tensor | Quantized]) -> None:
    """Let a model on the meta device hold these very tensors. A linear layer with a quantized weight
    becomes a frozen one; another quantized weight is dequantised."""
    dense = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for name in tensors.keys() - dense.keys():
        layer, _, _ = name.rpartition(".")
        linear = model.get_submodule(layer)
        if type(linear) is nn.Linear:
            is_late = isinstance(tensors[name], ToQuantize) or not isinstance(tensors[name], Quantized)
            storage = (LateWeight if is_late else QuantizedWeight)(tensors[name])
            model.set_submodule(layer, FrozenLinear(storage, linear.bias))
        else:
            dense[name] = tensors[name].tensor()
    dense = {name: _usable(tensor) for name, tensor in dense.items()}
    # Detached: a Parameter among the tensors would become the model's own, and change when the
    # model's dtype or device does.
    model.load_state_dict(
        {name: tensor.detach() for name, tensor in dense.items()}, strict=False, assign=True
    )


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a matrix with gaps in its rows and in its columns, which every product
    would copy: where the rows of two layers take turns in one tensor of gpt-oss. One value that stands
    for all (stride 0) stays so."""
    return tensor.contiguous() if tensor.ndim == 2 and not {0, 1} & {*tensor.stride()} else tensor


class skipping_init(TorchFunctionMode):
    """A context that skips initialisation: the meta device has nothing to fill, yet torch's first
    random number there costs a second of imports."""

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def shorten(names: list[str], most: int = 6, between: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
