"""Regular expressions for names of layers, matched in linear time. Torch-free.

Adapters store patterns, and come from other people. Python's `re` searches by trial and error, which
can take for ever: `(|)` forty times does. Here a pattern becomes a finite automaton (Thompson 1968),
whose states all advance together, one character at a time. Patterns of characters and dots alone,
such as thousands of full names, share one tree. What is accepted means the same as to `re`; the rest
is refused by name: look-around, references, flags, word boundaries, a repeated part that may be
empty.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from litlora.errors import CheckpointError

LONGEST = 1000
"""Characters of a pattern."""
MOST_STATES = 2000
"""Of a pattern's automaton: `(q_proj){100}` has 600."""
MOST_STEPS = 30_000_000
"""Steps that one set of patterns may take over all names, some seconds."""
MOST_STORED = 500_000
"""States in the moves that an automaton remembers."""
MOST_TOGETHER = 1_000_000
"""States of a set of patterns, and characters of their tree: some hundred megabytes."""
MOST_SECONDS = 5
"""For `searched`, which takes a thousandth of a second for patterns that people write."""
_DEEPEST = 50
"""Groups within groups."""

Test = Callable[[str], Any]
Node = tuple[Any, ...]
"""("char", test) | ("at", "start" or "end") | ("all", nodes) | ("any", nodes) |
("repeat", node, least, most or None)."""


class Patterns:
    """Patterns in an order; the first that matches a name counts."""

    def __init__(self, patterns: Iterable[str], *, ends: bool) -> None:
        """`ends`: a pattern may also match what follows any dot of a name, as in PEFT; else the whole
        name. Raises ValueError for a pattern that cannot be matched, and for too many."""
        self.texts, self._ends = list(patterns), ends
        self._tree: dict[Any, Any] = {}
        self._automata: list[tuple[int, _Automaton]] = []
        self._found: dict[str, str | None] = {}
        self._steps = self._size = 0
        for number, text in enumerate(self.texts):
            if not isinstance(text, str) or len(text) > LONGEST:
                raise ValueError(f"{str(text)[:60]!r} is not the name of a layer")
            self._add(number, text)
            if self._size > MOST_TOGETHER:
                raise ValueError(f"{len(self.texts):,} patterns of layer names are too many to match")

    def _add(self, number: int, text: str) -> None:
        if (plain := _plain(text)) is None:
            self._automata.append((number, _Automaton(text)))
            self._size += self._automata[-1][1].size
            return
        node = self._tree
        for key in plain:
            if key not in node:
                node[key] = {}
                self._size += 1
            node = node[key]
        node.setdefault(_END, number)

    def first(self, name: str) -> str | None:
        """The first pattern that matches this name. Raises CheckpointError where the search would
        take too long, or a name has several lines."""
        if name not in self._found:
            self._found[name] = self._search(name) if self.texts else None
        return self._found[name]

    def _search(self, name: str) -> str | None:
        if "\n" in name:
            raise CheckpointError(f"{name[:60]!r}: no layer has a name of several lines")
        starts = [0, *(place + 1 for place, c in enumerate(name) if c == "." and self._ends)]
        found = self._in_tree(name, set(starts))
        for number, automaton in self._automata:
            if found is not None and found < number:
                break
            matched, steps = automaton.matches(name, set(starts))
            self._count(steps)
            if matched:
                found = number
                break
        return None if found is None else self.texts[found]

    def _in_tree(self, name: str, starts: set[int]) -> int | None:
        active: list[dict[Any, Any]] = []
        for place, character in enumerate(name):
            if place in starts:
                active.append(self._tree)
            self._count(1 + len(active))
            active = [node[key] for node in active for key in (character, _ANY) if key in node]
        if len(name) in starts:
            active.append(self._tree)
        return min((node[_END] for node in active if _END in node), default=None)

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise CheckpointError(
                f"{len(self.texts):,} patterns of layer names, such as {self.texts[0][:60]!r}, take too long "
                "to match; name the layers in full"
            )


