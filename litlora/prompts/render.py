"""The process in which a chat template runs: it can compute, within limits of time and memory, and
do nothing else.

    PYTHONPATH=. python -P litlora/prompts/render.py < requests > replies

A chat template is a program by whoever made the model. jinja2's sandbox keeps it away from Python's
internals, but lets it loop and multiply text without end, and nothing inside its own process can be
trusted to stop it. So the operating system does: it limits the seconds of a request and the memory,
and forbids to open a file, to write one and to start a process.

Both sides send one JSON value a line. The first request has the template's source and the limits;
the reply "ready" says that the limits are in force. Each further request has the values that the
template is given; the reply is its text, or {"error": kind, "message": text}.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from litlora.worker import limit


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


def environment() -> Environment:
    """The filters, functions and tags of a template, as in transformers."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    found.globals["namespace"] = PlainNamespace
    return found


def answer(source: str, values: dict[str, Any], longest: int, compiled: list[Any]) -> Any:
    """The text, or what is wrong. `compiled` keeps the template from one request to the next."""
    try:
        if not compiled:
            compiled.append(environment().from_string(source))
        text = compiled[0].render(**values)
        if len(text) > longest:
            return {"error": "limits", "message": ""}
        text.encode()
        return text
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


def main() -> None:
    # Ctrl-C is for the process that asks; this one ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = json.loads(sys.stdin.readline())
    # What Python and jinja2 load on first use must be loaded while files can still be opened.
    for warm_up in ("{{ 'é\\n' | tojson }}{{ strftime_now('%d') }}{{ lipsum(1) }}", "{{ 1 // 0 }}"):
        answer(warm_up, {}, first["text"], [])
    limit(resource.RLIMIT_AS, first["memory"])
    for kind, amount in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 3)):
        limit(kind, amount)
    reply: Any = "ready"
    compiled: list[Any] = []
    while True:
        print(json.dumps(reply), flush=True)
        if not (request := sys.stdin.readline()):
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + first["seconds"] + 1)
        reply = answer(first["source"], json.loads(request), first["text"], compiled)


if __name__ == "__main__":
    main()
