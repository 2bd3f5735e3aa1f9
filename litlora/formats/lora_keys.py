"""The keys of LoRA files: which layer a key belongs to, and which part of its update it holds.

The factors of one layer are spelled in one of these ways, A before B; NAME is an adapter's:

    .lora_down.weight               .lora_up.weight                 kohya, ComfyUI
    .lora_A.weight                  .lora_B.weight                  PEFT, diffusers
    .lora_A.NAME.weight             .lora_B.NAME.weight             PEFT, as it is in memory
    .lora_A                         .lora_B                         Mochi
    .lora.down.weight               .lora.up.weight                 diffusers before PEFT
    .lora_linear_layer.down.weight  .lora_linear_layer.up.weight    the same, text encoders
    _lora.down.weight               _lora.up.weight                 the first diffusers; see _layer
    .lora_embedding_A               .lora_embedding_B               PEFT, embeddings

`.lora_B.bias` and `.token_adapter.trainable_tokens_delta` are PEFT's, too.
"""

import re
from dataclasses import dataclass

_FACTOR = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.weight|\.(?!weight$)(?P<name>[^.]+)\.weight|)"
    r"|(?P<end>_lora|\.lora|\.lora_linear_layer)\.(?P<diffusers>down|up)\.weight"
    r"|\.lora_embedding_(?P<embedding>[AB])(?:\.(?!weight$)(?P<embedding_name>[^.]+))?"
    r")"
)
_MAGNITUDE = re.compile(
    r"(?P<layer>.+?)\.(?:dora_scale|lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?)"
)
_BIAS = re.compile(r"(?P<layer>.+?)\.lora_B(?:\.(?!bias$)[^.]+)?\.bias")
_TOKENS = re.compile(r"(?P<layer>.+?)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_OLD = re.compile(r"(?P<parent>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)")
_PARTS = {"down": "A", "up": "B", "mid": "mid"}
FACTORS_OF = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
"""The tensors of one layer of LyCORIS's two products, by what LyCORIS calls them."""
_PRODUCTS = tuple(name for names in FACTORS_OF.values() for name in names)


@dataclass(frozen=True)
class Factor:
    """What a key says about one factor."""

    layer: str
    part: str
    """A, B or mid."""
    spelling: str
    """The same for both factors of a layer that belong together."""
    adapter: str | None = None
    """The adapter's name, if the key has one."""
    is_embedding: bool = False
    is_bare: bool = False
    """Whether the key ends in lora_A or lora_B, as it does in litlora's and litgpt's own files, too."""


def factor(key: str) -> Factor | None:
    """The factor that a key holds; None if it holds none."""
    found = _FACTOR.fullmatch(key)
    if found is None:
        return None
    layer = found["layer"]
    if found["kohya"]:
        return Factor(layer, _PARTS[found["kohya"]], "lora_down")
    if found["diffusers"]:
        layer = _layer(layer) if found["end"] == "_lora" else layer
        return Factor(layer, _PARTS[found["diffusers"]], found["end"] + ".down")
    if found["embedding"]:
        name = found["embedding_name"]
        return Factor(layer, found["embedding"], "lora_embedding_A", name, is_embedding=True)
    is_bare = key.endswith(("lora_A", "lora_B"))
    spelling = "lora_A" + (f".{found['name']}" if found["name"] else "")
    return Factor(layer, found["peft"], spelling, found["name"], is_bare=is_bare)


def magnitude(key: str) -> str | None:
    """The layer whose DoRA magnitude a key holds; None if it holds none."""
    found = _MAGNITUDE.fullmatch(key)
    return found["layer"] if found else None


def bias(key: str) -> str | None:
    """The layer whose B has a bias (PEFT's lora_bias) that a key holds; None if it holds none."""
    found = _BIAS.fullmatch(key)
    return found["layer"] if found else None


def token_rows(key: str) -> str | None:
    """The layer of which a key holds rows that replace those of some tokens (PEFT's
    trainable_token_indices); None if it holds none."""
    found = _TOKENS.fullmatch(key)
    return found["layer"] if found else None


def product_part(key: str) -> tuple[str, str] | None:
    """(the layer, the name in FACTORS_OF) of a factor of LoHa or LoKr; None for any other key."""
    layer, _, name = key.rpartition(".")
    return (layer, name) if layer and name in _PRODUCTS else None


def _layer(name: str) -> str:
    """The layer of `name`_lora: the first diffusers kept a layer's factors beside it, under names
    of their own in a text encoder."""
    found = _OLD.fullmatch(name)
    if found is None:
        return name
    parent, which = found["parent"], found["which"]
    if parent.endswith("self_attn"):
        return f"{parent}.{which}_proj"
    return f"{parent}.to_out.0" if which == "out" else f"{parent}.to_{which}"
