"""Files that are written block by block: torch's own reader, mapped or not, finds the same bits."""

import errno
import gc
import os
import zipfile

import pytest
import torch

from litlora.storage import blocks, torch_file
from litlora.storage.blocks import LazyTensor
from litlora.storage.torch_file import TorchFile, save

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
OTHERS = [torch.int64, torch.uint16, torch.int8, torch.bool]


class Rows(LazyTensor):
    """A tensor that is computed one row at a time."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def blocks(self, memory=None):
        return iter(self.tensor.split(1))


def write(path, tensors, **more):
    with TorchFile(path) as file:
        file.finish({"model": {name: file.add(tensor) for name, tensor in tensors.items()}, **more})
    return path


def same(a, b):
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.stride() == b.stride()
        and a.view(torch.uint8).equal(b.view(torch.uint8))
    )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_every_dtype_and_shape(tmp_path, mmap, small_blocks):
    shapes = [(7, 5), (3,), (1, 1), (2, 3, 4), (0, 4), (33, 17)]
    tensors = {f"{d}{s}": (torch.randn(s) * 50).to(d).reshape(s) for d in FLOATS + OTHERS for s in shapes}
    plain = {"a": [1, 2.5, None, True, "ü"], "b": {"c": -1}}
    content = torch.load(write(tmp_path / "x.pth", tensors, litlora=plain), weights_only=True, mmap=mmap)
    assert content["litlora"] == plain
    assert list(content["model"]) == list(tensors)
    assert all(same(content["model"][name], tensor) for name, tensor in tensors.items())
    assert (
        torch.load(write(tmp_path / "y.pth", {"scalar": torch.tensor(2.5)}), weights_only=True, mmap=mmap)[
            "model"
        ]["scalar"]
        == 2.5
    )


def test_views_and_lazy_tensors_are_written_like_contiguous_ones(tmp_path, small_blocks):
    matrix = torch.randn(12, 10)
    tensors = {
        "transposed": matrix.t(),
        "columns": matrix[:, 2:5],
        "rows": matrix[3:6],
        "parameter": torch.nn.Parameter(matrix),
    }
    model = torch.load(write(tmp_path / "x.pth", {**tensors, "lazy": Rows(matrix)}), weights_only=True)[
        "model"
    ]
    assert all(same(model[name], tensor.detach().contiguous()) for name, tensor in tensors.items())
    assert same(model["lazy"], matrix) and not model["parameter"].requires_grad


@pytest.mark.parametrize("large", [0, torch_file.LARGE])
def test_the_file_is_a_valid_zip_whose_tensors_can_be_mapped(tmp_path, large, monkeypatch):
    # With 0, small records get the 64-bit fields of records above 2 GiB.
    monkeypatch.setattr(torch_file, "LARGE", large)
    tensors = {str(n): torch.randn(n) for n in range(40)}
    path = write(tmp_path / "x.pth", tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "every record matches its checksum"
        assert max(info.extract_version for info in archive.infolist()) == (20 if large else 45)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    reader = torch._C.PyTorchFileReader(str(path))
    assert [reader.get_record_offset(f"data/{n}") % 64 for n in range(40)] == [0] * 40
    model = torch.load(path, weights_only=True, mmap=True)["model"]
    assert all(same(model[name], tensor) for name, tensor in tensors.items())


def test_equal_tensors_make_equal_files(tmp_path):
    first, second = (
        write(tmp_path / name, {"a": torch.arange(9.0)}, note="x") for name in ("first", "second")
    )
    assert first.read_bytes() == second.read_bytes()


def test_what_was_written_can_be_read_before_the_file_is_finished(tmp_path):
    tensors = [
        torch.zeros(3),
        torch.randn(500, 60).bfloat16(),
        torch.empty(0, 4),
        torch.randn(7),
        torch.empty(0),
    ]
    with TorchFile(tmp_path / "x.pth") as file:
        written = [file.add(tensor) for tensor in tensors]
        assert all(same(file.read(place), tensor) for place, tensor in zip(written, tensors, strict=True))
        more = torch.randn(9)
        assert same(file.read(file.add(more)), more)


def test_an_unfinished_file_is_not_a_torch_file(tmp_path):
    with TorchFile(tmp_path / "x.pth") as file:
        file.add(torch.zeros(1000))
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "x.pth", weights_only=True)


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    """It raises nothing else, although the archive has no end."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "a.pth", {"x": torch.zeros(20 << 20, dtype=torch.uint8), "y": torch.zeros(9)})
    gc.collect()  # deleting the archive must not write its end
