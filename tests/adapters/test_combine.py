"""Combining: what is exact is exact, what is approximate is the nearest and says how near, and one
adapter stays what it is."""

import dataclasses
import math

import pytest
import torch
from conftest import fails, random_adapter, succeeds
from safetensors.torch import load_file, save_file

from litlora.adapters.combine import combine_adapters, combine_files, combine_layer, factorized
from litlora.adapters.combine_entries import Recipe, combine_dense, drop_random, trim
from litlora.adapters.merge import merge_chain
from litlora.checkpoint import open_checkpoint, reference_to, resolve, write_adapter
from litlora.errors import CheckpointError, UserError
from litlora.formats.lora_files import LoRAFile, Update, read_lora, write_lora
from litlora.load import load
from litlora.lora import Adapter, LoRAConfig
from litlora.lora.select import layer_rank, layer_scale
from litlora.settings import CombineLoRA

MODES = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
OUT, IN = 30, 44


def asked(mode: str, **more) -> Recipe:
    energy = more.pop("energy", None)
    bound = {} if energy is None else {"max_error": (1 - energy) ** 0.5}
    return Recipe(**{"weights": [1.0], "mode": mode, "seed": 1337, **bound, **more})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def combine(terms: list[tuple[float, Update]], mode: str, **more) -> Update:
    return combine_layer(terms, asked(mode, **more), seeded())[0]


def random_terms(seed: int, out: int = OUT, into: int = IN) -> list[tuple[float, Update]]:
    """Updates of other ranks and scales, with weights of any sign."""
    generator = seeded(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    terms = []
    for _ in range(2 + seed % 3):
        rank = 1 + int(draw(0, 9))
        update = Update(
            torch.randn(rank, into, generator=generator),
            torch.randn(out, rank, generator=generator),
            draw(0.1, 4),
        )
        terms.append((draw(0.1, 2) * (-1 if draw(0, 1) < 0.3 else 1), update))
    return terms


def delta(update: Update) -> torch.Tensor:
    return update.scale * (update.B.double() @ update.A.double())


def total(terms: list[tuple[float, Update]]) -> torch.Tensor:
    return sum(weight * delta(update) for weight, update in terms)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return (torch.linalg.norm(got - wanted) / torch.linalg.norm(wanted)).item()


# ---- sums


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mode", ["linear", "cat", "dare_linear", "magnitude_prune", "svd"])
def test_a_sum_is_the_sum_of_the_updates(mode, seed):
    """No cross terms, whatever the ranks and scales; the sparse modes at their default density of
    1."""
    terms = random_terms(seed, out=12 + 7 * seed, into=60 - 3 * seed)
    ranks = sum(update.rank for _, update in terms)
    stored, full, lost = combine_layer(terms, asked(mode, rank=ranks if mode == "svd" else None), seeded())
    assert relative(delta(stored), total(terms)) < 1e-6
    assert math.isclose(full, total(terms).norm().item(), rel_tol=1e-6) and lost < 1e-6 * full
    assert stored.rank == (ranks if mode == "cat" else min(ranks, 12 + 7 * seed, 60 - 3 * seed))


def test_cat_keeps_the_factors_and_linear_the_rank():
    (_, one), (_, other) = random_terms(0)
    shared = dataclasses.replace(other, A=torch.cat([other.A[:1], one.A[:1]]), B=other.B[:, :1].repeat(1, 2))
    cat = combine([(0.5, one), (0.25, shared)], "cat")
    assert (
        cat.rank == one.rank + 2
        and torch.equal(cat.A, torch.cat([one.A, shared.A]))
        and torch.equal(cat.B[:, : one.rank], one.B)
    )
    linear = combine([(0.5, one), (0.25, one), (2.0, shared)], "linear")
    assert linear.rank == one.rank + 1, "the sum has one direction more than the first"
    assert relative(delta(linear), 0.75 * delta(one) + 2 * delta(shared)) < 1e-6


def test_an_adapter_minus_itself_is_nothing():
    (_, one), *_ = random_terms(0)
    for mode in MODES:
        nothing = combine([(1.0, one), (-1.0, one)], mode)
        assert delta(nothing).abs().max() < 1e-6, mode
        assert torch.isfinite(nothing.A).all()


def test_svd_is_the_nearest_of_its_rank():
    terms = random_terms(1)
    U, S, Vt = torch.linalg.svd(total(terms), full_matrices=False)
    stored, full, lost = combine_layer(terms, asked("svd", rank=3), seeded())
    assert stored.rank == 3 and relative(delta(stored), (U[:, :3] * S[:3]) @ Vt[:3]) < 1e-6
    assert math.isclose(lost, S[3:].norm().item(), rel_tol=1e-5)
    assert combine(terms, "svd").rank == max(update.rank for _, update in terms)
    stored, full, lost = combine_layer(terms, asked("svd", max_error=0.2), seeded())
    assert lost <= 0.2 * full < S[stored.rank - 1 :].norm()


# ---- trimming, dropping, electing


def by_hand(columns: list[list[float]], mode: str, density: float) -> list[float]:
    """TIES and magnitude pruning, entry by entry in plain Python."""
    kept = []
    for column in columns:
        least = sorted(map(abs, column), reverse=True)[max(1, int(density * len(column))) - 1]
        kept.append([value if abs(value) >= least else 0.0 for value in column])
    merged = []
    for values in zip(*kept, strict=True):
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        agreeing = [value for value in values if value * sign > 0]
        merged.append(
            sum(values) if mode == "magnitude_prune" else sum(agreeing) / len(agreeing) if agreeing else 0.0
        )
    return merged


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("mode", ["ties", "magnitude_prune"])
def test_trimming_and_electing_entry_by_entry(mode, density):
    deltas = [torch.randn(4, 6, dtype=torch.float64, generator=seeded(n)) for n in range(3)]
    got = combine_dense(deltas, asked(mode, density=density), seeded())
    wanted = by_hand([one.flatten().tolist() for one in deltas], mode, density)
    assert torch.allclose(got.flatten(), torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


def test_weights_go_in_before_the_election():
    one, other = torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[3.0, 1.0, 4.0]])
    got = combine_dense([one, -0.5 * other], asked("ties"), seeded())
    assert torch.equal(got, torch.tensor([[-1.5, -0.75, 0.0]])), (
        "1 against -1.5; -1 with -0.5; 2 against -2: nobody wins"
    )


