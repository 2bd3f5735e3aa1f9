"""A folder of weights in few bits behaves everywhere like the folder of its values."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import succeeds
from families import save_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora.checkpoint import open_checkpoint, resolve
from litlora.frozen.few_bits import Quantized
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.quantized import QuantizedWeight
from litlora.kernels import cpu
from litlora.load import load
from litlora.lora import LoRAConfig, add_lora
from litlora.serve.answer import Request
from litlora.serve.engine import Engine
from litlora.serve.opening import Opening, open_model
from litlora.serve.sampling import Sampling
from litlora.train.compile import compile_blocks


def gptq(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = W.float().abs().amax(1, keepdim=True).half() / 7
    q = (W.float() / scales.float()).round().clamp(-8, 7).int() + 8
    words = q.t().reshape(-1, 8, len(W)) << (torch.arange(8, dtype=torch.int32)[None, :, None] * 4)
    zeros = torch.full((1, len(W) // 8), 0x77777777, dtype=torch.int32)
    parts = {"qweight": words.sum(1, dtype=torch.int32), "qzeros": zeros, "scales": scales.t()}
    return parts, (q - 8).half() * scales


def awq(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Groups of 32 columns, with zero points."""
    grouped = W.float().unflatten(1, (-1, 32))
    low, high = grouped.aminmax(dim=2)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).int()
    q = (grouped / scales.float()[..., None]).round().int() + zeros[..., None]
    q = q.clamp(0, 15)
    words = [
        sum(part[row::8] << 4 * place for row, place in enumerate((0, 4, 1, 5, 2, 6, 3, 7))).t().int()
        for part in (q.flatten(1), zeros)
    ]
    values = (q - zeros[..., None]).half() * scales[..., None]
    return {**dict(zip(("qweight", "qzeros"), words, strict=True)), "scales": scales.t()}, values.flatten(1)


def packed(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors, with a scale for each row."""
    scales = W.float().abs().amax(1, keepdim=True).bfloat16() / 7
    q = (W.float() / scales.float()).round().clamp(-8, 7).int() + 8
    words = q.unflatten(1, (-1, 8)) << (torch.arange(8, dtype=torch.int32) * 4)
    parts = {"weight_packed": words.sum(2, dtype=torch.int32), "weight_scale": scales}
    return parts | {"weight_shape": torch.tensor(W.shape)}, (q - 8).bfloat16() * scales


def fp8(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (W.float().abs().max() / 448).reshape(1, 1)
    entries = (W.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": entries, "weight_scale_inv": scale}, (entries.float() * scale).bfloat16()


def fbgemm_fp8(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A scale for each row, and the bound of the activations that some folders hold as well."""
    scale = W.float().abs().amax(1, keepdim=True) / 448
    entries = (W.float() / scale).to(torch.float8_e4m3fn)
    parts = {"weight": entries, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])}
    return parts, (entries.float() * scale).bfloat16()


HOW = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "packed": (
        packed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
        },
    ),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fbgemm_fp8": (
        fbgemm_fp8,
        {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ["lm_head", "o_proj"],
        },
    ),
}