class ByPattern(dict[str, Any]):
    """PEFT's {pattern: value}: a key is a regular expression for the end of a module's name, after any
    dot, and the first that matches counts."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._patterns = Patterns(values, ends=True)

    def value(self, module: str, default: Any) -> Any:
        """The value for the module of this name."""
        pattern = self._patterns.first(module)
        return default if pattern is None else self[pattern]


def searched(pattern: str, names: list[str]) -> set[str] | None:
    """The names that Python's `re` matches as a whole, with all that it can; None if that takes longer
    than MOST_SECONDS, or too much memory. It works in a process of its own, as nothing else could
    end it."""
    asked = json.dumps([pattern, names])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SEARCH],
            input=asked,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=True,
        )
    except subprocess.SubprocessError:
        return None
    return {names[number] for number in json.loads(done.stdout)}


_SEARCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
matches = re.compile(pattern).fullmatch
print(json.dumps([number for number, name in enumerate(names) if matches(name)]))
"""


class _Key:
    """A key of the tree that is no character."""


_ANY, _END = _Key(), _Key()
"""A dot; the number of the pattern that ends here."""
_SPECIAL = set(r"\[](){}*+?|^$")


def _plain(pattern: str) -> list[Any] | None:
    """The keys of a pattern of characters, escaped ones and dots alone; None for any other."""
    keys: list[Any] = []
    place = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\" and pattern[place + 1 : place + 2] in _PUNCTUATION:
            place += 1
            keys.append(pattern[place])
        elif character in _SPECIAL:
            return None
        else:
            keys.append(_ANY if character == "." else character)
        place += 1
    return keys


_PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ ")
"""What stands for itself after a backslash."""


# ---- from text to a tree


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"the pattern {self.text[:60]!r} {what}, which names of layers do not need")

    def parse(self) -> Node:
        node = self.alternatives()
        if self.place < len(self.text):
            self.refuse("closes a group that is not open")
        return node

    def looking_at(self, pattern: str) -> re.Match | None:
        return re.compile(pattern).match(self.text, self.place)

    def alternatives(self) -> Node:
        found = [self.sequence()]
        while self.looking_at(r"\|"):
            self.place += 1
            found.append(self.sequence())
        return found[0] if len(found) == 1 else ("any", found)

    def sequence(self) -> Node:
        found: list[Node] = []
        while self.place < len(self.text) and not self.looking_at(r"[|)]"):
            found.append(self.repetition(self.atom()))
        return "all", found

    def repetition(self, node: Node) -> Node:
        match = self.looking_at(r"([*+?])|\{(\d+)(,?)(\d*)\}|\{,(\d+)\}")
        if match is None:
            return node
        if node[0] == "at":
            self.refuse("repeats an anchor")
        self.place = match.end()
        sign, least, comma, most, only_most = match.groups()
        if sign:
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        elif only_most:
            low, high = 0, self.number(only_most)
        elif not comma:
            if most:
                self.refuse("has a brace that is not closed")
            low = high = self.number(least)
        else:
            low, high = self.number(least), self.number(most) if most else None
        if high is not None and high < low:
            self.refuse("repeats at most fewer times than at least")
        if self.looking_at(r"\?"):  # as few as possible: the same names match
            self.place += 1
        if self.looking_at(r"[*+?]|\{\d*,?\d*\}"):
            self.refuse("repeats a repetition")
        if (high is None or high > 1) and _may_be_empty(node):
            self.refuse("repeats what may be empty")
        return "repeat", node, low, high

    def number(self, digits: str) -> int:
        if len(digits) > 4:
            self.refuse(f"repeats {digits[:9]} times")
        return int(digits)

    def atom(self) -> Node:
        character = self.text[self.place]
        if character == "(":
            return self.group()
        if character == "[":
            return self.characters()
        if character == "\\":
            return self.escaped()
        self.place += 1
        if character in "*+?{":
            self.refuse(f"has {character} after nothing")
        if character in "^$":
            return "at", "start" if character == "^" else "end"
        return "char", "\n".__ne__ if character == "." else character.__eq__

    def group(self) -> Node:
        opening = self.looking_at(r"\(\?:|\((?!\?)")
        if opening is None:
            self.refuse(f"has a group of the kind {self.text[self.place : self.place + 3]}")
        self.place, self.depth = opening.end(), self.depth + 1
        if self.depth > _DEEPEST:
            self.refuse(f"has more than {_DEEPEST} groups within groups")
        node = self.alternatives()
        if not self.looking_at(r"\)"):
            self.refuse("does not close a group")
        self.place, self.depth = self.place + 1, self.depth - 1
        return node

    def characters(self) -> Node:
        found = self.looking_at(r"\[\^?\]?(\\.|[^\]\\[])*\]")
        # Python warns that it may change the meaning of these.
        if found is None or re.search(r"--|&&|~~|\|\|", found[0]):
            self.refuse("has an unusual set of characters")
        self.place = found.end()
        try:
            return "char", re.compile(found[0]).fullmatch
        except re.error:
            self.refuse("has a set of characters that is not one")

    def escaped(self) -> Node:
        letter = self.text[self.place + 1 : self.place + 2]
        self.place += 2
        if letter in ("A", "Z"):
            return "at", "start" if letter == "A" else "end"
        if letter in _PUNCTUATION:
            return "char", letter.__eq__
        if not letter or letter not in "dDwWsS":
            self.refuse(f"has \\{letter}")
        return "char", re.compile("\\" + letter).fullmatch


