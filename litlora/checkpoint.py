"""Checkpoint directories: the chain from an adapter down to its base, and writing a whole
directory.

Any format can be read, see `litlora/formats`. A directory that we write holds `lit_model.pth`,
`model_config.yaml`, the tokenizer's files, `prompt_style.yaml` and, if a run made it,
`hyperparameters.yaml`.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from litlora import formats
from litlora.config import CONFIG_FILE, ModelConfig
from litlora.errors import BaseMismatchError, CheckpointError, setting
from litlora.formats.full import FullModel
from litlora.formats.litlora import adapter_entry, full_entry
from litlora.frozen.few_bits import Quantized
from litlora.frozen.quantize import QuantizedBase
from litlora.lora import Adapter, BaseReference
from litlora.lora.adapter import names_of
from litlora.model.through_transformers import check_adapter
from litlora.paths import HYPERPARAMETERS_FILE, STATE_FILE, WEIGHTS_FILE, checkpoint_dir, is_checkpoint
from litlora.prompts import STYLE_FILE, PromptStyle, write_style
from litlora.stop_tokens import name_stops
from litlora.storage import torch_file
from litlora.storage.atomic import replacing_directory
from litlora.storage.blocks import LazyTensor
from litlora.storage.fingerprint import fingerprint
from litlora.storage.torch_file import TorchFile, Written
from litlora.storage.untrusted import has_file, own_file
from litlora.text_facts import changed_text, text_facts
from litlora.tokenizer import find_sidecars
from litlora.transformers_config import Architecture, TransformersConfig, load_architecture


@dataclass(frozen=True)
class Chain:
    """A model as directories hold it: full weights, and the adapters to merge into them, innermost
    first."""

    base: FullModel
    adapters: list[Adapter]
    notices: list[str] = field(default_factory=list)
    """What could not be verified, and what the adapters were trained on, a line each; every command
    prints them."""
    allow_base_mismatch: bool = False
    """Whether the fingerprints of its links were not compared, and should not be."""

    @property
    def config(self) -> Architecture:
        """The base's architecture."""
        return self.base.config

    @property
    def top(self) -> FullModel | Adapter:
        """The outermost adapter, or the base itself: what the user named."""
        return self.adapters[-1] if self.adapters else self.base

    @property
    def inner(self) -> "Chain":
        """The chain that the outermost adapter was trained on."""
        return replace(self, adapters=self.adapters[:-1])

    @property
    def on_original(self) -> "Chain":
        """The same chain, but the base of the outermost adapter as it is stored, if the adapter was
        trained on it in few bits. Raises CheckpointError for one that fits these bits alone."""
        top = self.adapters[-1]
        if top.needs_quantised:
            raise CheckpointError(
                f"{top.file}: was started by LoftQ, which makes up for what quantising its base lost, so it "
                "does not fit the base as it is stored; use it on the base as it was trained"
            )
        original = top.trained_on(replace(top.base, quantized=None))
        return replace(self, adapters=[*self.adapters[:-1], original])

    @property
    def directories(self) -> list[Path]:
        """The directories of the links, the base's first."""
        return [link.directory for link in (self.base, *self.adapters)]

    @property
    def sources(self) -> list[Path]:
        """The same, outermost first: the order in which files beside the weights are looked for."""
        return self.directories[::-1]


# ---- reading


def open_checkpoint(
    path: Path, *, base_dir: Path | None = None, above: tuple[Path, ...] = ()
) -> FullModel | Adapter:
    """Open a checkpoint directory, or the weights' file in one. Raises CheckpointError for anything
    but sound files.

    An adapter of another format can only be read beside its base: `base_dir`, or the one that it
    names. `above` are the adapters that led here.
    """
    directory = checkpoint_dir(path)
    found: Chain | None = None

    def find_base(name: str, place: Path | None) -> Chain:
        nonlocal found
        found = _foreign_base(directory, name, base_dir or place and _short(place), above)
        return found

    opened = formats.detect(directory).open(directory, find_base)
    if found is None:
        return opened
    # The format of such an adapter stores no fingerprint of its base.
    return replace(opened, base=replace(reference_to(found.top, directory), fingerprint=None))


def _foreign_base(directory: Path, name: str, place: Path | None, above: tuple[Path, ...]) -> Chain:
    """The base of an adapter whose own files do not tell the architecture."""
    if place is None:
        what = f"its base {name!r} is not a directory here" if name else "it does not name its base"
        raise CheckpointError(
            f"{directory}: {what}; name its directory with {setting('base_checkpoint_dir')}"
        )
    above = (*above, directory)
    if any(place.resolve() == other.resolve() for other in above):
        raise CheckpointError(f"{_show([*above, place])}: the chain of adapters runs in a circle")
    # Only its shapes are needed here: `resolve` checks this link.
    return resolve(place, above=above, allow_base_mismatch=True)


