"""Every attack is refused in one line, within bounds, and leaves nothing behind; every document here is about an attack."""

import dataclasses
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from litlora.checkpoint import adapter_meta, full_meta, open_checkpoint, write_checkpoint
from litlora.errors import CheckpointError
from litlora.lora import LoRAConfig
from litlora.model import GPT
from litlora.paths import STATE_FILE
from litlora.resume import read_state
from litlora.untrusted import printable

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("attacks_make", HERE / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
CASES = [(document, *case) for document, cases in make.ATTACKS.items() for case in cases]


@pytest.fixture(scope="session")
def sound(tmp_path_factory, tokenizer_dir) -> Path:
    """A directory with a full checkpoint, `base`, and an adapter on it, `adapter`."""
    directory = tmp_path_factory.mktemp("sound")
    config, lora = tiny_config(), LoRAConfig(rank=2, targets=["q_proj"])
    write_checkpoint(directory / "base", dict(GPT(config).named_parameters()), full_meta(), config, sidecars_from=tokenizer_dir)
    tensors = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A": torch.randn(2, 32), f"{name}.lora_B": torch.randn(32, 2)}
    meta = adapter_meta(dataclasses.asdict(lora), open_checkpoint(directory / "base"), directory / "adapter")
    write_checkpoint(directory / "adapter", tensors, meta, config, sidecars_from=tokenizer_dir)
    return directory


def words(command: str, directory: Path) -> list[object]:
    return {
        make.CHAT: ["chat/base.py", "--checkpoint_dir", directory / "base", "--prompt", "a" * 60 + "c", "--prompt_style", style(directory)],
        make.MERGE: ["scripts/merge_lora.py", "--lora_path", directory / "adapter", "--out_dir", directory / "out"],
    }[command]


def style(directory: Path) -> str:
    return "template" if (directory / "base/chat_template.jinja").is_file() else "plain"


def test_the_sound_checkpoint_is_taken(sound, forked, tmp_path):
    shutil.copytree(sound, tmp_path / "it")
    for command in (make.CHAT, make.MERGE):
        assert forked.run(*words(command, tmp_path / "it"), "--seed", 1, cwd=tmp_path)["status"] == 0
    (tmp_path / "it/base/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert forked.run(*words(make.CHAT, tmp_path / "it"), cwd=tmp_path)["status"] == 0
    make.hugging_face(tmp_path / "it")
    assert forked.run(*words(make.CHAT, tmp_path / "it"), cwd=tmp_path)["status"] == 0


@pytest.mark.parametrize(("document", "attack", "command", "says"), CASES, ids=[f"{d}-{a.__name__}" for d, a, _, _ in CASES])
def test_an_attack_is_refused_in_one_line(document, attack, command, says, sound, forked, tmp_path):
    shutil.copytree(sound, tmp_path / "it")
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


def test_every_attack_has_a_document_and_every_document_an_attack():
    documents = {file.stem for file in HERE.glob("*.md")}
    assert documents == make.ATTACKS.keys() | {"terminal"}
    for file in HERE.glob("*.md"):
        text = file.read_text()
        assert "## What it tries" in text and "## What must happen" in text, file.name


def test_an_answer_does_not_steer_the_terminal():
    """terminal.md"""
    assert printable("a\x1b[31mred\x07\x9b2J\tb\nc\x7f é😀") == "a[31mred2J\tb\nc é😀"
    assert printable("\x1b]52;c;cm0gLXJm\x07\rover\u202ednim\u2066x\u2069") == "]52;c;cm0gLXJmoverdnimx"
    assert printable("שלום \u200fمرحبا\u200e e\u0301") == "שלום \u200fمرحبا\u200e e\u0301"
