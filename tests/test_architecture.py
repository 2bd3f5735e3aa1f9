"""The code is laid out as docs/architecture.md says."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

from conftest import REPO

PAGE = (REPO / "docs/architecture.md").read_text()
LAYERS = re.findall(r"^  ([\w/.]+) +\S", PAGE.split("```text")[1].split("```")[0], re.MULTILINE)
LAYERS = [name.removesuffix("/").removesuffix(".py") for name in LAYERS]
LIBRARY = sorted((REPO / "litlora").rglob("*.py"))
ENTRIES = sorted(file for folder in ("finetune", "chat", "scripts") for file in (REPO / folder).glob("*.py"))
WITHOUT_TORCH = [
    *("cli", "console", "errors", "hub", "inputs", "paths", "prompts", "ram", "settings", "text_facts"),
    *("config", "data.examples", "data.sources", "formats", "formats.families", "formats.folder"),
    *("serve.terminal", "storage.atomic", "storage.untrusted", "stop_tokens", "tokenizer"),
    "train.run_directory",
]
LONGEST_FUNCTION, MOST_PARAMETERS, LONGEST_MODULE = 60, 7, 450


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(body: list[ast.stmt]) -> set[str]:
    """The modules of litlora that are imported when these statements run: not those that only a
    function or a type checker needs."""
    found = set()
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "litlora":
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            found |= imported(node.body) | imported(node.orelse)
        elif isinstance(node, ast.Try | ast.With):
            found |= imported(node.body)
    return found


def layer(name: str) -> int:
    """Of a file's path in the library, or of a module's name, its place from the top."""
    part = name.split(".")[1] if "." in name else name
    return LAYERS.index(part)


def test_the_page_names_every_part_of_the_library():
    parts = {path.stem for path in (REPO / "litlora").iterdir() if path.suffix in ("", ".py")}
    assert set(LAYERS) == parts - {"__init__", "__pycache__"}


def test_imports_point_downward():
    for file in LIBRARY:
        inside = file.relative_to(REPO / "litlora")
        if inside.name == "__init__.py" and len(inside.parts) == 1:
            continue
        own = LAYERS.index(inside.parts[0].removesuffix(".py"))
        for name in imported(tree(file).body):
            # `from litlora import formats` and `from litlora.formats import detect` name the same layer
            assert own <= layer(name), f"{inside} imports {name}"


def test_entries_do_not_import_each_other():
    for file in ENTRIES:
        names = {
            (node.module or "").split(".")[0]
            for node in ast.walk(tree(file))
            if isinstance(node, ast.ImportFrom)
        }
        assert not names & {"finetune", "chat", "scripts"}, file


def test_what_runs_before_the_paths_are_checked_needs_no_torch():
    lines = [f"import litlora.{name}" for name in WITHOUT_TORCH]
    program = "; ".join(["import sys", *lines, "assert 'torch' not in sys.modules"])
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPO)


def test_no_message_of_the_library_names_an_option():
    for file in LIBRARY:
        inside = str(file.relative_to(REPO / "litlora"))
        if inside.startswith("cli") or inside.startswith("settings"):  # help texts are a command's
            continue
        prose = {
            node.body[0].value
            for node in ast.walk(tree(file))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
                found = re.search(r"(^|[\s'\"`(])--[a-z]\w+", node.value)
                assert not found, f"{inside}:{node.lineno}: {node.value}"


def test_a_function_fits_on_a_screen():
    for file in (*LIBRARY, *ENTRIES):
        is_short = file.read_text().count("\n") <= LONGEST_MODULE
        assert is_short or "facts" in file.name, f"{file}: only a table may be longer"
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef):
                where = f"{file}:{node.lineno}: {node.name}"
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                given = [argument for argument in given if argument.arg not in ("self", "cls", "ctx")]
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, where
                assert len(given) <= MOST_PARAMETERS, where


def test_no_test_imports_a_private_name():
    for file in sorted((REPO / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("litlora"):
                assert not [name.name for name in node.names if name.name.startswith("_")], file.name


def test_a_command_imports_its_edge_first():
    """Which shows no traceback if Ctrl-C comes while the rest is imported."""
    for file in ENTRIES:
        nodes = (node for node in tree(file).body if isinstance(node, ast.ImportFrom))
        first = next((node for node in nodes if node.module.split(".")[0] == "litlora"), None)
        if first is not None:
            assert f"{first.module}.{first.names[0].name}".startswith("litlora.cli"), file
