"""NEFTune's noise."""

import os
import signal
from array import array

import pytest
import torch
from conftest import AfterStep, extra_sinks, tiny_config, tune
from torch import nn

from litlora.data.examples import Example
from litlora.errors import UserError
from litlora.model import GPT
from litlora.settings import JSON, FinetuneDPO, TrainConfig
from litlora.train.neftune import noisy
from litlora.train.objective import SFT
from litlora.train.parallel import Parallel
from litlora.train.validation import evaluate


def test_each_example_has_the_noise_of_its_own_length():
    """As in the paper: uniform up to alpha / √(L C), for the L of the example, not of the pack."""
    embedding, lengths = nn.Embedding(50, 64), [3, 40, 400]
    ids = torch.randint(50, (1, sum(lengths)))
    plain = embedding(ids)
    with noisy(embedding, 5.0, lengths):
        noise = (embedding(ids) - plain)[0]
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        most = 5 / (length * 64) ** 0.5
        assert 0.9 * most < part.abs().max() <= 1.0001 * most
        assert part.std().item() == pytest.approx(most / 3**0.5, rel=0.2)
    assert torch.equal(embedding(ids), plain), "none is left outside of the block"


@pytest.mark.slow
def test_one_example_has_the_noise_that_transformers_gives_it():
    neftune = pytest.importorskip("transformers.integrations.neftune")
    embedding, ids = nn.Embedding(50, 16), torch.randint(50, (1, 7))
    torch.manual_seed(3)
    embedding.neftune_noise_alpha = 5.0
    expected = neftune.neftune_post_forward_hook(embedding.train(), (ids,), embedding(ids))
    torch.manual_seed(3)
    with noisy(embedding, 5.0, [7]):
        torch.testing.assert_close(embedding(ids), expected)


def test_validation_has_no_noise():
    model = GPT(tiny_config())
    examples = [Example(array("i", [1, 2, 3, 4, 5]), ((2, 5),)), Example(array("i", [6, 7]), ((1, 2),))]
    quiet, noised = (SFT(model, TrainConfig(neftune_alpha=alpha)) for alpha in (0.0, 50.0))
    batch = quiet.batch(examples, torch.device("cpu"))
    assert quiet(batch)[0] != noised(batch)[0]
    losses = [evaluate(Parallel(), objective, examples, objective.config) for objective in (quiet, noised)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_resumes_to_the_bit(method, base, alpaca_file, tmp_path):
    expected, out, quiet = tmp_path / "expected", tmp_path / "out", tmp_path / "quiet"
    settings = {"train": {"neftune_alpha": 5.0}, "precision": "32-true"}
    tune(method, base, alpaca_file, expected, **settings)
    tune(method, base, alpaca_file, quiet, precision="32-true")
    with extra_sinks(AfterStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))), pytest.raises(SystemExit):
        tune(method, base, alpaca_file, out, **settings)
    tune(method, base, alpaca_file, out, **settings, resume="auto")
    final = [(path / "final/lit_model.pth").read_bytes() for path in (out, expected, quiet)]
    assert final[0] == final[1] != final[2]


def test_what_does_not_go_with_it_is_named():
    with pytest.raises(UserError, match="^neftune_alpha 5: needs packing"):
        TrainConfig(neftune_alpha=5.0, packing=False)
    with pytest.raises(UserError, match="^neftune_alpha -1.0: must be 0 or more"):
        TrainConfig(neftune_alpha=-1.0)
    with pytest.raises(UserError, match="^neftune_alpha and loss dpo: "):
        FinetuneDPO(data=JSON(path="pairs.json"), train=TrainConfig(neftune_alpha=5.0))
