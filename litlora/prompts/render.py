"""The process in which a chat template runs: it can compute, within limits of time and memory, and
do nothing else.

    PYTHONPATH=. python -P litlora/prompts/render.py < requests > replies

A chat template is a program by whoever made the model. jinja2's sandbox keeps it away from Python's
internals, but lets it loop and multiply text without end, and nothing inside its own process can be
trusted to stop it. So the operating system does: it limits the seconds of a request and the memory,
and forbids to open a file, to write one and to start a process.

Both sides send one JSON value a line. The first request has the template's source and the limits;
the reply "ready" says that the limits are in force. Each further request is

    {"messages": [...], "wanted": [[count, more, add_generation_prompt], ...], "values": {...}, "now": time}

and asks for a text of the first `count` messages and `more` ones for each entry of `wanted`. The
reply is a list of [number of characters shared with the text before, the others]; or
{"error": kind, "message": text}.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from litlora.worker import limit, shared_length


class Generation(Extension):
    """{% generation %} marks what the model says; it does not change the text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
            line
        )


class PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore: they lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace with the name {name}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment(clock: Callable[[], datetime]) -> Environment:
    """The filters, functions and tags of a template, as in transformers."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = lambda format: clock().strftime(format)
    found.globals["namespace"] = PlainNamespace
    return found


class Renderer:
    """A template, compiled by the first request."""

    def __init__(self, source: str, longest: int) -> None:
        """`longest` is how many characters the texts of one request may have, but for what each
        shares with the one before."""
        self._source, self._longest = source, longest
        self._template: Template | None = None
        self._now = datetime.now()

    def answer(self, asked: dict[str, Any]) -> Any:
        """The texts, or what is wrong."""
        try:
            if self._template is None:
                self._template = environment(lambda: self._now).from_string(self._source)
            # One time for all texts of a conversation: a second that passes must not change them.
            self._now = datetime.now() if asked["now"] is None else datetime.fromtimestamp(asked["now"])
            return self._texts(asked)
        except TemplateSyntaxError as error:
            return {"error": "broken", "message": f"at its line {error.lineno}: {error}"[:500]}
        except SecurityError as error:
            return {"error": "forbidden", "message": str(error)[:500]}
        except TemplateError as error:
            return {"error": "refuses", "message": str(error)[:500]}
        except MemoryError:
            return {"error": "limits", "message": ""}
        except Exception as error:  # a template is a program and can raise any error
            return {"error": "fails", "message": f"{type(error).__name__}: {error}"[:500]}

    def _texts(self, asked: dict[str, Any]) -> Any:
        found: list[tuple[int, str]] = []
        before, size = "", 0
        for count, more, add_generation_prompt in asked["wanted"]:
            text = self._template.render(
                messages=asked["messages"][:count] + more,
                add_generation_prompt=add_generation_prompt,
                **asked["values"],
            )
            text.encode()
            shared = shared_length(before, text)
            found.append((shared, text[shared:]))
            size += len(text) - shared
            if max(size, len(text)) > self._longest:
                return {"error": "limits", "message": ""}
            before = text
        return found


def main() -> None:
    # Ctrl-C is for the process that asks; this one ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = json.loads(sys.stdin.readline())
    # What Python and jinja2 load on first use must be loaded while files can still be opened.
    for warm_up in ("{{ 'é\\n' | tojson }}{{ strftime_now('%d') }}{{ lipsum(1) }}", "{{ 1 // 0 }}"):
        asked = {"messages": [], "wanted": [[0, [], False]], "values": {}, "now": None}
        Renderer(warm_up, first["text"]).answer(asked)
    limit(resource.RLIMIT_AS, first["memory"])
    for kind, amount in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 3)):
        limit(kind, amount)
    renderer = Renderer(first["source"], first["text"])
    reply: Any = "ready"
    while True:
        print(json.dumps(reply), flush=True)
        if not (request := sys.stdin.readline()):
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + first["seconds"] + 1)
        reply = renderer.answer(json.loads(request))


if __name__ == "__main__":
    main()
