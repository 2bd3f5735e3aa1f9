"""A step on a GPU waits for nothing: no number is read from the device before the next step is on its
way. Shown on tensors without values, of which none can be read."""

from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_config
from test_fit import examples
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from litlora.kernels import attention
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.settings import TrainConfig
from litlora.train.checkpoints import EarlyCheckpoints
from litlora.train.fit import Data, Trainer
from litlora.train.interrupts import Interrupts
from litlora.train.objective import SFT
from litlora.train.parallel import Parallel


class Device(Parallel):
    """One whose numbers cannot be read: each read gives what the test says."""

    reads_late = True

    def __init__(self):
        super().__init__("cpu")
        self.read_so_far, self.wrong_steps = 0, ()

    def setup(self, module, optimizer):
        return module, optimizer

    def accumulating(self, module, enabled=True):
        return nullcontext()

    def backward(self, loss):
        loss.backward()

    def read(self, numbers):
        number = self.read_so_far = self.read_so_far + 1
        value = torch.nan if number in self.wrong_steps else 2.0
        return lambda: [torch.tensor(value) for _ in numbers]


class Sink:
    def __init__(self):
        self.events = []

    def handle(self, event):
        self.events.append(event)

    def close(self):
        pass


def trainer(parallel, model, data, tmp_path, **config):
    config = TrainConfig(**({"global_batch_size": 4, "log_interval": 2, "save_interval": 0} | config))
    checkpoints = EarlyCheckpoints(tmp_path, lambda *_: None, keep=1, newest=None, prunes=True)
    sink = Sink()
    objective = SFT(model, config).train()
    return (
        Trainer(
            parallel,
            objective,
            Data(data, []),
            config,
            checkpoints,
            sink=sink,
            interrupts=Interrupts(),
        ),
        sink,
    )


@pytest.mark.slow
def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch):
    """Forward, backward, clipping, AdamW and what is logged, over attention as a GPU has it."""
    if torch.__version__ < "2.13":
        pytest.skip("this torch has no flash attention over packs with grouped queries")
    monkeypatch.setattr(attention, "choose", lambda case: "varlen")
    model, data = GPT.without_weights(tiny_config(num_hidden_layers=1)).bfloat16(), examples(6)
    add_lora(model, LoRAConfig(targets=["all-linear"]))
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fresh = torch.empty(p.shape, dtype=p.dtype)
                    module._parameters[name] = torch.nn.Parameter(fresh, requires_grad=p.requires_grad)
    parallel = Device()
    fit, sink = trainer(parallel, model, data, tmp_path, global_batch_size=2, max_steps=3)
    real = fit.optimizer_step

    def without_values(*arguments):
        with mode:
            return real(*arguments)

    fit.optimizer_step = without_values
    done = fit.fit()
    with mode, pytest.raises(DataDependentOutputException):
        float(next(model.parameters()).sum())
    assert done.steps == parallel.read_so_far == 3
    assert [event.step for event in sink.events if type(event).__name__ == "Logged"] == [1, 2, 3]


def test_figures_read_late_are_those_read_at_once(tmp_path):
    """To the bit, and a step that is not finite is skipped by the device itself."""

    class Late(Parallel):
        reads_late = True

    found = {}
    for kind in (Parallel, Late):
        torch.manual_seed(0)
        model = GPT(tiny_config())
        add_lora(model, LoRAConfig(targets=["all-linear"]))
        fit, sink = trainer(kind("cpu"), model, examples(24), tmp_path, max_steps=9)
        batches, real = [], fit.objective.loss

        def loss(batch, batches=batches, real=real):
            batches.append(batch)
            value, figures = real(batch)
            return (value * torch.nan if len(batches) in (3, 4) else value), figures

        fit.objective.loss = loss
        done = fit.fit()
        measured = {"seconds": 0.0, "tokens_per_second": 0.0, "peak_memory": 0}
        steps = [event for event in sink.events if type(event).__name__ in ("Step", "Logged")]
        events = [{**vars(event), **measured} for event in steps]
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        found[kind] = str(events), weights, done.skipped
    (events, weights, skipped), (late_events, late_weights, late_skipped) = found.values()
    assert events == late_events and skipped == late_skipped == 2
    assert all(torch.equal(weights[name], late_weights[name]) for name in weights)