def test_dropping_keeps_the_mean_and_obeys_the_seed():
    one = torch.linspace(1, 2, 50_000)
    kept = drop_random(one, 0.2, seeded(3))
    chosen = kept != 0
    assert 0.19 < chosen.float().mean() < 0.21 and abs(kept.mean() / one.mean() - 1) < 0.03
    assert torch.allclose(kept[chosen], one[chosen] / 0.2)
    assert torch.equal(kept, drop_random(one, 0.2, seeded(3))) and not torch.equal(
        kept, drop_random(one, 0.2, seeded(4))
    )


def test_dropping_is_drawn_anew_for_each_adapter():
    one = torch.ones(1000)
    merged = combine_dense([one, one], asked("dare_linear", density=0.5), seeded())
    assert set(merged.tolist()) == {0.0, 2.0, 4.0}


def test_trimming_keeps_at_least_one_entry():
    assert trim(torch.tensor([[0.1, -3.0, 0.2]]), 0.01).tolist() == [[0.0, -3.0, 0.0]]


@pytest.mark.parametrize("mode", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
@pytest.mark.parametrize(("out", "into"), [(30, 44), (44, 30), (150, 190)])
def test_what_has_no_low_rank_is_stored_as_the_nearest_and_says_so(mode, out, into):
    terms = random_terms(4, out, into)
    settings = asked(mode, density=0.6)
    stored, full, lost = combine_layer(terms, settings, seeded())
    dense = combine_dense([weight * delta(update) for weight, update in terms], settings, seeded())
    if not mode.startswith("dare"):  # the draws of fp32 and float64 differ
        best = torch.linalg.svdvals(dense)[stored.rank :].norm().item()
        assert math.isclose(torch.linalg.norm(dense - delta(stored)).item(), lost, rel_tol=1e-4)
        assert best * (1 - 1e-6) <= lost <= best * 1.001
        assert math.isclose(full, dense.norm().item(), rel_tol=1e-5)
    assert 0 < lost < full and stored.rank == min(out, into, sum(update.rank for _, update in terms))
    stored, full, lost = combine_layer(
        terms, dataclasses.replace(settings, max_error=math.sqrt(0.05)), seeded()
    )
    assert lost <= math.sqrt(0.05) * full * 1.0001


def test_a_sketch_finds_what_the_whole_spectrum_has():
    matrix = torch.randn(160, 200, generator=seeded()) * torch.linspace(1, 0.3, 200)
    values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 8, 20):  # 20 + 16, four times, is below 160
        B, A = factorized(matrix, rank, None, seeded())
        assert A.size(0) == rank and torch.linalg.norm(matrix - B @ A) <= 1.002 * values[rank:].norm()
    B, A = factorized(matrix, 30, None, seeded())
    assert torch.linalg.norm(matrix - B @ A) <= (1 + 1e-6) * values[30:].norm()


