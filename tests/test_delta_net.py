"""Linear attention by the gated delta rule: chunks against the plain recurrence, packs against
separate sequences, the cache, all in float64."""

import shutil

import pytest
import torch
from families import save_folder
from safetensors.torch import load_file, save_file

from litlora.checkpoint import open_checkpoint
from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.example import example_config
from litlora.kernels.delta_rule import causal_convolution, chunked_delta_rule, recurrent_delta_rule
from litlora.load import load
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT, KVCache


def dense(**changes) -> ModelConfig:
    """Without experts: a router's scores are fp32."""
    values = example_config("qwen3_next").to_dict()
    experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    for name in (*experts, "shared_expert_intermediate_size", "dense_layers"):
        values.pop(name, None)
    return ModelConfig.from_dict(values | {"max_position_embeddings": 512} | changes)


def make_model(rank: int | None = None) -> GPT:
    torch.manual_seed(0)
    model = GPT(dense()).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "conv1d" in name:
                parameter.copy_(torch.randn_like(parameter))
    if rank is not None:
        add_lora(model, LoRAConfig(rank=rank, targets="all-linear"), torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def inputs(B: int, T: int) -> list[torch.Tensor]:
    H, K, V = 3, 5, 4
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K).double(), dim=-1) for _ in range(2))
    v, state = torch.randn(B, T, H, V).double(), torch.randn(B, H, K, V).double()
    decay, rate = -torch.rand(B, T, H).double().mul(3), torch.rand(B, T, H).double()
    return [part.requires_grad_() for part in (q, k, v, decay, rate, state)]


@pytest.mark.parametrize(
    ("B", "T", "lengths"),
    [(2, 1, None), (2, 63, None), (1, 64, None), (2, 150, None), (1, 200, [70, 1, 64, 65]), (1, 9, [9])],
)
def test_chunks_equal_the_recurrence(B, T, lengths):
    given = inputs(B, T)
    results = [rule(*given, lengths) for rule in (recurrent_delta_rule, chunked_delta_rule)]
    weights = [torch.randn_like(part) for part in results[0]]
    grads = [
        torch.autograd.grad(
            sum((a * w).sum() for a, w in zip(r, weights, strict=True)), given, materialize_grads=True
        )
        for r in results
    ]
    pairs = [*zip(*results, strict=True), *zip(*grads, strict=True)]
    assert all((a - b).abs().max() <= 1e-10 for a, b in pairs)


def test_the_convolution_of_a_pack_is_that_of_its_sequences():
    x, weight, before = torch.randn(1, 9, 6).double(), torch.randn(6, 1, 4).double(), torch.zeros(1, 3, 6)
    lengths = [4, 1, 2, 2]
    packed = causal_convolution(x, weight, before.double(), lengths)
    parts = [causal_convolution(part, weight, before.double(), None) for part in x.split(lengths, dim=1)]
    assert (packed - torch.cat(parts, dim=1)).abs().max() <= 1e-12
    late = sum(weight[:, 0, 3 - back] * x[0, 3 - back] for back in range(4))
    assert (packed[0, 3] - late).abs().max() <= 1e-12


def test_a_pack_equals_separate_sequences_with_gradients():
    model, lengths = make_model(rank=3), [70, 1, 5, 64, 2]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(64, (1, sum(lengths)))
    parts = [model(part) for part in ids.split(lengths, dim=1)]
    results = [model.logits(model.hidden(ids, lengths=lengths)), torch.cat(parts, dim=1)]
    weight = torch.randn_like(results[0])
    packed, separate = (torch.autograd.grad((logits * weight).sum(), trained) for logits in results)
    assert (results[0] - results[1]).abs().max() <= 1e-10
    assert all(
        (a - b).abs().max() <= 1e-10 * (1 + b.abs().max()) for a, b in zip(packed, separate, strict=True)
    )
    assert all(grad.abs().max() > 0 for grad in packed)


def test_wanted_positions_are_those_of_all():
    model, places = make_model(), torch.tensor([0, 3, 11])
    ids = torch.randint(64, (1, 12))
    with torch.no_grad():
        some, whole = model.hidden(ids, lengths=[5, 7], positions=places), model.hidden(ids, lengths=[5, 7])
    assert (some - whole[:, places]).abs().max() <= 1e-12


@pytest.mark.parametrize("sizes", [[1] * 20, [3, 1, 1, 66, 2, 1], [80]])
def test_the_cache_changes_nothing(sizes):
    model, ids = make_model(), torch.randint(64, (2, sum(sizes)))
    cache = KVCache(model.config, 2, sum(sizes), dtype=torch.float64, device=ids.device)
    with torch.no_grad():
        pieces = torch.cat([model(part, cache) for part in ids.split(sizes, dim=1)], dim=1)
        assert (pieces - model(ids)).abs().max() <= 1e-10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_value_heads": 3}, r"\(3\) is not a multiple of linear_num_key_heads \(2\)"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim missing"),
        ({"linear_conv_kernel_dim": 1}, "must be at least 2"),
        ({"linear_attention_layers": [4]}, "lists layer 4"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        dense(**changes)


@pytest.mark.parametrize(
    ("family", "start", "what"),
    [
        ("qwen3-next", "mtp.", "that predict several tokens ahead"),
        ("glm4-moe", "model.layers.3.", "that predict several tokens ahead"),
        ("gemma4", "model.layers.6.self_attn.k_proj.", "of layers that share those of others"),
    ],
)
def test_weights_that_no_model_has_are_named(family, start, what, tmp_path):
    """transformers does not read them either."""
    save_folder(family, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, f"{start}fc.weight": torch.ones(500, 500)}, file, {"format": "pt"})
    source = open_checkpoint(tmp_path)
    assert len(source.tensors) >= len(tensors) and not any(start in name for name in source.tensors)
    [notice] = source.notices
    assert f"{what} ({start}fc.weight; 1.0 MB) are not used" in notice


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--quantize", "nf4"], ["--stream_base", "true"]])
def test_train_and_convert(more, tmp_path, tokenizer_dir, alpaca_file, forked):
    """transformers gives the logits of what chat loads."""
    from transformers import AutoModelForCausalLM

    base, run, back = tmp_path / "base", tmp_path / "run", tmp_path / "back"
    save_folder("qwen3-next", base, vocab_size=400, max_position_embeddings=256)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, base)
    data = ["--data", "JSON", "--data.path", alpaca_file, "--train.max_steps", 2, "--precision", "32-true"]
    data += ["--train.max_seq_length", 60, "--checkpoint_dir", base, "--prompt_style", "plain", *more]
    data += ["--lora.targets", "all-linear", "--train.learning_rate", 0.01]
    forked.succeeds("finetune/lora.py", "--out_dir", run, *data, cwd=tmp_path)
    words = ["--checkpoint_dir", run / "final", "--out_dir", back]
    forked.succeeds("scripts/convert_lit_checkpoint.py", *words, cwd=tmp_path)
    ids = torch.randint(300, (1, 30))
    theirs = AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
    with torch.no_grad():
        expected, before = load(run / "final").model(ids), load(base).model(ids)
        assert (theirs(ids).logits - expected).abs().max() <= 1e-4
    assert (expected - before).abs().max() > 1e-3