def store(directory: Path, how: str) -> None:
    """Store the linear layers of a folder's blocks in few bits; `plain` beside it holds the values."""
    shutil.copytree(directory, directory.with_name("plain"))
    make, settings = HOW[how]
    kept = tuple(f"{module}.weight" for module in settings.get("modules_to_not_convert", ()))
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name and not name.endswith(("mlp.gate.weight", *kept)):
            parts, values[name] = make(tensor)
            module = name.removesuffix("weight")
            stored |= {module + end: part.contiguous() for end, part in parts.items()}
        else:
            stored[name] = values[name] = tensor.to(
                torch.float16 if how in ("gptq", "awq") else torch.bfloat16
            )
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    save_file(
        {n: v.contiguous() for n, v in values.items()},
        directory.with_name("plain") / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *[("llama", "gptq"), ("phi3", "gptq"), ("qwen3-moe", "fp8"), ("phi3", "fp8"), ("deepseek-v3", "fp8")],
        ("llama", "fbgemm_fp8"),
    ],
)
def test_gradients_and_fingerprint_are_those_of_the_values(family, how, tmp_path, tokenizer_dir):
    save_folder(family, tmp_path / "stored", vocab_size=400)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "stored")
    store(tmp_path / "stored", how)
    ours, plain = open_checkpoint(tmp_path / "stored"), open_checkpoint(tmp_path / "plain")
    assert ours.fingerprint == plain.fingerprint and ours.tensors.keys() == plain.tensors.keys()
    few = [name for name, tensor in ours.tensors.items() if isinstance(tensor, Quantized)]
    assert len(few) >= (6 if how == "fbgemm_fp8" else 7) * ours.config.num_hidden_layers
    found = {}
    for name in ("stored", "plain"):
        torch.manual_seed(1)
        model = load(tmp_path / name, dense=[]).model
        linears = [one for one in model.modules() if isinstance(one, FrozenLinear)]
        kept = [one for one in linears if isinstance(one.storage, QuantizedWeight)]
        assert len(kept) == (len(few) if name == "stored" else 0)
        add_lora(model, LoRAConfig(rank=4, alpha=8, targets="all-linear"))
        model = model.float()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model(torch.arange(20)[None] * 7 % 300).logsumexp(-1).sum().backward()
        found[name] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(found["plain"]) >= 14 * ours.config.num_hidden_layers
    for name, grad in found["plain"].items():
        torch.testing.assert_close(found["stored"][name], grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "how"), [("llama", "gptq"), ("phi3", "gptq"), ("phi3", "awq"), ("llama", "packed")]
)
def test_an_engine_answers_to_the_bit_as_on_the_values(family, how, tmp_path, tokenizer_dir, monkeypatch):
    """A token goes by compiled code in both, and a prompt of many by the values, which in bf16 are not
    multiplied alike."""
    monkeypatch.setattr("litlora.frozen.packed.packs", lambda _: False)  # whatever the processor
    save_folder(family, tmp_path / "stored", vocab_size=400, intermediate_size=64)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "stored")
    store(tmp_path / "stored", how)
    for dtype in (torch.float32, torch.bfloat16) if how == "packed" else (torch.float32,):
        found = {}
        for name in ("stored", "plain"):
            model = load(tmp_path / name, dense=[]).model.to(dtype)
            engine = Engine(model, owns_model=True)
            linears = [one for one in model.model.layers.modules() if isinstance(one, FrozenLinear)]
            kept = [one for one in linears if isinstance(one.storage, QuantizedWeight)]
            assert (len(kept) >= 14) == (name == "stored")
            assert cpu.library() is None or all(one.part and dtype in one.part.dtypes for one in kept)
            prompts = [[1, 2, 3], [*range(5, 35 if dtype == torch.float32 else 12)]]
            sampling = Sampling(max_new_tokens=8, logprobs=0)
            requests = [Request(prompt=prompt, sampling=sampling, text=False) for prompt in prompts]
            answers = [engine.submit(request) for request in requests]
            found[name] = [[(token.id, token.logprob) for token in answer] for answer in answers]
        assert found["stored"] == found["plain"]


