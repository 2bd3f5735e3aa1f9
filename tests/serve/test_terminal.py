"""What is typed, pasted or piped reaches the model as it was meant: on a real terminal (a pty) and
through a pipe."""

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest
from conftest import QUICKSTART, REPO

from litlora.load import load
from litlora.prompts import STYLES
from litlora.serve.conversation import ChatSession
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling

ECHO = """
import runpy, sys, time
from pathlib import Path
from litlora.errors import UserError
from litlora.serve.commands import Commands
talk = runpy.run_path("chat/base.py")["talk"]

class Echo:
    notice = speed = None
    def ask(self, question):
        if question == "slow":
            yield "[begun]"
            sys.stdin.flush()
            while not Path(sys.argv[1]).exists():
                time.sleep(0.01)
        if question == "broken":
            raise UserError("no answer")
        yield f"[asked {ascii(question)}]"
    def clear(self):
        print("[cleared]")

assert "prompt_toolkit" not in sys.modules
talk(Commands(Echo()))
assert ("prompt_toolkit" in sys.modules) == sys.stdin.isatty()
assert "torch" not in sys.modules
"""
"""The chat without a model: its answer is the question."""
LEFT, UP, CTRL_C, CTRL_D = "\x1b[D", "\x1b[A", "\x03", "\x04"


