"""Prompt styles: how a question is put to the model, in training and in chat alike. Torch-free.

A style turns one exchange into text; the answer follows the prompt directly and ends with the
end-of-text token. The style `template` is the model's own chat template, a jinja2 program, rendered
as `transformers` renders it. `prompt_style.yaml` in a checkpoint directory says which style the
model was taught with.
"""

import contextlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError, UserError
from litlora.storage.untrusted import read_text, read_yaml
from litlora.tokenizer import read_settings, token_text

STYLE_FILE = "prompt_style.yaml"
TEMPLATE = "template"
"""The name of the style that is the model's chat template."""
TEMPLATE_SECONDS, TEMPLATE_MEMORY, TEMPLATE_TEXT = 3, 2**30, 10**7
"""What a chat template may take for one conversation: seconds of computing, bytes of memory (its
interpreter included), characters."""

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


@dataclass(frozen=True)
class PromptStyle:
    """A named way to ask."""

    name: str
    render: Callable[[str, str], str]
    """(instruction, input or "") -> the prompt."""
    template: "ChatTemplate | None" = None
    """For the style `template`: what renders whole conversations. Its text has the begin-of-text
    token, if there is one."""

    def exchange(self, instruction: str, input: str, output: str) -> tuple[str, str]:
        """(prompt, answer); a template's answer has the mark that ends a turn behind it."""
        prompt = self.render(instruction, input)
        return prompt, output if self.template is None else self.template.answer(instruction, input, output)