@pytest.mark.skipif(cpu.library() is None, reason="there is no compiled code")
@pytest.mark.parametrize("how", ["gptq", "fbgemm_fp8"])
def test_chat_holds_bits_whose_values_would_not_fit_into_memory(how, tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr("litlora.frozen.packed.packs", lambda _: False)  # whatever the processor
    save_folder("llama", tmp_path / "stored", vocab_size=400)  # its MLPs' inner size is 48
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "stored")
    store(tmp_path / "stored", how)

    def answered(name):
        """(an answer, the layers in few bits)."""
        opened = open_model(resolve(tmp_path / name), Opening(torch.device("cpu")), live=False)
        layers = opened.engine.model.model.layers.named_modules()
        kept = [name for name, one in layers if isinstance(getattr(one, "storage", None), QuantizedWeight)]
        notices = [line for line in opened.notices if "they stay in these bits" in line]
        assert len(notices) == bool(kept)
        sampling = Sampling(max_new_tokens=12, logprobs=0)
        request = Request(prompt=[*range(3, 30)], sampling=sampling, text=False)
        return [(token.id, token.logprob) for token in opened.engine.submit(request)], kept

    expected, none = answered("plain")
    assert answered("stored") == (expected, [])
    monkeypatch.setattr("litlora.serve.opening.free_ram", lambda: 10_000)
    answer, kept = answered("stored")
    # What no compiled code reads is dequantised.
    assert not none and not any("down_proj" in name for name in kept)
    assert len(kept) == (6 if how == "gptq" else 5) * 3
    assert answer == expected
    monkeypatch.setattr("litlora.serve.opening.has_threads", lambda: False)
    assert answered("stored") == (expected, [])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
@pytest.mark.parametrize("how", ["gptq", "fp8"])
def test_compiled_blocks_on_a_stored_base_learn_the_same(how, tmp_path, tokenizer_dir):
    save_folder("llama", tmp_path / "stored", vocab_size=400, intermediate_size=64)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "stored")
    store(tmp_path / "stored", how)
    grads = []
    for is_compiled in (False, True):
        torch.manual_seed(1)
        model = load(tmp_path / "stored", dense=[]).model
        add_lora(model, LoRAConfig(rank=4, targets="all-linear"))
        model = model.float()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        if is_compiled:
            torch._dynamo.reset()
            compile_blocks(model, backend="eager")
        for count in (20, 7):  # and few tokens
            model(torch.arange(count)[None] * 7 % 300).logsumexp(-1).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_every_command_takes_a_stored_base(how, tmp_path, tokenizer_dir, alpaca_file):
    save_folder("llama", tmp_path / "stored", vocab_size=400, intermediate_size=64)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "stored")
    store(tmp_path / "stored", how)
    words = ["--data", "JSON", "--data.path", alpaca_file, "--train.max_seq_length", 64]
    words += ["--prompt_style", "plain", "--precision", "32-true", "--lora.targets", "all-linear"]
    base, run = ("--checkpoint_dir", tmp_path / "stored"), tmp_path / "run"
    out = ("--out_dir", run, "--train.save_interval", 2)
    said = succeeds("finetune/lora.py", *base, *out, *words, "--train.max_steps", 4).stdout
    kind = {"gptq": "4 bits, gptq", "awq": "4 bits, awq", "packed": "4 bits, compressed-tensors"}.get(
        how, "fp8"
    )
    assert f"({kind}) and dequantised to" in said
    whole = torch.load(run / "final/lit_model.pth", weights_only=True)["model"]
    shutil.rmtree(run / "final")
    succeeds("finetune/lora.py", *base, *out, *words, "--train.max_steps", 4, "--resume", run / "step-000002")
    again = torch.load(run / "final/lit_model.pth", weights_only=True)["model"]
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    merged = tmp_path / "merged"
    said = succeeds("scripts/merge_lora.py", "--lora_path", run / "final", "--out_dir", merged).stdout
    assert "verified" in said and "results hold these values, not the bits" in said
    asked = ("--prompt", "the fox", "--temperature", 0, "--max_new_tokens", 8)
    answers = {
        succeeds("chat/base.py", "--checkpoint_dir", place, *asked).stdout
        for place in (run / "final", merged)
    }
    assert len(answers) == 1
    succeeds("scripts/export_peft.py", "--lora_path", run / "final", "--out_dir", tmp_path / "peft")
    said = json.loads(succeeds("scripts/inspect_checkpoint.py", tmp_path / "stored", "--json").stdout)
    assert " ".join(reversed(kind.split(", "))) in said["dtypes"]
