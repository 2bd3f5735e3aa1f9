"""A training state is put back only if every entry fits the run (tests/attacks/training_state.md)."""

import copy
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import nn

from litlora.errors import CheckpointError, UserError
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.settings import TrainConfig
from litlora.train.objective import SFT
from litlora.train.optim import make_optimizer
from litlora.train.parallel import Parallel
from litlora.train.resume import Position, State, capture
from litlora.train.state_check import check_place_in_data, check_position

CONFIG = TrainConfig()
AT = Position(step=3, epoch=1, step_in_epoch=1, tokens=90, seconds=2.5, loss=1.5, interval_tokens=30)


def make() -> tuple[SFT, torch.optim.Optimizer]:
    model = GPT(tiny_config())
    add_lora(model, LoRAConfig(rank=2, targets=["q_proj"]))
    objective = SFT(model, CONFIG)
    return objective, make_optimizer(objective.trainable(), CONFIG)


def restore(
    content: dict, objective: SFT, optimizer: torch.optim.Optimizer, *, is_forced: bool = False
) -> dict:
    where = Path("run/step-000003")
    state = State(AT, content["weights"], content["optimizer"], content["ranks"], where, is_forced)
    return state.restore(Parallel(), objective, optimizer, CONFIG, ("loss",))


@pytest.fixture
def stored() -> dict:
    objective, optimizer = make()
    for parameter in objective.trainable().values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return copy.deepcopy(capture(Parallel(), objective, optimizer, AT, {"loss": torch.tensor(4.0)}))


def test_what_was_captured_comes_back_to_the_bit(stored):
    objective, optimizer = make()
    assert restore(stored, objective, optimizer) == {"loss": torch.tensor(4.0)}
    assert all(torch.equal(p, stored["weights"][name]) for name, p in objective.trainable().items())
    found = optimizer.state_dict()
    assert found["param_groups"] == stored["optimizer"]["param_groups"]
    for index, slot in stored["optimizer"]["state"].items():
        assert all(torch.equal(found["state"][index][name], value) for name, value in slot.items())


def test_a_run_without_a_finite_step_has_no_moments_and_comes_back(stored):
    stored["optimizer"]["state"] = {}
    objective, optimizer = make()
    restore(stored, objective, optimizer)
    assert not optimizer.state_dict()["state"]


def change(*path):
    """A function that sets the entry at a path, its last element the value."""
    *path, name, value = path

    def apply(content: dict) -> None:
        for step in path:
            content = content[step]
        content[name] = value

    return apply


def drop(*path):
    *path, name = path

    def apply(content: dict) -> None:
        for step in path:
            content = content[step]
        del content[name]

    return apply


def numpy_state(position, has_reserve=0, reserve=0.0, words=624):
    return ["MT19937", torch.zeros(words, dtype=torch.int64), position, has_reserve, reserve]


