"""One GPT for every family, driven by `ModelConfig`.

Shapes in this package: B batch, T tokens, C hidden_size, H heads, G key/value heads, D head_dim, V
vocabulary.
"""

from litlora.model.cache import CacheBatch, KVCache, StaticCache
from litlora.model.gpt import GPT, shorten
from litlora.model.router import Router
from litlora.model.through_transformers import TransformersModel
from litlora.transformers_config import Architecture, TransformersConfig

__all__ = [
    "GPT",
    "CacheBatch",
    "KVCache",
    "LanguageModel",
    "Router",
    "StaticCache",
    "TransformersModel",
    "kind_of",
    "shorten",
]

LanguageModel = GPT | TransformersModel


def kind_of(config: Architecture) -> type[GPT] | type[TransformersModel]:
    """The class of the models of an architecture."""
    return TransformersModel if isinstance(config, TransformersConfig) else GPT
