"""The checkpoint layout: reading, writing, fingerprints, and the chain from an adapter down to its
base.

A checkpoint directory holds `lit_model.pth`, `model_config.yaml`, the tokenizer's files,
`prompt_style.yaml` and, if a run made it, `hyperparameters.yaml`. `lit_model.pth` is one dict:
"model" maps names to tensors, "litlora" describes them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from litlora.config import CONFIG_FILE, ModelConfig
from litlora.errors import BaseMismatchError, CheckpointError, UserError
from litlora.formats import litgpt, peft
from litlora.formats.folder import is_model_folder
from litlora.formats.huggingface import open_folder
from litlora.frozen import bitsandbytes
from litlora.frozen.bitsandbytes import Quantized
from litlora.lora.adapter import parse_settings
from litlora.lora.select import layer_rank
from litlora.model import GPT
from litlora.paths import HYPERPARAMETERS_FILE, STATE_FILE, WEIGHTS_FILE, checkpoint_dir, is_checkpoint
from litlora.prompts import STYLE_FILE, PromptStyle
from litlora.settings import LoRAConfig, stored_values
from litlora.storage import torch_file
from litlora.storage.atomic import replacing_directory
from litlora.storage.fingerprint import fingerprint
from litlora.storage.tensors import open_torch
from litlora.storage.torch_file import LazyTensor, TorchFile
from litlora.storage.untrusted import own_file, read_yaml
from litlora.tokenizer import TOKENIZER_FILE, find_sidecars

FORMAT = 1
"""Version of the layout, stored in every file; a newer one is refused."""


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What weights may be stored in."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its tensors are memory-mapped, so nothing is read before it is used."""

    directory: Path
    tensors: dict[str, Tensor | Quantized]
    meta: dict[str, Any]
    """The "litlora" entry: format, kind, and for an adapter "lora" and "base"."""
    file: Path
    """The file that an error about the weights should name."""
    config: ModelConfig | None = None
    """The architecture, of full weights."""

    @property
    def is_adapter(self) -> bool:
        return self.meta["kind"] == "adapter"

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights. An adapter's covers its settings and its base's fingerprint as
        well."""
        if not self.is_adapter:
            return fingerprint(self.tensors)
        facts = {"lora": self.meta["lora"], "base": self.meta["base"]["fingerprint"]}
        return fingerprint(self.tensors, json.dumps(facts, sort_keys=True))

    def answers_to(self, wanted: str) -> bool:
        """Whether these weights are those of that fingerprint: their own, or that of the chain they
        were merged from."""
        # Merged weights answer to their chain's fingerprint only while nobody has touched them.
        return wanted == self.fingerprint or self.meta.get("merged") == {
            "chain": wanted,
            "result": self.fingerprint,
        }


@dataclass(frozen=True)
class Chain:
    """A model as the layout stores it: full weights, and the adapters to merge into them, innermost
    first."""

    base: Checkpoint
    adapters: list[Checkpoint]
    config: ModelConfig
    notices: list[str] = field(default_factory=list)
    """What could not be verified, a line each; every command says it."""

    @property
    def top(self) -> Checkpoint:
        """What the user named: the outermost adapter, or the base itself."""
        return self.adapters[-1] if self.adapters else self.base

    @property
    def inner(self) -> "Chain":
        """What the outermost adapter was trained on."""
        return replace(self, adapters=self.adapters[:-1])

    @property
    def directories(self) -> list[Path]:
        """Where the links lie, the base's directory first."""
        return [link.directory for link in (self.base, *self.adapters)]

    @property
    def sources(self) -> list[Path]:
        """The same, outermost first: where the files beside the weights are looked for."""
        return self.directories[::-1]


# ---- reading


