r"""Extract a LoRA from the difference of two models, a tensor at a time: what, added to the source,
gives the target.

    python scripts/lora_extractor.py --source-model base.safetensors \
        --target-model tuned.safetensors --output lora.safetensors --rank 32
    python scripts/lora_extractor.py --source-model checkpoints/$base \
        --target-model checkpoints/$tuned --format litlora --output $dir
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from litlora import cli, formats
from litlora.console import say
from litlora.errors import CheckpointError
from litlora.formats.families import FAMILIES, HF_CONFIG_FILE
from litlora.formats.folder import WRITTEN_SUFFIXES, files_beside, model_files
from litlora.paths import (
    CHECKPOINT_NAMES,
    PEFT_NAMES,
    WEIGHTS_FILE,
    checkpoint_dir,
    keep_inputs,
    output_dir,
    output_file,
)
from litlora.settings import LoRAExtractor
from litlora.storage.untrusted import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from litlora.adapters.extract import Extracted, Plan


def main(settings: LoRAExtractor) -> None:
    if settings.format == "litlora" or (
        settings.format == "peft" and _is_language_model(Path(settings.source_model))
    ):
        extract_adapter(settings)
    else:
        extract_file(settings)


def extract_file(settings: LoRAExtractor) -> None:
    """Extract a LoRA file, or a PEFT folder, between two models of whatever architecture."""
    source, target = Path(settings.source_model), Path(settings.target_model)
    files = (
        model_files(source, settings.source_type, "source_model"),
        model_files(target, settings.target_type, "target_model"),
    )
    if settings.format == "peft":
        output = _output_dir(settings, PEFT_NAMES, [source, target])
    else:
        output = output_file(settings.output, WRITTEN_SUFFIXES[settings.output_format], [source, target])

    from litlora.adapters.extract import as_peft, extract
    from litlora.formats.lora_files import possible_keys, result_tensors, write_lora
    from litlora.formats.model_files import extracted_metadata, open_model, writing
    from litlora.formats.scaled import shapes
    from litlora.storage.atomic import replacing_directory

    before, after = open_model(source, files[0]), open_model(target, files[1])
    kinds = settings.source_type, settings.target_type
    for path, kind, read in zip((source, target), kinds, files, strict=True):
        for file in files_beside(path, kind, read):
            say(f"left out: {file}: the index of the folder does not list it")
    sizes = shapes(before), shapes(after)
    names = _names(*sizes, settings.format)
    others = (before.keys() | after.keys()) - names.keys()
    left_out = _check_comparable(*sizes, settings.allow_mismatch, others)
    _say_left_out(before, after, others)
    plan, report = _plan(settings), Report(settings, "diffusion models" if others else "models")
    found = report.told(extract(before, after, plan, {*left_out, *others}))
    if settings.format == "peft":
        lora = as_peft(found, after, str(source.resolve()))
        with replacing_directory(output) as staging:
            write_lora(staging, lora, plan.dtype)
        report.sum_up(output, f'PeftModel.from_pretrained(MODEL, "{output}")')
        return
    named = {names[name]: tensor for name, tensor in sizes[0].items() if name in names}
    keys = possible_keys(named, settings.format)
    with writing(output, settings.output_format, keys, extracted_metadata(files[0])) as add:
        for one in found:
            keys = result_tensors(names[one.name], one.result, settings.format, plan.dtype)
            for key, tensor in keys.items():
                add(key, tensor)
    kinds = (("--source-type", settings.source_type), ("--lora-type", settings.output_format))
    words = [word for option, kind in kinds if kind != "safetensors" for word in (option, kind)]
    options = "--source-model", source, "--lora-model", output, *words, "--output", "MERGED"
    report.sum_up(output, cli.call("scripts/lora_merger.py", *options))


def extract_adapter(settings: LoRAExtractor) -> None:
    """Extract an adapter, ours or PEFT's, between two checkpoints of an architecture that we
    know."""
    source, target = checkpoint_dir(settings.source_model), checkpoint_dir(settings.target_model)
    names = CHECKPOINT_NAMES if settings.format == "litlora" else PEFT_NAMES
    output = _output_dir(settings, names, [source, target])

    from litlora.adapters.extract import as_adapter, extract
    from litlora.adapters.merge import merge_chain
    from litlora.checkpoint import reference_to, resolve, write_adapter
    from litlora.formats.peft_export import to_peft, write_peft
    from litlora.storage.atomic import replacing_directory

    base, tuned = resolve(source), resolve(target)
    keep_inputs(output, [*base.directories, *tuned.directories])
    if settings.format == "peft" and base.adapters:
        raise CheckpointError(
            f"{source}: is an adapter, but a PEFT folder must name a full model; "
            "merge it with scripts/merge_lora.py first"
        )
    before, after = merge_chain(base)[0], merge_chain(tuned)[0]
    left_out = _check_comparable(before, after, settings.allow_mismatch)
    report = Report(settings)
    adapter = as_adapter(report.told(extract(before, after, _plan(settings), left_out)))
    if settings.format == "litlora":
        adapter = adapter.trained_on(reference_to(base.top, output))
        write_adapter(output, adapter, base.config, sidecars_from=[*tuned.sources, *base.sources])
        report.sum_up(output, cli.call("chat/base.py", "--checkpoint_dir", output))
        return
    full, name = base.base, str(source.resolve())
    folder = to_peft(adapter, full.family(), base.config, full.tensors, name, full.parts)
    with replacing_directory(output) as staging:
        write_peft(staging, *folder)
    report.sum_up(
        output, f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "{output}")'
    )


def _output_dir(settings: LoRAExtractor, names: tuple[str, ...], inputs: list[Path]) -> Path:
    return output_dir(
        settings.output, overwrite=settings.overwrite, names=names, inputs=inputs, named="output"
    )


def _is_language_model(path: Path) -> bool:
    """Whether it is a checkpoint directory of an architecture that we know, and whose layers PEFT
    has names for; another Hugging Face folder is only a folder of tensors."""
    if not path.is_dir() or formats.detect(path) is None:
        return False
    return _model_type(path) in (None, *FAMILIES) or (path / WEIGHTS_FILE).is_file()


def _model_type(directory: Path) -> str | None:
    """The family that a directory's config.json names; None without such a file."""
    file = directory / HF_CONFIG_FILE
    if not file.is_file():
        return None
    values = read_json(file)
    return str(values.get("model_type", "")) if isinstance(values, dict) else ""


