"""Training on a base in 4 or 8 bits, as it is stored: the same bits as on the base that holds its
values in 16."""

import dataclasses
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from families import save_folder
from quantized import quantize_folder
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from litlora.errors import CheckpointError, UserError
from litlora.frozen.bitsandbytes import find_quantized
from litlora.frozen.few_bits import Quantized
from litlora.frozen.linear import FrozenLinear, stored_weights
from litlora.frozen.native import is_right_on
from litlora.frozen.quantize import QUANTIZERS
from litlora.frozen.quantized import QuantizedWeight
from litlora.frozen.scratch import scratch
from litlora.load import load
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.train.activations import checkpoint_activations, storages
from litlora.train.said import products_notice

FILES = Path(__file__).parent.parent / "bitsandbytes_files"


def matrices() -> dict[str, tuple[Quantized, torch.Tensor]]:
    """What bitsandbytes stored, beside the values that it computes."""
    stored, expected = load_file(FILES / "stored.safetensors"), load_file(FILES / "expected.safetensors")
    found = find_quantized(stored, dict.fromkeys(stored, FILES / "stored.safetensors"))
    return {name: (found[f"{name}.weight"], values) for name, values in expected.items()}


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_values(name, dtype):
    matrix, values = matrices()[name]
    some = torch.tensor([20, 21, 3, 4, 5, 0])
    for part, dense in ((matrix, values), (matrix.take(some), values[some])):
        weight, W = QuantizedWeight(part), dense.to(dtype)
        x, dy = torch.randn(2, 3, W.size(1), dtype=dtype), torch.randn(5, W.size(0), dtype=dtype)
        bias, total = torch.randn(W.size(0), dtype=dtype), torch.randn(5, W.size(1), dtype=dtype)
        assert torch.equal(weight.times(x), F.linear(x, W))
        assert torch.equal(weight.times(x, bias), F.linear(x, W, bias))
        assert torch.equal(weight.back(dy), dy @ W)
        assert torch.equal(weight.back(dy, total.clone()), total.addmm(dy, W))
        assert torch.equal(weight.rows(slice(1, 4)), dense[1:4]) and weight.dtype == dense.dtype
        assert weight.shape == dense.shape


def test_threads_do_not_share_what_they_dequantise():
    pairs = [(QuantizedWeight(matrix), values.float()) for matrix, values in matrices().values()]
    x = torch.eye(max(values.size(1) for _, values in pairs))

    def equal(number: int) -> bool:
        weight, values = pairs[number % len(pairs)]
        n = values.size(1)
        return all(torch.equal(weight.times(x[:n, :n]), values.t()) for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(equal, range(40)))


def test_moving_and_converting_a_model_leaves_the_bits():
    matrix, values = matrices()["nf4"]
    linear = FrozenLinear(QuantizedWeight(matrix)).to(torch.bfloat16)
    assert torch.equal(linear.weight, values)
    linear.to("meta")
    assert linear.storage.device.type == linear(torch.ones(2, 80, device="meta")).device.type == "meta"


@pytest.mark.parametrize("name", matrices())
def test_the_bytes_of_one_parameter_are_the_same_weight(name):
    """What FSDP divides: the values, the size and the moves are those of the weight as it was."""
    matrix, values = matrices()[name]
    for part, dense in ((matrix, values), (matrix.take(torch.tensor([20, 21, 3])), values[[20, 21, 3]])):
        weight = QuantizedWeight(part)
        weight.as_one_parameter()
        assert [(p.dtype, p.requires_grad) for p in weight.parameters()] == [(torch.uint8, False)]
        assert 0 <= weight.nbytes - part.nbytes < 16 * 6 and weight.to(torch.float16).dtype == dense.dtype
        assert torch.equal(weight.rows(), dense) and weight.shape == dense.shape
        x, dy = torch.randn(2, dense.size(1)), torch.randn(5, dense.size(0))
        assert torch.equal(weight.times(x), F.linear(x, dense.float()))
        assert torch.equal(weight.back(dy), dy @ dense.float())
        assert weight.matrix.stored().keys() == part.stored().keys()
        assert weight.to("meta").device.type == "meta"


def test_a_scale_that_is_not_finite_is_refused_before_training():
    for matrix, _ in matrices().values():
        spoiled = _spoiled(matrix)
        with pytest.raises(CheckpointError, match="values that are not finite"):
            QuantizedWeight(spoiled)


