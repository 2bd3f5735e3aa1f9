"""The README.md of an exported folder: a model card that says what the files beside the weights tell,
and nothing else. Torch-free until it is written.

People publish these folders. So a path of this machine appears as its last two parts alone.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from litlora.console import shown
from litlora.formats.families import HF_CONFIG_FILE
from litlora.hub import STATE_DIR, origin
from litlora.paths import CARD_FILE, FINAL, HYPERPARAMETERS_FILE, LICENCE_FILES
from litlora.prompts.styles import TEMPLATE_FILE
from litlora.report.history import History, flat_settings, read_history
from litlora.report.metrics import METRICS_FILE
from litlora.storage.untrusted import YAML_ERRORS, has_file, read_json_object, read_text
from litlora.tokenizer import read_settings

if TYPE_CHECKING:
    from litlora.checkpoint import Chain
    from litlora.lora import Adapter

LARGEST_TEXT = 2**20
"""Characters of a README.md or a licence that are read."""
OWNER_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
SETTINGS = (
    *("train.epochs", "train.max_steps", "train.global_batch_size", "train.packing", "train.max_seq_length"),
    *("train.learning_rate", "train.warmup_steps", "train.optimizer", "train.weight_decay"),
    *("lora.rank", "lora.alpha", "lora.dropout", "lora.targets", "lora.variant", "lora.init", "lora.rslora"),
    *("quantize", "preference.loss", "preference.beta", "teacher", "distill.temperature"),
    *("precision", "seed", "prompt_style"),
)
"""What a card shows of a run's settings, by their full names; all of them are in the run's
hyperparameters.yaml."""
PATHS = ("teacher", "prompt_style", "data.path", "data.init_args.path")


@dataclass(frozen=True)
class Use:
    """What an exported folder is, and how people load it."""

    library: str
    """library_name of the hub: transformers, peft, mlx, gguf."""
    what: str
    """In words: "as a Hugging Face folder"."""
    load: str
    """Code in Python."""
    asked: str | None = None
    """How it is asked and where its answers end; None: the code shows it."""
    base_model: str | None = None
    """The base's name on the hub, if whoever exports says so."""
    is_adapter: bool = False
    """Whether it needs its base beside it."""
    task: str = "text-generation"
    """pipeline_tag of the hub: what a page there offers to try."""


def write_card(directory: Path, chain: "Chain", use: Use) -> None:
    """Write the README.md of a folder that was exported from a chain."""
    (directory / CARD_FILE).write_text(card(chain, use), encoding="utf-8")