def reference_to(
    base: FullModel | Adapter, directory: Path, quantized: QuantizedBase | None = None
) -> BaseReference:
    """What an adapter in `directory`, trained on `base`, stores about its base; `quantized` says in
    what few bits it was then."""
    place = base.directory.absolute()
    relative = os.path.relpath(place, directory.absolute())
    return BaseReference(relative, str(place), base.fingerprint, quantized)


def resolve(
    path: Path,
    *,
    base_dir: Path | None = None,
    allow_base_mismatch: bool = False,
    above: tuple[Path, ...] = (),
) -> Chain:
    """Follow a checkpoint down to its base and check every link.

    `base_dir` replaces a base that is not where its adapter says: the first one whose fingerprint
    it matches, else the last. Raises CheckpointError for a missing link or a cycle, and
    BaseMismatchError for a base that the adapter was not trained on; each shows the chain. `above`
    are adapters that led to this one.
    """
    stand_in = open_checkpoint(base_dir) if base_dir is not None else None
    current = open_checkpoint(path, base_dir=base_dir, above=above)
    adapters: list[Adapter] = []
    seen, notices = list(above), []
    while isinstance(current, Adapter):
        seen.append(current.directory)
        adapters.append(current)
        wanted = current.base.fingerprint
        if stand_in is not None and (wanted is None or stand_in.answers_to(wanted)):
            base, stand_in = stand_in, None
        else:
            base = _recorded_base(current, seen, base_dir, required=stand_in is None)
            if stand_in is not None and not isinstance(base, Adapter):
                base, stand_in = stand_in, None
        if any(base.directory.resolve() == other.resolve() for other in seen):
            raise CheckpointError(f"{_show([*seen, base.directory])}: the chain of adapters runs in a circle")
        if wanted is None:
            notices.append(
                f"{current.directory}: this format does not tell which weights it was trained on, so "
                f"{base.directory} is taken as its base by shape alone"
            )
        elif not allow_base_mismatch:
            _check_base(current, base)
        if (quantized := current.base.quantized) is not None:
            what = quantized.quantizer.describe()
            notices.append(f"{current.directory}: was trained on {base.directory} quantised to {what}")
        if (then := current.text_facts) is not None:
            adds_tokens = current.rows is not None
            notices += changed_text(then, current.directory, base.directory, adds_tokens=adds_tokens)
        current = base
    notices += current.notices
    if stand_in is not None:
        unused = f"{setting('base_checkpoint_dir')} {base_dir}"
        raise CheckpointError(f"{path}: is not an adapter, so {unused} has no effect")
    if isinstance(current.config, TransformersConfig):
        for adapter in adapters:
            check_adapter(current.config, adapter)
    return Chain(current, _completed(current, adapters[::-1]), notices, allow_base_mismatch)


def _completed(base: FullModel, adapters: list[Adapter]) -> list[Adapter]:
    """The adapters, innermost first, with the weights that the rows of added tokens make of those
    below them."""
    weights: dict[str, Tensor | None] = {}
    for name in {name for adapter in adapters if adapter.rows for name in adapter.rows.tensors}:
        weight = base.tensors.get(name)
        weights[name] = weight.tensor() if isinstance(weight, Quantized) else weight
    done: list[Adapter] = []
    for adapter in adapters:
        if adapter.rows and (
            below := {*adapter.rows.tensors} & {n for a in done for n in names_of(a.updates)}
        ):
            raise CheckpointError(
                f"{adapter.file}: adds tokens to {sorted(below)[0]}, which an adapter below it updates; "
                "merge that one first"
            )
        done.append(adapter.completed(weights))
        weights |= {name: tensor for name, tensor in done[-1].whole.items() if name in weights}
    return done


def _recorded_base(
    adapter: Adapter, seen: list[Path], base_dir: Path | None, *, required: bool
) -> FullModel | Adapter | None:
    """The base where its adapter says: first relative to the adapter, then at its absolute path."""
    recorded = adapter.base
    relative = Path(os.path.normpath(adapter.directory.absolute() / recorded.path))
    for place in (relative, Path(recorded.absolute_path)):
        if is_checkpoint(place):
            return open_checkpoint(_short(place), base_dir=base_dir, above=tuple(seen))
    if required:
        chain = _show([*seen, _short(relative)])
        raise CheckpointError(
            f"{chain}: the last is not a checkpoint directory; name the base with "
            f"{setting('base_checkpoint_dir')}"
        )
    return None


