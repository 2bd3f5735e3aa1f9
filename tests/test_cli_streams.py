"""A command whose streams were closed by whoever started it."""

import os
import subprocess
import sys

import pytest
from conftest import REPO


@pytest.mark.parametrize("closed", [(2,), (1,), (0, 1, 2)])
def test_a_closed_stream_changes_neither_the_status_nor_the_other_streams(closed, tmp_path):
    done = subprocess.run(
        [sys.executable, REPO / "chat/base.py", "--checkpoint_dir", "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: [os.close(number) for number in closed],
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("" if 2 in closed else done.stderr)
    assert 2 in closed or done.stderr.startswith("error: nowhere: no such directory")
