"""What can be typed in a chat instead of a question."""

import json

import pytest
import torch
from conftest import random_adapter

from litlora.checkpoint import resolve
from litlora.errors import UserError
from litlora.lora import LoRAConfig
from litlora.lora.live import Way
from litlora.serve.commands import Commands, Ended
from litlora.serve.conversation import ChatSession
from litlora.serve.markdown import Markdown
from litlora.serve.opening import Opening, open_model
from litlora.serve.sampling import Sampling

QUESTION = "What is one and two?"


@pytest.fixture
def adapter(base, tmp_path):
    settings = LoRAConfig(rank=4, targets=["q_proj", "v_proj"], alpha=16)
    return random_adapter(tmp_path / "poet/final", base, settings)


def chat(directory, **sampling):
    """The commands of a chat as chat/base.py begins it: an adapter is merged."""
    chain, opening = resolve(directory), Opening(torch.device("cpu"))
    opened = open_model(chain, opening, live=False)
    session = ChatSession(opened.engine, opened.style, Sampling(**{"max_new_tokens": 8, **sampling}))
    reopen = (lambda: open_model(chain, opening, live=True)) if chain.adapters else None
    return Commands(session, opened, reopen)


def typed(commands, text):
    return "".join(commands.run(text) or ())


def test_a_merged_adapter_becomes_live_when_it_is_to_be_switched(base, adapter, capsys):
    commands = chat(adapter)
    merged = commands.session.engine
    said = "".join(commands.session.ask(QUESTION))
    session = commands.session
    base_says = typed(commands, "/compare base").partition("\n\nbase:\n")[2]
    assert session.engine is not merged and session.way == Way("poet")
    assert session.last == (QUESTION, said), "what is compared is not remembered"
    assert typed(commands, "/retry") == said != base_says
    typed(commands, "/strength 0")
    assert typed(commands, "/retry") == base_says
    typed(commands, "/adapter base")
    assert typed(commands, "/retry") == base_says and len(session.messages) == 2
    typed(commands, "/adapter poet")
    assert typed(commands, "/retry") == said
    assert capsys.readouterr().out.splitlines()[-1] == "base [poet]"


def test_what_is_compared_bears_the_name_of_what_gave_it(adapter, capsys):
    commands = chat(adapter)
    "".join(commands.session.ask(QUESTION))
    typed(commands, "/adapter base")
    assert "\n\npoet:\n" in typed(commands, "/compare poet")
    typed(commands, "/adapter poet")
    typed(commands, "/strength 0.5")
    typed(commands, "/compare base")
    typed(commands, "/retry")
    typed(commands, "/compare poet")
    typed(commands, "/adapter")
    shown = f"base [poet]|poet: {QUESTION}|base [poet]|poet × 0.5|poet: {QUESTION}|poet × 0.5: {QUESTION}"
    said = capsys.readouterr().out.splitlines()
    assert said == ["[base] poet", *shown.split("|")[1:], "base [poet × 0.5]"]


def test_a_question_that_no_longer_fits_is_kept_with_its_answer(base, tmp_path):
    commands, file = chat(base), tmp_path / "long.json"
    messages = [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "A"}]
    file.write_text(json.dumps(messages))
    typed(commands, f"/load {file}")
    for command in ("/retry", "/compare base"):
        with pytest.raises(UserError, match="context holds|no adapter here"):
            typed(commands, command)
    assert commands.session.messages == messages


def test_an_answer_from_a_file_cannot_steer_the_terminal(adapter, tmp_path):
    commands, file = chat(adapter), tmp_path / "hostile.json"
    answer = "\x1b[2J\x1b]0;title\x07yes\u202e\r"
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    file.write_text(json.dumps(messages))
    typed(commands, f"/load {file}")
    assert typed(commands, "/compare base").startswith("[2J]0;titleyes\n\nbase:\n")
    assert commands.session.messages == messages, "what is kept is what was said"


