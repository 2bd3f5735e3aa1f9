"""What Go's text/template makes of a template, for the few actions that ours have."""

import json
import re
from collections import deque

Node = str | tuple


def executed(template: str, messages: list[dict[str, str]]) -> str:
    """The text of a template that is given messages."""
    nodes, closing = _block(deque(re.split(r"(\{\{ .*? \}\})", template)))
    assert closing is None
    return _run(nodes, messages, {})


def _block(tokens: deque[str]) -> tuple[list[Node], str | None]:
    """(the nodes up to the action that closes them, that action)."""
    nodes: list[Node] = []
    while tokens:
        token = tokens.popleft()
        if not token.startswith("{{ "):
            nodes.append(token)
            continue
        action = token[3:-3]
        if action == "end" or action.startswith("else"):
            return nodes, action
        if action == "range .Messages":
            body, closing = _block(tokens)
            assert closing == "end"
            nodes.append(("range", body))
        elif action.startswith("if "):
            branches, condition = [], action[3:]
            while True:
                body, closing = _block(tokens)
                branches.append((condition, body))
                if closing == "end":
                    break
                condition = closing.removeprefix("else").removeprefix(" if ")
            nodes.append(("if", branches))
        else:
            nodes.append(("do", action))
    return nodes, None


def _run(nodes: list[Node], messages: list[dict[str, str]], state: dict[str, str]) -> str:
    found = ""
    for node in nodes:
        if isinstance(node, str):
            found += node
        elif node[0] == "range":
            for message in messages:
                state |= {".Role": message["role"], ".Content": message["content"]}
                found += _run(node[1], messages, state)
        elif node[0] == "if":
            body = next((body for condition, body in node[1] if _holds(condition, state)), [])
            found += _run(body, messages, state)
        elif assigned := re.fullmatch(r"(\$\w+) :?= (\S+)", node[1]):
            state[assigned[1]] = _value(assigned[2], state)
        else:
            found += _value(node[1], state)
    return found


def _holds(condition: str, state: dict[str, str]) -> bool:
    if not condition:
        return True
    name, one, other = condition.split(" ", 2)
    assert name == "eq"
    return _value(one, state) == _value(other, state)


def _value(text: str, state: dict[str, str]) -> str:
    return json.loads(text) if text.startswith('"') else state[text]