def open_checkpoint(path: Path, *, base_dir: Path | None = None, above: tuple[Path, ...] = ()) -> Checkpoint:
    """Open a checkpoint directory, or the weights' file in one. Raises CheckpointError for anything
    but a sound file.

    An adapter of another format can only be read beside its base: `base_dir`, or the one that it
    names. `above` are the adapters that led here.
    """
    directory = checkpoint_dir(path)
    for kind in (peft, litgpt):
        if kind.adapter_file(directory) is not None:
            return _open_foreign(directory, base_dir, above, kind)
    file = directory / WEIGHTS_FILE
    if not file.is_file() and is_model_folder(directory):
        tensors, config, weights = open_folder(directory)
        return _fitting(Checkpoint(directory, tensors, full_meta(), weights, config))
    content = open_torch(file)
    if litgpt.is_litgpt(directory) and not (isinstance(content, dict) and "litlora" in content):
        config = litgpt.load_config(directory)
        return _fitting(
            Checkpoint(directory, litgpt.read_full(file, content, config), full_meta(), file, config)
        )
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("litlora"), dict)
        or not isinstance(content.get("model"), dict)
    ):
        raise CheckpointError(f'{file}: not written by litlora: it lacks the entries "model" and "litlora"')
    tensors, meta = content["model"], content["litlora"]
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: has format {meta.get('format')!r}; this version of litlora reads format {FORMAT}"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f'{file}: the entry {name!r} of "model" is not a tensor')
    if meta.get("kind") == "adapter":
        _check_adapter(file, tensors, meta)
        return Checkpoint(directory, tensors, meta, file)
    if meta.get("kind") != "full":
        raise CheckpointError(f"{file}: kind is {meta.get('kind')!r}; it must be full or adapter")
    merged = meta.get("merged", {"chain": "", "result": ""})
    if not isinstance(merged, dict) or {name: type(value) for name, value in merged.items()} != {
        "chain": str,
        "result": str,
    }:
        raise CheckpointError(f"{file}: merged is {merged!r}; it must name the chain and the result")
    return _fitting(Checkpoint(directory, tensors, meta, file, ModelConfig.load(directory / CONFIG_FILE)))