class Report:
    """Says what became of each tensor as soon as it is known, and at the end the totals."""

    def __init__(self, settings: LoRAExtractor, compared: str = "models") -> None:
        self._found: list[Extracted] = []
        self._compared = compared
        self._dtype, self._largest = settings.output_dtype, settings.error_bound

    def told(self, extracted: "Iterable[Extracted]") -> "Iterator[Extracted]":
        """The same, each said. Raises CheckpointError if nothing was extracted."""
        for one in extracted:
            what = "whole" if one.rank is None else f"rank {one.rank}"
            least = "not proved to be near the least possible"
            if math.isfinite(one.excess):
                least = f"at most {one.excess:.2%} above the least possible"
            error = f"error {one.error / one.norm:.3e}" + ("" if one.rank is None else f", {least}")
            say(f"{one.name}: {' x '.join(map(str, one.shape))}, {what}, {error}")
            self._found.append(one)
            yield one
        if not self._found:
            raise CheckpointError(f"the two {self._compared} are equal: there is nothing to extract")

    def sum_up(self, output: Path, next_step: str) -> None:
        """Say the totals, and where the result is."""
        low_rank = [one for one in self._found if one.rank is not None]
        whole = len(self._found) - len(low_rank)
        error, norm = (math.hypot(*(getattr(one, part) for one in self._found)) for part in ("error", "norm"))
        missed = [one.name for one in self._found if one.error > 1.001 * self._largest * one.norm]
        if missed:
            say(
                f"note: {len(missed)} tensor(s), {missed[0]} first, have a larger error than asked for, "
                f"because {self._dtype} rounds them; --output_dtype fp32 does not"
            )
        say(f"total: {len(low_rank)} of low rank, {whole} whole, error {error / norm:.3e} of the difference")
        files = [output] if output.is_file() else [file for file in output.iterdir() if file.is_file()]
        say(f"result: {output} ({sum(file.stat().st_size for file in files):,} bytes)")
        say(f"next: {next_step}")


def _plan(settings: LoRAExtractor) -> "Plan":
    import torch

    from litlora.adapters.extract import Plan
    from litlora.adapters.lowrank import RankRule
    from litlora.storage.dtypes import DTYPES

    rank = None if settings.rank == "auto" else settings.rank
    return Plan(
        RankRule(rank, settings.energy, settings.sv_ratio, settings.max_error),
        exact=settings.svd == "exact",
        seed=settings.seed,
        min_size=settings.lowest_size,
        diff_only=settings.diff_only,
        replace=settings.is_directory,
        dtype=DTYPES[settings.output_dtype],
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def _names(source: "Mapping[str, Tensor]", target: "Mapping[str, Tensor]", format: str) -> dict[str, str]:
    """What a LoRA file calls the tensors that are extracted. PEFT's are those of a module, whose
    names are the model's."""
    from litlora.formats.diffusion_names import names_in_lora

    shapes = {name: tuple(tensor.shape) for model in (target, source) for name, tensor in model.items()}
    return {name: name for name in shapes} if format == "peft" else names_in_lora(shapes, format)


def _say_left_out(
    source: "Mapping[str, Tensor]", target: "Mapping[str, Tensor]", names: Collection[str]
) -> None:
    """Say how much of a whole checkpoint is not of its diffusion model, and how much of that
    differs."""
    from litlora.adapters.extract import differs
    from litlora.formats.diffusion_names import part_of_checkpoint

    parts: dict[str, list[str]] = {}
    for name in sorted(names):
        parts.setdefault(part_of_checkpoint(name), []).append(name)
    for part, inside in parts.items():
        count = sum(differs(source.get(name), target.get(name)) for name in inside)
        say(f"left out: {part}, not of the diffusion model: {count} of {len(inside)} tensors differ")


def _check_comparable(
    source: "Mapping[str, Tensor]",
    target: "Mapping[str, Tensor]",
    allow_mismatch: bool,
    others: Collection[str] = (),
) -> "Mapping[str, str]":
    """The tensors that cannot be subtracted, and why; they are listed. Raises CheckpointError for
    them unless `allow_mismatch`. `others` are not extracted."""
    from litlora.adapters.extract import mismatches
    from litlora.model import shorten

    left_out = {name: why for name, why in mismatches(source, target).items() if name not in others}
    found = [f"{name} ({why})" for name, why in left_out.items()]
    if found and not allow_mismatch:
        raise CheckpointError(
            f"{len(found)} tensor(s) cannot be subtracted: {shorten(found, 4, '; ')}; "
            "leave them out with --allow_mismatch"
        )
    for line in found:
        say(f"left out: {line}")
    return left_out


if __name__ == "__main__":
    cli.run(main, LoRAExtractor)