def _spoiled(matrix: Quantized) -> Quantized:
    if matrix.kind == "int8":
        return dataclasses.replace(matrix, largest=torch.full_like(matrix.largest, torch.inf))
    if isinstance(matrix.absmax, torch.Tensor):
        return dataclasses.replace(matrix, absmax=torch.full_like(matrix.absmax, torch.nan))
    nested = dataclasses.replace(matrix.absmax, absmax=torch.full_like(matrix.absmax.absmax, torch.inf))
    return dataclasses.replace(matrix, absmax=nested)


# ---- a folder


@pytest.fixture(params=[("llama", "nf4"), ("mixtral", "int8")], ids=lambda param: param[0])
def folders(request, tmp_path, tokenizer_dir) -> tuple[Path, Path]:
    """A folder in 4 or 8 bits, and one that holds the same values in bf16."""
    family, kind = request.param
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    save_folder(family, quantized, vocab_size=400)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, quantized)
    shutil.copytree(quantized, plain)
    values = quantize_folder(quantized, kind, nested=kind == "nf4")
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    return quantized, plain


def test_layers_of_the_blocks_stay_as_they_are_stored(folders):
    quantized, plain = (load(folder, dense=["down_proj", "layers.1.self_attn"]).model for folder in folders)
    stored = stored_weights(quantized)
    assert stored and not stored_weights(plain) and not stored_weights(load(folders[0]).model)
    leaves = {name.split(".")[-2] for name in stored}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert not [name for name in stored if name.startswith("model.layers.1.self_attn")]
    ids = torch.arange(20)[None] * 7 % 300
    assert torch.equal(quantized(ids), plain(ids))


WORDS = ["--lora.targets", "all-linear", "--lora.dropout", 0.1, "--train.max_steps", 3]
WHOLE = ["--lora.targets", '["q_proj"]', "--lora.modules_to_save", '["layers.1.mlp", "norm"]']
WORDS += ["--prompt_style", "plain"]


@pytest.mark.parametrize(
    "words",
    [
        ["--precision", "32-true"],
        ["--precision", "bf16-true"],
        ["--precision", "bf16-mixed", "--train.checkpoint_activations", "full"],
        [*WHOLE, "--precision", "32-true"],
    ],
    ids=["fp32", "bf16", "mixed and computed again", "whole modules"],
)
def test_a_run_gives_the_same_bits_as_on_its_values(words, folders, run, tmp_path):
    """The runs share a base by its fingerprint: what they store is equal, byte for byte."""
    finals = []
    for folder in folders:
        out = tmp_path / f"run_{folder.name}"
        run("lora", out, *WORDS, *words, "--checkpoint_dir", folder)
        finals.append(torch.load(out / "final/lit_model.pth", weights_only=True)["model"])
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())
    assert [tensor.dtype for tensor in finals[0].values()] == [t.dtype for t in finals[1].values()]


def test_a_run_resumes_to_the_bit(folders, run, tmp_path):
    # What auto measures may differ between two runs on a busy machine.
    words = (*WORDS, "--precision", "32-true", "--checkpoint_dir", folders[0])
    run("lora", tmp_path / "whole", *words)
    run("lora", tmp_path / "stopped", *words, stop_after=2)
    run("lora", tmp_path / "stopped", *words, "--resume", "auto")
    whole, stopped = (
        torch.load(tmp_path / name / "final/lit_model.pth", weights_only=True)["model"]
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())


def test_the_backward_keeps_no_more_than_on_the_values(folders):
    quantized, plain = (load(folder, dense=[]).model for folder in folders)
    kept = []
    for model in (quantized, plain):
        add_lora(model, LoRAConfig(targets="all-linear"))
        weights, sizes = storages(model), {}

        def pack(tensor, weights=weights, sizes=sizes):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.arange(40)[None]).sum()
        kept.append(sum(sizes.values()))
    assert kept[0] == kept[1] > 0


def test_a_layer_in_few_bits_cannot_be_trained_whole(folders):
    model = load(folders[0], dense=[]).model
    with pytest.raises(UserError, match="modules_to_save.*holds quantized weights"):
        add_lora(model, LoRAConfig(targets=["q_proj"], modules_to_save=["up_proj"]))


