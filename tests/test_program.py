"""The console command `litlora`, and a wheel."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import REPO

from litlora.cli.program import NOT_LISTED, commands, listing, named

PROGRAM = "import sys; from litlora.cli.program import main; main()"


def litlora(*words, cwd=REPO, status=0, **environment):
    """What `litlora WORDS` prints, without torch."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_every_file_is_a_command_with_one_line():
    files = {
        str(file.relative_to(REPO))
        for folder in ("finetune", "chat", "scripts")
        for file in (REPO / folder).glob("*.py")
        if file.stem not in NOT_LISTED
    }
    found = commands()
    assert {str(each.file.relative_to(REPO)) for each in found} == files
    assert len({each.words for each in found}) == len(found)
    for line in listing()[2:]:
        assert re.fullmatch(r"  \S+( \S+)?  +[A-Z].{5,}", line) and len(line) < 150, line
    for each in found:
        assert each.settings, each.file


def test_the_page_names_commands_that_there_are():
    lines = [line.split() for line in (REPO / "docs/console.md").read_text().splitlines()]
    called = [words[1:] for words in lines if words[:1] == ["litlora"] and len(words) > 1]
    assert len(called) > 5
    for words in called:
        assert words[0] == "completion" or named(words).file.is_file()


def test_words_lead_to_the_same_files():
    assert "Fine-tune with LoRA." in litlora("finetune", "lora", "--help")
    assert "--max_new_tokens" in litlora("chat", "--help")
    assert "--strength" in litlora("merge", "--help") and "--strength" in litlora("merge_lora", "--help")
    said = litlora("finetune", "lora", "--lora.rank", "x", status=2)
    assert said.startswith("error: --lora.rank: expected int") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["finetune"], "error: litlora finetune: needs one of distill, dpo, full, lora"),
        (["finetune", "loar"], "error: litlora finetune: needs one of"),
        (["mergee"], "no such command; did you mean litlora merge?; litlora --help lists them"),
        (["completion", "fish"], "error: litlora completion: needs a shell, one of bash, zsh"),
    ],
)
def test_a_mistake_is_one_line(words, says):
    said = litlora(*words, status=2)
    assert says in said and said.count("\n") == 1


def test_bash_and_zsh_complete_commands_options_and_values(tmp_path):
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(litlora("completion", "bash"))
    program = f"""source {script}
    complete_words() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
      _shtab_litlora; echo "${{COMPREPLY[*]}}"; }}
    complete_words litlora fin; complete_words litlora finetune lo
    complete_words litlora finetune lora --lora.ra; complete_words litlora chat --accelerator c"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    lines = [set(line.split()) for line in done.stdout.splitlines()]
    assert lines == [{"finetune"}, {"lora"}, {"--lora.rank", "--lora.rank_pattern"}, {"cpu", "cuda"}]
    zsh = litlora("completion", "zsh")
    assert zsh.startswith("#compdef litlora") and "--lora.rank" in zsh
    if shutil.which("zsh"):
        (tmp_path / "_litlora").write_text(zsh)
        subprocess.run(["zsh", "-n", tmp_path / "_litlora"], check=True)


def test_the_doctor_knows_every_extra():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    said = litlora("doctor", "--json", "--measure", "false")
    for extra in extras.keys() - {"test"}:
        assert f'"{extra}": ' in said.partition('"extras"')[2], extra
    assert '"device": "cpu"' in said and "GFLOP" not in said


@pytest.mark.slow
def test_a_wheel_has_the_commands_and_the_quickstart_base(tmp_path):
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if not name.startswith(("tests/", "benchmarks/")) and (REPO / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("litlora-*.whl")
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert (
            "litlora = litlora.cli.program:main"
            in archive.read(
                next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
            ).decode()
        )
        archive.extractall(place)
    said = litlora("--help", cwd=tmp_path, PYTHONPATH=str(place))
    assert "finetune lora" in said and "quickstart" not in said
    words = ["--train.max_steps", 2, "--train.save_interval", 0, "--data.max_examples", 40]
    said = litlora("finetune", "lora", *words, cwd=tmp_path, PYTHONPATH=str(place))
    assert str(place / "litlora/installed/checkpoints/litlora/quickstart") in said
    assert Path(tmp_path, "out/lora/alpaca/final/lit_model.pth").is_file()
