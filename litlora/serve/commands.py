"""What can be typed in a chat instead of a question: /help, /adapter, /retry and so on."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from litlora.console import one_line, printable, say
from litlora.errors import UserError
from litlora.settings.sampling import SamplingSettings
from litlora.storage.untrusted import read_json

if TYPE_CHECKING:
    from litlora.lora.live import Way
    from litlora.serve.conversation import ChatSession
    from litlora.serve.opening import Opened

COMMAND = re.compile(r"/[^\s/]*([^\S\n].*)?")
"""A line that begins as a command does; a path such as /etc/hosts does not."""
HELP = """\
/help             this list
/clear, /reset    forget the conversation
/system TEXT      another system message; /system off: none
/retry            answer the last question again
/params           the sampling settings; /params NAME VALUE sets one
/adapter          the adapters; /adapter NAME answers through one, /adapter base through none
/strength X       how strongly the adapter acts: 0 not at all, 1 as it was trained
/compare NAME     the last question, answered by another adapter or by base
/save FILE        write the conversation (JSON); /load FILE goes on with it
/exit, /quit      end the chat, as Ctrl-D does
Ctrl-C            stop an answer
Alt-Enter         a new line in a question
A question whose first word begins with / needs a space before it."""


class Ended(Exception):
    """The chat is to end."""


class Commands:
    """The commands of one chat. Each returns an answer to show, if it makes one."""

    def __init__(
        self,
        session: "ChatSession",
        opened: "Opened | None" = None,
        reopen: "Callable[[], Opened] | None" = None,
    ) -> None:
        """`opened` is what the session's engine belongs to; `reopen` opens it once more with its
        adapter live, if there is one that is merged."""
        self.session, self.opened, self._reopen = session, opened, reopen

    def run(self, typed: str) -> Iterator[str] | None:
        """Do what was typed. Raises UserError for what cannot be done, and Ended."""
        word, *after = typed.split(maxsplit=1)
        known = {
            "/help": self._help,
            "/clear": self._clear,
            "/reset": self._clear,
            "/exit": self._exit,
            "/quit": self._exit,
            "/system": self._system,
            "/retry": self._retry,
            "/params": self._params,
            "/adapter": self._adapter,
            "/strength": self._strength,
            "/compare": self._compare,
            "/save": self._save,
            "/load": self._load,
        }
        if word not in known:
            raise UserError(
                f"{one_line(word)}: no such command; /help lists them, a space before it makes it a question"
            )
        rest = after[0].strip() if after else ""
        if rest and word in ("/help", "/clear", "/reset", "/exit", "/quit", "/retry"):
            raise UserError(f"{word} stands alone; a space before it makes it a question")
        return known[word](rest)

    def _help(self, rest: str) -> None:
        say(*HELP.splitlines())

    def _clear(self, rest: str) -> None:
        self.session.clear()

    def _exit(self, rest: str) -> None:
        raise Ended

    def _system(self, rest: str) -> None:
        if rest:
            self.session.set_system(None if rest == "off" else rest)
        say(f"system: {self.session.system or '(none)'}")

    def _retry(self, rest: str) -> Iterator[str]:
        return self.session.retry()

    def _params(self, rest: str) -> None:
        sampling = self.session.sampling
        kinds = get_type_hints(SamplingSettings)
        if rest:
            name, _, value = rest.partition(" ")
            if name not in kinds or not value.strip():
                raise UserError(f"/params NAME VALUE: NAME is one of {', '.join(kinds)}")
            new = {name: _parsed(name, value.strip(), kinds[name])}
            self.session.sampling = sampling = dataclasses.replace(sampling, **new)
        say(" ".join(f"{name}={getattr(sampling, name)}" for name in kinds))

    def _adapter(self, name: str) -> None:
        if name:
            self.session.way = self._way(name)
        there = [*self._live().engine.adapters] if self._may_be_live else []
        used = self._used or "base"
        shown = f"[{_label(self.session.way)}]"
        say(" ".join(shown if one == used else one for one in ("base", *there)))

    def _strength(self, rest: str) -> None:
        try:
            strength = float(rest)
        except ValueError:
            raise UserError("/strength X: X is a number, such as 0.5") from None
        if not -10 <= strength <= 10:
            raise UserError(f"/strength {rest}: must be from -10 to 10")
        self._live()
        if self._used is None:
            raise UserError("/strength: no adapter is in use; /adapter NAME chooses one")
        self.session.way = self.session.way._replace(strength=strength)
        say(_label(self.session.way))

    def _compare(self, name: str) -> Iterator[str]:
        if not name:
            raise UserError("/compare NAME: name an adapter, or base")
        if self.session.last is None:
            raise UserError("there is no question yet")
        way = self._way(name)
        pieces = self.session.compare(way)
        question, answer = self.session.last
        by = self.session.last_way
        say(f"{'as loaded' if by is None else _label(by)}: {question}")
        return itertools.chain([f"{printable(answer.strip())}\n\n{name}:\n"], pieces)

    def _way(self, name: str) -> "Way":
        from litlora.lora.live import Way
        from litlora.serve.opening import PLAIN

        there = self._live().engine.adapters
        if name == PLAIN:
            return Way(None)
        if name not in there:
            raise UserError(f"{name}: there is no adapter of this name; there is {', '.join(there)} and base")
        return Way(name)

    @property
    def _used(self) -> str | None:
        """The adapter that answers go through."""
        return self.session.way.adapter

    @property
    def _may_be_live(self) -> bool:
        return self._reopen is not None or bool(self.opened and self.opened.engine.adapters)

    def _live(self) -> "Opened":
        """The model with adapters that can be switched; merged ones are opened once more, live."""
        if self.opened is None or not self._may_be_live:
            raise UserError("there is no adapter here, the model alone")
        if self._reopen is not None:
            from litlora.lora.live import Way

            self.opened = self._reopen()
            self._reopen = None
            self.session.move(self.opened.engine, Way(self.opened.default))
        return self.opened

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save FILE: name a file")
        text = json.dumps({"messages": self.session.messages}, ensure_ascii=False, indent=2) + "\n"
        try:
            with Path(name).open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"{name}: exists; name another file") from None
        except OSError as error:
            raise UserError(f"{name}: {error.strerror or error}") from None
        except ValueError:
            raise UserError(f"{name}: cannot be the name of a file") from None
        say(f"saved: {name}")

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load FILE: name a file that /save wrote")
        try:
            found = read_json(Path(name))
        except OSError as error:
            raise UserError(f"{name}: {error.strerror or error}") from None
        except ValueError:
            raise UserError(f"{name}: cannot be the name of a file") from None
        try:
            self.session.restore(found.get("messages") if isinstance(found, dict) else found)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        say(f"loaded: {len(self.session.messages)} messages")


def _label(way: "Way") -> str:
    """What answers go through, for people."""
    name = way.adapter or "base"
    return name if way.adapter is None or way.strength == 1 else f"{name} × {way.strength:g}"


def _parsed(name: str, value: str, kind: object) -> int | float | None:
    """The value of a sampling setting."""
    kinds = get_args(kind) or (kind,)
    if value.lower() in ("none", "null") and type(None) in kinds:
        return None
    with suppress(ValueError):
        return int(value) if int in kinds else float(value)
    raise UserError(f"/params {name} {value}: must be a {'whole ' if int in kinds else ''}number")