def kernel_of_bitsandbytes(packed, scales, W, table, blocksize):
    """The operation that a GPU has, by bitsandbytes' code for the CPU, which writes memory of its own."""
    operation = torch.ops.bitsandbytes.dequantize_4bit
    W.copy_(operation.default(packed, scales, blocksize, table, W.shape, W.dtype))


@pytest.mark.filterwarnings("ignore")
def test_a_gpu_dequantises_by_one_operation_of_bitsandbytes(monkeypatch):
    """The same bits; rows that do not begin with a block, or are rounded to two dtypes in turn, are
    computed by the plain form."""
    pytest.importorskip("bitsandbytes")
    assert is_right_on(torch.device("cpu"), kernel_of_bitsandbytes)
    arguments = [argument.name for argument in torch.ops.bitsandbytes.dequantize_4bit.out._schema.arguments]
    assert arguments == ["A", "absmax", "blocksize", "quant_type", "shape", "dtype", "out"]
    calls = []

    def kernel(packed, scales, W, table, blocksize):
        calls.append((table, W.dtype))
        kernel_of_bitsandbytes(packed, scales, W, table, blocksize)

    monkeypatch.setattr("litlora.frozen.bitsandbytes.four_bit_on", lambda device: kernel)
    for matrix, values in matrices().values():
        for dtype in (matrix.dtype, torch.float32, torch.bfloat16):
            for first in (0, 1, 16):
                part = dataclasses.replace(matrix, stored_rows=range(first, len(values)))
                calls.clear()
                part.write_to(W := torch.empty(part.shape, dtype=dtype))
                assert torch.equal(W, values[first:].to(dtype)), (matrix.name, dtype, first)
                if matrix.bits == 4:
                    at_once = first != 1 and matrix.dtype in (dtype, torch.float32)
                    assert calls == [(matrix.table, dtype)] * at_once


def in_nf4(model):
    for name, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and name != "lm_head":
            W = QUANTIZERS["nf4"].quantised(linear.weight, name, Path("x"))
            model.set_submodule(name, FrozenLinear(QuantizedWeight(W)))
    return model


def test_a_gpu_without_the_kernel_is_told(monkeypatch):
    model, gpu = GPT(tiny_config(num_hidden_layers=1)), torch.device("cuda")
    monkeypatch.setattr("litlora.train.said.four_bit_on", lambda device: None)
    assert products_notice(model, gpu) is None
    notice = products_notice(in_nf4(model), gpu)
    assert "'litlora[bitsandbytes]'" in notice and products_notice(model, torch.device("cpu")) is None
    monkeypatch.setattr("litlora.train.said.four_bit_on", lambda device: kernel_of_bitsandbytes)
    assert products_notice(model, gpu) is None


class Allocated(TorchDispatchMode):
    """The memory of all results of some size, each of which stays, so that none has another's place."""

    def __init__(self, least):
        super().__init__()
        self.least, self.found = least, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() >= self.least:
                storage = one.untyped_storage()
                self.found.setdefault(storage.data_ptr(), storage)
        return result


@pytest.mark.parametrize("how", ["none", "full"])
def test_all_layers_are_dequantised_into_one_buffer(how, monkeypatch):
    """In the forward, where a block is computed again, and in the backward."""
    monkeypatch.setattr("litlora.frozen.bitsandbytes.four_bit_on", lambda device: lambda *_: _[2].fill_(0.01))
    model = in_nf4(GPT(tiny_config(hidden_size=64, intermediate_size=256, num_hidden_layers=3)))
    add_lora(model, LoRAConfig(rank=2, targets=["all-linear"]))
    checkpoint_activations(model, how)
    scratch((1,), torch.float32, torch.device("cpu"))
    largest = 64 * 256 * 4
    with Allocated(largest) as allocated:
        model(torch.arange(6)[None]).sum().backward()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    new = {address: storage.nbytes() for address, storage in allocated.found.items() if address not in own}
    assert len(new) == 1, new


def test_on_a_gpu_a_buffer_goes_after_its_use():
    """A GPU's allocator gives it to whichever thread asks next: nothing here keeps one."""
    with FakeTensorMode():
        for strides in (None, (1, 4)):
            W = scratch((4, 8), torch.bfloat16, torch.device("cuda"), strides)
            assert W.shape == (4, 8) and W.device.type == "cuda" and W.stride() == (strides or (8, 1))
            kept = weakref.ref(W)
            del W
            assert kept() is None
