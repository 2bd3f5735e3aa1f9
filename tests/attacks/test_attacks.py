"""Every attack is refused with one line, within limits of time and memory, and leaves nothing
behind. Every document here describes an attack."""

import ast
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPO, tiny_config
from safetensors.torch import save_file

from litlora.checkpoint import open_checkpoint, reference_to, write_adapter, write_full
from litlora.console import printable
from litlora.errors import CheckpointError
from litlora.lora import Adapter, LoRAConfig
from litlora.lora.adapter import parse_tensors
from litlora.model import GPT
from litlora.paths import STATE_FILE
from litlora.train.resume import read_state

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("attacks_make", HERE / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
CASES = [(document, *case) for document, cases in make.ATTACKS.items() for case in cases]
LONG = ("a_decoder_that_doubles_40_times", "steps_without_end", "loops_in_loops", "a_power")
"""They take seconds to be stopped; others like them are quicker."""


def repeated() -> Iterator[str]:
    """What is tried in several files, which one function reads: all but one file of each, in turn."""
    for document in ("json", "yaml"):
        kinds: dict[str, list[str]] = {}
        for attack, *_ in make.ATTACKS[document]:
            kinds.setdefault(attack.__name__.rpartition("_in_")[0], []).append(attack.__name__)
        for number, names in enumerate(kinds.values()):
            yield from (name for name in names if name != names[number % len(names)])


SLOW = {*LONG, *repeated()}


@pytest.fixture(scope="session")
def valid(tmp_path_factory, tokenizer_dir) -> Path:
    """A directory with a full checkpoint, `base`, and an adapter on it, `adapter`."""
    directory = tmp_path_factory.mktemp("valid")
    config, lora = tiny_config(), LoRAConfig(rank=2, targets=["q_proj"])
    write_full(
        directory / "base", dict(GPT(config).named_parameters()), config, sidecars_from=[tokenizer_dir]
    )
    tensors = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A": torch.randn(2, 32), f"{name}.lora_B": torch.randn(32, 2)}
    reference = reference_to(open_checkpoint(directory / "base"), directory / "adapter")
    adapter = Adapter(lora, *parse_tensors(tensors, lora), reference)
    write_adapter(directory / "adapter", adapter, config, sidecars_from=[tokenizer_dir])
    return directory


def words(command: str, directory: Path) -> list[object]:
    return {
        make.CHAT: [
            "chat/base.py",
            "--checkpoint_dir",
            directory / "base",
            "--prompt",
            "a" * 60 + "c",
            "--prompt_style",
            style(directory),
        ],
        make.MERGE: [
            "scripts/merge_lora.py",
            "--lora_path",
            directory / "adapter",
            "--out_dir",
            directory / "out",
        ],
    }[command]


def style(directory: Path) -> str:
    return "template" if (directory / "base/chat_template.jinja").is_file() else "plain"


def test_a_valid_checkpoint_is_accepted(valid, forked, tmp_path):
    shutil.copytree(valid, tmp_path / "it")
    for command in (make.CHAT, make.MERGE):
        assert forked.run(*words(command, tmp_path / "it"), "--seed", 1, cwd=tmp_path)["status"] == 0
    (tmp_path / "it/base/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert forked.run(*words(make.CHAT, tmp_path / "it"), cwd=tmp_path)["status"] == 0
    make.hugging_face(tmp_path / "it")
    assert forked.run(*words(make.CHAT, tmp_path / "it"), cwd=tmp_path)["status"] == 0


@pytest.mark.parametrize(
    ("document", "attack", "command", "says"),
    [
        pytest.param(
            *case, id=f"{case[0]}-{(name := case[1].__name__)}", marks=[pytest.mark.slow] * (name in SLOW)
        )
        for case in CASES
    ],
)
def test_an_attack_is_refused_in_one_line(document, attack, command, says, valid, forked, tmp_path):
    shutil.copytree(valid, tmp_path / "it")
    attack(tmp_path / "it")
    line = forked.refuses(*words(command, tmp_path / "it"), cwd=tmp_path)
    assert re.search(says, line), line
    assert not list(tmp_path.rglob("pwned"))


def test_a_training_state_that_calls_something_is_refused(tmp_path):
    """pickle_payload.md"""
    torch.save({"optimizer": {"state": {0: {"step": make.payload(tmp_path)}}}}, tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match="could run code"):
        read_state(tmp_path, {})
    assert not list(tmp_path.rglob("pwned"))


@pytest.fixture(scope="module")
def stopped_run(valid, forked, tmp_path_factory) -> Path:
    """A directory with a base, and a run on it, `run`, that was stopped after its first step."""
    directory = tmp_path_factory.mktemp("stopped")
    shutil.copytree(valid / "base", directory / "base")
    records = [{"instruction": f"count {n}", "output": "one two " * (1 + n % 3)} for n in range(8)]
    (directory / "data.json").write_text(json.dumps(records))
    words = ["--checkpoint_dir", "base", "--data", "JSON", "--data.path", "data.json", "--out_dir", "run"]
    words += ["--prompt_style", "plain", "--train.max_steps", 2, "--train.save_interval", 1]
    done = forked.run("finetune/lora.py", *words, "--accelerator", "cpu", cwd=directory)
    assert done["status"] == 0, done
    shutil.rmtree(directory / "run/final")
    return directory


@pytest.mark.parametrize("attack", make.STATES, ids=lambda attack: attack.__name__)
def test_a_training_state_that_does_not_fit_is_refused(attack, stopped_run, forked, tmp_path):
    """training_state.md; tests/train/test_state_check.py tries every entry."""
    shutil.copytree(stopped_run, tmp_path / "it")
    file = tmp_path / "it/run/step-000001/state.pth"
    state = torch.load(file, weights_only=True)
    attack(state)
    torch.save(state, file)
    words = ["--config", "run/step-000001/hyperparameters.yaml", "--resume", "auto"]
    line = forked.refuses("finetune/lora.py", *words, cwd=tmp_path / "it")
    assert "step-000001/state.pth" in line, line


@pytest.mark.parametrize("attack", make.PATTERNS, ids=lambda attack: attack.__name__)
def test_patterns_that_never_end_end(attack, valid, forked, tmp_path):
    """patterns.md: they match no layer, and the adapter is merged as without them."""
    shutil.copytree(valid, tmp_path / "it")
    attack(tmp_path / "it")
    done = forked.run(*words(make.MERGE, tmp_path / "it"), cwd=tmp_path)
    assert done["status"] == 0, done


def test_links_in_the_own_directory_and_into_the_cache_are_followed(valid, forked, tmp_path):
    """links.md: the hub's cache is laid out like this."""
    shutil.copytree(valid, tmp_path / "it")
    repository, base = tmp_path / "models--a--b", tmp_path / "it/base"
    for name in ("blobs", "snapshots"):
        (repository / name).mkdir(parents=True)
    for number, name in enumerate(["tokenizer.json", "tokenizer_config.json"]):
        blob = repository / "blobs" / (f"{number}" * 64)
        (base / name).rename(blob)
        (base / name).symlink_to(blob)
    (base / "files").mkdir()
    (base / "files/all.json").write_text("{}")
    (base / "generation_config.json").symlink_to("files/all.json")
    done = forked.run(*words(make.MERGE, tmp_path / "it"), cwd=tmp_path)
    assert done["status"] == 0, done
    assert not (tmp_path / "it/out/tokenizer.json").is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("setting", ["--config", "--data.path"])
def test_settings_and_data_that_never_end_are_refused(setting, kind, valid, forked, tmp_path):
    """pipes.md"""
    shutil.copytree(valid, tmp_path / "it")
    file = tmp_path / "endless.json"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    data = ["--data", "JSON"] if setting == "--data.path" else []
    words = ["--checkpoint_dir", "it/base", *data, setting, file, "--out_dir", "out"]
    line = forked.refuses("finetune/lora.py", *words, cwd=tmp_path)
    assert re.search("endless.json: .*it is a pipe, a device or a socket", line), line


def test_a_prompt_style_that_is_a_pipe_is_refused(valid, forked, tmp_path):
    """pipes.md"""
    shutil.copytree(valid, tmp_path / "it")
    (tmp_path / "it/base/prompt_style.yaml").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "it/base/prompt_style.yaml")
    line = forked.refuses("chat/base.py", "--checkpoint_dir", "it/base", "--prompt", "a", cwd=tmp_path)
    assert "prompt_style.yaml: it is a pipe" in line


def test_every_attack_has_a_document_and_every_document_an_attack():
    documents = {file.stem for file in HERE.glob("*.md")}
    assert documents == make.ATTACKS.keys() | {"terminal", "training_state"}
    for file in HERE.glob("*.md"):
        text = file.read_text()
        assert "## What it tries" in text and "## What must happen" in text, file.name


def test_an_answer_does_not_steer_the_terminal():
    """terminal.md"""
    assert printable("a\x1b[31mred\x07\x9b2J\tb\nc\x7f é😀") == "a[31mred2J\tb\nc é😀"
    assert printable("\x1b]52;c;cm0gLXJm\x07\rover\u202ednim\u2066x\u2069") == "]52;c;cm0gLXJmoverdnimx"
    assert printable("שלום \u200fمرحبا\u200e e\u0301") == "שלום \u200fمرحبا\u200e e\u0301"


HOSTILE = "layer\x1b[2J\x1b]0;owned\x07\r\u202e\x9b31m"


@pytest.mark.parametrize("command", ["inspect", "inspect as JSON", "resize", "merge", "extract"])
def test_a_name_in_a_file_does_not_steer_the_terminal(command, forked, tmp_path):
    """terminal.md"""
    lora = {f"{HOSTILE}.diff": torch.ones(8)}
    for name in ("plain", HOSTILE):
        lora |= {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
    save_file(lora, tmp_path / "style.safetensors")
    for name in ("model", "tuned"):
        tensors = {"plain.weight": torch.randn(8, 8), f"{HOSTILE}\nerror: fake.weight": torch.randn(8, 8)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    words = {
        "inspect": ["scripts/inspect_checkpoint.py", "style.safetensors"],
        "inspect as JSON": ["scripts/inspect_checkpoint.py", "style.safetensors", "--json"],
        "resize": [
            "scripts/resize_lora.py",
            "--lora_path",
            "style.safetensors",
            "--rank",
            1,
            "--out_dir",
            "out",
        ],
        "merge": [
            "scripts/lora_merger.py",
            "--source-model",
            "model.safetensors",
            "--lora-model",
            "style.safetensors",
            "--output",
            "out",
        ],
        "extract": [
            "scripts/lora_extractor.py",
            "--source-model",
            "model.safetensors",
            "--target-model",
            "tuned.safetensors",
        ],
    }[command]
    more = {"merge": ["--allow_unmatched"], "extract": ["--output", "out", "--rank", 2, "--min_size", 0]}.get(
        command, []
    )
    done = forked.run(*words, *more, cwd=tmp_path)
    assert done["status"] == 0, done
    said = done["stdout"] + done["stderr"]
    assert all(line.isprintable() for line in said.split("\n")), said
    assert not any(line.startswith("error: fake") for line in said.split("\n"))
    assert re.search(r"layer\\(x1b|u001b)\[2J", said)
    if command == "inspect as JSON":
        assert HOSTILE in [layer["name"] for layer in json.loads(done["stdout"])["layers"]]


def test_a_name_in_an_adapter_does_not_steer_the_terminal(valid, forked, tmp_path):
    """terminal.md: commands print notes about directories with hostile names."""
    shutil.copytree(valid, tmp_path / "it\x1b[2J")
    file = tmp_path / "it\x1b[2J/adapter/tokenizer.json"
    file.write_text(file.read_text() + " ")
    done = forked.run(
        "scripts/merge_lora.py", "--lora_path", "it\x1b[2J/adapter", "--out_dir", "out", cwd=tmp_path
    )
    assert done["status"] == 0 and "\x1b" not in done["stdout"] + done["stderr"]
    assert "note: it\\x1b[2J/adapter/tokenizer.json: is not the tokenizer" in done["stdout"]


def test_commands_print_only_through_say():
    """Except constants, the pieces of a model's answer, which its conversation made printable, and
    what escapes its own text."""
    safe = {"Constant", "piece", "one_line", "shown", "map"}

    def kind(node: ast.expr) -> set[str]:
        if isinstance(node, ast.JoinedStr):
            return {
                name
                for value in node.values
                for name in kind(value.value if isinstance(value, ast.FormattedValue) else value)
            }
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                return {node.func.id}
            return kind(node.args[0] if node.args else node.func.value)
        return {node.id if isinstance(node, ast.Name) else type(node).__name__}

    # Four print JSON for the process that started them; the others are a tool for developers, and a
    # shell's script of our own options.
    own = {"render.py", "tokenizer_process.py", "encode_process.py", "llama_cpp_process.py"}
    own |= {"build_quickstart.py", "completion.py"}
    folders = ("litlora", "scripts", "finetune", "chat")
    files = [file for folder in folders for file in (REPO / folder).rglob("*.py") if file.name not in own]
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert set().union(*map(kind, node.args)) <= safe, (
                    f"{file.name}:{node.lineno}: print() of text that may come from a file; use say()"
                )
