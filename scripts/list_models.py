"""Say which models can be fine-tuned, and what memory that takes.

python scripts/list_models.py
python scripts/list_models.py --memory checkpoints/Qwen/Qwen3-8B --rank 16 --seq 4096
python scripts/list_models.py --memory config.json

With --memory, nothing but the architecture is read: a config.json alone will do. The figures are
those of one device, with AdamW; torch itself and the buffers of its kernels come on top.
"""

import json
from dataclasses import asdict
from pathlib import Path

from litlora import cli
from litlora.config import CONFIG_FILE, ModelConfig
from litlora.console import say
from litlora.errors import CheckpointError, setting
from litlora.formats.families import FAMILIES, HF_CONFIG_FILE
from litlora.formats.families.multimodal import MULTIMODAL
from litlora.paths import checkpoint_dir
from litlora.settings import PRESETS, ListModels
from litlora.settings.targets import in_preset, kind_of
from litlora.transformers_config import Architecture, load_architecture


def main(settings: ListModels) -> None:
    if settings.memory is not None:
        _memory(settings)
    else:
        _models(settings)


def _say_json(found: object) -> None:
    say(*json.dumps(found, indent=2).split("\n"))


# ---- which models


def _models(settings: ListModels) -> None:
    """The families, those with the same linear layers together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for kind in FAMILIES:
        groups.setdefault(_linear_layers(kind), []).append(kind)
    if settings.json:
        rows = [{"layers": layers, "families": kinds} for layers, kinds in groups.items()]
        _say_json({"families": rows, "multimodal": list(MULTIMODAL)})
        return
    say("Own implementation, by the model_type of config.json:", "")
    for layers, kinds in groups.items():
        say(*_wrapped(", ".join(kinds), "  "))
        for preset in PRESETS:
            adapted = [layer for layer in layers if in_preset(_example_name(layer), preset)]
            say(*_wrapped(", ".join(adapted) or "-", f"    {preset:<11} ", " " * 16))
        say("")
    say("The language model inside these; the rest of the folder stays as it is:", "")
    say(*_wrapped(", ".join(MULTIMODAL), "  "), "")
    say("Any other causal decoder of transformers: docs/other-models.md.")
    say("What a run adapts, it prints. --memory CONFIG: what memory a fine-tune takes.")


def _linear_layers(kind: str) -> tuple[str, ...]:
    """The kinds of linear layers in a family, in the model's order."""
    from litlora.formats.families.example import example_config
    from litlora.frozen.linear import LINEAR
    from litlora.model import GPT

    model = GPT.without_weights(example_config(kind))
    return tuple(
        dict.fromkeys(kind_of(name) for name, module in model.named_modules() if isinstance(module, LINEAR))
    )


def _example_name(layer: str) -> str:
    """A module's name of that kind: experts.0.up_proj of experts.up_proj."""
    return layer.replace("experts.", "experts.0.") if layer.startswith("experts.") else layer


def _wrapped(text: str, start: str, after: str | None = None) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 100, initial_indent=start, subsequent_indent=after or start)


# ---- what memory


def _memory(settings: ListModels) -> None:
    config = _config(Path(settings.memory))
    if not isinstance(config, ModelConfig):
        raise CheckpointError(
            f"{setting('memory')} {settings.memory}: runs through transformers, and of such a model the "
            "memory is not computed"
        )

    from litlora.train.estimate import METHODS, need

    needs = [need(config, method, rank=settings.rank, tokens=settings.seq) for method in METHODS]
    if settings.json:
        _say_json([{**asdict(one), "total": one.total, "least": one.least} for one in needs])
        return
    large = max(one.total for one in needs) >= 2**30
    unit, size, digits = ("GiB", 2**30, 2) if large else ("MiB", 2**20, 1)
    say(
        f"{unit} on one device, rank {settings.rank} on all linear layers, {settings.seq:,} tokens a step:",
        "",
    )
    rows = [("", "weights", "adapter", "gradients", "AdamW", "activations", "total", "recomputed")]
    for one in needs:
        held = (one.weights, one.adapter, one.gradients, one.optimizer, one.activations)
        rows.append((one.method, *(f"{n / size:,.{digits}f}" for n in (*held, one.total, one.least))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    say(*("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows), "")
    say(
        "LoRA: a base in bf16. QLoRA: its blocks in nf4. full: fp32, multiplied in bf16.",
        "recomputed: the total with --train.checkpoint_activations full.",
    )


def _config(path: Path) -> Architecture:
    """The architecture that a file or a directory tells. Raises CheckpointError if it does not."""
    if path.is_file():
        if path.name not in (HF_CONFIG_FILE, CONFIG_FILE):
            raise CheckpointError(
                f"{setting('memory')} {path}: must be a directory, a {HF_CONFIG_FILE} or a {CONFIG_FILE}"
            )
        path, name = path.parent, path.name
    else:
        name = next((name for name in (CONFIG_FILE, HF_CONFIG_FILE) if (path / name).is_file()), None)
    if name == CONFIG_FILE:
        return load_architecture(path / CONFIG_FILE)
    if name == HF_CONFIG_FILE:
        from litlora.formats.huggingface import architecture_in

        return architecture_in(path)[1]

    from litlora.checkpoint import resolve

    return resolve(checkpoint_dir(path)).config


if __name__ == "__main__":
    cli.run(main, ListModels)
