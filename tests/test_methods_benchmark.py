"""benchmarks/methods.py reads what the commands print."""

import importlib.util

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
