"""What a run computes in: decided by rule and measurement, exact where it says so, and never a
change of the stored base."""

import re
from array import array
from pathlib import Path

import pytest
import torch
from conftest import fails, tiny_config, tune

from litlora.checkpoint import open_checkpoint
from litlora.data.examples import Example, split, tokenize
from litlora.data.sources import read_dataset
from litlora.load import load
from litlora.lora import LoRAConfig, LoRALinear, add_lora
from litlora.model import GPT
from litlora.prompts import choose_style
from litlora.settings import JSON, TrainConfig
from litlora.train.objective import SFT
from litlora.train.precision import bf16_speedup, cast, decide, stored_dtype


def validation_loss(directory: Path, data: Path, dtype: torch.dtype) -> float:
    """Mean loss of what chat would load from `directory`, merged, over the examples that `tune`
    kept out."""
    loaded = load(directory)
    _, kept_out = split(read_dataset(JSON(path=str(data))).conversations, 0.2, 42)
    style, _ = choose_style("plain", None, None, default="plain")
    objective = SFT(loaded.model.to(dtype), TrainConfig(packing=False))
    total, count = 0.0, 0
    for example in tokenize(kept_out, loaded.tokenizer, style, 64).examples:
        batch = objective.batch([example], torch.device("cpu"))
        total += float(objective(batch)[0].detach())
        count += len(batch.targets)
    return total / count


# ---- the rule


@pytest.mark.parametrize(
    ("stored", "ratio", "trains_base", "name"),
    [
        (torch.bfloat16, 2.2, False, "bf16-true"),
        (torch.bfloat16, 2.2, True, "bf16-mixed"),
        (torch.bfloat16, 0.4, False, "32-true"),
        (torch.bfloat16, 0.4, True, "32-true"),
        (torch.float32, 9.0, False, "32-true"),
        (torch.float32, 9.0, True, "32-true"),
        (torch.float16, 9.0, False, "32-true"),
    ],
)
def test_auto_is_fast_where_it_may_be_and_rounds_no_base(stored, ratio, trains_base, name):
    decision = decide("auto", stored, lambda: ratio, trains_base=trains_base)
    assert decision.name == name
    assert (f"{ratio} x" if stored == torch.bfloat16 else "stored in fp") in decision.reason
    assert trains_base is False or decision.dtype == torch.float32, "what trains stays in fp32"
    if not trains_base:
        assert torch.promote_types(stored, decision.dtype) == decision.dtype


@pytest.mark.parametrize(
    ("stored", "trains_base", "name", "says"),
    [
        (torch.bfloat16, False, "bf16-true", "stored in it"),
        (torch.float16, False, "bf16-true", "rounds the base, which is stored in fp16"),
        (torch.float32, False, "bf16-mixed", "stays in fp32"),
        (torch.bfloat16, True, "bf16-mixed", "stored in it"),
    ],
)
def test_a_gpu_with_bf16_computes_in_it(stored, trains_base, name, says, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    asked = {"trains_base": trains_base, "device": torch.device("cuda")}
    decision = decide("auto", stored, lambda: pytest.fail("measured"), **asked)
    assert decision.name == name and says in decision.reason
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    assert decide("auto", stored, lambda: 0.5, **asked).name == "32-true", "an old one emulates it"


def test_what_was_asked_for_is_not_measured():
    assert (
        decide("bf16-mixed", torch.bfloat16, lambda: pytest.fail("measured"), trains_base=False).name
        == "bf16-mixed"
    )


def test_the_measurement_is_one_and_changes_no_random_number():
    before = torch.get_rng_state()
    assert 0.01 < bf16_speedup(torch.device("cpu")) < 100
    assert torch.equal(torch.get_rng_state(), before)


def test_the_stored_dtype_is_that_of_most_numbers():
    model = GPT(tiny_config()).bfloat16()
    model.model.norm.float()
    assert stored_dtype(model) == torch.bfloat16


def test_casting_counts_what_it_rounds_and_keeps_ties():
    model = GPT(tiny_config(tie_word_embeddings=True)).half()
    weights = len(list(model.parameters()))
    assert cast(model, torch.float32) == 0 and stored_dtype(model) == torch.float32
    assert cast(model, torch.bfloat16) == weights
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_mixed_computes_products_in_bf16_and_the_loss_in_fp32():
    model, seen = GPT(tiny_config()), {}
    add_lora(model, LoRAConfig(rank=2))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.register_forward_hook(lambda layer, _, y: seen.update({layer: y.dtype}))
    ids = torch.randint(0, 400, (2, 9))
    precision = decide("bf16-mixed", torch.float32, None, trains_base=False)
    mixed = SFT(model, contexts=[lambda: precision.computing(torch.device("cpu"))])
    batch = mixed.batch(
        [Example(array("i", row.tolist()), ((0, len(row)),)) for row in ids], torch.device("cpu")
    )
    loss, _ = mixed(batch)
    assert set(seen.values()) == {torch.bfloat16} and loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(SFT(model)(batch)[0].detach()), rel=1e-2)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# ---- whole runs