def test_a_conversation_is_saved_and_goes_on(base, tmp_path):
    commands, file = chat(base), tmp_path / "talk.json"
    assert "".join(commands.session.ask(QUESTION))
    typed(commands, f"/save {file}")
    first = commands.session.last
    assert json.loads(file.read_text())["messages"] == commands.session.messages
    second = "".join(commands.session.ask("And then?"))
    again = chat(base)
    typed(again, f"/load {file}")
    assert again.session.last == first
    assert "".join(again.session.ask("And then?")) == second
    with pytest.raises(UserError, match="exists; name another file"):
        typed(commands, f"/save {file}")
    for text, message in (
        ("[1]", "holds no conversation"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "holds no conversation"),
        ('{"messages": 5}', "holds no conversation"),
        ('{"messages": [{"role": {}, "content": "x"}, {"role": [], "content": "x"}]}', "no conversation"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            typed(again, f"/load {file}")
    assert again.session.messages == commands.session.messages


def test_sampling_is_shown_and_set(base, capsys):
    commands = chat(base, temperature=1.0)
    typed(commands, "/params temperature 1e9")
    typed(commands, "/params temperature 1")
    typed(commands, "/params seed 3")
    first = "".join(commands.session.ask(QUESTION))
    typed(commands, "/params seed 3")
    assert typed(commands, "/retry") == first
    typed(commands, "/params top_k none")
    typed(commands, "/params max_new_tokens 3")
    assert commands.session.sampling == Sampling(max_new_tokens=3, temperature=1.0, seed=3)
    typed(commands, "/retry")
    assert commands.session.speed.num_tokens == 3
    assert "max_new_tokens=3 temperature=1.0 top_k=None" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/params colour red", "NAME is one of max_new_tokens, temperature"),
        ("/params top_k 1.5", "/params top_k 1.5: must be a whole number"),
        ("/params temperature hot", "/params temperature hot: must be a number"),
        ("/params temperature 1e10", "must be 0, or from 1e-09 to 1e+09"),
        ("/adapter\tpoet", "there is no adapter here"),
        ("/params top_p 2", "top_p 2.0: must be from 1e-09 to 1"),
        ("/strength 0.5", "there is no adapter here, the model alone"),
        ("/strength much", "X is a number, such as 0.5"),
        ("/adapter poet", "there is no adapter here"),
        ("/compare", "name an adapter, or base"),
        ("/compare base", "there is no question yet"),
        ("/retry", "there is no question yet"),
        ("/save", "name a file"),
        ("/load nowhere.json", "nowhere.json: No such file or directory"),
        ("/load \0x", "cannot be the name of a file"),
        ("/save \ud800", "cannot be the name of a file"),
        ("/load /dev/zero", "not a file"),
        ("/system Be brief.", "has no place for a system message"),
        ("/reset now", "/reset stands alone"),
        ("/nonsense", "/nonsense: no such command; /help lists them"),
    ],
)
def test_what_cannot_be_done_is_said(base, text, message):
    with pytest.raises(UserError) as refused:
        typed(chat(base), text)
    assert message in str(refused.value)


def test_the_chat_ends(base):
    for text in ("/exit", "/quit"):
        with pytest.raises(Ended):
            typed(chat(base), text)


TEXT = "# Title\nSome **bold**, `code` and * star\n* **x**\n```python\na ** b\n```\n2 ** 3 `open\nend **"
SHOWN = (
    "[1;4m# Title[0m\nSome [1mbold[0m, [36mcode[0m and * star\n* [1mx[0m\n"
    "[2m```python[0m\n[36ma ** b[0m\n[2m```[0m\n2 ** 3 `open\nend **"
)


@pytest.mark.parametrize("size", [1, 2, 7, 200])
def test_markdown_gets_its_looks_in_whatever_pieces_it_comes(size):
    looks = Markdown()
    pieces = [looks.push(TEXT[at : at + size]) for at in range(0, len(TEXT), size)]
    assert ("".join(pieces) + looks.finish()).replace("\x1b", "") == SHOWN
    waiting = Markdown()
    assert waiting.push("plain words ") == "plain words ", "what has no mark is shown at once"
