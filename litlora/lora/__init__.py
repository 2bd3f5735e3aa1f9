"""LoRA on any `nn.Module`: wrap linear layers, train, merge, unmerge, unwrap.

add_lora(model, config)      wraps the layers that config.targets names and freezes everything else
merge_lora(model)            folds every update into its W, in place; outputs stay the same up to rounding
unmerge_lora(model)          puts back the very bits of every W
unwrap_lora(model)           plain nn.Linear layers again, with plain names: merged if merged, else the base
"""

from litlora.lora.layer import (
    OUTPUT_HEAD,
    LoRALinear,
    add_lora,
    attach_lora,
    fitting,
    gated_mlp,
    layer_rank,
    layer_scale,
    lora_tensors,
    merge_lora,
    merged_weight,
    project,
    scale_of,
    select_layers,
    stored_config,
    unmerge_lora,
    unwrap_lora,
)
from litlora.settings import LoRAConfig

__all__ = [
    "OUTPUT_HEAD",
    "LoRAConfig",
    "LoRALinear",
    "add_lora",
    "attach_lora",
    "fitting",
    "gated_mlp",
    "layer_rank",
    "layer_scale",
    "lora_tensors",
    "merge_lora",
    "merged_weight",
    "project",
    "scale_of",
    "select_layers",
    "stored_config",
    "unmerge_lora",
    "unwrap_lora",
]
