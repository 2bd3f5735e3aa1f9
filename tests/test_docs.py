"""README.md and docs/: their commands are understood, their examples are what they are said to be."""

import importlib.util
import json
import re
import runpy
import shlex
from collections import Counter

import pytest
from conftest import REPO

from litlora import cli
from litlora.data.conversation import Place
from litlora.data.records import FORMS, choose_form
from litlora.errors import UserError

READMES = REPO / "README.md", REPO / "README.zh-CN.md"
PAGES = [*READMES, *sorted((REPO / "docs").glob("*.md"))]
OURS = r"(?:[A-Z_]+=\S+ )*python (?:finetune|chat|scripts)/"
"""How a command of ours begins, with its environment."""


def commands_of(page) -> list[str]:
    found = (
        either
        for line in page.read_text().splitlines()
        for both in re.findall(rf"`({OURS}[^`]+)`|^(?: {{4,}}|)(?:.*&& )?({OURS}.*)", line)
        for either in both
    )
    return [command.split("  #")[0].strip() for command in found if command]


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})
FORMS_TABLE = (REPO / "docs/data.md").read_text().split("| form | a record |")[1].split("\n\n")[0]
EXAMPLES = re.findall(r"^\| `(\w+)` \| `(\{.+\})` \|$", FORMS_TABLE, re.MULTILINE)
LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text())
    if ":" not in link
]


SAID = [
    words
    for line in (REPO / "docs/trouble.md").read_text().splitlines()
    if line.startswith("| `")
    for words in re.findall(r"`([^`]+)`", line.split(" | ")[0])
]
"""What messages say, in the tables of docs/trouble.md."""


def settings_of(script: str, words: list[str], monkeypatch) -> type:
    """The settings that a command line is for, of those that the command hands to `cli.run`."""
    taken = []
    monkeypatch.setattr(cli, "run", lambda main, *settings: taken.append(settings))
    spec = importlib.util.spec_from_file_location("__main__", REPO / script)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return cli.meant(taken[0], words)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, monkeypatch):
    environment, _, rest = command.partition("python ")
    for name, value in (word.split("=") for word in environment.split()):
        monkeypatch.setenv(name, value)
    script, *words = shlex.split(rest)
    monkeypatch.chdir(REPO)
    if any("hyperparameters.yaml" in word for word in words):  # of a run that is not there
        words = words[2:]
    try:
        cli.parse(settings_of(script, words, monkeypatch), words)
    except UserError as error:
        pytest.fail(str(error))


def test_the_commands_of_the_pages_are_found():
    scripts = {command.partition("python ")[2].split()[0] for command in COMMANDS}
    assert {"finetune/lora.py", "finetune/full.py", "chat/base.py", "scripts/show_data.py"} <= scripts


def test_there_is_an_example_of_every_form():
    assert [form for form, _ in EXAMPLES] == list(FORMS)


@pytest.mark.parametrize(("form", "record"), EXAMPLES)
def test_an_example_is_of_its_form(form, record):
    assert choose_form([(Place("x.jsonl", "line 1"), json.loads(record))], None, {}, ()) == form


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page, link):
    file, _, heading = link.partition("#")
    target = page.parent / file if file else page
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]
        assert heading in slugs


def test_what_messages_say_is_in_the_code():
    code = [file.read_text() for folder in ("litlora", "scripts") for file in (REPO / folder).rglob("*.py")]
    code = [re.sub(r'"\s*\n\s*f?"', "", text) for text in code]  # a message of several lines
    assert len(SAID) > 25
    assert [words for words in SAID if not any(words in text for text in code)] == []


def test_the_picture_is_drawn_from_its_figures():
    figures = json.loads((REPO / "benchmarks/learning_rate.json").read_text())
    drawn = (REPO / "docs/pictures/learning_rate.svg").read_text()
    assert runpy.run_path(str(REPO / "benchmarks/curves.py"))["drawing"](figures) == drawn
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (REPO / "docs/learning_rate.md").read_text(), re.MULTILINE)
    tables = {name: re.findall(r"[\d.]+", cells) for name, cells in rows}
    for name, curve in figures["curves"].items():
        assert [float(loss) for loss in tables[name]] == [loss for _, loss in curve]


def test_the_chinese_readme_says_the_same():
    english, chinese = ([page.read_text(), commands_of(page)] for page in READMES)
    assert chinese[1] == english[1]
    for pattern in (
        r"^## ",
        r"\((docs/[^)]+|SECURITY.md)\)",
        r"^    \w+/ ",
        r"(?<![\w.])\d[\d,.]*\d(?![\w.])",
    ):
        found = [Counter(re.findall(pattern, text, re.MULTILINE)) for text, _ in (english, chinese)]
        assert found[0] == found[1]
