"""A model's chat template, a jinja2 program, as a prompt style; rendered as `transformers` does.

A template is a program by whoever made the model, so it runs in a process of its own (`render.py`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from litlora.errors import CheckpointError, UserError
from litlora.prompts.styles import TEMPLATE, PromptStyle
from litlora.storage.untrusted import read_text
from litlora.tokenizer import Tokenizer, read_settings, token_text
from litlora.worker import Worker, shared_length

TEMPLATE_SECONDS, TEMPLATE_MEMORY, TEMPLATE_TEXT = 3, 2**30, 10**7
"""What a chat template may use for one conversation: seconds of computing, bytes of memory (its
interpreter included), characters."""
AT_ONCE = 10_000
"""Messages that a template is asked to write with one request, those of all its texts together."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The names under which chat templates look for the thought of an assistant's message."""

Message = dict[str, Any]
"""A message as a chat template gets it: {"role": text, "content": text, ...}, in OpenAI's form."""


class Refusal(UserError):
    """A chat template refuses a conversation."""


class TurnEnd(NamedTuple):
    """A token that ends the assistant's turns."""

    id: int
    name: str


class TurnEnds(NamedTuple):
    """The tokens that end the assistant's turns, and at which generation must stop."""

    text: TurnEnd | None
    """After an answer. None: the template puts no token there, and the end-of-text token does."""
    call: TurnEnd | None
    """After calls of tools."""

    def of(self, message: Message) -> TurnEnd | None:
        """That of a message."""
        return self.call if message.get("tool_calls") else self.text


