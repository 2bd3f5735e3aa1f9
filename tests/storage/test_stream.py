"""The file holds what was written through the stream, whichever way the bytes take to the disk."""

import errno
import os
import random

import pytest

from litlora.storage import stream
from litlora.storage.stream import OutputStream


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 4096)
    monkeypatch.setattr(stream, "FLUSH", 8192)


def written(path, *, cached):
    """The bytes of a file and the bytes that it should have: writes of many lengths, some of them
    overwritten later."""
    source, expected = random.Random(1), bytearray()
    file = OutputStream(path, cached=cached)
    for length in (0, 1, 5000, 4096, 3, 40_000, 20_001, 64):
        data = source.randbytes(length)
        begin = len(expected)
        assert file.tell() == begin and file.write(memoryview(data)) == length
        expected += data
        if length > 50:
            again = source.randbytes(50)
            file.seek(begin)
            file.write(again)
            expected[begin : begin + 50] = again
            file.seek(len(expected))
        if length == 3:
            file.flush()
            assert path.read_bytes() == expected, "flushed bytes can be read"
    file.close(cancel=False)
    return path.read_bytes(), bytes(expected)


@pytest.mark.parametrize("cached", [True, False])
def test_the_file_holds_what_was_written(tmp_path, cached):
    found, expected = written(tmp_path / "x", cached=cached)
    assert found == expected


def test_a_buffer_may_be_reused_after_a_write(tmp_path):
    room = bytearray(1000)
    file = OutputStream(tmp_path / "x", cached=False)
    for n in range(50):
        room[:] = bytes([n]) * 1000
        file.write(room)
    file.close(cancel=False)
    assert (tmp_path / "x").read_bytes() == b"".join(bytes([n]) * 1000 for n in range(50))


def test_a_file_system_without_direct_io_gets_the_same_bytes(tmp_path, monkeypatch):
    pwrite, refused = os.pwrite, []
    monkeypatch.setattr(stream.os, "major", lambda device: 8)
    # In place of O_DIRECT, a flag that every file system accepts.
    monkeypatch.setattr(stream.os, "O_DIRECT", os.O_APPEND, raising=False)

    def refuse(handle, data, offset):
        if stream.fcntl.fcntl(handle, stream.fcntl.F_GETFL) & os.O_APPEND:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(handle, data, offset)

    monkeypatch.setattr(stream.os, "pwrite", refuse)
    found, expected = written(tmp_path / "x", cached=False)
    assert found == expected
    assert refused


def test_the_rest_of_a_partial_write_is_written(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(
        stream.os, "pwrite", lambda handle, data, offset: pwrite(handle, data[: -(-len(data) // 2)], offset)
    )
    found, expected = written(tmp_path / "x", cached=False)
    assert found == expected


@pytest.mark.parametrize("length", [10, 100_000])
def test_a_full_disk_is_an_error(tmp_path, length):
    (tmp_path / "full").symlink_to("/dev/full")
    file = OutputStream(tmp_path / "full", cached=True)
    with pytest.raises(OSError, match="No space left"):
        file.write(bytes(length))
        file.close(cancel=False)