@pytest.mark.parametrize("mode", MODES)
def test_weights_beyond_fp32_are_refused(mode):
    (_, one), (_, other) = random_terms(0)
    with pytest.raises(UserError, match="beyond fp32"):
        combine([(1e39, one), (1.0, other)], mode)


# ---- beside PEFT


@pytest.fixture
def peft_layer():
    """(settings, ...) -> a layer of real PEFT with these adapters, random, and ours of the same."""
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(14, 12, bias=False)

    def make(*configs: dict):
        model = None
        for name, config in zip("xyz", configs, strict=False):
            settings = peft.LoraConfig(target_modules=["layer"], **config)
            model = (
                peft.get_peft_model(Model(), settings, name)
                if model is None
                else (model.add_adapter(name, settings), model)[1]
            )
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape)
        layer = model.base_model.model.layer
        ours = [
            Update(layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, layer.scaling[n])
            for n in "xyz"[: len(configs)]
        ]
        return model, layer, ours

    return make


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("mode", "theirs", "density", "weights"),
    [
        ("cat", "cat", 1.0, [0.7, -0.3]),
        ("linear", "cat", 1.0, [0.7, -0.3]),
        ("svd", "svd", 1.0, [0.7, -0.3]),
        ("ties", "ties_svd", 1.0, [0.7, 0.7]),
        ("ties", "ties_svd", 0.4, [0.7, 0.7]),
        ("magnitude_prune", "magnitude_prune_svd", 0.4, [0.7, -0.3]),
    ],
)
def test_peft_combines_to_the_same_where_it_is_right(mode, theirs, density, weights, peft_layer):
    model, layer, ours = peft_layer({"r": 4, "lora_alpha": 12}, {"r": 3, "lora_alpha": 2})
    rank = 5 if mode == "svd" else 12
    more = {} if theirs == "cat" else {"svd_rank": rank, "density": density}
    model.base_model.add_weighted_adapter(["x", "y"], weights, "both", combination_type=theirs, **more)
    settings = {} if theirs == "cat" else {"rank": rank}
    got = combine(list(zip(weights, ours, strict=True)), mode, density=density, **settings)
    assert relative(delta(got), layer.get_delta_weight("both").double().detach()) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["linear", "cat", "svd", "dare_linear", "magnitude_prune"])
def test_the_scale_of_rslora_and_mixed_ranks_counts_once(mode, peft_layer):
    """PEFT 0.21 makes these sums too large by the root of the new rank, and with linear adds cross
    terms."""
    _, layer, ours = peft_layer({"r": 4, "lora_alpha": 12, "use_rslora": True}, {"r": 2, "lora_alpha": 2})
    wanted = 0.7 * layer.get_delta_weight("x") + 0.3 * layer.get_delta_weight("y")
    got = combine([(0.7, ours[0]), (0.3, ours[1])], mode, **({"rank": 12} if mode == "svd" else {}))
    assert relative(delta(got), wanted.double().detach()) < 1e-6


