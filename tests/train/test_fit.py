"""The loop: every token weighs the same, only what is marked trains, what is written can be
trusted."""

import csv
from array import array

import pytest
import torch
from conftest import tiny_config

from litlora.config import RopeScaling
from litlora.data.examples import Example
from litlora.errors import DataError, UserError
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.report.console import Console
from litlora.report.metrics import Metrics
from litlora.report.sinks import Sinks
from litlora.settings import TrainConfig
from litlora.train.checkpoints import EarlyCheckpoints
from litlora.train.fit import Data, Trainer
from litlora.train.interrupts import Interrupts
from litlora.train.objective import SFT
from litlora.train.parallel import Parallel
from litlora.train.validation import evaluate


def examples(count=14, seed=0):
    """Random ids; answers of 1 to 12 tokens, so that a mean of means would weigh them very
    differently."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for _ in range(count):
        prompt, answer = number(1, 20), number(1, 13)
        made.append(
            Example(
                array("i", [number(1, 400) for _ in range(prompt + answer)]), ((prompt, prompt + answer),)
            )
        )
    return made


def train(
    model,
    data,
    tmp_path,
    *,
    val=(),
    save=lambda *_: None,
    sinks=(),
    seed=1,
    resume=None,
    interrupts=None,
    parallel=None,
    objective=SFT,
    **settings,
):
    config = TrainConfig(
        **{
            "epochs": 1,
            "learning_rate": 0.05,
            "warmup_steps": 0,
            "max_grad_norm": 0,
            "save_interval": 0,
            **settings,
        }
    )
    trainer = Trainer(
        parallel or Parallel("cpu"),
        objective(model, config),
        Data(list(data), list(val), seed),
        config,
        EarlyCheckpoints(tmp_path, save, keep=config.keep_checkpoints),
        sink=Sinks([Console(), *sinks]),
        interrupts=interrupts or Interrupts(),
    )
    return trainer.fit(resume)


def mean_loss(model, data):
    """The plain mean over all supervised tokens, one example at a time."""
    objective, total, count = SFT(model, TrainConfig(packing=False)), 0, 0
    for example in data:
        batch = objective.batch([example], torch.device("cpu"))
        total = total + objective(batch)[0]
        count += len(batch.targets)
    return total / count


PADDED = [{"packing": False, "micro_batch_size": size} for size in (1, 2, 7, 14)]
PACKED = [{"micro_batch_tokens": tokens} for tokens in (1, 50, 999)]


@pytest.mark.parametrize("cut", PADDED + PACKED)
def test_a_step_is_the_gradient_of_the_mean_over_its_tokens(cut, tmp_path):
    """However the step is cut into micro-batches: float64, one plain AdamW step written out."""
    model = GPT(tiny_config()).double()
    data = examples()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean_loss(model, data).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    done = train(model, data, tmp_path, global_batch_size=14, **cut)
    assert done.steps == 1
    for name, p in model.named_parameters():
        expected = before[name] - 0.05 * gradients[name] / (
            gradients[name].abs() + 1e-8
        )  # AdamW's first step
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


def test_what_is_left_over_is_trained_on(tmp_path):
    seen = []
    model = GPT(tiny_config())
    model.model.register_forward_hook(
        lambda _, inputs, kwargs, __: seen.extend(kwargs["lengths"]), with_kwargs=True
    )
    done = train(model, examples(15), tmp_path, global_batch_size=4, epochs=2)
    assert sorted(seen) == sorted(2 * [len(e.ids) for e in examples(15)]) and done.steps == 2 * 4
    assert done.tokens == 2 * sum(len(e.ids) for e in examples(15))


def test_max_steps_counts_over_epochs(tmp_path):
    assert (
        train(
            GPT(tiny_config()), examples(8), tmp_path, micro_batch_size=2, global_batch_size=4, max_steps=5
        ).steps
        == 5
    )


def test_the_frozen_base_stays_as_it_is_to_the_bit(tmp_path):
    model = GPT(tiny_config()).bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, LoRAConfig(rank=2))
    first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, examples(), tmp_path, micro_batch_size=2, global_batch_size=2)
    after = {name.replace(".linear.", "."): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert all(not torch.equal(after[name], p) for name, p in first.items()), (
        "every A and B must have learned"
    )


def test_it_learns(tmp_path):
    model, data = GPT(tiny_config()), examples(8)
    start = mean_loss(model, data).item()
    done = train(
        model,
        data,
        tmp_path,
        val=data,
        micro_batch_size=4,
        global_batch_size=8,
        epochs=30,
        learning_rate=0.01,
    )
    assert done.val_loss < 0.5 * start
    assert done.val_loss == pytest.approx(mean_loss(model, data).item(), rel=1e-5)


@pytest.mark.parametrize("cut", PADDED + PACKED)
def test_validation_weighs_every_token_the_same(cut):
    model, data = GPT(tiny_config()), examples()
    add_lora(model, LoRAConfig(rank=2, dropout=0.5))
    config = TrainConfig(global_batch_size=14, **cut)
    objective = SFT(model, config).train()
    got = evaluate(Parallel("cpu"), objective, data, config)
    assert objective.training, "the mode must be put back"
    assert got == pytest.approx(mean_loss(model.eval(), data).item(), rel=1e-5)


def test_the_newest_early_checkpoints_are_kept(tmp_path):
    def save(directory, state):
        directory.mkdir()

    sizes = {"micro_batch_size": 1, "global_batch_size": 1}
    train(GPT(tiny_config()), examples(8), tmp_path, save=save, **sizes, save_interval=2, keep_checkpoints=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006"]


def test_metrics_have_a_row_a_logged_step(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv")
    sizes = {"micro_batch_size": 1, "global_batch_size": 1, "log_interval": 3, "eval_interval": 5}
    train(GPT(tiny_config()), examples(8), tmp_path, val=examples(3), sinks=[metrics], **sizes)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["loss"]] == [1, 3, 6, 8]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [5, 8]
    assert int(rows[-1]["tokens"]) == sum(len(e.ids) for e in examples(8))
    assert all(float(row["learning_rate"]) > 0 and float(row["grad_norm"]) > 0 for row in rows if row["loss"])


def test_gradients_are_clipped_to_the_norm(tmp_path):
    """The norm that is logged is the one before."""
    model, data = GPT(tiny_config()), examples(4)
    captured = []

    class Watched(Parallel):
        def clip(self, parameters, max_norm):
            parameters = list(parameters)
            norm = super().clip(parameters, max_norm)
            captured.append(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters])).item())
            return norm

    for max_norm in (1e-3, 0):
        train(
            model,
            data,
            tmp_path,
            parallel=Watched("cpu"),
            micro_batch_size=4,
            global_batch_size=4,
            max_grad_norm=max_norm,
        )
    assert captured[0] == pytest.approx(1e-3, rel=1e-3) and captured[1] > 1e-2


def test_every_label_masked_is_an_error(tmp_path):
    with pytest.raises(DataError, match="every label is masked"):
        train(GPT(tiny_config()), [Example(array("i", [5]), ((0, 1),))] * 4, tmp_path)


def test_spoilt_weights_are_found_by_the_validation_and_not_saved(tmp_path):
    saved = []
    with pytest.raises(UserError, match="the validation loss is (nan|inf) after step 1.*lower learning_rate"):
        train(
            GPT(tiny_config()),
            examples(4),
            tmp_path,
            val=examples(3),
            save=lambda *done: saved.append(done),
            micro_batch_size=4,
            global_batch_size=4,
            learning_rate=1e30,
        )
    assert not saved


def test_a_trainable_weight_without_effect_is_an_error(tmp_path):
    model = GPT(tiny_config())
    model.idle = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"idle\.weight and 1 other trainable weights take no part"):
        train(model, examples(), tmp_path, micro_batch_size=2, global_batch_size=2)


def test_padding_that_would_change_an_example_is_refused():
    scaling = RopeScaling(
        rope_type="longrope",
        original_max_position_embeddings=64,
        short_factor=(1.0,) * 4,
        long_factor=(2.0,) * 4,
        attention_factor=1.0,
    )
    model = GPT.without_weights(tiny_config(rope_scaling=scaling))
    SFT(model, TrainConfig())
    with pytest.raises(UserError, match="^packing false: this model .*longrope"):
        SFT(model, TrainConfig(packing=False))