class Wanted(NamedTuple):
    """A text that a template is asked for."""

    count: int
    """Of the first so many messages,"""
    more: list[Message]
    """and these."""
    add_generation_prompt: bool


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
            TEMPLATE,
            lambda instruction, input: self.render([template_message("user", instruction, input)]),
            self,
        )

    @property
    def fingerprint(self) -> str:
        """A hash of all that its texts depend on, but the day."""
        facts = json.dumps([self.source, self._special_tokens], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def render(
        self, messages: list[Message], *, tools: Any = None, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text. Raises CheckpointError if the template is broken, UserError if
        it refuses the messages."""
        wanted = [Wanted(len(messages), [], add_generation_prompt)]
        ((_, text),) = self.renders(messages, wanted, tools=tools)
        return text

    def renders(
        self, messages: list[Message], wanted: list[Wanted], *, tools: Any = None, now: float | None = None
    ) -> Iterator[tuple[int, str]]:
        """Several texts of a conversation, each with the number of characters that it shares with
        the one before. `now` is the time that the template is told. Raises as `render`."""
        if any(message.get("tool_calls") for message in messages):
            messages = [self._call_form.applied(message) for message in messages]
        before, last = "", None
        for group in _groups(wanted):
            # The last text of the group before comes again, for the next one to be compared with.
            again = [] if last is None else [last]
            asked = {"messages": messages, "values": self._values(tools), "now": now}
            for shared, rest in self._asked(asked, [*again, *group])[len(again) :]:
                before = before[:shared] + rest
                yield shared, before
            last = group[-1]

    def _asked(self, asked: dict[str, Any], wanted: list[Wanted]) -> list[tuple[int, str]]:
        reply = self._worker.ask({**asked, "wanted": wanted})
        if isinstance(reply, list):
            return reply
        kind, message = ("limits", "") if reply is None else (reply["error"], reply["message"])
        if kind == "limits" and len(wanted) > 1:  # the limits are those of a single text
            texts = [self._asked(asked, [one])[0][1] for one in wanted]
            shared = [shared_length(*pair) for pair in zip(["", *texts], texts, strict=False)]
            return [(number, text[number:]) for number, text in zip(shared, texts, strict=True)]
        if kind == "refuses":
            raise Refusal(f"{self.path}: the chat template refuses the conversation: {message}")
        what = {
            "broken": f"is broken {message}",
            "forbidden": f"does what is forbidden: {message}",
            "fails": f"fails: {message}",
            "limits": f"was stopped: it needs more than {TEMPLATE_SECONDS} s, {TEMPLATE_MEMORY:,} bytes "
            f"or {TEMPLATE_TEXT:,} characters",
        }
        raise CheckpointError(f"{self.path}: the chat template {what[kind]}")

    @cached_property
    def ending(self) -> str:
        """What the template puts after an answer; nothing, if it does not show answers."""
        return self._after_answer([])

    @cached_property
    def _ending_within(self) -> str:
        """What it puts after an answer that a question follows."""
        with suppress(Refusal):
            return self._after_answer([template_message("user", "?")])
        return ""

    def _after_answer(self, more: list[Message]) -> str:
        talk = [template_message("user", "?"), template_message("assistant", "ANSWER"), *more]
        _, shown, after = self.render(talk, add_generation_prompt=False).rpartition("ANSWER")
        return after if shown else ""

    @cached_property
    def shapes_shown(self) -> set[str]:
        """Shapes of conversations that it was seen to show whole (`shown.check_shape`)."""
        return set()

    def turn_ends(self, tokenizer: Tokenizer) -> TurnEnds:
        """How the template ends the assistant's turns."""
        # Of several marks that follow every answer at once, the turn ends with the one that ends a text.
        marks = tokenizer.leading_added(commonprefix([self.ending, self._ending_within]))
        known = [token for token in marks if token in tokenizer.stop_ids]
        text = known[0] if known else tokenizer.turn_end(self.ending)
        between, after = self._around_calls
        inside = {*tokenizer.added_tokens(between)}
        ends = [token for token in tokenizer.added_tokens(after) if token not in inside]
        # A mark that closes the calls may come before the end of the turn.
        known = [token for token in ends if token == text] or [e for e in ends if e in tokenizer.stop_ids]
        call = text if not after else (known or ends or [None])[0]
        return TurnEnds(
            *(None if token is None else TurnEnd(token, tokenizer.token(token)) for token in (text, call))
        )

    @cached_property
    def _around_calls(self) -> tuple[str, str]:
        """What the template puts between two calls of tools and after the last one; nothing, if it
        shows none. One that shows a single call has nothing between."""
        for number in (2, 1):
            with suppress(UserError):
                text = self.render(_called(number), add_generation_prompt=False)
                _, first, rest = text.partition("FIRST")
                between, second, after = rest.partition("SECOND")
                if first and (second or number == 1):
                    return (between, after) if second else ("", rest)
        return "", ""

    @cached_property
    def _call_form(self) -> "CallForm":
        """How the template wants calls. Of the forms that it shows, the one with the shortest text:
        some write an empty content as a turn of its own, and text in quotes once more."""
        shown = []
        for form in (CallForm(empty, as_text) for as_text in (False, True) for empty in ("", None)):
            with suppress(UserError):
                calls = [form.applied(one) for one in _called(1)]
                asked = {"messages": calls, "values": self._values(None), "now": None}
                ((_, text),) = self._asked(asked, [Wanted(len(calls), [], False)])
                if "FIRST" in text:
                    shown.append(("'FIRST'" in text, len(text), form))  # Python's quotes are not JSON's
        return min(shown, key=lambda entry: entry[:2])[2] if shown else CallForm("", False)

    def _values(self, tools: Any) -> dict[str, Any]:
        return {"tools": tools, "documents": None, **self._special_tokens}


def squeezed(text: str) -> str:
    """A text without spaces and line ends, of which templates take some and add others."""
    return "".join(text.split())


def shows(text: str, content: str) -> bool:
    """Whether a rendered text has the content of a message, with whatever spaces and line ends."""
    return squeezed(content) in squeezed(text)


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


class CallForm(NamedTuple):
    """How a chat template wants a message with calls of tools."""

    empty: str | None
    """What stands for a content that is empty."""
    as_text: bool
    """Whether arguments are JSON text, or the object that it means."""

    def applied(self, message: Message) -> Message:
        """A message in this form."""
        if not message.get("tool_calls"):
            return message
        calls = [self._call(call) for call in message["tool_calls"]]
        return {**message, "content": message["content"] or self.empty, "tool_calls": calls}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        arguments = function["arguments"]
        if self.as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self.as_text and isinstance(arguments, str):
            with suppress(ValueError):
                found = json.loads(arguments)
                arguments = found if isinstance(found, dict) else arguments
        return {**call, "function": {**function, "arguments": arguments}}


def template_message(
    role: str, content: str, input: str = "", more: Mapping[str, Any] | None = None
) -> Message:
    """A message as every chat template gets it, in training and in chat.

    `input`, an instruction's second part, belongs to the content. `more` is what else the message
    has, in OpenAI's form; a thought gets all names under which templates look for it.
    """
    found = {"role": role, "content": f"{content}\n\n{input}" if input else content, **(more or {})}
    thought = thought_of(found)
    return found if thought is None else {**found, **dict.fromkeys(THOUGHTS, thought)}


def thought_of(message: Message) -> str | None:
    """What an assistant's message has as the thought before it."""
    return next((message[name] for name in THOUGHTS if message.get(name)), None)


def _called(number: int) -> list[Message]:
    """A question and the calls of tools that answer it."""
    calls = [
        {
            "id": f"call0000{index}",
            "type": "function",
            "function": {"name": "look", "arguments": {"at": ("FIRST", "SECOND")[index]}},
        }
        for index in range(number)
    ]
    return [template_message("user", "?"), template_message("assistant", "", more={"tool_calls": calls})]


def _groups(wanted: list[Wanted]) -> Iterator[list[Wanted]]:
    """The texts in order, about AT_ONCE messages at a time."""
    group: list[Wanted] = []
    size = 0
    for one in wanted:
        group.append(one)
        size += one.count
        if size >= AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group