SLOT, GROUP = ("optimizer", "state", 0), ("optimizer", "param_groups", 0)
MOMENT = (2, 32)
GENERATORS = ("ranks", 0, "generators")
BROKEN = {
    "a moment of another size": (change(*SLOT, "exp_avg_sq", torch.ones(3)), r"not a tensor of shape"),
    "a moment that is a number": (change(*SLOT, "exp_avg", 1.0), "not a tensor of shape"),
    "a moment of whole numbers": (change(*SLOT, "exp_avg", torch.ones(MOMENT, dtype=torch.int32)), "int32"),
    "a moment that is not finite": (change(*SLOT, "exp_avg", torch.full(MOMENT, math.nan)), "not finite"),
    "a negative square": (change(*SLOT, "exp_avg_sq", torch.full(MOMENT, -1.0)), "below 0"),
    "a missing moment": (drop(*SLOT, "exp_avg_sq"), "must have step, exp_avg, exp_avg_sq"),
    "one moment more": (change(*SLOT, "max_exp_avg_sq", torch.ones(MOMENT)), "must have"),
    "a slot that is a list": (change(*SLOT, []), "must have"),
    "a missing slot": (drop(*SLOT), "not that of 4 weights"),
    "one slot more": (change(*SLOT[:2], 9, {}), "not that of 4 weights"),
    "a step that is a vector": (change(*SLOT, "step", torch.ones(3)), r"state\[0\].step is not a tensor"),
    "a negative step": (change(*SLOT, "step", torch.tensor(-1.0)), "below 0"),
    "a step in fp64": (change(*SLOT, "step", torch.tensor(1.0, dtype=torch.float64)), "float64"),
    "no decay": (drop(*GROUP, "weight_decay"), r"param_groups\[0\] must have weight_decay"),
    "betas as text": (change(*GROUP, "betas", "0.9"), "betas is 0.9"),
    "a beta of 1": (change(*GROUP, "betas", (0.9, 1.0)), "betas is"),
    "a learning rate that is NaN": (change(*GROUP, "lr", math.nan), "lr is nan"),
    "a negative epsilon": (change(*GROUP, "eps", -1.0), "eps is -1.0"),
    "weights in another order": (change(*GROUP, "params", [1, 0, 2, 3]), "params is"),
    "a weight number that is a vector": (change(*GROUP, "params", [torch.ones(3), 1, 2, 3]), "params is"),
    "a switch that is a vector": (change(*GROUP, "amsgrad", torch.ones(3)), "amsgrad is"),
    "a version of a generator that is a vector": (
        change(*GENERATORS, "python", (torch.ones(3), (0,) * 625, None)),
        "not one of its version 3",
    ),
    "a torch generator that is out of range": (
        change(*GENERATORS, "torch", torch.full_like(torch.get_rng_state(), 255)),
        "generator torch: ",
    ),
    "another decay": (change(*GROUP, "weight_decay", 1.5), "weight_decay is 1.5"),
    "other betas": (change(*GROUP, "betas", (0.0, 0.95)), "betas is"),
    "a reserve beyond any float": (
        change(*GENERATORS, "numpy", numpy_state(3, 1, 2**5000)),
        "ends with",
    ),
    "a weight number as text": (change(*GROUP, "params", ["0", 1, 2, 3]), "params is"),
    "another kernel": (change(*GROUP, "amsgrad", True), "amsgrad is True, and False here"),
    "no groups": (change("optimizer", "param_groups", []), "must have 1 groups"),
    "no optimizer": (change("optimizer", {}), "state and param_groups"),
    "a rank that is a number": (change("ranks", [3]), "a rank lacks"),
    "a loss that is a vector": (change("ranks", 0, "interval_loss", torch.ones(3)), "not a scalar"),
    "a loss that is infinite": (change("ranks", 0, "interval_loss", torch.tensor(math.inf)), "not finite"),
    "a figure that nothing measures": (
        change("ranks", 0, "interval_figures", {"x": torch.tensor(1.0)}),
        "interval_figures",
    ),
    "no generators": (drop(*GENERATORS, "numpy"), "incomplete"),
    "a short torch generator": (
        change(*GENERATORS, "torch", torch.zeros(3, dtype=torch.uint8)),
        "generator torch",
    ),
    "a torch generator of floats": (change(*GENERATORS, "torch", torch.zeros(5056)), "generator torch"),
    "a numpy generator beyond its end": (change(*GENERATORS, "numpy", numpy_state(10**6)), "out of range"),
    "a short numpy generator": (change(*GENERATORS, "numpy", numpy_state(3, words=5)), "624 words"),
    "a numpy reserve that is text": (change(*GENERATORS, "numpy", numpy_state(3, 1, "x")), "ends with"),
    "a Python generator of large words": (
        change(*GENERATORS, "python", (3, (2**40,) * 625, None)),
        "out of range",
    ),
    "a Python generator of another version": (change(*GENERATORS, "python", (2, (), None)), "version 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_entry_that_does_not_fit_is_refused_before_anything_is_loaded(stored, name):
    spoil, says = BROKEN[name]
    spoil(stored)
    objective, optimizer = make()
    before = {name: p.detach().clone() for name, p in objective.trainable().items()}
    generator = torch.get_rng_state(), random.getstate()
    with pytest.raises(CheckpointError, match=f"step-000003/state.pth: does not fit.*{says}") as raised:
        restore(stored, objective, optimizer)
    assert str(raised.value).isprintable()
    assert all(torch.equal(p, before[name]) for name, p in objective.trainable().items())
    assert not optimizer.state_dict()["state"]
    assert torch.equal(generator[0], torch.get_rng_state()) and generator[1] == random.getstate()


@pytest.mark.parametrize(
    "weight", [torch.full((2, 32), math.inf), torch.ones(2, 32, dtype=torch.int64)], ids=str
)
def test_a_weight_is_a_finite_float(stored, weight):
    stored["weights"][next(iter(stored["weights"]))] = weight
    with pytest.raises(CheckpointError, match="not finite|int64"):
        restore(stored, *make())


def test_a_weight_of_another_precision_is_for_a_forced_resume(stored):
    name = next(iter(stored["weights"]))
    stored["weights"][name] = stored["weights"][name].half()
    with pytest.raises(CheckpointError, match="is of torch.float16, not torch.float32"):
        restore(stored, *make())
    restore(stored, *make(), is_forced=True)


@pytest.mark.parametrize(
    ("step", "epoch", "done"), [(4, 1, 1), (3, 0, 1), (3, 1, 0), (9, 4, 1), (2**53, 2**52, 0)]
)
def test_a_place_in_the_data_that_the_run_does_not_have_is_refused(step, epoch, done):
    check_place_in_data({**vars(AT), "step": 3, "epoch": 1, "step_in_epoch": 1}, 2, 8)
    with pytest.raises(
        ValueError, match=f"step {step}, which is step {done} of epoch {epoch}, in a run of 8"
    ):
        check_place_in_data({**vars(AT), "step": step, "epoch": epoch, "step_in_epoch": done}, 2, 8)


def test_a_weight_of_another_shape_cannot_be_forced(stored):
    stored["weights"][next(iter(stored["weights"]))] = torch.ones(3)
    with pytest.raises(UserError, match="other weights train there"):
        restore(stored, *make())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", math.nan),
        ("seconds", 1e300),
        ("seconds", 0.0),
        ("seconds", -1.0),
        ("step", -1),
        ("step", 10**30),
        ("epoch", 4),
        ("step_in_epoch", 10**9),
        ("skipped", 4),
        ("skipped_in_a_row", 1),
        ("tokens", -5),
        ("logged_seconds", 3.0),
        ("interval_tokens", 91),
        ("interval_supervised", 31),
        ("loss", None),
    ],
)
def test_a_position_that_no_run_reaches_is_refused(name, value):
    check_position(vars(AT))
    check_position(vars(Position()))
    with pytest.raises(ValueError, match=name):
        check_position({**vars(AT), name: value})


def test_a_loss_of_skipped_steps_is_not_a_number_and_is_accepted():
    check_position({**vars(AT), "loss": math.nan, "skipped": 3, "skipped_in_a_row": 2})


def test_moments_of_another_precision_come_to_that_of_the_weights(stored):
    """A resume that is forced may change the precision; no other may."""
    for slot in stored["optimizer"]["state"].values():
        slot["exp_avg"] = slot["exp_avg"].to(torch.bfloat16)
    objective, optimizer = make()
    with pytest.raises(CheckpointError, match="exp_avg is of torch.bfloat16, not torch.float32"):
        restore(stored, objective, optimizer)
    restore(stored, objective, optimizer, is_forced=True)
    assert all(isinstance(p, nn.Parameter) for p in objective.trainable().values())
    assert {slot["exp_avg"].dtype for slot in optimizer.state_dict()["state"].values()} == {torch.float32}
