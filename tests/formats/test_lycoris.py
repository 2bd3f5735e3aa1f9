"""LoHa, LoKr, DoRA, Tucker's convolutions and norms: what is merged is what LyCORIS and PEFT merge."""

import peft
import pytest
import torch
from conftest import REPO, fails, succeeds
from safetensors.torch import load_file, save_file
from torch import nn

from litlora.adapters.describe import describe
from litlora.cli import parse
from litlora.errors import CheckpointError
from litlora.formats.lora_files import read_lora
from litlora.settings import LoRAMerger

FILES = REPO / "tests/lycoris_files"
KINDS = sorted(file.stem for file in FILES.glob("*.safetensors") if file.stem not in ("base", "expected"))
DENSE = [kind for kind in KINDS if not kind.startswith("locon")]


def merged(tmp_path, source, lora, *more: object) -> dict[str, torch.Tensor]:
    words = ["--source-model", source, "--lora-model", lora, "--output", tmp_path / "out.safetensors"]
    module = {"__name__": "script"}  # within this process, which need not import torch again
    exec((REPO / "scripts/lora_merger.py").read_text(), module)
    module["main"](parse(LoRAMerger, [*map(str, words), "--output_dtype", "fp32", *map(str, more)]))
    return load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_what_lycoris_saves_is_merged_as_lycoris_merges_it(tmp_path, kind):
    found = merged(tmp_path, FILES / "base.safetensors", FILES / f"{kind}.safetensors")
    expected = load_file(FILES / "expected.safetensors")
    names = [name for name in found if f"{kind}/{name}" in expected]
    assert len(names) == 5
    for name in names:
        wanted = expected[f"{kind}/{name}"]
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=2e-6)


def test_half_of_dora_is_half_of_what_it_changes(tmp_path):
    source = load_file(FILES / "base.safetensors")
    half = merged(tmp_path, FILES / "base.safetensors", FILES / "dora.safetensors", "--alpha", "0.5")
    wanted = load_file(FILES / "expected.safetensors")["dora/conv.weight"]
    middle = (source["conv.weight"].double() + wanted) / 2
    torch.testing.assert_close(half["conv.weight"].double(), middle, rtol=1e-5, atol=2e-6)


