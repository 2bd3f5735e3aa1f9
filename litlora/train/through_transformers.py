"""What a run on a model of transformers does without, by the names of the settings."""

from litlora.errors import UserError, setting
from litlora.settings import Finetune, FinetuneLoRA
from litlora.settings.targets import PRESETS

WHY = "this model runs through transformers"


def check_through(settings: Finetune) -> None:
    """Raise UserError for a setting that needs litlora's own model."""
    train = settings.train
    refused = {
        "compile": (train.compiles, "whose blocks are not compiled"),
        "neftune_alpha": (train.neftune_alpha, "one sequence at a time, and the noise is for packs"),
        "add_tokens": (settings.tokenizer.add_tokens, "whose vocabulary stays as it is"),
        "strategy": (settings.strategy == "fsdp", "which is not divided among devices; use ddp"),
    }
    for name, (is_set, why) in refused.items():
        if is_set:
            raise UserError(f"{setting(name)}: {WHY}, {why}; leave it out")
    if train.checkpoint_activations == "selective":
        raise UserError(
            f"{setting('checkpoint_activations')} selective: {WHY}, whose layers differ; use full or none"
        )
    if isinstance(settings, FinetuneLoRA):
        for option in ("rank_pattern", "alpha_pattern"):
            if presets := [name for name in getattr(settings.lora, option) if name in PRESETS]:
                raise UserError(
                    f"{setting(option)} {presets[0]}: {WHY}, where a preset goes by the kind of a layer, and "
                    "this option by names; name the layers"
                )
