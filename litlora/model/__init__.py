"""One GPT for every family, driven by `ModelConfig`.

Shapes in this package: B batch, T tokens, C hidden_size, H heads, G key/value heads, D head_dim, V
vocabulary.
"""

from litlora.model.cache import KVCache
from litlora.model.experts import Router
from litlora.model.gpt import GPT, shorten

__all__ = ["GPT", "KVCache", "Router", "shorten"]
