"""Write the files beside this one with the libraries' own code: random weights in few bits, and what
the libraries dequantise them to.

Tests do not need the libraries:

    pip install compressed-tensors==0.20.0 gguf==0.19.0
    pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.9
    python tests/stored_files/make.py

Of each method, METHOD.safetensors holds layers as its tool saves them and METHOD-expected.safetensors
their values. METHOD is a quant_method and, after a hyphen, what sets the file apart.
"""

import importlib.util
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent


def module_at(package: str, path: str):
    """One module of a package that as a whole does not load beside a newer transformers."""
    file = distribution(package).locate_file(path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def save(method: str, layers: dict[str, tuple[dict[str, Tensor], Tensor]]) -> None:
    """Write {layer: (its tensors by the ends of their names, its values)}."""
    stored = {f"{layer}.{end}": part for layer, (parts, _) in layers.items() for end, part in parts.items()}
    save_file({name: part.contiguous() for name, part in stored.items()}, HERE / f"{method}.safetensors")
    values = {layer: values.contiguous() for layer, (_, values) in layers.items()}
    save_file(values, HERE / f"{method}-expected.safetensors")


def ranges(W: Tensor, group: int, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups)."""
    grouped = W.float().unflatten(1, (-1, group))
    if symmetric:
        scales = grouped.abs().amax(-1) * 2 / (2**bits - 1)
        return scales.half(), torch.full(scales.shape, 2 ** (bits - 1))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half()
    return scales, (-low / scales.float()).round().clamp(1, 2**bits - 1)


def gptq() -> None:
    qlinear = module_at("auto-gptq", "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    cases = {"sym": (4, 32, True, False), "asym": (4, 32, False, False), "act": (4, 32, False, True)}
    cases |= {"whole": (4, 64, True, False), "two": (2, 32, True, False)}
    cases |= {"three": (3, 32, False, False), "eight": (8, 32, False, True)}
    for name, (bits, group, symmetric, act_order) in cases.items():
        W = torch.randn(96, 64)
        scales, zeros = ranges(W, group, bits, symmetric=symmetric)
        layer = qlinear.QuantLinear(bits, group, 64, 96, bias=False)
        index = torch.arange(64, dtype=torch.int32) // group
        index = index[torch.randperm(64)] if act_order else index
        linear = nn.Linear(64, 96, bias=False).half()
        # Whole numbers of the group of each column, so that none is out of range.
        low, high = -zeros, 2**bits - 1 - zeros
        columns = index.long()
        q = (W / scales.float()[:, columns]).round()
        q = torch.minimum(torch.maximum(q, low[:, columns]), high[:, columns])
        linear.weight.data = (q * scales.float()[:, columns]).half()
        layer.pack(linear, scales.float(), zeros.float(), index)
        ends = ("qweight", "qzeros", "scales", "g_idx")
        # The product with ones on the diagonal is the matrix itself.
        layer.use_cuda_fp16 = layer.autogptq_cuda_available = False
        values = layer(torch.eye(64, dtype=torch.float16)).t()
        save(f"gptq-{name}", {"layer": ({end: getattr(layer, end) for end in ends}, values)})


def awq() -> None:
    packing = module_at("autoawq", "awq/utils/packing_utils.py")
    W = torch.randn(64, 128)
    for name, group in (("groups", 32), ("whole", 128)):
        scales, zeros = ranges(W, group, 4, symmetric=False)
        q = (W / scales.float().repeat_interleave(group, 1)).round() + zeros.repeat_interleave(group, 1)
        q, zeros = q.clamp(0, 15).int().t(), zeros.int().t()
        packed = [
            sum(part[:, row::8] << (4 * place) for place, row in enumerate(packing.AWQ_ORDER))
            for part in (q, zeros)
        ]
        parts = dict(zip(("qweight", "qzeros"), (part.int().contiguous() for part in packed), strict=True))
        parts["scales"] = scales.t().contiguous()
        values = packing.dequantize_gemm(*parts.values(), 4, group)
        save(f"awq-{name}", {"layer": (parts, values.t())})


def compressed() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    cases = {
        "packed": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        "asymmetric": (
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        ),
        "packed_eight": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    }
    for name, (method, args) in cases.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        compressor = BaseCompressor.get_value_from_registry(method)
        W = torch.randn(40, 96).bfloat16()
        whole = {"tensor": W.numel(), "channel": 96}.get(args["strategy"], 32)
        groups = W.float().reshape(1 if args["strategy"] == "tensor" else 40, -1, whole)
        most = 448 if args.get("type") == "float" else 2 ** (args["num_bits"] - 1) - 1
        parts = {"weight": W, "weight_scale": (groups.abs().amax(-1) / most).bfloat16()}
        if args["strategy"] == "tensor":
            parts["weight_scale"] = parts["weight_scale"].reshape(1)
        if args.get("symmetric") is False:
            parts["weight_zero_point"] = torch.randint(-3, 4, parts["weight_scale"].shape, dtype=torch.int8)
        stored = compressor.compress(parts, scheme)
        values = compressor.decompress(stored, scheme)["weight"]
        save(f"compressed-tensors-{name}", {"layer": (stored, values)})


def fp8() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=(32, 32))

    W = torch.randn(64, 96).bfloat16()
    found = Fp8Quantize(Quantizer()).convert({"layer.weight": [W]})
    parts = {name.removeprefix("layer."): part for name, part in found.items()}
    parts = {name: part[0] if isinstance(part, list) else part for name, part in parts.items()}
    values = Fp8Dequantize(Quantizer())._dequantize_one(*parts.values(), output_dtype=torch.bfloat16)
    save("fp8-blocks", {"layer": (parts, values)})


def mxfp4() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(256, (2, 24, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (2, 24, 3), dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks, scales).transpose(1, 2).flatten(0, 1)
    save("mxfp4-experts", {"layer": ({"w_blocks": blocks, "w_scales": scales}, values)})


def ggml() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    places = {"Q6_K": (208,)} | dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"):
        number = GGMLQuantizationType[kind]
        values, size = GGML_QUANT_SIZES[number]
        raw = torch.randint(256, (24, 512 // values, size), dtype=torch.uint8)
        for place in places.get(kind, (0,)):
            scales = (torch.randn(*raw.shape[:2], 1) / 100).half()
            raw[..., place : place + 2] = scales.view(torch.uint8)
        raw = raw.flatten(1)
        save(
            f"gguf-{kind}",
            {"layer": ({"raw": raw}, torch.from_numpy(quants.dequantize(raw.numpy(), number)))},
        )


def main() -> None:
    torch.manual_seed(0)
    for make in (gptq, awq, compressed, fp8, mxfp4, ggml):
        make()


if __name__ == "__main__":
    main()