def test_a_layer_is_merged_by_blocks_of_rows(tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = {"w1_a": (3000, 2), "w1_b": (2, 500), "w2_a": (3000, 2), "w2_b": (2, 500)}
    lora = {f"x.hada_{name}": torch.randn(*shape, generator=generator) for name, shape in parts.items()}
    lora["x.dora_scale"] = torch.rand(1, 500, generator=generator)
    W = torch.randn(3000, 500, generator=generator)
    save_file({"x.weight": W}, tmp_path / "base.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    a1, b1, a2, b2 = (lora[f"x.hada_{name}"].double() for name in parts)
    V = W.double() + (a1 @ b1) * (a2 @ b2)
    wanted = lora["x.dora_scale"].double() * V / V.norm(dim=0)
    found = merged(tmp_path, tmp_path / "base.safetensors", tmp_path / "lora.safetensors")["x.weight"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.square = nn.Linear(10, 10)
        self.conv = nn.Conv2d(3, 8, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_peft_dora_is_merged_as_peft_merges_it(tmp_path, as_file):
    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    alpha = 4 if as_file else 10  # a file without a config has scale 1
    targets = ["up", "square", "conv"]
    config = peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules=targets, use_dora=True, init_lora_weights=False
    )
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(tmp_path / "adapter")
    lora = tmp_path / "adapter"
    if as_file:
        save_file(load_file(lora / "adapter_model.safetensors"), lora := tmp_path / "lora.safetensors")
    found = merged(tmp_path, tmp_path / "base.safetensors", lora)
    wanted = model.merge_and_unload().state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", DENSE)
def test_inspect_shows_what_a_file_without_a_plain_rank_holds(kind):
    shown = describe(FILES / f"{kind}.safetensors")
    layers = {layer["name"].removeprefix("lycoris_"): layer for layer in shown["layers"]}
    name = "DoRA" if "dora" in kind else {"loha": "LoHa", "lokr": "LoKr"}[kind[:4]]
    assert shown["format"] == f"LoRA file ({name})"
    if "dora" in kind:
        assert layers["conv"]["delta_norm"] is None
        return
    source, expected = (load_file(FILES / f"{name}.safetensors") for name in ("base", "expected"))
    for name, layer in layers.items():
        change = expected[f"{kind}/{name}.weight"] - source[f"{name}.weight"].double()
        assert layer["delta_norm"] == pytest.approx(change.norm().item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_resize_and_combine_refuse_by_name_and_say_what_works(tmp_path, kind):
    file = FILES / f"{kind}.safetensors"
    for words in (["resize_lora.py", "--rank", 2], ["combine_lora.py"]):
        words += ["--lora_path", file, "--out_dir", tmp_path / "out"]
        said = fails(f"scripts/{words[0]}", *words[1:])
        name = {"loha": "LoHa", "lokr": "LoKr", "dora": "DoRA"}[kind]
        assert f"is {name}, which is not a product of two factors; merge it with scripts/lora_m" in said
        assert not (tmp_path / "out").exists()


def test_a_tucker_convolution_is_resized_as_the_lora_that_it_is(tmp_path):
    words = ["--lora_path", FILES / "locon-tucker.safetensors", "--rank", 2, "--out_dir", tmp_path]
    succeeds("scripts/resize_lora.py", *words)
    again = merged(tmp_path, FILES / "base.safetensors", tmp_path / "locon-tucker.safetensors")
    wanted = load_file(FILES / "expected.safetensors")
    wanted = wanted["locon-tucker/conv.weight"]
    torch.testing.assert_close(again["conv.weight"].double(), wanted, rtol=1e-5, atol=2e-6)


def hada(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    shapes = {"a": (8, 2), "b": (2, 6)}
    sound = {f"hada_w{n}_{part}": torch.ones(*shape) for n in "12" for part, shape in shapes.items()}
    return {f"x.{name}": tensor for name, tensor in (sound | changes).items() if tensor.numel()}


FACTORS = {"x.lora_down.weight": torch.ones(2, 6), "x.lora_up.weight": torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (hada(hada_w2_b=torch.ones(0)), "do not form an update"),
        (hada(hada_w2_b=torch.ones(2, 7)), "do not form an update"),
        (hada(hada_w2_b=torch.ones(3, 6)), "do not form an update"),
        (hada(hada_t1=torch.ones(2, 2, 3, 3)), "do not form an update"),
        (hada(hada_w1_a=torch.ones(8, 2).int()), "whose values are not floating-point"),
        (hada() | {"x.lokr_w1": torch.ones(2, 2)}, "factors of LoHa and of LoKr"),
        (hada() | FACTORS, "has both LoRA's factors and hada_w1_a"),
        ({"x.lokr_w1": torch.ones(2, 2)}, "do not form an update"),
        ({"x.lokr_w1": torch.ones(2), "x.lokr_w2": torch.ones(2, 2)}, "do not form an update"),
        ({f"x.lokr_{name}": torch.ones(2, 2) for name in ("w1", "w1_a", "w2")}, "do not form an update"),
        (FACTORS | {"x.dora_scale": torch.ones(7, 1)}, "fits neither the outputs nor"),
        (FACTORS | {"x.lora_magnitude_vector": torch.ones(1, 6)}, "fits neither the outputs nor"),
        (FACTORS | {"x.dora_scale": torch.ones(8, 1), "x.lora_magnitude_vector": torch.ones(8)}, "keep one"),
        ({"x.dora_scale": torch.ones(8, 1), "y.diff": torch.ones(3)}, "x.dora_scale: has no factors"),
        (FACTORS | {"x.lora_mid.weight": torch.ones(3, 2, 3, 3)}, "do not form an update"),
        (FACTORS | {"x.oft_blocks": torch.ones(3, 2, 2)}, "x.oft_blocks: unrecognised key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_forms_no_update_is_refused(tmp_path, tensors, says):
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=says) as raised:
        read_lora(tmp_path / "lora.safetensors")
    assert "lora.safetensors" in str(raised.value) and "\n" not in str(raised.value)


def test_an_update_of_another_shape_fits_nothing(tmp_path):
    save_file({"x.weight": torch.zeros(8, 5)}, tmp_path / "base.safetensors")
    save_file(hada(), tmp_path / "lora.safetensors")
    words = ["--source-model", tmp_path / "base.safetensors", "--lora-model", tmp_path / "lora.safetensors"]
    said = fails("scripts/lora_merger.py", *words, "--output", tmp_path / "out")
    assert "x is (8, 6), x.weight (8, 5)" in said
