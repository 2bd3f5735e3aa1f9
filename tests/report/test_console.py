"""The console: one line that redraws at a terminal, lines elsewhere."""

import os
import pty
import re
import subprocess
import sys
import termios
import threading
from contextlib import suppress

import pytest
from conftest import QUICKSTART, REPO

WORDS = ["--checkpoint_dir", QUICKSTART, "--train.max_steps", 4, "--train.log_interval", 1]
WORDS += ["--train.save_interval", 0, "--data.max_examples", 60, "--out_dir"]


def at_a_terminal(words, columns):
    """What a command writes to stderr, which is a terminal of so many columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    program = [sys.executable, str(REPO / "finetune/lora.py"), *map(str, words)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True)
    pieces: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(ours, pieces))
    reader.start()
    said = process.communicate(timeout=200)[0]
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert process.returncode == 0, pieces
    return said, b"".join(pieces).decode()


def read_all(terminal, pieces):
    with suppress(OSError):  # the other end is closed
        while piece := os.read(terminal, 2**16):
            pieces.append(piece)


@pytest.mark.slow
def test_progress_is_one_line_that_redraws_at_a_terminal(tmp_path):
    said, shown = at_a_terminal([*WORDS, tmp_path / "run"], 140)
    lines = [line for line in shown.split("\r") if "loss" in line]
    assert len(lines) >= 3, shown
    figures = r"step \d/4 .+ left, loss [\d.]+, lr [\d.e-]+, [\d,]+ tokens/s, [\d.]+ GiB"
    assert all(re.search(figures, line) for line in lines), lines
    assert "step 4/4 | validation loss" in said + shown and "report: " in said
    assert not re.search(r"step \d/4 \| loss", said), "no lines beside the bar"