def card(chain: "Chain", use: Use) -> str:
    """The text of a README.md."""
    run = run_of(chain.top.directory)
    base = _base_of(chain, run)
    licence = licence_of(base)
    facts: dict[str, Any] = {"library_name": use.library}
    facts["pipeline_tag"] = use.task
    if (base_id := use.base_model or hub_name(base)) is not None:
        facts["base_model"] = base_id
        if use.is_adapter or chain.adapters or run is not None:
            # Said, as the hub would take a GGUF file of a tuned model for its base in fewer bits.
            facts["base_model_relation"] = "adapter" if use.is_adapter else "finetune"
    facts |= licence.linked(base_id)
    facts["tags"] = ["litlora", *(["lora"] if chain.adapters else [])]
    if (data_id := _hub_data(run)) is not None:
        facts["datasets"] = [data_id]
    parts = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(chain.top.directory.absolute().name if run is None else name_of(chain.top.directory))}",
        f"{_method(chain, run)}, {use.what}.",
        _weights(chain, base, licence),
        _training(run),
        f"## How to load it\n\n```python\n{use.load}\n```" + (f"\n\n{use.asked}" if use.asked else ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- how each kind of folder is loaded


_ASK = """
messages = [{"role": "user", "content": "What is a llama?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))"""


TASKS = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text"}


def of_folder(directory: Path) -> Use:
    """A Hugging Face folder that is complete but for its card."""
    named = str(read_json_object(directory / HF_CONFIG_FILE).get("architectures", [""])[0])
    loader = (
        "AutoModelForCausalLM"
        if named.endswith(("CausalLM", "LMHeadModel"))
        else "AutoModelForImageTextToText"
    )
    load = f"""\
from transformers import {loader}, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = {loader}.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)"""
    asked = None if _has_template(directory) else "It has no chat template: it continues a text."
    what = "as a Hugging Face folder"
    return Use("transformers", what, load + ("" if asked else _ASK), asked, task=TASKS[loader])


def of_peft(chain: "Chain", base_model: str | None, directory: Path, quantised_by: str) -> Use:
    """A PEFT folder that is complete but for its card; `quantised_by` is what makes transformers
    quantise the base as in training."""
    loader = "AutoModelForImageTextToText" if chain.base.parts else "AutoModelForCausalLM"
    base = base_model or hub_name(chain.base.directory) or _last_parts(chain.base.directory)
    config = ", BitsAndBytesConfig" if quantised_by else ""
    load = f"""\
from peft import PeftModel
from transformers import {loader}, AutoTokenizer{config}

folder = "."  # this folder, or its name on the hub
base = {json.dumps(base)}  # a Hugging Face folder of the base, or its name on the hub
model = {loader}.from_pretrained(base{quantised_by})
"""
    rows = chain.top.rows
    if rows is not None and rows.num_rows > chain.config.vocab_size:
        load += f"model.resize_token_embeddings({rows.num_rows})\n"
    load += "model = PeftModel.from_pretrained(model, folder)"
    if _has_template(directory):
        load += "\ntokenizer = AutoTokenizer.from_pretrained(folder)" + _ASK
    else:
        load = load.replace(", AutoTokenizer", "")
    said = _said_name(base_model)
    return Use("peft", "as a PEFT folder", load, base_model=said, is_adapter=True, task=TASKS[loader])


def of_mlx(base_model: str) -> Use:
    """An adapter folder of mlx-lm."""
    said = _said_name(base_model)
    name = said or _last_parts(Path(base_model))
    load = f"""\
from mlx_lm import generate, load

model, tokenizer = load({json.dumps(name)}, adapter_path=".")
messages = [{{"role": "user", "content": "What is a llama?"}}]
print(generate(model, tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True)))"""
    return Use("mlx", "as an adapter of mlx-lm", load, base_model=said, is_adapter=True)


def of_gguf(file: str, asked: str, *, is_adapter: bool) -> Use:
    """A GGUF file, of a model or of an adapter for a file of its base."""
    what = f'"BASE.gguf", lora_path="{file}"' if is_adapter else f'"{file}"'
    load = f"""\
from llama_cpp import Llama

model = Llama({what})  # or llama-server of llama.cpp, or Ollama with the Modelfile
messages = [{{"role": "user", "content": "What is a llama?"}}]
print(model.create_chat_completion(messages, max_tokens=100)["choices"][0]["message"]["content"])"""
    what = "as a GGUF adapter" if is_adapter else "as a GGUF file"
    return Use("gguf", what, load, asked, is_adapter=is_adapter)


def _has_template(directory: Path) -> bool:
    settings = read_settings(directory / "tokenizer_config.json")
    return has_file(directory / TEMPLATE_FILE) or bool(settings.get("chat_template"))


# ---- what made it


@dataclass(frozen=True)
class Run:
    """What a run left beside a checkpoint."""

    history: History
    """Without rows, unless the checkpoint is what the run ended with."""
    data: str | None
    """What it said of its data."""


def run_of(directory: Path) -> Run | None:
    """The run that made a checkpoint; None if nothing beside it tells."""
    file = directory / HYPERPARAMETERS_FILE
    if not has_file(file):
        return None
    place = directory.absolute().parent
    whole = directory.absolute().name == FINAL and has_file(place / METRICS_FILE)
    history = read_history(place, file) if whole else _settings_alone(directory, file)
    first = read_text(file).partition("\n")[0]
    return Run(history, first.removeprefix("# data: ") if first.startswith("# data: ") else None)


def _settings_alone(directory: Path, file: Path) -> History:
    return History(str(directory), (), [], flat_settings(file))


def _base_of(chain: "Chain", run: Run | None) -> Path:
    """Where training began: of a model that was trained whole, where its run says."""
    named = None if run is None or chain.adapters else run.history.settings.get("checkpoint_dir")
    return Path(named) if isinstance(named, str) else chain.base.directory


def _method(chain: "Chain", run: Run | None) -> str:
    """What was trained, as a sentence without its end."""
    base = _place(_base_of(chain, run))
    settings = {} if run is None else run.history.settings
    how = "fine-tuned"
    if "preference.loss" in settings:
        how = f"tuned on preferences ({_text(settings['preference.loss'])})"
    elif "teacher" in settings:
        how = f"distilled from {_place(Path(str(settings['teacher'])))}"
    if not chain.adapters:
        return f"{base}, all of it" if run is None else f"{base}, {how} as a whole"
    below = f" on {_place(chain.inner.top.directory)}" if len(chain.adapters) > 1 else ""
    return f"{base}, {how} with {_adapter(chain.adapters[-1])}{below}"


def _adapter(adapter: "Adapter") -> str:
    """An adapter's kind and size, as its own file says."""
    ranks = sorted({update.rank for update in adapter.updates.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    names = sorted({name.rpartition(".")[2] for name in adapter.updates})
    kind = {"lora": "LoRA", "dora": "DoRA"}.get(adapter.config.variant, adapter.config.variant)
    whole = f", and {len(adapter.whole)} tensors trained whole" if adapter.whole else ""
    rows = f", and {len(adapter.rows.ids)} added tokens" if adapter.rows is not None else ""
    return (
        f"{kind} of {rank} on {', '.join(map(_text, names))}{whole}{rows}"
        if names
        else f"an adapter{whole}{rows}"
    )


def _weights(chain: "Chain", base: Path, licence: "Licence") -> str:
    """The table of the weights that a folder was made of."""
    is_trained = base.absolute() != chain.base.directory.absolute()
    whose = "fingerprint of the trained weights" if is_trained else "its fingerprint"
    lines = [f"| base | {_place(base)} |", f"| {whose} | `{chain.base.fingerprint}` |"]
    for link in chain.adapters[:-1]:
        lines.append(f"| adapter below | {_place(link.directory)}, fingerprint `{link.fingerprint}` |")
    if chain.adapters and (quantized := chain.top.base.quantized) is not None:
        lines.append(f"| quantised while training | {_text(quantized.quantizer.describe())} |")
    lines.append(f"| licence of the base | {licence.said} |")
    note = (
        "The fingerprint is litlora's: a hash over names, shapes, number formats and a sample of the bytes "
        "of every weight."
    )
    return "\n".join(["## Base", "", "| | |", "| --- | --- |", *lines, "", note])


def _training(run: Run | None) -> str:
    if run is None:
        return "## Training\n\nNothing beside the weights says how they were trained."
    history, settings = run.history, run.history.settings
    lines = [f"| data | {_data(run)} |"]
    lines += [f"| {name} | {_setting(name, settings[name])} |" for name in SETTINGS if name in settings]
    table = "\n".join(["## Training", "", "| | |", "| --- | --- |", *lines])
    losses, vals, steps = history.column("loss"), history.column("val_loss"), history.steps
    if not losses:
        return table + "\n\nIts losses are not beside this checkpoint."
    said = [f"{steps:,} steps", f"training loss {losses[0]:.4f} at first and {losses[-1]:.4f} at the end"]
    if vals:
        said.append(f"validation loss {min(vals):.4f} at best and {vals[-1]:.4f} at the end")
    if seconds := history.column("seconds"):
        said.append(f"{max(seconds):,.0f} s")
    return f"{table}\n\n{'; '.join(said)}. Losses are in nats a token."


def _data(run: Run) -> str:
    settings = run.history.settings
    kind = settings.get("data.class_path") or settings.get("data")
    place = settings.get("data.init_args.path") or settings.get("data.path")
    found = [_text(kind)] if kind else []
    found += [str(place) if str(place).startswith("hf://") else _place(Path(str(place)))] if place else []
    return ", ".join([*found, *([_text(run.data)] if run.data else [])]) or "not stored"


def _hub_data(run: Run | None) -> str | None:
    """The name of a data set of the hub."""
    settings = {} if run is None else run.history.settings
    place = str(settings.get("data.init_args.path") or settings.get("data.path") or "")
    name = re.match(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?=[@/]|$)", place, re.ASCII)
    return name[1] if name else None


def _setting(name: str, value: Any) -> str:
    if name in PATHS and isinstance(value, str) and os.sep in value:
        return _place(Path(value))
    return _text("default" if value is None else str(value).lower() if isinstance(value, bool) else value)


# ---- the base's licence and name


@dataclass(frozen=True)
class Licence:
    """What a folder says of its model's licence."""

    facts: dict[str, str]
    """The entries of a model card that name it."""
    said: str

    def linked(self, base_id: str | None) -> dict[str, str]:
        """The facts, with a link to a file of the base's folder as one to the base on the hub; without
        it, if the base has no name there: the file is not copied."""
        link = self.facts.get("license_link", "")
        if "://" in link:
            return self.facts
        facts = {key: value for key, value in self.facts.items() if key != "license_link"}
        if link and base_id is not None:
            facts["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{quote(link)}"
        return facts


def licence_of(directory: Path) -> Licence:
    """The licence that a base's folder states, in its model card or in a file; it is not looked up
    anywhere."""
    file = directory / CARD_FILE
    stated = {
        key: str(value)
        for key, value in (front_matter(file) if has_file(file) else {}).items()
        if key in ("license", "license_name", "license_link")
        and isinstance(value, str)
        and value.isprintable()
    }
    beside = [name for name in LICENCE_FILES if has_file(directory / name)]
    if not stated and not beside:
        return Licence({}, "its folder states none")
    said = ", ".join(f"{_text(value)}" for value in stated.values())
    files = f"its folder holds {beside[0]}" if beside else ""
    return Licence(stated, "; ".join(filter(None, [said, files])))


def front_matter(file: Path) -> Mapping[str, Any]:
    """The facts at the beginning of a model card; empty if there are none that can be read."""
    text = file.read_bytes()[:LARGEST_TEXT].decode("utf-8", "replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except YAML_ERRORS:
        return {}
    return values if isinstance(values, dict) else {}


def hub_name(directory: Path) -> str | None:
    """The name on the hub of a model that was downloaded from there: as the download noted it, or else
    that of its directory."""
    if (noted := origin(directory)) is not None:
        return noted
    if not (directory / STATE_DIR / "huggingface").is_dir():
        return None
    name = "/".join(directory.absolute().parts[-2:])
    return name if OWNER_NAME.fullmatch(name) else None


def name_of(directory: Path) -> str:
    """What people call what a run made: the run's directory."""
    place = directory.absolute()
    return place.parent.name if place.name == FINAL else place.name


def _said_name(base_model: str | None) -> str | None:
    """A base's name on the hub, if that is what was said, and not a directory here."""
    is_name = base_model is not None and OWNER_NAME.fullmatch(base_model) and not Path(base_model).is_dir()
    return base_model if is_name else None


def _place(path: Path) -> str:
    return f"`{re.sub('[`|]', '?', shown(_last_parts(path)))}`"


def _last_parts(path: Path) -> str:
    """The last two parts of a path; the last alone if the other is somebody's home directory, which
    bears their name."""
    parent, name = path.absolute().parent, path.absolute().name
    is_home = parent == Path.home() or str(parent.parent) in ("/home", "/Users")
    return name if is_home else "/".join(filter(None, (parent.name, name)))


def _text(value: Any) -> str:
    """Text on one line, without what Markdown or a table would take for its own."""
    return re.sub(r"([|<>`\[\]])", r"\\\1", shown(" ".join(str(value).split())))