def _fitting(found: Checkpoint) -> Checkpoint:
    """The full checkpoint, if it fits its architecture: it may be merged or converted without being
    loaded."""
    if odd := [name for name, tensor in found.tensors.items() if tensor.dtype not in DTYPES]:
        kind = str(found.tensors[odd[0]].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{found.file}: {odd[0]} is {kind}; weights are read in float32, bfloat16, float16 and float64"
        )
    config, count = found.config, len(found.tensors)
    modules = config.num_hidden_layers + (config.num_hidden_layers - len(config.dense_layers)) * (
        config.num_experts or 0
    )
    if config.qk_norm == "each_head":
        modules += config.num_hidden_layers * config.num_attention_heads
    if modules > count:  # before a model of that many parts is built to compare with
        raise CheckpointError(
            f"{found.file}: holds {count} weights; its configuration describes {modules:,} modules or more"
        )
    try:
        GPT.without_weights(found.config).check_fit(found.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{found.file}: {error}") from None
    return found


def _open_foreign(directory: Path, base_dir: Path | None, above: tuple[Path, ...], kind: Any) -> Checkpoint:
    """An adapter of another format, read by the module `kind`: its own files do not tell the
    architecture, its base does."""
    name, place = kind.base_of(directory)
    if base_dir is None and place is None:
        what = f"its base {name!r} is no directory here" if name else "it does not name its base"
        raise CheckpointError(
            f"{directory}: {what}; name its directory with --base_checkpoint_dir (in scripts: --checkpoint_dir)"
        )
    below, above = base_dir or _short(place), (*above, directory)
    if any(below.resolve() == other.resolve() for other in above):
        raise CheckpointError(f"{_show([*above, below])}: the chain of adapters runs in a circle")
    base = resolve(
        below, above=above, allow_base_mismatch=True
    )  # for its shapes only; whoever resolves this link checks it
    tensors, lora = kind.read_adapter(directory, base.config, base.base.tensors)
    return Checkpoint(
        directory,
        tensors,
        _foreign_meta(directory, stored_values(lora), base.top.directory),
        kind.adapter_file(directory),
    )


def _foreign_meta(directory: Path, lora: dict[str, Any], base_dir: Path) -> dict[str, Any]:
    """The "litlora" entry of an adapter of another format: nothing in it identifies the base."""
    place = base_dir.absolute()
    base = {
        "path": os.path.relpath(place, directory.absolute()),
        "absolute_path": str(place),
        "fingerprint": None,
    }
    return {"format": FORMAT, "kind": "adapter", "lora": lora, "base": base}


def _check_adapter(file: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    kinds = {
        "lora": {"rank": int, "alpha": float},
        "base": {"path": str, "absolute_path": str, "fingerprint": str},
    }
    for entry, fields in kinds.items():
        for name, kind in fields.items():
            value = meta[entry].get(name) if isinstance(meta.get(entry), dict) else None
            if type(value) is not kind:
                raise CheckpointError(
                    f"{file}: an adapter must describe itself, but its {entry}.{name} is {value!r}"
                )
    lora = meta["lora"]
    try:
        config = parse_settings(lora)
        if not isinstance(config.modules_to_save, list):
            raise TypeError(f"modules_to_save is {config.modules_to_save!r}")
    except (
        UserError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
    ) as error:  # values of strange types
        raise CheckpointError(
            f"{file}: rank {lora['rank']} and alpha {lora['alpha']} make no adapter: {error}"
        ) from None
    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        raise CheckpointError(
            f"{file}: {odd[0]} is {tensors[odd[0]].dtype}; an adapter's tensors are floating-point numbers"
        )
    for module in adapter_modules(tensors):
        A, B = tensors.get(f"{module}.lora_A"), tensors.get(f"{module}.lora_B")
        if A is None or B is None:
            raise CheckpointError(f"{file}: {module} has lora_A or lora_B, but not both")
        rank = layer_rank(config, module)
        if (
            A.ndim != 2
            or B.ndim != 2
            or A.size(0) != rank
            or B.size(1) != rank
            or not (A.numel() and B.numel())
        ):
            raise CheckpointError(
                f"{file}: {module}: A {tuple(A.shape)} and B {tuple(B.shape)} make no update of rank {rank}"
            )
    whole = [f".{name}." for name in config.modules_to_save]
    if odd := sorted(
        name for name in whole_tensors(tensors) if not any(part in f".{name}" for part in whole)
    ):
        raise CheckpointError(f"{file}: {odd[0]} is not part of an adapter")
    if not tensors:
        raise CheckpointError(f"{file}: the adapter is empty")


def adapter_modules(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the layers that an adapter updates."""
    return list(
        dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith((".lora_A", ".lora_B")))
    )


def whole_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter that replace the base's of the same name."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith((".lora_A", ".lora_B"))}


def resolve(
    path: Path,
    *,
    base_dir: Path | None = None,
    allow_base_mismatch: bool = False,
    above: tuple[Path, ...] = (),
) -> Chain:
    """Follow a checkpoint down to its base and check every link.

    `base_dir` stands in for a base that is not where its adapter says: for the first link whose
    fingerprint it matches, else for the last. Raises CheckpointError for a missing link or a cycle,
    BaseMismatchError for a base that is not the one trained on, each showing the chain. `above` are
    adapters that led to this one.
    """
    stand_in = open_checkpoint(base_dir) if base_dir is not None else None
    current, adapters, seen, notices = (
        open_checkpoint(path, base_dir=base_dir, above=above),
        [],
        list(above),
        [],
    )
    while current.is_adapter:
        seen.append(current.directory)
        adapters.append(current)
        foreign = (
            current.meta["base"]["fingerprint"] is None
        )  # another format's: whatever base is named is taken
        if stand_in is not None and (foreign or stand_in.answers_to(current.meta["base"]["fingerprint"])):
            base, stand_in = stand_in, None
        else:
            base = _recorded_base(current, seen, base_dir, required=stand_in is None)
            if stand_in is not None and (base is None or not base.is_adapter):
                base, stand_in = stand_in, None
        if any(base.directory.resolve() == other.resolve() for other in seen):
            raise CheckpointError(f"{_show([*seen, base.directory])}: the chain of adapters runs in a circle")
        if foreign:
            notices.append(
                f"{current.directory}: this format does not tell which weights it was trained on, so {base.directory} "
                "is taken as its base by shape alone"
            )
        elif not allow_base_mismatch:
            _check_base(current, base)
        notices += _taught_otherwise(current, base)
        current = base
    if line := bitsandbytes.notice(current.directory, current.tensors):
        notices.append(line)
    if stand_in is not None:
        raise CheckpointError(f"{path}: is no adapter, so --base_checkpoint_dir {base_dir} has no use")
    return Chain(current, adapters[::-1], current.config, notices)


def _recorded_base(
    adapter: Checkpoint, seen: list[Path], base_dir: Path | None, *, required: bool
) -> Checkpoint | None:
    """The base where its adapter says it is: beside the adapter first, then at its place of old."""
    recorded = adapter.meta["base"]
    places = [
        Path(os.path.normpath(adapter.directory.absolute() / recorded["path"])),
        Path(recorded["absolute_path"]),
    ]
    for place in places:
        if is_checkpoint(place):
            return open_checkpoint(_short(place), base_dir=base_dir, above=tuple(seen))
    if required:
        chain = _show([*seen, _short(places[0])])
        raise CheckpointError(
            f"{chain}: the last is no checkpoint directory; name the base with --base_checkpoint_dir"
        )
    return None


def _check_base(adapter: Checkpoint, base: Checkpoint) -> None:
    if not base.answers_to(adapter.meta["base"]["fingerprint"]):
        raise BaseMismatchError(
            f"{base.directory}: not the base that {adapter.directory} was trained on (fingerprint {base.fingerprint}, "
            f"not {adapter.meta['base']['fingerprint']}); name the right one, or go on with --allow_base_mismatch"
        )
    here, there = adapter.directory / CONFIG_FILE, base.directory / CONFIG_FILE
    config = base.config or (ModelConfig.load(there) if there.is_file() else None)
    if here.is_file() and config is not None and (trained := ModelConfig.load(here)) != config:
        ours, theirs = trained.to_dict(), config.to_dict()
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise BaseMismatchError(
            f"{base.directory}: {name} is {theirs.get(name)}, but {adapter.directory} was trained with {ours.get(name)}; "
            "name the right base, or go on with --allow_base_mismatch"
        )


def _taught(directory: Path) -> dict[str, str]:
    """What the text that a model of this directory sees depends on: a digest of its tokenizer, and
    its prompt style."""
    found = {}
    if (file := directory / TOKENIZER_FILE).is_file():
        with file.open("rb") as stream:
            found["tokenizer"] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    if (file := directory / STYLE_FILE).is_file():
        values = read_yaml(file)
        found["prompt_style"] = str(values.get("style") if isinstance(values, dict) else values)
    return found


def _taught_otherwise(adapter: Checkpoint, base: Checkpoint) -> list[str]:
    """What is to be said if an adapter's text is no longer what it was trained on, or was not its
    base's: either may be meant."""
    then = adapter.meta.get("taught")
    if not isinstance(then, dict):  # adapters of before say nothing
        return []
    now, below, said = _taught(adapter.directory), _taught(base.directory), []
    if now.get("tokenizer", then.get("tokenizer")) != then.get("tokenizer"):
        said.append(
            f"{adapter.directory / TOKENIZER_FILE}: is not the tokenizer that this adapter was trained with"
        )
    elif below.get("tokenizer", then.get("tokenizer")) != then.get("tokenizer"):
        said.append(
            f"{base.directory / TOKENIZER_FILE}: is not the tokenizer that {adapter.directory} was trained with, whose own is used"
        )
    if now.get("prompt_style") != then.get("prompt_style"):
        style, other = now.get("prompt_style"), then.get("prompt_style")
        said.append(
            f"{adapter.directory / STYLE_FILE}: says {style}, but this adapter was trained with the prompt style {other}"
        )
    return said


def _show(directories: list[Path]) -> str:
    return " -> ".join(map(str, directories))


def _short(path: Path) -> Path:
    """A path as a person would type it: relative if it lies below the current directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# ---- writing


def full_meta(**more: Any) -> dict[str, Any]:
    """The "litlora" entry of a full checkpoint."""
    return {"format": FORMAT, "kind": "full", **more}


def adapter_meta(lora: LoRAConfig, base: Checkpoint, directory: Path) -> dict[str, Any]:
    """The "litlora" entry of an adapter that will lie in `directory`, trained on `base`."""
    place = base.directory.absolute()
    return {
        "format": FORMAT,
        "kind": "adapter",
        "lora": stored_values(lora),
        "base": {
            "path": os.path.relpath(
                place, directory.absolute()
            ),  # relative, so that moving the whole tree keeps working
            "absolute_path": str(place),  # and this, so that moving the adapter alone does
            "fingerprint": base.fingerprint,
        },
    }


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    meta: dict[str, Any] | Callable[[dict[str, Tensor]], dict[str, Any]],
    config: ModelConfig,
    *,
    sidecars_from: Path | list[Path],
    prompt_style: PromptStyle | None = None,
    hyperparameters: str | None = None,
    state: dict[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a whole checkpoint directory, in place of whatever is there; it appears complete or not
    at all.

    The weights are written a block at a time, whether they are mapped, lie on a GPU or are computed
    as they are asked for. `meta` is the "litlora" entry, or makes it from the tensors as written.
    The tokenizer's files are copied from `sidecars_from` (of several directories, from the first
    that has them), and so is the prompt style unless one is given. `hyperparameters` is the YAML
    text of the run's settings, `state` what resuming the run from here needs besides. `check` looks
    at the complete directory before it gets its name; if it raises, nothing is left of it.
    """
    with replacing_directory(directory) as staging:
        (staging / CONFIG_FILE).write_text(
            yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8"
        )
        sources = [sidecars_from] if isinstance(sidecars_from, Path) else sidecars_from
        styles = [
            own_file(directory / STYLE_FILE) for directory in sources if (directory / STYLE_FILE).is_file()
        ]
        for file in (*find_sidecars(sources), *styles[:1]):
            shutil.copyfile(file, staging / file.name)
        if prompt_style is not None:
            (staging / STYLE_FILE).write_text(yaml.safe_dump({"style": prompt_style.name}), encoding="utf-8")
        if hyperparameters is not None:
            (staging / HYPERPARAMETERS_FILE).write_text(hyperparameters, encoding="utf-8")
        if state is not None:
            torch_file.save(staging / STATE_FILE, state)
        with TorchFile(staging / WEIGHTS_FILE, cached=check is not None) as file:
            written = {name: file.add(tensor) for name, tensor in tensors.items()}
            if callable(meta):
                meta = meta({name: file.read(tensor) for name, tensor in written.items()})
            if meta["kind"] == "adapter":
                meta = {**meta, "taught": _taught(staging)}
            file.finish({"model": written, "litlora": meta})
        if check is not None:
            check(staging)
