"""benchmarks/methods.py reads what the commands print."""

import importlib.util
import json

from conftest import REPO


def benchmark():
    spec = importlib.util.spec_from_file_location("methods", REPO / "benchmarks/methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_closing_lines_are_read():
    said = (
        "base: checkpoints/litlora/quickstart, 1,894,080 parameters; 105,472 train\n"
        "40 steps in 1:38, 5,143 tokens/s, peak memory 0.34 GiB; loss 0.0124\n"
    )
    assert benchmark().said(said) == {"trained": 105_472, "tokens_per_second": 5_143, "memory": 0.34}


def test_the_page_is_made_of_the_figures():
    methods = benchmark()
    figures = json.loads(methods.FIGURES.read_text(encoding="utf-8"))
    assert (REPO / "docs/methods.md").read_text(encoding="utf-8") == methods.page_of(figures)
    for task, rows in methods.TABLES:
        measured = figures["tables"][task.name]
        assert [row["method"] for row in measured] == [method.name for method in rows]
        assert all(len(row["losses"]) == len(methods.SEEDS) for row in measured)
