"""LoRA on any `nn.Module`: wrap linear layers, train, merge, unmerge, unwrap.

add_lora(model, config)      wraps the layers that config.targets names and freezes everything else
merge_lora(model)            folds every update into its W; outputs stay the same up to rounding
unmerge_lora(model)          puts back every W, bit for bit
unwrap_lora(model)           plain layers again, with plain names: merged if merged, else the base's

layer.py     LoRALinear, LoRAEmbedding, and the functions above
together.py  layers of one input, in one function
update.py    one layer's update, and the formula
dense.py     updates of other tools that are not s · B A
variants.py  what A and B mean, and what belongs to them
starts.py    the values of A and B before the first step; eva.py: those by the data
adapter.py   the updates of all layers, with their settings and the base they are for
rows.py      rows of added tokens
casts.py     A and B in the dtype of the computation, cast once a step
grouped.py   a layer of all experts as one
live.py      adapters that are switched on and off, each for its own sequences
biases.py    biases that train, those of B too
select.py    which layers, and the rank and alpha of each
"""

from litlora.lora.adapter import Adapter, BaseReference
from litlora.lora.layer import (
    LoRAEmbedding,
    LoRALinear,
    adapter_of,
    add_lora,
    attach_lora,
    lora_updates,
    merge_lora,
    unmerge_lora,
    unwrap_lora,
)
from litlora.lora.select import select_layers
from litlora.lora.starts import start_lora
from litlora.lora.together import gated_mlp, project
from litlora.lora.update import Update
from litlora.lora.variants import VARIANTS, Variant
from litlora.settings import LoRAConfig

__all__ = [
    "VARIANTS",
    "Adapter",
    "BaseReference",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "Update",
    "Variant",
    "adapter_of",
    "add_lora",
    "attach_lora",
    "gated_mlp",
    "lora_updates",
    "merge_lora",
    "project",
    "select_layers",
    "start_lora",
    "unmerge_lora",
    "unwrap_lora",
]