class Terminal:
    """A program on a terminal of its own, and what it shows there."""

    def __init__(self, *words: object) -> None:
        self._main, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (40, 120))
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, *map(str, words)], stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, cwd=REPO, env=environment,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )  # fmt: skip
        self._terminal = terminal
        self._seen = ""

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed, as it did before the program."""
        return bool(termios.tcgetattr(self._terminal)[3] & termios.ECHO)

    def expect(self, text: str) -> str:
        """What is shown up to `text`, which is then done with."""
        deadline = time.monotonic() + 20
        while text not in self._seen:
            assert time.monotonic() < deadline, self._seen[-2000:]
            self._read(0.2)
        before, _, self._seen = self._seen.partition(text)
        return before

    def send(self, keys: str | bytes, until: Callable[[], object] | None = None) -> None:
        """Type at the prompt. Where the terminal takes no more for now, call `until`."""
        left = keys if isinstance(keys, bytes) else keys.encode()
        while left:
            _, ready, _ = select.select([], [self._main], [], 0.05)
            left = left[os.write(self._main, left[:256]) :] if ready else left
            if not ready and until is not None:
                until()
            self._read(0)  # a program that cannot print does not read either

    def asked(self, keys: str | bytes) -> str:
        """The question that these keys ask, as ascii() writes it."""
        self.send(keys if isinstance(keys, bytes) else keys + "\r")
        self.expect("[asked ")
        question = self.expect("]")
        self.expect(">>>")
        return question

    def status(self) -> int:
        """The exit status, once the program has ended."""
        deadline = time.monotonic() + 30
        while self._process.poll() is None and time.monotonic() < deadline:
            self._read(0.1)
        return self._process.wait(0)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._main)
        os.close(self._terminal)

    def _read(self, seconds: float) -> None:
        try:
            if select.select([self._main], [], [], seconds)[0]:
                self._seen += os.read(self._main, 65536).decode(errors="replace")
        except OSError:  # the program has closed its terminal
            pass


@pytest.fixture
def start():
    """start(words) -> a Terminal at its first prompt."""
    running = []

    def start(*words):
        running.append(Terminal(*words))
        running[-1].expect(">>>")
        return running[-1]

    yield start
    for terminal in running:
        terminal.close()


@pytest.fixture
def echo(start):
    return start("-c", ECHO)


def paste(text: str) -> str:
    """A paste as a terminal marks it, which sends a line break as Enter does."""
    return f"\x1b[200~{text.replace(chr(10), chr(13))}\x1b[201~"


def test_keys_edit_the_line_and_call_earlier_ones_back(echo):
    assert echo.asked("ab" + LEFT + "X") == "'aXb'"
    assert echo.asked(UP + LEFT + "Y") == "'aXYb'"
    assert echo.asked(UP + UP) == "'aXb'"
    assert echo.asked("日本語\x7f") == ascii("日本")
    assert echo.asked("one\x1b\rtwo") == ascii("one\ntwo"), "Alt-Enter begins a new line"


def test_a_paste_of_several_lines_is_one_question(echo):
    assert echo.asked(paste("one\n\n  two\nthree\n") + "four") == ascii("one\n\n  two\nthree\nfour")
    assert echo.asked(paste("/exit\nis a line")) == ascii("/exit\nis a line")


def test_a_long_paste_arrives_whole(echo):
    long = " ".join(map(str, range(2000)))
    assert len(long) > 2 * 4095
    assert echo.asked(paste(long)) == ascii(long)
    long = long[:4499]
    assert echo.asked(long) == ascii(long), "by a terminal that does not mark pastes"


@pytest.mark.parametrize("size", [3, 9000], ids=["short", "long"])
def test_what_is_pasted_while_an_answer_streams_is_the_next_question(start, tmp_path, size):
    go = tmp_path / "go"
    chat = start("-c", ECHO, go)
    chat.send("slow\r")
    chat.expect("[begun]")
    pasted = "\n".join("x" * (size // 3) for _ in range(3))
    chat.send(paste(pasted), until=None if size < 4000 else go.touch)
    go.touch()
    assert "x" not in chat.expect("[asked 'slow']")
    chat.expect(">>>")
    assert chat.asked(" and more") == ascii(pasted + " and more")
    chat.send(CTRL_D)
    assert chat.status() == 0


def test_what_is_typed_while_an_answer_streams_is_asked_after_it(start, tmp_path):
    chat = start("-c", ECHO, tmp_path / "go")
    chat.send("slow\r")
    chat.expect("[begun]")
    chat.send("one\rtwo")
    (tmp_path / "go").touch()
    chat.expect("[asked 'slow']")
    chat.expect("[asked 'one']")
    assert chat.asked("!") == "'two!'"


def test_ctrl_c_stops_an_answer_and_leaves_the_terminal_as_it_was(start, tmp_path):
    chat = start("-c", ECHO, tmp_path / "go")
    chat.send("slow\r")
    chat.expect("[begun]")
    chat.send(CTRL_C)
    chat.expect("(stopped)")
    chat.expect(">>>")
    assert chat.asked("next") == "'next'"
    chat.send(CTRL_D)
    assert chat.status() == 0 and chat.echoes


def test_a_command_is_not_a_question(echo):
    for typed in ("/foo", "/foo bar", "/help?", "/"):
        echo.send(typed + "\r")
        word = typed.split()[0]
        before = echo.expect(f"error: {word}: no such command; /help lists them, a space before it")
        assert "asked" not in before and "asked" not in echo.expect(">>>")
    echo.send("/help\r")
    assert "asked" not in echo.expect("/exit, /quit      end the chat")
    for typed in ("/clear", "/reset", " /clear "):
        echo.expect(">>>")
        echo.send(typed + "\r")
        assert "asked" not in echo.expect("[cleared]")
    echo.expect(">>>")
    assert echo.asked(" /foo bar") == "'/foo bar'"
    assert echo.asked("/etc/hosts is what?") == "'/etc/hosts is what?'"
    echo.send("/exit\r")
    assert echo.status() == 0


def test_ctrl_c_drops_the_line_and_ctrl_d_ends(echo):
    echo.send("half a li" + CTRL_C)
    echo.expect("(Ctrl-D ends)")
    echo.expect(">>>")
    assert echo.asked("whole") == "'whole'"
    echo.send(CTRL_D)
    assert echo.status() == 0


@pytest.mark.slow
def test_the_model_gets_a_paste_as_one_question(start):
    loaded, question = load(QUICKSTART), "What is\nthe capital of France?"
    sampling = Sampling(max_new_tokens=6, temperature=0)
    session = ChatSession(Engine(loaded.model, loaded.tokenizer), STYLES["plain"], sampling)
    answer = "".join(session.ask(question))
    chat = start("chat/base.py", "--checkpoint_dir", QUICKSTART, "--temperature", 0, "--max_new_tokens", 6)
    chat.send(b"caf\xe9\r")
    chat.expect("(the question is not UTF-8 text; send it as UTF-8)")
    chat.expect(">>>")
    chat.send(paste(question) + "\r")
    chat.expect(answer.strip().replace("\n", "\r\n"))
    chat.expect(" tokens/s)")
    chat.expect(">>>")
    chat.send("/quit\r")
    assert chat.status() == 0


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_piped_lines_are_questions_as_they_were(encoding):
    piped = subprocess.run(
        [sys.executable, "-c", ECHO],
        input=b"one\n\n \xe6\x97\xa5 \n\x1b[D/clear\n/clear\nc\xe9 va\nbroken\n/foo\nlast",
        capture_output=True, cwd=REPO, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == (
        b">>> ".join(
            [b"", b"[asked 'one']\n", b"", b"[asked '\\u65e5']\n",
             b"[asked '\\x1b[D/clear']\n", b"[cleared]\n",
             b"[asked 'c\\udce9 va']\n", b"\n", b"", b"[asked 'last']\n", b"\n"]
        )
    )  # fmt: skip
    broken, refused = piped.stderr.splitlines()
    assert broken == b"(no answer)" and refused.startswith(b"error: /foo: no such command")
