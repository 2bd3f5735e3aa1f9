"""Wrong values for every option of every command and for every field of every file: one line, status
2, nothing changed on the disk.

The cases are generated from the types of the settings and configurations.
"""

import dataclasses
import json
import re
import shutil
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from conftest import REPO, tiny_config
from safetensors.torch import save_file

from litlora import settings as all_settings
from litlora.checkpoint import open_checkpoint, reference_to, write_adapter, write_full
from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.lora import Adapter, LoRAConfig
from litlora.lora.adapter import parse_tensors
from litlora.model import GPT
from litlora.storage.untrusted import read_json_object, read_yaml_mapping

SCRIPTS = {
    str(path.relative_to(REPO)): getattr(all_settings, found[1])
    for folder in ("finetune", "chat", "scripts")
    for path in sorted((REPO / folder).glob("*.py"))
    if (found := re.search(r"run\(main, (\w+)\)", path.read_text()))
}


@pytest.fixture(scope="session")
def sound(tmp_path_factory, tokenizer_dir) -> Path:
    """`base`, an `adapter` on it, `hf` and `peft`, all with the same weights, and `data.jsonl`."""
    place = tmp_path_factory.mktemp("bad_input")
    config, lora = tiny_config(), LoRAConfig(rank=2, targets=["q_proj"])
    tensors = {name: parameter.detach() for name, parameter in GPT(config).named_parameters()}
    write_full(place / "base", tensors, config, sidecars_from=[tokenizer_dir])
    pairs = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        pairs |= {f"{name}.lora_A": torch.randn(2, 32), f"{name}.lora_B": torch.randn(32, 2)}
    reference = reference_to(open_checkpoint(place / "base"), place / "adapter")
    adapter = Adapter(lora, *parse_tensors(pairs, lora), reference)
    write_adapter(place / "adapter", adapter, config, sidecars_from=[tokenizer_dir])
    shutil.copytree(tokenizer_dir, place / "hf")
    save_file(tensors, place / "hf/model.safetensors")
    facts = {name: getattr(config, name) for name in HF_FIELDS if hasattr(config, name)}
    facts |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
    (place / "hf/config.json").write_text(json.dumps(facts))
    (place / "peft").mkdir()
    parts = {f"base_model.model.{name}.weight": tensor for name, tensor in pairs.items()}
    save_file(parts, place / "peft/adapter_model.safetensors")
    (place / "peft/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "base_model_name_or_path": "../base"})
    )
    (place / "data.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 20)
    (place / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 20)
    return place


@pytest.fixture
def place(sound, tmp_path) -> Path:
    shutil.copytree(sound, tmp_path / "it")
    return tmp_path / "it"


def words(script: str, checkpoint: str = "base") -> list[str]:
    """A command that would use a checkpoint, as far as it has the options for it."""
    names = {field.name for field in dataclasses.fields(SCRIPTS[script])}
    found = [script]
    for name, value in (
        ("lora_path", "adapter"),
        ("checkpoint_dir", checkpoint),
        ("teacher", "base"),
        ("out_dir", "out"),
        ("prompt", "Hi"),
        ("prompts", "data.jsonl"),
        ("out_path", "answers.jsonl"),
    ):
        if name in names:
            found += [f"--{name}", value]
    if "train" in names:
        data = "pairs.jsonl" if "preference" in names else "data.jsonl"
        found += ["--data", "JSON", "--data.path", data, "--train.max_steps", "1"]
    return [*found, "--rank", "1"] if script == "scripts/resize_lora.py" else found


# ---- options


def bad_values(kind: Any) -> list[str]:
    if isinstance(kind, types.UnionType):
        return sorted(
            set.intersection(*(set(bad_values(one)) for one in get_args(kind) if one is not type(None)))
        )
    if get_origin(kind) is Literal:
        return ["nonsense", "[1]"]
    return {int: ["many", "1.5", ".nan", "[1]"], float: ["fast", "[1]", "{}"], bool: ["perhaps", "7"]}.get(
        kind, []
    )


def options(kind: type, prefix: str = "--") -> list[tuple[str, str]]:
    found = []
    for name, hint in get_type_hints(kind).items():
        if name in ("data", "name"):
            continue
        if dataclasses.is_dataclass(hint):
            found += options(hint, f"{prefix}{name}.")
        found += [(prefix + name, value) for value in bad_values(hint)]
    return found


OPTIONS = [(script, option, value) for script, kind in SCRIPTS.items() for option, value in options(kind)]


def test_there_is_a_table():
    assert len(OPTIONS) >= 100 and {script for script, _, _ in OPTIONS} >= SCRIPTS.keys() - {
        "scripts/download.py"
    }


SHARED_OPTIONS = ("finetune/distill.py", "finetune/dpo.py", "finetune/full.py", "scripts/show_data.py")
"""Most of their options are those of finetune/lora.py."""
FIRST_OF: dict[str, str] = {}
"""Of each option, the command that the default suite tries it with."""
for tried, option, _ in sorted(OPTIONS, key=lambda case: case[0] in SHARED_OPTIONS):
    FIRST_OF.setdefault(option, tried)


def some(script: str, cases: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One value of each option that is this command's: of all that are wrong for its type in turn."""
    values: dict[str, list[str]] = {}
    for option, value in cases:
        if FIRST_OF[option] == script:
            values.setdefault(option, []).append(value)
    return [(option, wrong[n % len(wrong)]) for n, (option, wrong) in enumerate(values.items())]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_values_of_every_option(script, every, forked, sound):
    cases = [(option, value) for tried, option, value in OPTIONS if tried == script]
    for option, value in cases if every else some(script, cases):
        line = forked.refuses(*words(script), option, value, cwd=sound)
        assert option in line or option.rpartition(".")[2] in line or f"{value}: " in line, (
            option,
            value,
            line,
        )


FOR_ODD_PATHS = ("finetune/lora.py", "scripts/merge_lora.py")


@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=pytest.mark.slow) if s in SHARED_OPTIONS else s for s in SCRIPTS]
)
def test_wrong_paths_of_every_option(script, forked, sound):
    for field in dataclasses.fields(SCRIPTS[script]):
        if field.name in ("checkpoint_dir", "base_checkpoint_dir", "lora_path", "teacher"):
            odd = ("data.jsonl", ".", "a\x1b[2Jb", "x" * 300) if script in FOR_ODD_PATHS else ()
            for path in ("nowhere", *odd):
                line = forked.refuses(*words(script), f"--{field.name}", path, cwd=sound)
                assert path[:4].strip("\x1b[2J") in line, line


