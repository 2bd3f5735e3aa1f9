"""Files of tensors, where the disk or the file is not what it should be."""

import os
import resource

import pytest
import torch

from litlora.errors import CheckpointError
from litlora.storage.tensors import open_safetensors, open_torch, save_safetensors


def test_a_full_disk_is_the_error_that_it_is_for_any_file(tmp_path):
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save_safetensors(tmp_path / "x", {"x": torch.ones(100_000)}, {"format": "pt"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize("read", [open_safetensors, open_torch])
def test_a_pipe_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="cannot be read: it is a pipe"):
        read(tmp_path / "pipe")
