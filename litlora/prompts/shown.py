"""Proof that a chat template shows all of a conversation: what it leaves out would be lost in
silence. Torch-free."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from litlora.errors import UserError, setting
from litlora.prompts.template import THOUGHTS, ChatTemplate, Message, Wanted, shows, squeezed, thought_of

CANARY = "xqzxjq"
"""A word that no template has by itself."""


@dataclass(frozen=True)
class Asked:
    """A conversation, for a template."""

    messages: list[Message]
    turns: Sequence[int]
    """Which messages are to be learned; all are the assistant's."""
    tools: list[dict[str, Any]] | None = None
    now: float | None = None
    """The time that the template is told."""

    def texts(self, template: ChatTemplate, wanted: list[Wanted]) -> Iterator[tuple[int, str]]:
        """As `ChatTemplate.renders`."""
        return template.renders(self.messages, wanted, tools=self.tools, now=self.now)


def check_turn(template: ChatTemplate, asked: Asked, index: int, answer: str) -> None:
    """Raises UserError if a finished turn, from its prompt on, lacks something of its message."""
    message, shown = asked.messages[index], squeezed(answer)
    content = message["content"]
    # The prompt may have the mark with which a thought in the content begins.
    begun = content.partition("<think>")[2] or content
    if squeezed(content) not in shown and squeezed(begun) not in shown:
        raise UserError(answer_left_out(template, content))
    if squeezed(thought_of(message) or "") not in shown:
        raise UserError(_left_out(template, "thought", index))
    for call in message.get("tool_calls") or ():
        for text in _leaves(call.get("function", call)):
            if not any(squeezed(spelling) in shown for spelling in _spellings(text)):
                raise UserError(_left_out(template, "call", index))


def check_context(
    template: ChatTemplate, asked: Asked, indices: Sequence[int], prompt: str, shared: int
) -> None:
    """Raises UserError if a prompt lacks words that the system or the user said in these messages;
    its first `shared` characters are older than they are.

    What is not checked: the assistant's earlier turns, as many templates leave out their thoughts
    on purpose; and the results of tools, which some write in a form of their own."""
    for index in indices:
        role, content = asked.messages[index]["role"], asked.messages[index]["content"]
        if role in ("assistant", "tool") or shows(prompt[shared:], content):
            continue
        # A template may take a word out of its place: "/no_think" of a system message.
        if not all(word in prompt for word in content.split()):
            raise UserError(_left_out(template, role, index))


def check_shape(template: ChatTemplate, asked: Asked) -> None:
    """Raises UserError if the template leaves out a message, or a part of one, by its kind: of the
    same conversation in words that nothing else has, each must be there.

    One conversation of a shape is enough, as templates look at roles and fields, hardly at words.
    """
    fields = [
        [
            message["role"],
            *(name for name, value in message.items() if value),
            bool(message["content"].strip()),
        ]
        for message in asked.messages
    ]
    shape = json.dumps([fields, [*asked.turns], len(asked.tools or ())])
    if shape in template.shapes_shown:
        return
    words = _Words()
    messages = [words.of_message(message, index) for index, message in enumerate(asked.messages)]
    tools = [words.of_tool(tool) for tool in asked.tools or ()] or None
    thoughts = {index: found for index in asked.turns if (found := thought_of(messages[index]))}
    wanted = [Wanted(index + 1, [], False) for index in (*thoughts, asked.turns[-1])]
    try:
        texts = list(Asked(messages, (), tools, asked.now).texts(template, wanted))
    except UserError:  # what it refuses in these words, it may show in the real ones
        return
    for (index, thought), (_, text) in zip(thoughts.items(), texts, strict=False):
        if thought not in text:
            raise UserError(_left_out(template, "thought", index))
    for word, what, index in words.expected:
        if word not in texts[-1][1]:
            said = asked.messages[index]["content"]
            is_answer = what == "assistant"
            raise UserError(
                answer_left_out(template, said) if is_answer else _left_out(template, what, index)
            )
    template.shapes_shown.add(shape)


class _Words:
    """Messages with a word of its own for each thing that is said in them."""

    def __init__(self) -> None:
        self.expected: list[tuple[str, str, int]] = []
        """Each word, what it stands for, and the message that has it."""
        self._ids: dict[str, str] = {}
        """Of calls, where they have the name of what is called, as Kimi K2's do."""

    def _word(self, what: str, index: int) -> str:
        self.expected.append((f"{CANARY}{len(self.expected)}x", what, index))
        return self.expected[-1][0]

    def of_message(self, message: Message, index: int) -> Message:
        found = dict(message)
        role = message["role"]
        if message["content"].strip():
            found["content"] = self._word(role, index)
        if message.get("name") and role != "tool":  # of a tool, its call has the name
            found["name"] = self._word("name", index)
        if thought_of(message) is not None:
            found |= dict.fromkeys(THOUGHTS, f"{CANARY}thought{index}x")
        if message.get("tool_calls"):
            found["tool_calls"] = [self._of_call(call, index) for call in message["tool_calls"]]
        if isinstance(called := message.get("tool_call_id"), str) and called in self._ids:
            found["tool_call_id"] = self._ids[called]
        return found

    def _of_call(self, call: dict[str, Any], index: int) -> dict[str, Any]:
        said = {"name": self._word("call", index), "arguments": {"a": self._word("call", index)}}
        name, own = call.get("function", call).get("name"), call.get("id")
        if isinstance(own, str) and isinstance(name, str) and name and name in own:
            self._ids[own] = own.replace(name, said["name"])
            call = {**call, "id": self._ids[own]}
        return {**call, "function": said} if "function" in call else {**call, **said}

    def of_tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = tool.get("function", tool)
        named = {**function, "name": self._word("tools", 0)}
        return {**tool, "function": named} if "function" in tool else named


def answer_left_out(template: ChatTemplate, content: str) -> str:
    """The message about an answer that the template does not show, or not all of it."""
    return (
        f"{template.path}: the chat template leaves out the answer {content.strip()[:40]!r}, or part "
        "of it: take out of the answers what it leaves out, such as a thought in <think>, "
        f"or choose {setting('prompt_style')} alpaca"
    )


def _left_out(template: ChatTemplate, what: str, index: int) -> str:
    """The message about a thing that the template does not show."""
    other = f"choose another {setting('prompt_style')}"
    named, remedy = {
        "system": ("the system message", ""),
        "tools": ("the tools", f": {other}, or leave them out with {setting('ignore')} '[tools]'"),
        "user": (f"message {index}, of the user", f": {other}, or leave the record out"),
        "thought": (
            f"the thought of message {index}",
            ": put it into the content as <think>...</think>, take it out, or " + other,
        ),
        "call": (f"a tool call of message {index}, or part of it", f": {other}, or take the call out"),
        "name": (f"the name in message {index}", f": take it out, or {other}"),
    }.get(what, (f"message {index}, of the role {what!r}", f": rename the role, or {other}"))
    return f"{template.path}: the chat template leaves out {named}{remedy}"


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a call's name and arguments."""
    if isinstance(value, dict):
        for name, inner in value.items():
            parsed = None
            if name == "arguments" and isinstance(inner, str):
                with suppress(ValueError):
                    parsed = json.loads(inner)
            yield from _leaves(inner if parsed is None else parsed)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _spellings(text: str) -> tuple[str, ...]:
    """A text as it is, and as JSON has it."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
