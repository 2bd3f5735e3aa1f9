"""The functions that an assistant may call, and its calls, in OpenAI's form. Torch-free."""

from typing import Any

from litlora.data.records.fields import Record, mapping, parsed, plain, quoted, text

FLAT_CALL = ("name", "arguments")


def read_tools(record: Record, name: str = "tools") -> tuple[dict[str, Any], ...]:
    """The record's list of functions: as OpenAI has them, as bare schemas (name, description,
    parameters), or either as JSON text."""
    value, at = record.fields.get(name), record.named(name)
    if isinstance(value, str):
        value = parsed(value, at, record.place) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        record.wrong(f"{at} must be a list of functions, not {type(value).__name__}")
    return tuple(_tool(tool, f"{at}[{number}]", record) for number, tool in enumerate(value))


def _tool(value: Any, at: str, record: Record) -> dict[str, Any]:
    tool = dict(mapping(value, at, record.place))
    kind = tool.get("type")
    if kind not in (None, "function"):
        record.wrong(f'{at}.type is {quoted(kind)}; only "function" can be used')
    bare = "function" not in tool
    function = dict(tool if bare else mapping(tool["function"], f"{at}.function", record.place))
    if bare:
        function.pop("type", None)
    at = at if bare else f"{at}.function"
    _check_name(function, at, record)
    if isinstance(function.get("parameters"), str):
        function["parameters"] = parsed(function["parameters"], f"{at}.parameters", record.place)
    if function.get("parameters") is not None:
        mapping(function["parameters"], f"{at}.parameters", record.place)
    wrapped = {"type": "function", "function": function}
    return plain(wrapped if bare else {**tool, **wrapped}, at, record.place)


def read_calls(value: Any, at: str, record: Record) -> list[dict[str, Any]]:
    """An assistant's calls: as OpenAI has them, or bare (name, arguments)."""
    if not isinstance(value, list):
        record.wrong(f"{at} must be a list of calls, not {type(value).__name__}")
    return [read_call(call, f"{at}[{number}]", record) for number, call in enumerate(value)]


def read_call(value: Any, at: str, record: Record) -> dict[str, Any]:
    """One call, in OpenAI's form but for its arguments: these are the object, not its JSON text, as
    chat templates write them themselves."""
    place, path = record.place, _without_numbers(at)
    call = mapping(value, at, place)
    head: dict[str, Any] = {}
    if "function" in call:
        call = record.used(call, ("id", "type", "function"), path)
        if call.get("type", "function") != "function":
            record.wrong(f'{at}.type is {quoted(call["type"])}; only "function" can be used')
        if "id" in call:
            head["id"] = text(call["id"], f"{at}.id", place)
        at, path = f"{at}.function", f"{path}.function"
        call = mapping(call.get("function"), at, place)
    call = record.used(call, FLAT_CALL, path)
    _check_name(call, at, record)
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{at}.arguments", place)
    mapping(arguments, f"{at}.arguments", place)
    plain(arguments, f"{at}.arguments", place)
    return {**head, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _check_name(function: dict[str, Any], at: str, record: Record) -> None:
    name = function.get("name")
    if name is None or name == "":
        record.wrong(f"{at} has no name: which function is it?")
    text(name, f"{at}.name", record.place)


def _without_numbers(at: str) -> str:
    """`messages[2].tool_calls[0]` as `messages.tool_calls`, which is what `ignore` takes."""
    return ".".join(part.partition("[")[0] for part in at.split("."))