# ---- whole adapters


FIRST = LoRAConfig(
    rank=4, alpha=10, rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={r".*layers\.1\..*": 2.5}
)
SECOND = LoRAConfig(rank=2, alpha=7, targets=["q_proj", "up_proj", "lm_head"], modules_to_save=["model.norm"])
THIRD = LoRAConfig(rank=5, targets="qv", modules_to_save=["embed_tokens", "model.norm"])


@pytest.fixture
def adapters(base, tmp_path):
    """Directories of adapters of different settings on one base."""
    return [
        random_adapter(tmp_path / f"adapter{n}", base, config, seed=n)
        for n, config in enumerate([FIRST, SECOND, THIRD])
    ]


def changes_of(directory) -> dict[str, torch.Tensor]:
    """What an adapter makes of its base: W' - W of every tensor, by the merge that chat uses."""
    chain = resolve(directory)
    merged, _ = merge_chain(chain)
    return {name: merged[name].double() - tensor for name, tensor in chain.base.tensors.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "which", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_one_adapter_at_weight_1_stays_what_it_is(mode, which, adapters):
    chain = resolve(adapters[which])
    combined, changes = combine_adapters([chain], asked(mode))
    tensors, settings = combined.tensors, combined.config
    assert tensors.keys() == chain.top.tensors.keys()
    assert all(
        torch.equal(tensor, chain.top.tensors[name]) and tensor.dtype == chain.top.tensors[name].dtype
        for name, tensor in tensors.items()
    )
    assert settings == chain.top.config and all(change.error == 0 for change in changes)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_of_one_s_own_goes_into_the_scale(mode, adapters):
    chain = resolve(adapters[0])
    combined, _ = combine_adapters([chain], asked(mode, weights=[-0.5]))
    tensors, settings = combined.tensors, combined.config
    before = chain.top.config
    assert all(torch.equal(tensor, chain.top.tensors[name]) for name, tensor in tensors.items())
    for name in combined.updates:
        assert layer_rank(settings, name) == layer_rank(before, name)
        assert math.isclose(layer_scale(settings, name), -0.5 * layer_scale(before, name), rel_tol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_of_weight_0_is_left_out(mode, adapters):
    chains = [resolve(adapter) for adapter in adapters]
    combined, _ = combine_adapters(chains, asked(mode, weights=[0.0, 1.0, 0.0]))
    tensors = combined.tensors
    assert tensors.keys() == chains[1].top.tensors.keys()
    assert all(torch.equal(tensor, chains[1].top.tensors[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("mode", [pytest.param("linear", marks=pytest.mark.slow), "cat"])
def test_the_command_adds_what_the_adapters_change(mode, adapters, tmp_path):
    """Other ranks, scales, layers, rsLoRA and modules saved whole: merged, the sum of what each
    does, merged alone."""
    weights, out = [0.7, -0.4, 1.5], tmp_path / "out"
    words = ["--lora_path", *adapters, "--weights", *weights, "--mode", mode]
    done = succeeds("scripts/combine_lora.py", *words, "--out_dir", out)
    assert (
        f"next: python chat/base.py --checkpoint_dir {out}" in done.stdout
        and done.stdout.count("e+00") + done.stdout.count("e-0") > 14
    )
    apart = [changes_of(directory) for directory in adapters]
    for name, got in changes_of(out).items():
        wanted = sum(weight * change[name] for weight, change in zip(weights, apart, strict=True))
        assert torch.allclose(got, wanted, atol=3e-6), name
    with torch.no_grad():
        ids = torch.arange(20).view(1, 20)
        assert torch.allclose(load(out, live=True).model(ids), load(out).model(ids), atol=1e-4)
    assert {"prompt_style.yaml", "tokenizer.json", "hyperparameters.yaml", "model_config.yaml"} <= {
        path.name for path in out.iterdir()
    }
    assert open_checkpoint(out).base.fingerprint == resolve(adapters[0]).base.fingerprint


@pytest.mark.slow
def test_a_combination_can_be_talked_to_trained_further_and_exported(adapters, tmp_path, alpaca_file):
    out = tmp_path / "out"
    words = ["--lora_path", adapters[0], adapters[1], "--mode", "dare_ties", "--density", 0.5, "--rank", 6]
    succeeds("scripts/combine_lora.py", *words, "--out_dir", out)
    succeeds("chat/base.py", "--checkpoint_dir", out, "--prompt", "Hi", "--max_new_tokens", 2)
    train = [
        "--data",
        "JSON",
        "--data.path",
        alpaca_file,
        "--train.max_steps",
        1,
        "--out_dir",
        tmp_path / "more",
    ]
    succeeds("finetune/lora.py", "--checkpoint_dir", out, *train)
    succeeds("scripts/export_peft.py", "--lora_path", out, "--out_dir", tmp_path / "peft")
    # The folder goes back in: combined with another it does what the original did.
    done = succeeds(
        "scripts/combine_lora.py",
        "--lora_path",
        tmp_path / "peft",
        adapters[2],
        "--out_dir",
        tmp_path / "both",
    )
    assert "note:" in done.stdout and "by shape alone" in done.stdout
    pair = [changes_of(out), changes_of(adapters[2])]
    for name, got in changes_of(tmp_path / "both").items():
        assert torch.allclose(got, pair[0][name] + pair[1][name], atol=3e-6), name
    chains = [resolve(adapter) for adapter in adapters[:2]]
    again = [
        combine_adapters(chains, asked("dare_ties", weights=[1.0, 1.0], density=0.5, rank=6, seed=seed))[0]
        for seed in (1337, 3)
    ]
    stored = open_checkpoint(out).tensors
    assert all(
        torch.allclose(again[0].tensors[name], tensor, atol=1e-4) for name, tensor in stored.items()
    ), "the seed repeats the draws"
    assert not any(
        torch.allclose(again[1].tensors[name], tensor, atol=1e-4)
        for name, tensor in stored.items()
        if "lora" in name
    )


def test_modules_saved_whole_are_elected_too(adapters, base):
    chains = [resolve(adapters[1]), resolve(adapters[2])]
    tensors = combine_adapters(chains, asked("ties", weights=[1.0, 1.0]))[0].tensors
    weight = open_checkpoint(base).tensors["model.norm.weight"].double()
    apart = [chain.top.whole["model.norm.weight"].double() - weight for chain in chains]
    wanted = combine_dense(apart, asked("ties"), seeded())
    assert torch.allclose(tensors["model.norm.weight"].double() - weight, wanted, atol=1e-6)
    assert torch.equal(
        tensors["model.embed_tokens.weight"], chains[1].top.tensors["model.embed_tokens.weight"]
    )


def test_adapters_on_an_adapter_are_combined_on_it(adapters, tmp_path):
    pair = [
        random_adapter(
            tmp_path / f"second{n}",
            adapters[2],
            LoRAConfig(rank=2, modules_to_save=["model.norm"]),
            seed=7 + n,
        )
        for n in range(2)
    ]
    words = ["--lora_path", pair[0], pair[1], "--weights", 0.5, 0.5, "--out_dir", tmp_path / "out"]
    succeeds("scripts/combine_lora.py", *words)
    below, one, other, got = (
        merge_chain(resolve(path))[0] for path in (adapters[2], *pair, tmp_path / "out")
    )
    for name, tensor in below.items():
        assert torch.allclose(
            got[name] - tensor, 0.5 * (one[name] - tensor) + 0.5 * (other[name] - tensor), atol=1e-5
        ), name


def test_another_base_is_refused_unless_allowed(adapters, make_checkpoint, tmp_path, base):
    stranger = random_adapter(tmp_path / "stranger", make_checkpoint("other", seed=3), SECOND)
    words = ["scripts/combine_lora.py", "--out_dir", tmp_path / "out", "--lora_path", adapters[0], stranger]
    assert f"{base}: not the base that {stranger} was trained on" in fails(*words)
    assert not (tmp_path / "out").exists()
    succeeds(*words, "--allow_base_mismatch")


@pytest.mark.slow
def test_what_is_no_plain_adapter_is_refused_by_name(adapters, tmp_path, base):
    words = ["scripts/combine_lora.py", "--out_dir", tmp_path / "out", "--lora_path"]
    assert "is a full model; --lora_path needs an adapter" in fails(*words, base, adapters[0])
    assert f"{base}: is what {adapters[0]} was trained on" in fails(*words, adapters[0], base)
    assert "no such directory" in fails(*words, adapters[0], tmp_path / "nowhere")
    assert (
        fails(*words, "nowhere.safetensors", "neither.safetensors")
        == "error: nowhere.safetensors: no such file\n"
    )
    assert f"holds {adapters[0]}, which is read" in fails(
        *words, adapters[0], "--out_dir", adapters[0], "--overwrite"
    )
    dora = random_adapter(tmp_path / "dora", base, LoRAConfig(rank=2, targets="qv", variant="dora"))
    assert "has the variant dora, whose updates are not a product" in fails(*words, adapters[0], dora)
    assert not (tmp_path / "out").exists()


def test_shapes_and_kinds_that_do_not_go_together_are_refused(adapters, make_checkpoint, tmp_path):
    wide = resolve(
        random_adapter(
            tmp_path / "wide", make_checkpoint("wide_base", intermediate_size=80), LoRAConfig(rank=2)
        )
    )
    with pytest.raises(CheckpointError, match="gate_proj is 80 x 32, but 64 x 32 in"):
        combine_adapters([resolve(adapters[0]), wide], asked("linear", weights=[1.0, 1.0]))
    head = resolve(
        random_adapter(
            tmp_path / "head", tmp_path / "base", LoRAConfig(targets="qv", modules_to_save=["lm_head"])
        )
    )
    pair = [resolve(adapters[1]), head]  # A and B of the head in one, the whole head in the other
    for mode, density in (("ties", 1.0), ("magnitude_prune", 0.5)):
        with pytest.raises(CheckpointError, match="adapts lm_head.weight, which .* replaces whole"):
            combine_adapters(pair, asked(mode, weights=[1.0, 1.0], density=density))
    tensors = combine_adapters(pair, asked("linear", weights=[1.0, 1.0]))[0].tensors
    assert {"lm_head.weight", "lm_head.lora_A"} <= tensors.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0, 2.0]}, "2 for 1 adapter"),
        ({"weights": [0.0]}, "all are 0"),
        ({"weights": [math.nan]}, "weights nan: must be a finite number"),
        ({"mode": "linear", "rank": 4}, "mode linear is exact"),
        ({"mode": "cat", "energy": 0.9}, "mode cat is exact"),
        ({"mode": "svd", "density": 0.5}, "density 0.5: mode svd drops nothing"),
        ({"mode": "ties", "density": 0.0}, "density 0.0: must be above 0"),
        ({"lora_path": []}, "is empty"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        CombineLoRA(**{"lora_path": ["a"], "out_dir": "out", **settings})


# ---- LoRA files of other tools


def lora_file(path, *, alpha: bool, seed: int) -> dict[str, torch.Tensor]:
    """A file with a linear layer, a convolution and a whole difference, each file of another rank;
    returns the changes it means."""
    torch.manual_seed(seed)
    rank, tensors, means = 2 + seed, {}, {}
    for name, shape in (("unet_a", (12, 20)), ("unet_conv", (6, 4, 3, 3))):
        A, B = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *(1,) * (len(shape) - 2))
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        tensors |= {f"{name}.alpha": torch.tensor(3.0)} if alpha else {}
        means[name] = (3.0 / rank if alpha else 1.0) * (B.flatten(1).double() @ A.flatten(1).double()).view(
            shape
        )
    tensors["unet_norm.diff"] = means["unet_norm"] = torch.randn(7)
    save_file(tensors, path)
    return means


def meant(path) -> dict[str, torch.Tensor]:
    found = read_lora(path)
    deltas = {
        name: update.scale * (update.B.flatten(1).double() @ update.A.flatten(1).double())
        for name, update in found.updates.items()
    }
    return {name: delta.view(found.updates[name].shape) for name, delta in deltas.items()} | {
        "unet_norm": found.diffs["unet_norm.diff"]
    }


@pytest.mark.parametrize("alphas", [(True, True), (False, False), (False, True)])
def test_files_of_other_tools_are_added_up_in_their_own_format(alphas, tmp_path):
    one, other = (
        lora_file(tmp_path / f"{seed}.safetensors", alpha=alpha, seed=seed)
        for seed, alpha in enumerate(alphas)
    )
    words = [
        "--lora_path",
        tmp_path / "0.safetensors",
        tmp_path / "1.safetensors",
        "--weights",
        0.5,
        -2,
        "--out_dir",
        tmp_path / "out",
    ]
    assert "unet_conv" in succeeds("scripts/combine_lora.py", *words).stdout
    found = meant(tmp_path / "out/0.safetensors")
    assert all(
        relative(found[name].double(), 0.5 * one[name].double() - 2 * other[name].double()) < 1e-6
        for name in one
    )
    assert ("unet_a.alpha" in load_file(tmp_path / "out/0.safetensors")) == alphas[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [True, False])
def test_one_file_at_weight_1_stays_what_it_is(mode, alpha, tmp_path):
    lora_file(tmp_path / "one.safetensors", alpha=alpha, seed=1)
    combined, _ = combine_files([read_lora(tmp_path / "one.safetensors")], asked(mode), torch.float32)
    write_lora(tmp_path / "out.safetensors", combined, torch.float32)
    before, after = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_files_that_do_not_go_together_are_refused(base, tmp_path):
    lora_file(tmp_path / "a.safetensors", alpha=True, seed=0)
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "b.safetensors")
    save_file(tensors | {"unet_norm.diff": torch.ones(5)}, tmp_path / "c.safetensors")

    def said(*paths, more=()) -> str:
        return fails(
            "scripts/combine_lora.py",
            "--lora_path",
            tmp_path / "a.safetensors",
            *paths,
            "--out_dir",
            tmp_path / "out",
            *more,
        )

    assert "has no layer of a name that" in said(tmp_path / "b.safetensors")
    assert "unet_norm.diff is 5, but 7 in" in said(tmp_path / "c.safetensors")
    assert "is a LoRA file, but not all are" in said(base)
    assert "needs no base" in said(more=("--checkpoint_dir", base))
    assert not (tmp_path / "out").exists()


def test_one_layer_under_two_spellings_is_combined_into_one(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    up, down = torch.randn(2, 6, 2), torch.randn(2, 2, 6)
    names = ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv")
    for file, name, B, A in zip((a, b), names, up, down, strict=True):
        save_file({f"{name}.lora_up.weight": B.clone(), f"{name}.lora_down.weight": A.clone()}, file)
    succeeds("scripts/combine_lora.py", "--lora_path", a, b, "--out_dir", tmp_path / "out")
    updates = read_lora(tmp_path / "out/a.safetensors").updates
    assert [*updates] == [names[0]]
    torch.testing.assert_close(updates[names[0]].product(), up[0] @ down[0] + up[1] @ down[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("weight", "size"), [(600, 1.0), (1e-10, 1.0), (0.7, 1e-4)])
def test_the_error_that_is_told_is_that_of_what_is_stored(weight, size, dtype, tmp_path):
    """In 16 bits: an alpha that they cannot hold, and factors that they hold badly."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        generator = torch.Generator().manual_seed(seed)
        A, B = (size * torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 30), (20, 4)))
        write_lora(file, LoRAFile(file, {"x": Update(A, B, 32.0)}, alpha=True), dtype)
    words = [
        "scripts/combine_lora.py",
        "--lora_path",
        *files,
        "--weights",
        weight,
        -weight / 3,
        "--out_dir",
        tmp_path / "out",
    ]
    told = float(succeeds(*words).stdout.splitlines()[1].split()[-1])
    exact = sum(
        factor * weight * read_lora(file).updates["x"].product().double()
        for factor, file in zip((1, -1 / 3), files, strict=True)
    )
    found = read_lora(tmp_path / "out/a.safetensors").updates["x"].product().double()
    assert 0 < told == pytest.approx(relative(found, exact), rel=0.01, abs=1e-6) and told < 0.5


def test_what_cannot_be_stored_is_refused(tmp_path):
    for name, scale in (("a", 300.0), ("b", -300.0)):
        file = tmp_path / f"{name}.safetensors"
        write_lora(
            file,
            LoRAFile(file, {"x": Update(torch.full((1, 5), scale), torch.full((6, 1), 300.0), 1.0)}),
            torch.float16,
        )
    words = [
        "--lora_path",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "--weights",
        3000,
        1,
        "--out_dir",
        tmp_path / "out",
    ]
    assert "x: the result has values beyond what float16 can hold" in fails("scripts/combine_lora.py", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["linear", "cat", "svd"])
def test_adapters_that_cancel_out_leave_nothing_and_an_error_of_nothing(mode):
    one = Update(torch.randn(4, 30), torch.randn(20, 4), 2.0)
    stored, full, lost = combine_layer([(1.0, one), (-1.0, one)], asked(mode), seeded())
    assert (
        full == lost == 0
        and stored.rank == (8 if mode == "cat" else 1)
        and stored.product().abs().max() < 1e-5
    )


def test_factors_of_two_dtypes_are_one_update(base, tmp_path):
    adapter = random_adapter(tmp_path / "adapter", base, LoRAConfig(rank=2))
    content = torch.load(adapter / "lit_model.pth", weights_only=True)
    content["model"] = {
        name: tensor.double() if name.endswith("lora_A") else tensor
        for name, tensor in content["model"].items()
    }
    torch.save(content, adapter / "lit_model.pth")
    words = [
        "--lora_path",
        adapter,
        "--weights",
        0.5,
        "--mode",
        "ties",
        "--density",
        0.5,
        "--out_dir",
        tmp_path / "out",
    ]
    succeeds("scripts/combine_lora.py", *words)


@pytest.mark.parametrize("end", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("mode", ["linear", "cat"])
def test_the_ends_of_a_tied_base_are_combined_apart(tmp_path, make_checkpoint, end, mode):
    """One adapter updates an end and holds the weight below, which both ends share; the other holds
    that end whole."""
    base_dir = make_checkpoint("base", tie_word_embeddings=True)
    chain = resolve(base_dir)
    W = chain.base.tensors["model.embed_tokens.weight"]
    below, trained = W + torch.randn_like(W), W + torch.randn_like(W)
    update = Update(torch.randn(3, 32), torch.randn(400, 3), 0.5)
    config = LoRAConfig(rank=3, alpha=1.5, targets=[end], modules_to_save=[end])
    for name, updates, whole in (("one", {end: update}, below), ("other", {}, trained)):
        reference = reference_to(chain.base, tmp_path / name)
        adapter = Adapter(config, updates, {f"{end}.weight": whole}, reference)
        write_adapter(tmp_path / name, adapter, chain.config, sidecars_from=[base_dir])
    adapters = [tmp_path / "one", tmp_path / "other"]
    succeeds(
        "scripts/combine_lora.py",
        *("--lora_path", *adapters, "--out_dir", tmp_path / "both"),
        *("--mode", mode, "--weights", 0.5, 2.0),
    )
    shared = W.double() + 0.5 * (below.double() - W)
    wanted = {
        "model.embed_tokens.weight": shared,
        "lm_head.weight": shared,
        f"{end}.weight": shared + 2.0 * (trained.double() - W) + 0.5 * delta(update),
    }
    merged, model = merge_chain(resolve(tmp_path / "both"))
    assert not model.tie_word_embeddings
    for name, expected in wanted.items():
        assert (merged[name].double() - expected).abs().max() < 1e-5
