"""Calls of tools in an answer, in the forms in which chat templates show them. Torch-free."""

import json
import re
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from litlora.errors import UserError
from litlora.prompts import ChatTemplate
from litlora.prompts.template import template_message

Call = tuple[str, dict[str, Any]]
"""The function's name, and its arguments."""


class Form(NamedTuple):
    """A way to write calls."""

    mark: str
    """What a template that writes so has around or in a call."""
    read: Callable[[str], tuple[str, list[Call]]]
    """Text -> what is said beside the calls, and the calls."""


def read_tagged(text: str) -> tuple[str, list[Call]]:
    """Hermes' and Qwen's: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""
    calls = []
    for found in re.finditer(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", text, re.DOTALL):
        if (call := _call(_loaded(found[1]), "arguments")) is None:
            return text, []
        calls.append(call)
    said = text.partition("<tool_call>")[0] if calls else text
    return said.strip() if calls else said, calls


def read_listed(text: str) -> tuple[str, list[Call]]:
    """Mistral's: [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]; the mark, a special token, may
    be missing in the text."""
    said, mark, rest = text.rpartition("[TOOL_CALLS]")
    entries = _loaded(rest if mark else text)
    calls = [_call(entry, "arguments") for entry in entries] if isinstance(entries, list) else []
    return (said.strip(), calls) if calls and None not in calls else (text, [])


def read_bare(text: str) -> tuple[str, list[Call]]:
    """Llama 3's: {"name": ..., "parameters": {...}}, alone, or several after each other with `;`."""
    parts = text.removeprefix("<|python_tag|>").strip().split(";\n") if ";\n" in text else [text]
    calls = [_call(_loaded(part.removeprefix("<|python_tag|>")), "parameters") for part in parts]
    return ("", calls) if None not in calls else (text, [])


FORMS = (
    Form("<tool_call>", read_tagged),
    Form("[TOOL_CALLS]", read_listed),
    Form('"parameters": {"at"', read_bare),
)


def form_of(template: ChatTemplate | None) -> Form | None:
    """The form in which a template shows calls, if it shows them in one that is known."""
    if template is None:
        return None
    function = {"name": "look", "arguments": {"at": "here"}}
    calls = [{"id": "call00000", "type": "function", "function": function}]
    asked = [template_message("user", "?"), template_message("assistant", "", more={"tool_calls": calls})]
    try:
        text = template.render(asked, add_generation_prompt=False)
    except UserError:
        return None
    fits = (form for form in FORMS if form.mark in text and form.read(_from(text, form))[1])
    return next(fits, None)


def _from(text: str, form: Form) -> str:
    """A rendered text from its call on, as an answer has it."""
    at = text.rfind(form.mark)
    begin = text.rfind("{", 0, text.rfind('"look"')) if form.read is read_bare else at
    call, depth = "", 0
    for character in text[begin:]:
        call += character
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if depth == 0 and character in "}" and form.read is not read_listed:
            break
        if depth == 0 and character == "]" and form.read is read_listed and '"look"' in call:
            break
    return call


def openai_calls(calls: list[Call]) -> list[dict[str, Any]]:
    """Calls as OpenAI writes them, with ids."""
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for name, arguments in calls
    ]


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _call(value: Any, arguments: str) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get(arguments, {})
    return (value["name"], given) if isinstance(given, dict) else None