def _alpaca(instruction: str, input: str) -> str:
    """The prompt of Stanford Alpaca (Taori et al. 2023), to the letter."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def _plain(instruction: str, input: str) -> str:
    """The bare text, for a base model that merely continues."""
    return f"{instruction}\n{input}" if input else instruction


STYLES = {style.name: style for style in (PromptStyle("alpaca", _alpaca), PromptStyle("plain", _plain))}


def load_style(directory: Path, template: PromptStyle | None = None) -> PromptStyle | None:
    """The style that a checkpoint directory names; None if it names none. `template` is its chat
    template, if it has one."""
    path = directory / STYLE_FILE
    try:
        value = read_yaml(path)
    except FileNotFoundError:
        return None
    if isinstance(value, dict) and str(value.get("class_path")).startswith("litgpt."):
        # litgpt's own; of its many styles, which it names by class, we have one
        return STYLES["alpaca"] if value["class_path"] == "litgpt.prompts.Alpaca" else None
    name = value.get("style") if isinstance(value, dict) else None
    if name == TEMPLATE:
        if template is None:
            raise CheckpointError(
                f"{path}: the style is the model's chat template, but there is none beside it"
            )
        return template
    if not isinstance(name, str) or name not in STYLES:
        raise CheckpointError(
            f"{path}: style {name!r} is not known; there are {', '.join((*STYLES, TEMPLATE))}"
        )
    return STYLES[name]


def choose_style(
    named: str | None, taught: PromptStyle | None, template: PromptStyle | None, default: str
) -> tuple[PromptStyle, str]:
    """The style to use, and why: the one named, else the one taught, else the chat template, else
    the default."""
    if named == TEMPLATE and template is None:
        raise UserError(
            "--prompt_style template: the model has no chat template (chat_template.jinja, or one in tokenizer_config.json)"
        )
    if named is not None:
        return template if named == TEMPLATE else STYLES[named], "chosen by you"
    if taught is not None:
        return taught, "as it was taught"
    return (template, "the model's own") if template is not None else (STYLES[default], "it names none")


class ChatTemplate:
    """A model's chat template. It is a stranger's program, so it runs in a process of its own
    (litlora/render_template.py)."""

    def __init__(self, source: str, path: Path, special_tokens: dict[str, str]) -> None:
        """`path` is where the source was found; `special_tokens` are what a template may name:
        bos_token, eos_token, ..."""
        self.path = path
        self._source = source
        self._special_tokens = special_tokens
        self._process: subprocess.Popen | None = None

    @property
    def style(self) -> PromptStyle:
        """The template as a prompt style: the instruction and its input are one message of the
        user's."""
        return PromptStyle(
            TEMPLATE, lambda instruction, input: self.render([_user(instruction, input)]), self
        )

    def render(self, messages: list[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text. Raises CheckpointError if the template is broken, UserError if
        it refuses the messages."""
        values = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        reply = self._ask(values | self._special_tokens)
        if isinstance(reply, str):
            return reply
        kind, message = reply["error"], reply["message"]
        if kind == "refuses":
            raise UserError(f"{self.path}: the chat template refuses the conversation: {message}")
        what = {
            "broken": f"is broken {message}",
            "forbidden": f"does what is forbidden: {message}",
            "fails": f"fails: {message}",
            "limits": f"was stopped: it takes more than {TEMPLATE_SECONDS} s, {TEMPLATE_MEMORY:,} bytes or {TEMPLATE_TEXT:,} characters",
        }
        raise CheckpointError(f"{self.path}: the chat template {what[kind]}")

    def _ask(self, values: dict[str, Any]) -> Any:
        """What the process replies. It is started for the first question, and again after one that
        it did not survive."""
        try:
            if self._process is None:
                self._process = self._start()
            reply = _exchange(self._process, values)
        except BaseException:  # after Ctrl-C, say, the reply on its way must not answer the next question
            self._end()
            raise
        if reply is None:
            self._end()
            return {"error": "limits", "message": ""}
        return reply

    def _start(self) -> subprocess.Popen:
        program = Path(__file__).with_name("render_template.py")
        known = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ")  # no tokens and keys
        process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in known if name in os.environ},
        )
        weakref.finalize(self, _stop, process)
        limits = {"seconds": TEMPLATE_SECONDS, "memory": TEMPLATE_MEMORY, "text": TEMPLATE_TEXT}
        assert _exchange(process, {"source": self._source, **limits}) == "ready", f"{program} does not run"
        return process

    def _end(self) -> None:
        if self._process is not None:
            _stop(self._process)
            self._process = None

    def answer(self, instruction: str, input: str, output: str) -> str:
        """What follows the prompt when the model answers `output`, up to and with what the template
        puts behind it.

        Raises CheckpointError if the answered conversation does not show the answer.
        """
        question = _user(instruction, input)
        prompt = self.render([question])
        finished = self.render(
            [question, {"role": "assistant", "content": output}], add_generation_prompt=False
        )
        if finished.startswith(prompt):
            return finished[len(prompt) :]
        # Some templates open the answer with a thought when they ask, and leave that out
        # afterwards.
        shown = output.strip()
        if not shown:
            return self.ending
        if (start := finished.rfind(shown)) < 0:
            raise CheckpointError(f"{self.path}: the chat template leaves out the answer {shown[:40]!r}")
        return output + finished[start + len(shown) :]

    @cached_property
    def ending(self) -> str:
        """What the template puts behind an answer."""
        return self.answer("?", "", "ANSWER").rpartition("ANSWER")[2]


def _exchange(process: subprocess.Popen, values: dict[str, Any]) -> Any:
    """What a process replies to a line of JSON; None if it is no more."""
    try:
        process.stdin.write(json.dumps(values).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        return None
    return json.loads(line) if line.endswith(b"\n") else None


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # what was not sent has no reader
            pipe.close()


def load_template(files: dict[str, Path]) -> ChatTemplate | None:
    """The chat template among a model's files (by name): `chat_template.jinja`, else the one in
    `tokenizer_config.json`."""
    config_path = files.get("tokenizer_config.json")
    settings = read_settings(config_path)
    special = special_tokens(read_settings(files.get("special_tokens_map.json")) | settings)
    if (path := files.get("chat_template.jinja")) is not None:
        return ChatTemplate(read_text(path), path, special)
    for path in (config_path, files.get("chat_template.json")):
        found = read_settings(path).get("chat_template")
        if isinstance(found, list):  # several, each with a name
            found = next(
                (
                    entry.get("template")
                    for entry in found
                    if isinstance(entry, dict) and entry.get("name") == "default"
                ),
                None,
            )
        if isinstance(found, str):
            return ChatTemplate(found, path, special)
        if found is not None:
            raise CheckpointError(f"{path}: chat_template must be text, not {type(found).__name__}")
    return None


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, as a template may: {"eos_token": "</s>",
    ...}."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    found = {name: token_text(settings.get(name)) for name in names}
    return {name: text for name, text in found.items() if text is not None}


def _user(instruction: str, input: str) -> Message:
    return {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}
