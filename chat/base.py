"""Talk to a model: a full checkpoint, an adapter or a chain of them, merged in memory.

python chat/base.py --checkpoint_dir $dir/final
python chat/base.py --checkpoint_dir $dir/final --prompt "What is the capital of France?"
python chat/base.py --checkpoint_dir $dir/final --system "Be brief."
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.cli import run
from litlora.console import one_line, say
from litlora.errors import UserError, setting
from litlora.paths import checkpoint_dir
from litlora.settings import Chat

if TYPE_CHECKING:
    from litlora.serve.conversation import ChatSession
    from litlora.serve.terminal import CtrlC


def main(settings: Chat) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    if settings.prompt is not None and not settings.prompt.strip():
        raise UserError(f"{setting('prompt')}: is empty; ask something")

    from litlora.checkpoint import resolve
    from litlora.load import load_chain, pick_device
    from litlora.prompts import choose_style, lacking_tokens
    from litlora.serve.conversation import ChatSession
    from litlora.serve.engine import Engine
    from litlora.serve.sampling import Sampling
    from litlora.streaming import gib, streams

    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    device, asked = pick_device(settings.accelerator), settings.stream_base
    in_few_bits = settings.quantize not in (None, "none")
    stream = streams(False if in_few_bits else asked, chain, device)
    loaded = load_chain(chain, device=device, quantize=settings.quantize, live=None, stream=stream)
    style, reason = choose_style(
        settings.prompt_style,
        loaded.prompt_style,
        loaded.template,
        default="plain",
        tokenizer=loaded.tokenizer,
    )
    for notice in loaded.chain.notices:
        say(f"note: {notice}", file=sys.stderr)
    if settings.prompt_style and style.called and (lacking := lacking_tokens(style, loaded.tokenizer)):
        say(f"note: the tokenizer cuts {', '.join(lacking)} into pieces", file=sys.stderr)
    if loaded.quantized is not None:
        how = loaded.quantized.quantizer.describe()
        say(f"note: the linear layers of the blocks are in {how}", file=sys.stderr)
    if (streamed := loaded.stream) is not None:
        size = streamed.nbytes + streamed.head_bytes
        say(
            f"note: the base stays in its file; a token reads {gib(size)}, which takes "
            f"{size / streamed.speed:.2g} s at the {gib(streamed.speed)} a second just measured",
            file=sys.stderr,
        )
    sampling = Sampling.of(settings)
    session = ChatSession(Engine(loaded.model, loaded.tokenizer), style, sampling, settings.system)
    if settings.prompt is not None:
        for piece in session.ask(settings.prompt):
            print(piece, end="", flush=True)
        print()
        return
    more = ", /help lists more" if sys.stdin.isatty() else ""
    say(
        f"{directory} | prompt style {style.title} ({reason}) | "
        f"Ctrl-C stops an answer, /clear forgets the conversation{more}, Ctrl-D ends"
    )
    if settings.system is not None:
        say(f"system: {settings.system}")
    talk(session)


HELP = """\
/help           this list
/clear, /reset  forget the conversation
/exit, /quit    end the chat, as Ctrl-D does
Ctrl-C          stop an answer
A question whose first word begins with / needs a space before it."""

COMMAND = re.compile(r"/[^\s/]*([^\S\n].*)?")
"""A line that begins as a command does; a path such as /etc/hosts does not."""


def talk(session: "ChatSession") -> None:
    """Answer questions from the terminal until its end of input."""
    from litlora.serve.terminal import CtrlC, question_reader

    read = question_reader()
    with CtrlC() as ctrl_c:
        while True:
            try:
                with ctrl_c.stops():
                    typed = read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D ends)")
                continue
            if not act_on(session, typed, ctrl_c):
                return


def act_on(session: "ChatSession", typed: str, ctrl_c: "CtrlC") -> bool:
    """Do or answer what was typed; returns whether the chat goes on."""
    question = typed.strip()
    if question in ("/exit", "/quit"):
        return False
    if question in ("/clear", "/reset"):
        session.clear()
    elif question == "/help":
        say(*HELP.splitlines())
    elif COMMAND.fullmatch(typed.rstrip()):
        word = one_line(question.split()[0])
        say(
            f"error: {word}: no such command; /help lists them, a space before it makes it a question",
            file=sys.stderr,
        )
    elif question:
        answer(session, question, ctrl_c)
    return True


def answer(session: "ChatSession", question: str, ctrl_c: "CtrlC") -> None:
    """Stream one answer to the terminal."""
    from litlora.serve.terminal import keeping_input

    try:
        with keeping_input(), ctrl_c.stops():
            for piece in session.ask(question):
                print(piece, end="", flush=True)
        if session.notice:
            print(f"\n({one_line(session.notice)})", end="")
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except UserError as error:
        print(f"({one_line(str(error))})", end="", file=sys.stderr)
    print()


if __name__ == "__main__":
    run(main, Chat)