@pytest.mark.parametrize(
    ("stored", "precision", "close"),
    [
        (torch.bfloat16, "bf16-true", 2e-2),
        pytest.param(torch.bfloat16, "bf16-mixed", 2e-2, marks=pytest.mark.slow),
        # The merge rounds to the base's bf16.
        pytest.param(torch.bfloat16, "32-true", 2e-2, marks=pytest.mark.slow),
        pytest.param(torch.float32, "bf16-true", 2e-2, marks=pytest.mark.slow),
        (torch.float32, "32-true", 1e-4),
    ],
    ids=str,
)
def test_what_was_trained_is_what_chat_merges(
    stored, precision, close, make_checkpoint, alpaca_file, tmp_path, capsys
):
    base = make_checkpoint("base", dtype=stored)
    before = (base / "lit_model.pth").read_bytes()
    untrained = validation_loss(base, alpaca_file, torch.float32)
    tune("lora", base, alpaca_file, tmp_path / "out", precision=precision, train={"learning_rate": 3e-2})
    printed = capsys.readouterr().out
    assert f"precision: {precision} (as set)" in printed
    rounds = stored == torch.float32 and precision == "bf16-true"
    assert ("rounds 21 of the base's tensors" in printed) == rounds
    live = float(re.search(r"validation loss ([\d.]+)\n", printed)[1])
    assert live < untrained - 10 * close, "it must have learned more than the rounding"
    compute = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    assert validation_loss(tmp_path / "out/final", alpaca_file, compute) == pytest.approx(live, abs=close)
    adapter = open_checkpoint(tmp_path / "out/final")
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
    assert adapter.base.fingerprint == open_checkpoint(base).fingerprint, (
        "that of the base as stored, not as cast"
    )
    assert (base / "lit_model.pth").read_bytes() == before


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_base_stored_as_parameters_keeps_its_fingerprint(precision, base, alpaca_file, tmp_path):
    """A Parameter in the file would become the model's own and change with it, before its
    fingerprint is asked for."""
    content = torch.load(base / "lit_model.pth", weights_only=True)
    content["model"] = {
        name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in content["model"].items()
    }
    torch.save(content, base / "lit_model.pth")
    tune(
        "lora",
        base,
        alpaca_file,
        tmp_path / "out",
        precision=precision,
        lora=LoRAConfig(targets="qv", modules_to_save=["norm"]),
    )
    adapter = open_checkpoint(tmp_path / "out/final")
    assert adapter.base.fingerprint == open_checkpoint(base).fingerprint
    assert adapter.tensors["model.norm.weight"].dtype == torch.bfloat16, (
        "what replaces a weight of the base has its dtype"
    )
    load(tmp_path / "out/final")


def test_the_run_stores_what_auto_meant(base, alpaca_file, tmp_path, capsys):
    tune("lora", base, alpaca_file, tmp_path / "out")
    assert (
        "precision: 32-true (the base is stored in fp32, which bf16 would round)\n" in capsys.readouterr().out
    )
    assert "precision: 32-true\n" in (tmp_path / "out/hyperparameters.yaml").read_text()


@pytest.mark.parametrize("precision", [pytest.param("bf16-mixed", marks=pytest.mark.slow), "bf16-true"])
def test_a_full_run_stores_the_dtype_of_the_base(precision, make_checkpoint, alpaca_file, tmp_path, capsys):
    base = make_checkpoint("base", dtype=torch.bfloat16, tie_word_embeddings=True)
    before = (base / "lit_model.pth").read_bytes()
    tune("full", base, alpaca_file, tmp_path / "out", precision=precision, train={"learning_rate": 1e-2})
    printed = capsys.readouterr().out
    assert ("train in bf16, which loses updates" in printed) == (precision == "bf16-true")
    result, start = open_checkpoint(tmp_path / "out/final"), open_checkpoint(base)
    assert {tensor.dtype for tensor in result.tensors.values()} == {torch.bfloat16}
    assert all(
        not torch.equal(result.tensors[name], start.tensors[name])
        for name in start.tensors
        if "norm" not in name
    )
    assert (base / "lit_model.pth").read_bytes() == before


@pytest.mark.slow
def test_small_updates_are_kept_where_full_trains_by_default(make_checkpoint, alpaca_file, tmp_path):
    """Steps of a thousandth of a weight: fp32 adds them up, bf16-true loses them."""
    base, moved = make_checkpoint("base", dtype=torch.bfloat16), {}
    start = open_checkpoint(base).tensors["model.norm.weight"]
    for precision in ("bf16-mixed", "bf16-true"):
        out = tmp_path / precision
        tune(
            "full",
            base,
            alpaca_file,
            out,
            precision=precision,
            train={"learning_rate": 1e-3, "max_steps": 12, "min_lr_ratio": 1.0},
        )
        moved[precision] = int((open_checkpoint(out / "final").tensors["model.norm.weight"] != start).sum())
    assert moved["bf16-true"] == 0 < moved["bf16-mixed"]


def test_an_unknown_precision_is_one_line(tmp_path):
    assert "--precision" in fails("finetune/lora.py", "--precision", "16", "--out_dir", tmp_path / "out")


def test_attention_meets_one_dtype_under_autocast():
    """Rotation makes fp32 of queries and keys; a kernel wants them as the values are."""
    model, met = GPT(tiny_config()), []
    attention = model.model.layers[0].self_attn
    plain = attention.packed_attention
    attention.packed_attention = lambda q, k, v, pack, **more: (
        met.extend((q.dtype, k.dtype, v.dtype)) or plain(q, k, v, pack, **more)
    )
    with torch.autocast("cpu", torch.bfloat16):
        model.model(torch.randint(400, (1, 12)), lengths=[5, 7])
    assert met == [torch.bfloat16] * 3