# ---- files


def wrong(kind: Any) -> list[Any]:
    """Values that are not of this type."""
    if isinstance(kind, types.UnionType):
        return [value for value in wrong(get_args(kind)[0]) if value is not None]
    if get_origin(kind) is tuple:
        return [5, "x", {"a": 1}, [None], [10**12], [-1]]
    if kind is int:
        return [None, "32", 0, -4, 1.5, float("nan"), 10**12, 10**200, [32], {}, True]
    if kind is float:
        return [None, "x", 0, -1.0, float("nan"), float("inf"), [1.0], True]
    if kind is bool:
        return [None, "yes", 1, []]
    return [5, "nonsense", [], {"a": 1}, True]


CONFIG = [(name, value) for name, kind in get_type_hints(ModelConfig).items() for value in wrong(kind)]
HF_FIELDS = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *("head_dim", "max_position_embeddings", "rope_theta", "tie_word_embeddings"),
)
HF = [
    (name, value)
    for name in HF_FIELDS[:-2]
    for value in ("32", -4, 1.5, float("nan"), 10**12, [32], {"a": 1})
]
HF += [("model_type", value) for value in (None, 5, "evil", [])] + [
    ("rope_scaling", value) for value in ("x", [1], {"type": "x"}, {"a": 1})
]
HF += [("rms_norm_eps", value) for value in ("x", -1, float("inf"), [])] + [
    ("hidden_act", value) for value in ("x", 5, [])
]
PEFT = [("r", value) for value in ("2", 0, -1, 1.5, None, [2], True, 3, 10**9)] + [
    ("peft_type", value) for value in (None, "LOHA", 5, [])
]
PEFT += [("lora_alpha", value) for value in ("x", 0, float("nan"), [], True)] + [
    ("rank_pattern", value) for value in ([], {"(": 2}, {"q_proj": "x"})
]
PEFT += [("base_model_name_or_path", value) for value in (5, [], "nowhere")] + [
    ("lora_dropout", value) for value in ("x", 7, [])
]
LORA = [("rank", value) for value in (None, "2", 0, -1, 2.0, 3, 10**30)] + [
    ("alpha", value) for value in (None, "x", 16, 0.0, float("nan"), [])
]
LORA += [("targets", value) for value in ([], 5)] + [("dropout", value) for value in (1.0, -1, "x")]
LORA += [("rank_pattern", value) for value in (5, [1], {1: 2}, {"q_proj": 0}, {"(?=a)": 2})] + [
    ("modules_to_save", 5)
]
META = [("format", value) for value in (None, 2, "1", [])] + [
    ("kind", value) for value in (None, "half", 5, [])
]
META += [("base", value) for value in (None, [], {}, {"path": 5})] + [
    ("lora", value) for value in (None, [], {})
]
RECORDS = [
    *(
        "5",
        "[]",
        "{",
        '{"instruction": "a"}',
        '{"output": "b"}',
        '{"instruction": 5, "output": "b"}',
        '{"instruction": "a", "output": null}',
    ),
    *(
        '{"instruction": "a", "output": "\\ud800"}',
        "9" * 5000,
        "[" * 100_000,
        "",
        "\x00",
        '{"instruction": "a", "input": [], "output": "b"}',
    ),
]
STYLES = ("", "5", "[]", "style: nonsense", "style: 5", "style: [x]", "style: template", "\t", "a: b: c")
TOKENIZER_CONFIGS = (
    *([], 5, {"eos_token": 5}, {"eos_token": "none such"}),
    *({"eos_token": "<|endoftext|>", "chat_template": value} for value in (5, {"a": 1})),
)
GENERATION_CONFIGS = ([], {"eos_token_id": "x"}, {"eos_token_id": [1.5]})
TOKENIZERS = ("", "{}", "[]", '{"model": 5}')
MODEL_CONFIGS = ("", "5", "[]", "hidden_size: 32", "nonsense: 1", "\t")
SMALL_FILES = [
    *(("base/prompt_style.yaml", text) for text in STYLES),
    *(("base/tokenizer_config.json", json.dumps(value)) for value in TOKENIZER_CONFIGS),
    *(("base/generation_config.json", json.dumps(value)) for value in GENERATION_CONFIGS),
    *(("base/tokenizer.json", text) for text in TOKENIZERS),
    *(("base/model_config.yaml", text) for text in MODEL_CONFIGS),
]


