"""Adapters that started by the weights, to PEFT and from it: in a folder they are plain LoRA, or are
refused by name."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import reference_to, resolve, write_adapter
from litlora.errors import CheckpointError
from litlora.load import build
from litlora.lora import LoRAConfig, adapter_of, add_lora
from litlora.settings import ExportPEFT

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(24).reshape(2, 12) * 7 % 97


@pytest.fixture
def base(tmp_path):
    """A random model of transformers, and its folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        intermediate_size=48,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


@torch.no_grad()
def logits(model):
    result = model(IDS)
    return getattr(result, "logits", result)


def ours(directory: Path) -> torch.nn.Module:
    chain = resolve(directory)
    tensors, config = merge_chain(chain)
    return build(config, tensors, chain.base).eval()


def disturb(model: torch.nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(init, variant, rslora, base, tmp_path):
    theirs, base_dir = base
    chain = resolve(base_dir)
    model = build(chain.config, chain.base.tensors, chain.base).eval()
    config = LoRAConfig(rank=3, alpha=5, init=init, variant=variant, rslora=rslora)
    add_lora(model, config)
    disturb(model)
    wanted = logits(model)
    adapter = adapter_of(model, config).trained_on(reference_to(chain.top, tmp_path / "adapter"))
    write_adapter(tmp_path / "adapter", adapter, chain.config, sidecars_from=chain.sources)
    spec = importlib.util.spec_from_file_location("export_peft", ROOT / "scripts/export_peft.py")
    export = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export)
    export.main(ExportPEFT(lora_path=str(tmp_path / "adapter"), out_dir=str(tmp_path / "peft")))
    found = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "peft").eval()
    assert (wanted - logits(theirs)).abs().max() > 0.01
    assert (logits(found) - wanted).abs().max() < 1e-5
    assert (logits(ours(tmp_path / "peft")) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_peft_is_read_once_it_is_converted(init, base, tmp_path):
    theirs, base_dir = base
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], init_lora_weights=init
    )
    model = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    model.peft_config["default"].base_model_name_or_path = str(base_dir)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    disturb(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=f"init_lora_weights {init} changed the base's weights as well"):
        ours(tmp_path / "plain")
    converted = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    model.save_pretrained(tmp_path / "converted", **converted)
    stated = json.loads((tmp_path / "converted/adapter_config.json").read_text())
    assert stated["init_lora_weights"] is True and stated["r"] == 8
    assert (wanted - logits(theirs)).abs().max() > 0.01
    assert (logits(ours(tmp_path / "converted")) - wanted).abs().max() < 1e-5
