"""Makes the files here: LoRA files by LyCORIS itself, and what LyCORIS merges from them.

    pip install lycoris-lora==4.1.3 einops toml tqdm
    python tests/lycoris_files/make.py

base.safetensors holds a small model's weights, KIND.safetensors what LyCORIS saves, and
expected.safetensors the weights that it then computes with, in float64, as KIND/NAME.
"""

from pathlib import Path

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).parent
KINDS = {
    "locon": (LoConModule, {}),
    "locon-tucker": (LoConModule, {"use_tucker": True}),
    "dora": (LoConModule, {"weight_decompose": True}),
    "dora-by-input": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {}),
    "loha-tucker": (LohaModule, {"use_tucker": True}),
    "loha-dora": (LohaModule, {"weight_decompose": True}),
    "lokr": (LokrModule, {"factor": 2}),
    "lokr-both": (LokrModule, {"factor": 8, "decompose_both": True}),
    "lokr-full": (LokrModule, {"factor": 4, "full_matrix": True}),
    "lokr-tucker": (LokrModule, {"factor": 2, "use_tucker": True}),
    "lokr-dora": (LokrModule, {"factor": 2, "weight_decompose": True}),
}


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(16, 64), "conv": nn.Conv2d(8, 12, 3), "point": nn.Conv2d(8, 12, 1)}
    return nn.ModuleDict(layers | {"norm": nn.LayerNorm(12)})


def live_weight(lora: nn.Module, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias that a module computes with. get_merged_weight is not that for LoHa and
    LoKr, to which LyCORIS 4.1.3 applies the scale twice there."""
    if not hasattr(lora, "get_weight"):
        return lora.get_merged_weight(1, W.shape)
    V = W + lora.get_weight(W.shape) * lora.scalar
    return (lora.apply_weight_decompose(V) if lora.wd else V), None


def main() -> None:
    base = model().double()
    weights = {name: tensor.float() for name, tensor in base.state_dict().items()}
    save_file(weights, FOLDER / "base.safetensors")
    expected = {}
    for kind, (module, options) in KINDS.items():
        torch.manual_seed(1)
        saved = {}
        for name, layer in model().items():
            is_norm = name == "norm"
            lora = NormModule(name, layer) if is_norm else module(name, layer, 1.0, 2, 3.0, **options)
            with torch.no_grad():
                for parameter in lora.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            state = lora.state_dict() if is_norm else lora.custom_state_dict()
            saved |= {f"lycoris_{name}.{key}": tensor.detach().clone() for key, tensor in state.items()}
            layer.double()
            lora.double()
            weight, bias = live_weight(lora, layer.weight)
            expected[f"{kind}/{name}.weight"] = weight.detach().clone()
            expected |= {} if bias is None else {f"{kind}/{name}.bias": bias.detach().clone()}
        save_file(saved, FOLDER / f"{kind}.safetensors")
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
