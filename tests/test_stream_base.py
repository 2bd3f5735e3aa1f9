"""A base that stays in its file: the results are those of the base in memory to the bit, and no more
of it is in memory than it should be."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICKSTART, random_adapter, resident
from families import save_folder

from litlora.checkpoint import resolve
from litlora.errors import UserError
from litlora.load import load_chain
from litlora.lora import LoRAConfig, adapter_of, add_lora
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling
from litlora.settings import Finetune, TrainConfig
from litlora.streaming import streams
from litlora.train.activations import checkpoint_activations
from litlora.train.objective import SFT
from litlora.train.precision import cast

CPU = torch.device("cpu")
WORDS = ["--prompt_style", "plain", "--precision", "32-true", "--train.max_steps", 4]
IDS = torch.arange(24).view(1, 24) * 7 % 90


def stored(directory: Path) -> bytes:
    return (directory / "final/lit_model.pth").read_bytes()


def gradients(model, how: str, *, dropout: float = 0.0, targets="all-linear") -> list[torch.Tensor]:
    """Of two micro-batches and an evaluation between them."""
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(rank=2, dropout=dropout, targets=targets))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.1)
    checkpoint_activations(model.train(), how)
    objective, found = SFT(model, TrainConfig()), []
    from litlora.data.batches import Batch

    batch = Batch(IDS, torch.arange(10, 23), IDS[0, 11:], [11, 13])
    for _ in range(2):
        loss, _ = objective(batch)
        loss.backward()
        found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        with torch.no_grad():
            found.append(objective(batch)[0])
    return found


def equal_by_bits(directory: Path, dtype: torch.dtype, **more) -> None:
    found = []
    for stream in (False, True):
        model = load_chain(resolve(directory), stream=stream).model
        cast(model, dtype)
        found.append(gradients(model, **more))
    assert len(found[0]) == len(found[1]) > 8
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("file", "computed", "how"),
    [
        (torch.bfloat16, torch.float32, "full"),
        (torch.float32, torch.bfloat16, "none"),
        *(
            pytest.param(file, computed, how, marks=pytest.mark.slow)
            for file, computed in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32))
            for how in ("none", "selective", "full")
        ),
    ],
)
def test_gradients_are_those_of_the_base_in_memory(file, computed, how, make_checkpoint):
    directory = make_checkpoint("base", dtype=file, tie_word_embeddings=True, num_hidden_layers=3)
    equal_by_bits(directory, computed, how=how, dropout=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"attention_bias": True, "mlp_bias": True, "lm_head_bias": True},
        {"mlp": "plain", "hidden_act": "relu", "final_logit_softcapping": 5.0},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ],
    ids=["one layer", "biases", "plain", "experts"],
)
def test_architectures(changes, make_checkpoint):
    equal_by_bits(make_checkpoint("base", dtype=torch.bfloat16, **changes), torch.float32, how="full")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in ("gpt2", "phi3", "gemma2", "qwen2-moe", "qwen3-next")),
        *((family, torch.bfloat16) for family in ("gpt2", "phi3", "gemma2", "qwen2-moe")),
        *((family, torch.float32) for family in ("gemma3n", "gemma4", "gemma4-26b")),
    ],
)
def test_families_that_fuse_or_transpose(family, dtype, tmp_path, tokenizer_dir):
    save_folder(family, tmp_path / "folder")
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "folder")
    equal_by_bits(tmp_path / "folder", dtype, how="full", targets="attention")


@pytest.mark.slow
def test_a_layer_and_a_matrix_of_the_next_are_in_memory(make_checkpoint):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    directory = make_checkpoint("base", head_dim=64, **sizes)
    chain = resolve(directory)
    model = load_chain(chain, stream=True).model
    file, total = chain.base.file, chain.base.num_bytes
    layer = sum(p.numel() * 4 for n, p in chain.base.tensors.items() if ".layers.0." in n)
    most = []

    def watched(back):
        def call(*given):
            most.append(resident(file))
            return back(*given)

        return call

    for block in model.model.layers[::3]:
        block.mlp.up_proj.storage.back = watched(block.mlp.up_proj.storage.back)
    gradients(model, "full")
    # The thread that reads ahead may be a matrix further, and norms share pages with matrices.
    assert len(most) == 2 * 4 and max(most) < 3 * layer < total / 3


def test_answers_are_the_same(make_checkpoint):
    directory = make_checkpoint("base", dtype=torch.bfloat16, vocab_size=5000, num_hidden_layers=3)
    models = [load_chain(resolve(directory), stream=stream).model for stream in (False, True)]
    with torch.inference_mode():
        logits = [model(IDS) for model in models]
        assert torch.equal(*logits)
    found = [list(Engine(model).generate([1, 2, 3], Sampling(max_new_tokens=20))) for model in models]
    assert found[0] == found[1] and len(found[0]) == 20
    engines = [Engine(model, owns_model=True) for model in models]
    found = [list(engine.generate([1, 2, 3], Sampling(max_new_tokens=20))) for engine in engines]
    assert found[0] == found[1]
    with torch.inference_mode():
        for ids in (IDS, IDS[:, :1]):
            assert torch.equal(*(model(ids) for model in models))


def test_what_an_adapter_puts_in_the_place_of_weights_stays(make_checkpoint, tmp_path):
    """It is in memory of its own, which would be lost if it were given back."""
    directory = make_checkpoint("base", hidden_size=128, intermediate_size=512, head_dim=32)
    settings = LoRAConfig(rank=2, targets=["q_proj"], modules_to_save=["up_proj", "lm_head"])
    chain = resolve(random_adapter(tmp_path / "adapter", directory, settings))
    models = [load_chain(chain, live=True, stream=stream).model for stream in (False, True)]
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(*(model(IDS) for model in models))


def test_an_adapter_is_live(make_checkpoint, tmp_path):
    directory = make_checkpoint("base", dtype=torch.bfloat16)
    settings = LoRAConfig(rank=2, targets=["q_proj", "lm_head"])
    chain = resolve(random_adapter(tmp_path / "adapter", directory, settings))
    assert streams(True, chain, CPU)
    models = [load_chain(chain, live=True, stream=stream).model for stream in (False, True)]
    with torch.inference_mode():
        assert torch.equal(*(model(IDS) for model in models))
    assert adapter_of(models[1], settings).updates.keys() == chain.top.updates.keys()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--lora.variant", "dora"), ("--precision", "bf16-mixed")])
def test_a_run_writes_the_same_bytes(more, base, run, tmp_path):
    for name in ("false", "true"):
        run("lora", tmp_path / name, *WORDS, "--stream_base", name, *more)
    assert stored(tmp_path / "true") == stored(tmp_path / "false")
    settings = (tmp_path / "true/final/hyperparameters.yaml").read_text()
    assert "stream_base: true" in settings
    assert "stream_base: false" in (tmp_path / "false/final/hyperparameters.yaml").read_text()


@pytest.mark.slow
def test_a_run_resumes_with_it_and_without(base, run, tmp_path):
    run("lora", tmp_path / "whole", *WORDS)
    run("lora", tmp_path / "run", *WORDS, "--stream_base", "true", stop_after=2)
    run("lora", tmp_path / "run", *WORDS, "--resume", "auto")
    found = [
        torch.load(tmp_path / n / "final/lit_model.pth", weights_only=True)["model"] for n in ("whole", "run")
    ]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.slow
def test_chat_and_dpo_say_what_it_costs(tmp_path, forked):
    ask = ("chat/base.py", "--prompt", "Hello", "--temperature", 0, "--checkpoint_dir", QUICKSTART)
    said = [forked.run(*ask, "--stream_base", name, cwd=tmp_path) for name in ("false", "true")]
    assert said[0]["stdout"] == said[1]["stdout"] and said[1]["status"] == 0
    assert re.search(r"the base stays in its file; a token reads 0\.\d\d GiB, which takes", said[1]["stderr"])
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Say a.", "chosen": "a", "rejected": "b"}\n' * 8)
    words = ("--data", pairs, "--data.val_fraction", 0.25, "--train.epochs", 1, "--precision", "32-true")
    for name in ("false", "true"):
        out = ("--out_dir", tmp_path / name, "--stream_base", name)
        printed = forked.succeeds("finetune/dpo.py", *words, *out, cwd=tmp_path)
        assert ("base: stays in its file; a micro-batch reads" in printed) == (name == "true")
    assert stored(tmp_path / "true") == stored(tmp_path / "false")


# ---- auto, and mistakes


def test_auto_streams_what_exceeds_the_free_memory(base):
    chain = resolve(base)
    size = sum(tensor.nbytes for tensor in chain.base.tensors.values())
    assert Finetune.stream_base == "auto"
    assert streams("auto", chain, CPU, free=lambda: size - 1)
    assert not streams("auto", chain, CPU, free=lambda: size)
    wider = {"computes_in": lambda stored: torch.float64}
    assert streams("auto", chain, CPU, free=lambda: size, **wider)
    assert not streams(False, chain, CPU, free=lambda: 0)
    assert not streams("auto", chain, torch.device("cuda"), free=lambda: 0)
    assert not streams("auto", chain, CPU, free=lambda: None) and not chain.notices
    assert not streams("auto", chain, CPU, hindrance="it trains", free=lambda: 0)
    assert "of free memory, and cannot be streamed: it trains" in chain.notices[0]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["finetune/full.py"], "--stream_base true: a full fine-tune trains all weights"),
        (
            ["finetune/lora.py", "--quantize", "nf4"],
            "--stream_base true: --quantize needs the base in memory",
        ),
        (["finetune/lora.py", "--train.compile", "true"], "--train.compile needs the base in memory"),
        (["finetune/lora.py", "--lora.modules_to_save", "[norm]"], "--lora.modules_to_save needs the base"),
        (["finetune/lora.py", "--tokenizer.add_tokens", "[<a>]"], "--tokenizer.add_tokens needs the base"),
        (["chat/base.py", "--quantize", "fp8"], "--stream_base true: --quantize needs the base in memory"),
    ],
)
def test_what_does_not_go_together_is_refused_with_both_settings(words, why, tmp_path, forked):
    said = forked.refuses(*words, "--stream_base", "true", "--checkpoint_dir", QUICKSTART, cwd=tmp_path)
    assert why in said and "--stream_base true" in said


def test_what_is_not_in_a_file_is_refused(base, tmp_path, forked):
    adapter = random_adapter(tmp_path / "adapter", base, LoRAConfig(rank=2))
    words = ("finetune/lora.py", "--stream_base", "true", "--checkpoint_dir", adapter)
    said = forked.refuses(*words, cwd=tmp_path)
    assert f"--stream_base true: {adapter} is an adapter, whose merge is in memory" in said
    second = random_adapter(tmp_path / "second", adapter, LoRAConfig(rank=2))
    with pytest.raises(UserError, match="is an adapter on .*adapter, whose merge is in memory"):
        streams(True, resolve(second), CPU)
    with pytest.raises(UserError, match="streams on the CPU alone, and this device is cuda"):
        streams(True, resolve(base), torch.device("cuda"))


def test_values_that_are_not_finite_are_refused(make_checkpoint):
    directory = make_checkpoint("base")
    content = torch.load(directory / "lit_model.pth", weights_only=True)
    content["model"]["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    torch.save(content, directory / "lit_model.pth")
    with pytest.raises(
        UserError, match=r"model.layers.1.mlp.up_proj.weight holds values that are not finite"
    ):
        load_chain(resolve(directory), stream=True)