def _may_be_empty(node: Node) -> bool:
    kind = node[0]
    if kind == "all":
        return all(map(_may_be_empty, node[1]))
    if kind == "any":
        return any(map(_may_be_empty, node[1]))
    if kind == "repeat":
        return node[2] == 0 or _may_be_empty(node[1])
    return kind == "at"


# ---- from the tree to an automaton


class _Automaton:
    """States by number: ("char", test, next) | ("at", where, next) | ("split", nexts) | ("match",)."""

    def __init__(self, pattern: str) -> None:
        parser = _Parser(pattern)
        tree = parser.parse()
        self._states: list[tuple[Any, ...]] = [("match",)]
        self._refuse = parser.refuse
        self._start = self._add(tree, 0)
        self._moves: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._stored = 0
        self._first = self._reached([self._start], "start"), self._reached([self._start], "")

    @property
    def size(self) -> int:
        return len(self._states)

    def _new(self, *state: Any) -> int:
        if len(self._states) >= MOST_STATES:
            self._refuse("stands for too many states")
        self._states.append(state)
        return len(self._states) - 1

    def _add(self, node: Node, then: int) -> int:
        """Add the states of a node in front of the state `then`; returns the first."""
        kind = node[0]
        if kind in ("char", "at"):
            return self._new(kind, node[1], then)
        if kind == "all":
            for part in reversed(node[1]):
                then = self._add(part, then)
            return then
        if kind == "any":
            return self._new("split", [self._add(part, then) for part in node[1]])
        _, part, least, most = node
        if most is None:
            loop = self._new("split", [])
            self._states[loop] = "split", [self._add(part, loop), then]
            then = loop
        else:
            end = then
            for _ in range(most - least):
                then = self._new("split", [self._add(part, then), end])
        for _ in range(least):
            then = self._add(part, then)
        return then

    def _reached(self, states: Iterable[int], where: str) -> frozenset[int]:
        """These states and what follows them without a character; `where` in a name this is."""
        found: set[int] = set()
        pending = list(states)
        while pending:
            if (number := pending.pop()) in found:
                continue
            found.add(number)
            state = self._states[number]
            if state[0] == "split":
                pending += state[1]
            elif state[0] == "at" and state[1] in where:
                pending.append(state[2])
        return frozenset(found)

    def matches(self, name: str, starts: set[int]) -> tuple[bool, int]:
        """(whether the pattern matches the rest of the name from one of `starts`, steps taken)."""
        states: frozenset[int] = frozenset()
        steps = len(name)
        for place, character in enumerate(name):
            if place in starts:
                states |= self._first[place > 0]
            key = states, character
            if key not in self._moves:
                steps += len(states)
                self._moves[key] = self._moved(states, character)
                self._stored += 1 + len(states)
                if self._stored > MOST_STORED:
                    self._stored, self._moves = 0, {key: self._moves[key]}
            states = self._moves[key]
        if len(name) in starts:
            states |= self._first[len(name) > 0]
        # An end may be followed by a start only in an empty name.
        return 0 in self._reached(states, "end" if name else "start end"), steps + len(states)

    def _moved(self, states: frozenset[int], character: str) -> frozenset[int]:
        after = [
            self._states[number][2]
            for number in states
            if self._states[number][0] == "char" and self._states[number][1](character)
        ]
        return self._reached(after, "")