@pytest.mark.parametrize(
    ("read", "text"),
    [(read_json_object, text) for text in ("[]", "5", "null", "{")]
    + [(read_yaml_mapping, text) for text in ("", "5", "[]", "{", "- a: 1")],
)
def test_a_file_that_holds_no_mapping_is_named(read, text, tmp_path):
    file = tmp_path / "a"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=rf"^{file}: (must hold a|cannot be read as)"):
        read(file)
    file.write_text('{"a": 1, "b": {"c": 2}}')
    read(file)["b"]["c"] = 3  # what a caller does to its values does not reach the next one
    assert read(file) == {"a": 1, "b": {"c": 2}}
    with pytest.raises(CheckpointError, match="nowhere: no such file; a model needs it$"):
        read(tmp_path / "nowhere", "a model needs it")


def edit_yaml(file: Path, name: str, value: Any) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), name: value}))


def edit_json(file: Path, name: str, value: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))


def refused(forked: Any, place: Path, file: str, *command: str) -> None:
    line = forked.refuses(*command, cwd=place)
    assert file in line, (command, line)


FIELDS = sorted({name for name, _ in CONFIG})


@pytest.mark.parametrize(
    "name",  # one function checks all: each sixteenth stands for the others
    [pytest.param(name, marks=pytest.mark.slow) if place % 16 else name for place, name in enumerate(FIELDS)],
)
def test_wrong_values_in_model_config_yaml(name, forked, place):
    file = place / "base/model_config.yaml"
    sound = file.read_text()
    for _, value in (case for case in CONFIG if case[0] == name):
        file.write_text(sound)
        edit_yaml(file, name, value)
        refused(forked, place, "base/", *words("chat/base.py"))


