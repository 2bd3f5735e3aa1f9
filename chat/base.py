"""Talk to a model: a full checkpoint, an adapter or a chain of them, merged in memory; or several
adapters of one base, live.

python chat/base.py --checkpoint_dir $dir/final
python chat/base.py --checkpoint_dir $dir/final --prompt "What is the capital of France?"
python chat/base.py --checkpoint_dir $dir/final --system "Be brief."
python chat/base.py --checkpoint_dir checkpoints/$repo_id --adapters poet=out/poet/final clerk=out/clerk/final
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.cli import run
from litlora.console import one_line, say
from litlora.errors import UserError, setting
from litlora.paths import checkpoint_dir
from litlora.settings import Chat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from litlora.serve.commands import Commands
    from litlora.serve.conversation import ChatSession
    from litlora.serve.terminal import CtrlC


def main(settings: Chat) -> None:
    directory = checkpoint_dir(settings.checkpoint_dir)
    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    if settings.prompt is not None and not settings.prompt.strip():
        raise UserError(f"{setting('prompt')}: is empty; ask something")

    named = [entry.partition("=")[::2] for entry in settings.adapters]
    adapters = {name: checkpoint_dir(path) for name, path in named}

    from litlora.checkpoint import resolve
    from litlora.lora.live import Way
    from litlora.serve.commands import Commands
    from litlora.serve.conversation import ChatSession
    from litlora.serve.opening import Opening, open_model
    from litlora.serve.sampling import Sampling

    chain = resolve(directory, base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch)
    opening = Opening.of(settings, max_batch=1)
    opened = open_model(chain, opening, live=bool(adapters))
    for name, place in adapters.items():
        opened.add_adapter(name, place)
    for notice in dict.fromkeys(opened.notices):
        say(f"note: {notice}", file=sys.stderr)
    session = ChatSession(opened.engine, opened.style, Sampling.of(settings), settings.system)
    session.way = Way(opened.default)
    if settings.prompt is not None:
        for piece in session.ask(settings.prompt):
            print(piece, end="", flush=True)
        print()
        return
    more = ", /help lists more" if sys.stdin.isatty() else ""
    say(
        f"{directory} | prompt style {opened.style.title} ({opened.style_reason}) | "
        f"Ctrl-C stops an answer, /clear forgets the conversation{more}, Ctrl-D ends"
    )
    if settings.system is not None:
        say(f"system: {settings.system}")
    is_merged = bool(chain.adapters) and not adapters
    talk(Commands(session, opened, (lambda: open_model(chain, opening, live=True)) if is_merged else None))


def talk(commands: "Commands") -> None:
    """Answer questions from the terminal until its end of input."""
    from litlora.serve.commands import Ended
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
            try:
                act_on(commands, typed, ctrl_c)
            except Ended:
                return


def act_on(commands: "Commands", typed: str, ctrl_c: "CtrlC") -> None:
    """Do or answer what was typed. Raises Ended at the end of the chat."""
    from litlora.serve.commands import COMMAND

    question = typed.strip()
    # A command may stand behind spaces; what is no command is then a question.
    if COMMAND.fullmatch(typed.rstrip()) or question in ("/clear", "/reset", "/help", "/exit", "/quit"):
        try:
            pieces = commands.run(typed)
        except UserError as error:
            say(f"error: {one_line(str(error))}", file=sys.stderr)
            return
        if pieces is not None:
            answer(commands.session, pieces, ctrl_c)
    elif question:
        answer(commands.session, commands.session.ask(question), ctrl_c)


def answer(session: "ChatSession", pieces: "Iterator[str]", ctrl_c: "CtrlC") -> None:
    """Stream one answer to the terminal."""
    from litlora.serve.terminal import keeping_input, looks

    shown = looks()
    try:
        with keeping_input(), ctrl_c.stops():
            for piece in pieces:
                print(shown.push(piece), end="", flush=True)
        print(shown.finish(), end="")
        if session.notice:
            print(f"\n({one_line(session.notice)})", end="")
        if session.speed is not None and shown.is_terminal:
            print(f"\n{shown.dim(one_line(session.speed.text))}", end="")
    except KeyboardInterrupt:
        print(f"{shown.finish()} (stopped)", end="")
    except UserError as error:
        print(shown.finish(), end="", flush=True)
        end = "" if sys.stdout.isatty() else "\n"
        print(f"({one_line(str(error))})", end=end, file=sys.stderr)
    print()


if __name__ == "__main__":
    run(main, Chat)
