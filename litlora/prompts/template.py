"""A model's chat template, a jinja2 program, as a prompt style; rendered as `transformers` does.

A template is a program by whoever made the model, so it runs in a process of its own (`render.py`).
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError, UserError, setting
from litlora.prompts.styles import TEMPLATE, PromptStyle
from litlora.storage.untrusted import read_text
from litlora.tokenizer import read_settings, token_text
from litlora.worker import Worker

TEMPLATE_SECONDS, TEMPLATE_MEMORY, TEMPLATE_TEXT = 3, 2**30, 10**7
"""What a chat template may use for one conversation: seconds of computing, bytes of memory (its
interpreter included), characters."""

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


class ChatTemplate:
    """A model's chat template, and the process that renders it."""

    def __init__(self, source: str, path: Path, special_tokens: dict[str, str]) -> None:
        """`path` is where the source was found; `special_tokens` are what a template may name:
        bos_token, eos_token, ..."""
        self.path, self.source = path, source
        self._special_tokens = special_tokens
        limits = {"seconds": TEMPLATE_SECONDS, "memory": TEMPLATE_MEMORY, "text": TEMPLATE_TEXT}
        self._worker = Worker(Path(__file__).with_name("render.py"), {"source": source, **limits})

    @property
    def style(self) -> PromptStyle:
        """The template as a prompt style: an instruction and its input are one user message."""
        return PromptStyle(
            TEMPLATE, lambda instruction, input: self.render([user_message(instruction, input)]), self
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
        reply = self._worker.ask(values | self._special_tokens)
        if isinstance(reply, str):
            return reply
        kind, message = ("limits", "") if reply is None else (reply["error"], reply["message"])
        if kind == "refuses":
            raise UserError(f"{self.path}: the chat template refuses the conversation: {message}")
        what = {
            "broken": f"is broken {message}",
            "forbidden": f"does what is forbidden: {message}",
            "fails": f"fails: {message}",
            "limits": f"was stopped: it needs more than {TEMPLATE_SECONDS} s, {TEMPLATE_MEMORY:,} bytes "
            f"or {TEMPLATE_TEXT:,} characters",
        }
        raise CheckpointError(f"{self.path}: the chat template {what[kind]}")

    def exchange(self, messages: list[Message]) -> tuple[str, str]:
        """The prompt that asks for the last message, which is the assistant's, and the text that
        begins with this prompt and ends after the answer.

        Raises UserError if the template does not show the whole answer.
        """
        output = messages[-1]["content"]
        prompt = self.render(messages[:-1])
        finished = self.render(messages, add_generation_prompt=False)
        if not finished.startswith(prompt):
            # Some templates begin the answer with a thought when they ask, and leave it out
            # afterwards.
            shown = output.strip()
            whole = not shown or finished.endswith(shown + self.ending)
            finished = prompt + (output if shown else "") + self.ending
        else:
            whole = shows(finished[len(prompt) :], output)
        if not whole:
            raise UserError(
                f"{self.path}: the chat template leaves out the answer {output.strip()[:40]!r}, or part "
                "of it: take out of the answers what it leaves out, such as a thought in <think>, "
                f"or choose {setting('prompt_style')} alpaca"
            )
        return prompt, finished

    @cached_property
    def ending(self) -> str:
        """What the template puts after an answer; nothing, if it does not show answers."""
        probe = [user_message("?", ""), {"role": "assistant", "content": "ANSWER"}]
        _, shown, after = self.render(probe, add_generation_prompt=False).rpartition("ANSWER")
        return after if shown else ""


def shows(text: str, content: str) -> bool:
    """Whether a rendered text has the content of a message, with whatever spaces and line ends."""
    return "".join(content.split()) in "".join(text.split())


def load_template(files: dict[str, Path]) -> ChatTemplate | None:
    """The chat template among a model's files (by name): `chat_template.jinja`, else the one in
    `tokenizer_config.json` or `chat_template.json`."""
    config_path = files.get("tokenizer_config.json")
    settings = read_settings(config_path)
    special = special_tokens(read_settings(files.get("special_tokens_map.json")) | settings)
    if (path := files.get("chat_template.jinja")) is not None:
        return ChatTemplate(read_text(path), path, special)
    for path in (config_path, files.get("chat_template.json")):
        found = read_settings(path).get("chat_template")
        if isinstance(found, list):  # several, each with a name
            entries = (entry for entry in found if isinstance(entry, dict))
            found = next((e.get("template") for e in entries if e.get("name") == "default"), None)
        if isinstance(found, str):
            return ChatTemplate(found, path, special)
        if found is not None:
            raise CheckpointError(f"{path}: chat_template must be text, not {type(found).__name__}")
    return None


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens in a tokenizer_config.json, by the names that a template may use:
    {"eos_token": "</s>", ...}."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    found = {name: token_text(settings.get(name)) for name in names}
    return {name: text for name, text in found.items() if text is not None}


def user_message(instruction: str, input: str) -> Message:
    """An instruction and its input as one message."""
    return {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}