@pytest.mark.parametrize(
    "script", ["chat/base.py", "finetune/lora.py", "finetune/full.py", "scripts/convert_lit_checkpoint.py"]
)
def test_every_command_refuses_a_wrong_configuration(script, forked, place):
    edit_yaml(place / "base/model_config.yaml", "num_hidden_layers", 3)
    refused(forked, place, "base/lit_model.pth: weight(s) missing", *words(script))
    (place / "base/lit_model.pth").write_bytes(b"PK\3\4")
    refused(forked, place, "base/lit_model.pth: broken", *words(script))


@pytest.mark.parametrize("name", sorted({name for name, _ in HF}))
def test_wrong_values_in_config_json(name, forked, place):
    file = place / "hf/config.json"
    sound = file.read_text()
    for _, value in (case for case in HF if case[0] == name):
        file.write_text(sound)
        edit_json(file, name, value)
        refused(forked, place, "hf/", *words("scripts/convert_hf_checkpoint.py", "hf"))


@pytest.mark.parametrize("name", sorted({name for name, _ in PEFT}))
def test_wrong_values_in_adapter_config_json(name, forked, place):
    file = place / "peft/adapter_config.json"
    sound = file.read_text()
    for _, value in (case for case in PEFT if case[0] == name):
        file.write_text(sound)
        edit_json(file, name, value)
        if (name, value) == ("r", None):
            continue  # PEFT's default: 8, which the tensors contradict
        refused(forked, place, "peft", "scripts/merge_lora.py", "--lora_path", "peft", "--out_dir", "out")


@pytest.mark.parametrize(("entry", "cases"), [("lora", LORA), (None, META)], ids=["lora", "litlora"])
def test_wrong_values_in_an_adapter(entry, cases, forked, place):
    file = place / "adapter/lit_model.pth"
    sound = torch.load(file, weights_only=True)
    commands = ("scripts/merge_lora.py", "scripts/export_peft.py")
    for number, (name, value) in enumerate(cases):
        meta = sound["litlora"]
        meta = {**meta, entry: {**meta[entry], name: value}} if entry else {**meta, name: value}
        torch.save({**sound, "litlora": meta}, file)
        refused(forked, place, "adapter/lit_model.pth: ", *words(commands[number % 2]))


@pytest.mark.parametrize(
    "script", ["finetune/lora.py", pytest.param("finetune/full.py", marks=pytest.mark.slow)]
)
def test_wrong_records(script, forked, place):
    for text in RECORDS:
        (place / "data.jsonl").write_text(text)
        refused(forked, place, "data.jsonl", *words(script))


def test_wrong_small_files(forked, place):
    for file, text in SMALL_FILES:
        before = (place / file).read_bytes() if (place / file).exists() else None
        (place / file).write_text(text)
        refused(
            forked,
            place,
            Path(file).name if "template" in text or "tokenizer" in file else file,
            *words("chat/base.py"),
        )
        (place / file).unlink() if before is None else (place / file).write_bytes(before)


def test_a_run_on_the_sound_files_works(forked, place):
    """Otherwise every refusal above could have another reason."""
    for command in (
        *(words(script) for script in ("chat/base.py", "scripts/merge_lora.py", "scripts/export_peft.py")),
        [*words("scripts/convert_hf_checkpoint.py", "hf")],
        ["scripts/merge_lora.py", "--lora_path", "peft", "--out_dir", "out"],
    ):
        done = forked.run(*command, cwd=place)
        assert done["status"] == 0, done
        shutil.rmtree(place / "out", ignore_errors=True)
