"""The objective: equal to the plain way, in value and gradient, at a fraction of the logits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from litlora import loss as loss_module
from litlora.loss import IGNORE, SupervisedLoss
from litlora.model import GPT


def batch():
    ids = torch.randint(400, (3, 17))
    labels = ids.clone()
    labels[0, :9] = labels[1, :2] = labels[1, 11:] = labels[2, :] = IGNORE
    return ids, labels


@pytest.mark.parametrize("chunk", [1024, 5, 1])
def test_loss_and_gradients_equal_the_plain_way(chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    model = GPT(tiny_config()).double()
    ids, labels = batch()
    wanted = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    wanted_gradients = torch.autograd.grad(wanted, list(model.parameters()))
    got = SupervisedLoss(model)(ids, labels)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(got, list(model.parameters())), wanted_gradients, rtol=1e-10, atol=1e-12)


def test_a_batch_without_labels_has_loss_zero_and_gradients_zero():
    model = GPT(tiny_config())
    ids, labels = batch()
    loss = SupervisedLoss(model)(ids, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_logits_exist_at_supervised_positions_only():
    model = GPT(tiny_config())
    ids, labels = batch()
    rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].size(0)))
    SupervisedLoss(model)(ids, labels)
    assert rows == [int((labels[:, 1:] != IGNORE).sum())]
