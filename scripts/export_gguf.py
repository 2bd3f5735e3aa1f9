"""Write any checkpoint as a GGUF file for llama.cpp and Ollama, with a Modelfile beside it, and check
with llama.cpp that it is the model that was tested.

    python scripts/export_gguf.py --checkpoint_dir $dir/final --out_dir $dir/gguf --dtype Q4_K_M
    python scripts/export_gguf.py --checkpoint_dir $dir/final --adapter_only true --out_dir $dir/gguf

An adapter or a chain is merged first; with adapter_only, the outermost adapter is written alone.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.cli import run
from litlora.console import say
from litlora.errors import CheckpointError, UserError
from litlora.formats.families import FAMILIES
from litlora.paths import ADAPTER_GGUF, GGUF_NAMES, MODEL_GGUF, checkpoint_dir, output_dir
from litlora.settings import ExportGGUF

if TYPE_CHECKING:
    from litlora.adapters.merge import Plan
    from litlora.checkpoint import Chain
    from litlora.formats.gguf_export import GGUFModel
    from litlora.formats.gguf_text import Text


NOT_INSTALLED = "not run: that needs llama.cpp; install it with: pip install 'litlora[llama-cpp]'"


def main(settings: ExportGGUF) -> None:
    if settings.model_type is not None and settings.model_type not in FAMILIES:
        raise UserError(
            f"--model_type {settings.model_type}: no such family; there are {', '.join(FAMILIES)}"
        )
    directory = checkpoint_dir(settings.checkpoint_dir)
    base_dir = checkpoint_dir(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    inputs = [directory, base_dir] if base_dir else [directory]
    out_dir = output_dir(settings.out_dir, overwrite=settings.overwrite, names=GGUF_NAMES, inputs=inputs)

    from litlora.checkpoint import resolve
    from litlora.formats.gguf_export import gguf_package
    from litlora.paths import keep_inputs
    from litlora.storage.fingerprint import check_finite

    gguf_package()
    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    keep_inputs(out_dir, chain.directories)
    for adapter in chain.adapters:
        check_finite(adapter.tensors, adapter.file)
    for notice in chain.notices:
        say(f"note: {notice}")
    if settings.adapter_only:
        _export_adapter(settings, chain, out_dir)
    else:
        _export_model(settings, chain, out_dir)


def _export_model(settings: ExportGGUF, chain: "Chain", out_dir: Path) -> None:
    """Write the model that a chain stands for."""
    import torch

    from litlora.adapters.merge import converted, plan_merge
    from litlora.card import name_of, of_gguf, write_card
    from litlora.formats.gguf_export import WRITTEN_KINDS, as_gguf, kinds_in, notes_on, write_model
    from litlora.formats.gguf_text import text_of
    from litlora.formats.llama_cpp import check_quantiser, quantise
    from litlora.formats.ollama import write_modelfile
    from litlora.storage.atomic import replacing_directory

    kind = settings.number_format if settings.number_format in WRITTEN_KINDS else "F32"
    if kind != settings.number_format:
        check_quantiser(settings.number_format)
    merged, config = plan_merge(chain)
    plan = converted(merged, torch.float32)  # rounded once, to the number format of the file
    model = as_gguf(plan, config, chain.base.family(settings.model_type), chain.top.directory)
    text = text_of(chain.sources, config, settings.prompt_style)
    for note in (*notes_on(model), *text.vocabulary.notes):
        say(f"note: {note}")
    said = []
    with replacing_directory(out_dir) as staging:
        file = staging / MODEL_GGUF
        write_model(file, model, kind, lambda writer: text.describe(writer, name_of(chain.top.directory)))
        if settings.verify:
            said += _verified(file, model, plan, text, kind)
        if kind != settings.number_format:
            plain = file.rename(staging / "plain.gguf")
            quantise(plain, file, settings.number_format)
            plain.unlink()
            if settings.verify:
                said += _verified(file, model, plan, text, settings.number_format)
        kinds = ", ".join(f"{count} tensors in {name}" for name, count in kinds_in(file).items())
        modelfile = write_modelfile(staging, f"./{MODEL_GGUF}", None, text)
        write_card(staging, chain, of_gguf(MODEL_GGUF, text.said, is_adapter=False))
    if chain.adapters:
        say(f"merged: {' + '.join(str(link.directory) for link in (chain.base, *chain.adapters))}")
    say(*(said if settings.verify else ["not verified: --verify false"]))
    say(text.said)
    result = out_dir / MODEL_GGUF
    say(f"result: {result} ({result.stat().st_size:,} bytes: {model.graph.name}, {kinds})")
    say(*modelfile)
    say(f"next: llama-cli -m {shlex.quote(str(result))} --jinja")


def _verified(file: Path, model: "GGUFModel", plan: "Plan", text: "Text", kind: str) -> list[str]:
    """What running a file beside the live model found, or why that was not done, and what reading it
    back found. Raises CheckpointError for a file that is not the model."""
    from litlora.adapters.verify import bytes_needed
    from litlora.adapters.verify_gguf import read_back
    from litlora.formats.gguf_export import PLAIN_KINDS, WRITTEN_KINDS
    from litlora.formats.llama_cpp import is_installed
    from litlora.ram import free_ram

    said = [read_back(file, model.stored())] if kind in WRITTEN_KINDS else []
    if not is_installed():
        return [*said, NOT_INSTALLED]
    need, free = bytes_needed(plan, model.config) + file.stat().st_size, free_ram()
    if free is not None and need > free:
        return [*said, f"not run: it takes {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"]
    return [*said, *_run(file, None, plan, text, kind, plain=kind in PLAIN_KINDS)]


def _run(
    file: Path, adapter: Path | None, plan: "Plan", text: "Text", what: str, *, plain: bool
) -> list[str]:
    """What llama.cpp gives beside the live model of a plan, whose file is in a plain number format or
    not."""
    from litlora.adapters.verify import live_model, logits, probe_ids
    from litlora.adapters.verify_gguf import check_plain, check_text, compare
    from litlora.formats.llama_cpp import LlamaCpp

    ids, _ = probe_ids(text.sources, text.config)
    live = logits(*live_model(plan, text.config), ids)
    running = LlamaCpp(file, adapter, context=ids.size(1))
    try:
        found = compare(live, running, ids[0].tolist())
        if plain:
            check_plain(found, file)
        return [*([check_text(text, running)] if plain else []), found.line(what)]
    finally:
        running.close()


def _export_adapter(settings: ExportGGUF, chain: "Chain", out_dir: Path) -> None:
    """Write the outermost adapter of a chain alone."""
    from litlora.adapters.merge import plan_merge
    from litlora.card import of_gguf, write_card
    from litlora.formats.gguf_adapter import adapter_tensors, check_adapter, write_adapter_file
    from litlora.formats.gguf_export import as_gguf
    from litlora.formats.gguf_text import text_of
    from litlora.formats.ollama import write_modelfile
    from litlora.storage.atomic import replacing_directory

    if not chain.adapters:
        raise CheckpointError(f"{chain.base.directory}: is a full model, and --adapter_only needs an adapter")
    plan, config = plan_merge(chain.inner)
    model = as_gguf(plan, config, chain.base.family(settings.model_type), chain.top.directory)
    check_adapter(chain.top, model)
    text = text_of(chain.sources, config, settings.prompt_style)
    alpha, tensors = adapter_tensors(chain.top, model, chain.base.tensors)
    with replacing_directory(out_dir) as staging:
        write_adapter_file(staging / ADAPTER_GGUF, model, alpha, tensors, settings.number_format)
        said = _verified_adapter(staging, model, chain, text) if settings.verify else []
        modelfile = ["note: no Modelfile: name the model below the adapter with --base_model"]
        if settings.base_model is not None:
            modelfile = write_modelfile(staging, settings.base_model, f"./{ADAPTER_GGUF}", text)
        write_card(staging, chain, of_gguf(ADAPTER_GGUF, text.said, is_adapter=True))
    result, below = out_dir / ADAPTER_GGUF, chain.inner.top.directory
    say(*(said if settings.verify else ["not verified: --verify false"]))
    say(text.said)
    say(
        f"result: {result} ({result.stat().st_size:,} bytes: an adapter for {model.graph.name}, "
        f"{len(tensors) // 2} layers in {settings.number_format})"
    )
    say(*modelfile)
    if settings.base_model is None:
        lora = shlex.quote(str(result))
        say(f"next: write {below} as GGUF, too, and run: llama-cli -m BASE.gguf --lora {lora}")


def _verified_adapter(staging: Path, model: "GGUFModel", chain: "Chain", text: "Text") -> list[str]:
    """What running an adapter's file on a file of its base found, beside the live model, or why it was
    not run. Raises CheckpointError if it is not the adapter."""
    import torch

    from litlora.adapters.merge import converted, plan_merge
    from litlora.adapters.verify import bytes_needed
    from litlora.card import name_of
    from litlora.formats.gguf_export import write_model
    from litlora.formats.llama_cpp import is_installed
    from litlora.ram import free_ram

    if not is_installed():
        return [NOT_INSTALLED]
    # llama.cpp adds it to the base as it is stored.
    chain = chain.on_original if chain.top.base.quantized else chain
    merged, config = plan_merge(chain)
    plan = converted(merged, torch.float32)
    size = sum(tensor.shape.numel() * 4 for tensor in plan.values())
    if (free := free_ram()) is not None and (need := bytes_needed(plan, config) + size) > free:
        return [f"not run: it takes {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"]
    base = staging / "base.gguf"
    write_model(base, model, "F32", lambda writer: text.describe(writer, name_of(chain.inner.top.directory)))
    said = _run(base, staging / ADAPTER_GGUF, plan, text, "the adapter on its base in F32", plain=True)
    base.unlink()
    return said


if __name__ == "__main__":
    run(main, ExportGGUF)
