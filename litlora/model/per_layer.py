"""What Gemma 3n and 4 give to each layer of each token beside the residual stream: per-layer embeddings.
P is hidden_size_per_layer_input."""

import torch
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.kernels.lora import ACTIVATIONS
from litlora.lora import project
from litlora.model.norms import make_norm


class WithLayerInputs(nn.Module):
    """A decoder's part in it. A class to inherit from, since the family's names lie in the decoder."""

    def add_layer_inputs(self, config: ModelConfig) -> None:
        """Add the modules, if the architecture has them."""
        width, count = config.hidden_size_per_layer_input, config.num_hidden_layers
        self.per_layer_width, self.per_layer_scale = width, config.hidden_size**-0.5
        self.per_layer_rows = config.vocab_size_per_layer_input
        if width is not None:
            self.embed_tokens_per_layer = nn.Embedding(config.vocab_size_per_layer_input, count * width)
            self.per_layer_model_projection = nn.Linear(config.hidden_size, count * width, bias=False)
            self.per_layer_projection_norm = make_norm(config, width)

    def layer_inputs(self, input_ids: Tensor, x: Tensor) -> list[Tensor] | None:
        """For each layer (B, T, P), of ids (B, T) and their embeddings x (B, T, C): half of it is looked
        up, and half is made of x."""
        if self.per_layer_width is None:
            return None
        # A token without a row has that of the first one (Gemma 3n).
        found = self.embed_tokens_per_layer(torch.where(input_ids < self.per_layer_rows, input_ids, 0))
        # rounded to the embedding's dtype, as in training
        found = found * float(torch.tensor(self.per_layer_width**0.5, dtype=found.dtype))
        (made,) = project(x, self.per_layer_model_projection)
        made = (made * self.per_layer_scale).unflatten(-1, (-1, self.per_layer_width))  # (B, T, layers, P)
        both = self.per_layer_projection_norm(made) + found.unflatten(-1, (-1, self.per_layer_width))
        # Each in memory of its own: a compiler would see where in the tensor a part begins.
        return [part.contiguous() for part in (both * 2**-0.5).unbind(2)]


class WithGate(nn.Module):
    """A block's part in it."""

    def add_gate(self, config: ModelConfig) -> None:
        """Add the modules, if the architecture has them."""
        width = config.hidden_size_per_layer_input
        self.gate_activation = None if width is None else ACTIVATIONS[config.hidden_act]
        if width is not None:
            self.per_layer_input_gate = nn.Linear(config.hidden_size, width, bias=False)
            self.per_layer_projection = nn.Linear(width, config.hidden_size, bias=False)
            self.post_per_layer_input_norm = make_norm(config)

    def of_layer_input(self, x: Tensor, given: Tensor) -> Tensor:
        """x (B, T, C), and what the layer has for each token (B, T, P) -> what is made of both, (B, T, C)."""
        (gate,) = project(x, self.per_layer_input_gate)
        inner = self.gate_activation(gate) * given
        return self.post_per_layer_input_norm(project(inner, self.per_layer_projection)[0])
