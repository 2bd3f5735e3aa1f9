"""A command under a limit of memory ends with one line, whatever ran out of it."""

import resource
import subprocess
import sys

import pytest
from conftest import QUICKSTART, REPO

BASE = str(QUICKSTART)
COMMANDS = {
    "training": ["finetune/lora.py", "--train.max_steps", "2", "--out_dir", "out", "--checkpoint_dir", BASE],
    "chat": ["chat/base.py", "--prompt", "hi", "--checkpoint_dir", BASE],
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_that_memory_ran_out(command, tmp_path):
    """600 MB of address space end during the imports of torch, or when a file is mapped."""
    script, *words = COMMANDS[command]
    done = subprocess.run(
        [sys.executable, str(REPO / script), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (600 * 10**6, 600 * 10**6)),
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "memory" in line and "Traceback" not in done.stderr
    assert not (tmp_path / "out/final").exists()
