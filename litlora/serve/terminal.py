"""Questions from whoever sits at the terminal, or from a pipe. Torch-free."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from litlora.serve.markdown import DIM, END, Markdown

PROMPT = ">>> "


def question_reader() -> Callable[[], str]:
    """A function that returns the next question from stdin. It raises EOFError at the end, and
    KeyboardInterrupt on Ctrl-C.

    At a terminal, lines can be edited and called back, and a paste of any length and any number of
    lines is one question; the history lasts as long as the chat. Elsewhere each line is a question.
    A byte that is not text becomes a surrogate, which `ChatSession.ask` refuses by question.
    """
    if _at_terminal():
        return _line_editor()
    sys.stdin.reconfigure(errors="surrogateescape")  # the default depends on the locale
    return lambda: input(PROMPT)


class CtrlC:
    """Ctrl-C in a chat: one KeyboardInterrupt inside `with ctrl_c.stops():`, and nothing elsewhere, so
    that a second one, or one between two questions, does not end the program. It is the process's
    handler of SIGINT from the beginning of `with CtrlC() as ctrl_c:` to its end."""

    def __init__(self) -> None:
        self._stops = False

    def __enter__(self) -> "CtrlC":
        self._before = signal.signal(signal.SIGINT, self._received)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def stops(self) -> Iterator[None]:
        self._stops = True
        try:
            yield
        finally:
            self._stops = False

    def _received(self, *signal_and_frame: object) -> None:
        if self._stops:
            self._stops = False
            raise KeyboardInterrupt


class Plain:
    """An answer as it is: what a pipe or a file gets."""

    is_terminal = False

    def push(self, piece: str) -> str:
        """What to write for one more piece."""
        return piece

    def finish(self) -> str:
        """The rest, at the end."""
        return ""

    def dim(self, text: str) -> str:
        """A remark beside an answer."""
        return text


class Styled(Plain):
    """An answer in Markdown: what a terminal gets that can show it."""

    is_terminal = True

    def __init__(self) -> None:
        self._markdown = Markdown()

    def push(self, piece: str) -> str:
        return self._markdown.push(piece)

    def finish(self) -> str:
        return self._markdown.finish()

    def dim(self, text: str) -> str:
        return f"{DIM}{text}{END}"


def looks() -> Plain:
    """How an answer is shown: with NO_COLOR set, at a terminal, too, as it is."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return Plain()
    found = Plain() if os.environ.get("NO_COLOR") else Styled()
    found.is_terminal = True
    return found


def _at_terminal() -> bool:
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


@contextmanager
def keeping_input() -> Iterator[None]:
    """While an answer is shown at a terminal: what is typed or pasted meanwhile waits, unseen and whole,
    for the next prompt, as if it were typed there. Ctrl-C interrupts as ever, and drops it."""
    if not _at_terminal():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    waiting = termios.tcgetattr(sys.stdin)
    waiting[0] &= ~termios.ICRNL  # Enter as the line editor gets it
    waiting[3] &= ~(termios.ICANON | termios.ECHO)
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr
    termios.tcsetattr(sys.stdin, termios.TCSANOW, waiting)
    screen.write("\x1b[?2004h")  # mark the beginning and the end of a paste
    screen.flush()
    try:
        yield
    finally:
        screen.write("\x1b[?2004l")
        screen.flush()
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _line_editor() -> Callable[[], str]:
    # The kernel's own line input cuts lines of more than 4,095 bytes and knows no keys.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))

    # With the answers in a pipe, the line that is edited still has to be seen.
    session = PromptSession(
        history=InMemoryHistory(), output=create_output(always_prefer_tty=True), key_bindings=keys
    )
    return lambda: session.prompt(PROMPT)