def _check_base(adapter: Adapter, base: FullModel | Adapter) -> None:
    go_on = f"or go on with {setting('allow_base_mismatch')}"
    if not base.answers_to(adapter.base.fingerprint):
        raise BaseMismatchError(
            f"{base.directory}: not the base that {adapter.directory} was trained on (fingerprint "
            f"{base.fingerprint}, not {adapter.base.fingerprint}); name the right one, {go_on}"
        )
    here, there = adapter.directory / CONFIG_FILE, base.directory / CONFIG_FILE
    trained = load_architecture(here) if here.is_file() else None
    config = base.config if isinstance(base, FullModel) else None
    if trained is not None and config is None and there.is_file():
        config = load_architecture(there)
        if isinstance(config, ModelConfig):
            # Adapters below may add tokens and untie the output head; their fingerprints tell.
            changed = {name: getattr(trained, name) for name in ("vocab_size", "tie_word_embeddings")}
            config = replace(config, **changed)
    if trained is not None and config is not None and trained != config:
        ours, theirs = trained.facts(), config.facts()
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise BaseMismatchError(
            f"{base.directory}: {name} is {theirs.get(name)}, but {adapter.directory} was trained with "
            f"{ours.get(name)}; name the right base, {go_on}"
        )


def _show(directories: list[Path]) -> str:
    return " -> ".join(map(str, directories))


def _short(path: Path) -> Path:
    """A path as a person would type it: relative if it lies below the current directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# ---- writing


@dataclass(frozen=True)
class Beside:
    """What a directory holds beside the weights, the architecture and the tokenizer."""

    prompt_style: PromptStyle | None = None
    """None: the first that `sidecars_from` has."""
    hyperparameters: str | None = None
    """YAML text of the settings of the command that made it."""
    state: dict[str, Any] | None = None
    """What resuming the run from here needs: the content of state.pth."""
    stops: tuple[int, ...] = ()
    """Tokens that its generation_config.json names besides those that it has."""
    base: FullModel | None = None
    """The model that a full one was made from: what that has beside its language model goes along, and
    its experts lie as they did there."""


def write_full(
    directory: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    config: Architecture,
    *,
    sidecars_from: list[Path],
    beside: Beside = Beside(),
    merged_from: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a full model; see `_write`. `merged_from` is the fingerprint of the chain that it was
    merged from and can stand for."""
    base = beside.base

    def entry(staging: Path, file: TorchFile, written: dict[str, Written]) -> dict[str, Any]:
        if base is not None and base.parts is not None:
            base.parts.write(staging)
        apart = base is not None and base.apart
        if merged_from is None:
            return full_entry(apart=apart)
        found = fingerprint({name: file.read(tensor) for name, tensor in written.items()})
        return full_entry({"chain": merged_from, "result": found}, apart=apart)

    _write(directory, tensors, config, sidecars_from, beside, entry, check)


def write_adapter(
    directory: Path,
    adapter: Adapter,
    config: Architecture,
    *,
    sidecars_from: list[Path],
    beside: Beside = Beside(),
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter that has a base, and `config`, the base's architecture; see `_write`."""

    def entry(staging: Path, file: TorchFile, written: dict[str, Written]) -> dict[str, Any]:
        return adapter_entry(adapter, text_facts(staging))

    _write(directory, adapter.tensors, config, sidecars_from, beside, entry, check)


def _write(
    directory: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    config: Architecture,
    sources: list[Path],
    beside: Beside,
    entry: Callable[[Path, TorchFile, dict[str, Written]], dict[str, Any]],
    check: Callable[[Path], None] | None,
) -> None:
    """Write a whole checkpoint directory, replacing what is there; it appears complete or not at
    all.

    The weights are written a block at a time: they may be mapped, on a GPU, or computed on demand.
    The tokenizer's files, and the prompt style unless one is given, are copied from the first of
    the `sources` that has them. `check` inspects the complete directory before it gets its name;
    if it raises, the directory is removed.
    """
    with replacing_directory(directory) as staging:
        (staging / CONFIG_FILE).write_text(
            yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8"
        )
        styles = [own_file(source / STYLE_FILE) for source in sources if has_file(source / STYLE_FILE)]
        for file in (*find_sidecars(sources), *styles[:1]):
            shutil.copyfile(file, staging / file.name)
        name_stops(staging, list(beside.stops))
        if beside.prompt_style is not None:
            write_style(staging, beside.prompt_style)
        if beside.hyperparameters is not None:
            (staging / HYPERPARAMETERS_FILE).write_text(beside.hyperparameters, encoding="utf-8")
        if beside.state is not None:
            torch_file.save(staging / STATE_FILE, beside.state)
        with TorchFile(staging / WEIGHTS_FILE, cached=check is not None) as file:
            written = {name: file.add(tensor) for name, tensor in tensors.items()}
            file.finish({"model": written, "litlora": entry(staging, file, written)})
        if check is not None:
            check(staging)
