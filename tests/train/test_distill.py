"""Distill: equal to TRL's where all tokens are kept, to the formula in float64, however it is cut up."""

from array import array

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, tiny_config
from safetensors.torch import load_file
from trl_said import ALONE, CPU, answer

from litlora.checkpoint import resolve
from litlora.data.examples import Example
from litlora.errors import UserError
from litlora.model import GPT
from litlora.settings import DistillConfig, TrainConfig
from litlora.train import distill
from litlora.train.distill import Distill, Teacher, divergence, predictions

SOME = [answer([1, 2, 3], [4, 5, 6, 7]), answer([9], [8]), answer([20, 21], [22, 23, 24, 25, 26])]


@pytest.mark.parametrize(("name", "temperature"), [("plain", 1.0), ("warm", 2.5)])
def test_with_all_tokens_it_is_trl(name, temperature):
    said = load_file(REPO / "tests/trl_files/distill.safetensors")
    learned = said["labels"][0] != -100
    logits = said["student"][0].requires_grad_()
    teacher = predictions(said["teacher"][0][learned] / temperature, logits.size(1))
    found = divergence(logits[learned] / temperature, teacher)
    torch.testing.assert_close(found, said[f"{name}.loss"][0], atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, said[f"{name}.gradient"][0], atol=1e-5, rtol=0)


def coarse(logits, teacher_logits, k):
    """The plain formula: probabilities of the k likeliest, and of the others together."""
    p, q = teacher_logits.softmax(-1), logits.softmax(-1)
    total = logits.new_zeros(())
    for row in range(len(p)):
        top = p[row].argsort(descending=True)[:k]
        others = [v for v in range(len(p[row])) if v not in top]
        pairs = [(p[row, v], q[row, v]) for v in top]
        pairs += [(p[row, others].sum(), q[row, others].sum())] if others else []
        total = total + sum(a * torch.log(a / b) for a, b in pairs)
    return total


@pytest.mark.parametrize("k", [1, 4, 10, 11])
def test_it_is_the_formula(k):
    teacher, logits = (2 * torch.randn(5, 11, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    wanted, found = coarse(logits, teacher, k), divergence(logits, predictions(teacher, k))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (found, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    full = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    assert found <= full + 1e-12


def test_a_teacher_of_fewer_tokens_leaves_no_rest():
    """Rows of the student's embedding that only it has."""
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    teacher = predictions(torch.randn(3, 7, dtype=torch.float64), 7)
    assert (teacher.rest == -torch.inf).all()
    found = divergence(logits, teacher)
    p, log_q = teacher.log_probs.exp(), logits.log_softmax(-1).gather(1, teacher.ids.long())
    torch.testing.assert_close(found, (p * (teacher.log_probs - log_q)).sum())
    assert torch.autograd.grad(found, logits)[0].isfinite().all()


def student_of(teacher_dir, weights=None, **settings):
    train = {name: settings.pop(name) for name in ("packing", "mask_prompt") if name in settings}
    model = weights or GPT(tiny_config())
    found = Distill(
        model, TrainConfig(**train), teacher=Teacher(resolve(teacher_dir)), distill=DistillConfig(**settings)
    )
    return found.eval()


def loss_of(objective, examples=SOME):
    examples = objective.prepared(examples, ALONE)
    objective.ready()
    return objective(objective.batch(examples, CPU))


def test_of_itself_a_model_has_nothing_to_learn(base):
    from litlora.load import load

    loss, figures = loss_of(student_of(base, load(base).model, top_k=8))
    assert abs(float(loss.detach())) < 1e-5 and abs(float(figures["kl"])) < 1e-5


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_whole_way_is_the_formula(base, weight):
    """Positions, temperature, weight, and the models themselves: one example at a time."""
    from litlora.load import load

    student, teacher = GPT(tiny_config()), load(base).model
    loss, figures = loss_of(student_of(base, student, top_k=7, temperature=2.0, weight=weight))
    kl = cross_entropy = 0
    for example in SOME:
        (start, stop), ids = example.learned[0], torch.tensor([list(example.ids)])
        places = range(start - 1, stop - 1)
        logits, theirs = (model(ids)[0][places].double() for model in (student, teacher))
        kl = kl + coarse(logits / 2, theirs / 2, 7)
        cross_entropy = cross_entropy + F.cross_entropy(logits, ids[0, start:stop], reduction="sum")
    torch.testing.assert_close(figures["kl"].double(), kl.detach(), atol=1e-4, rtol=1e-5)
    wanted = weight * kl + (1 - weight) * cross_entropy
    torch.testing.assert_close(loss.double(), wanted, atol=1e-4, rtol=1e-5)
    gradients = [
        torch.autograd.grad(each, student.get_parameter("model.norm.weight"))[0] for each in (loss, wanted)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_packing_and_chunks_make_no_difference(base, monkeypatch):
    student = GPT(tiny_config())
    weight = student.get_parameter("lm_head.weight").requires_grad_()
    found = []
    for packing, rows in ((True, 10**6), (False, 10**6), (True, 3), (False, 1)):
        monkeypatch.setattr(distill, "chunk_rows", lambda *_, rows=rows: rows)
        loss, figures = loss_of(student_of(base, student, packing=packing, weight=0.5))
        (gradient,) = torch.autograd.grad(loss, weight)
        found.append((loss.detach(), figures["kl"], gradient))
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], atol=1e-5, rtol=1e-5)


def test_prompts_that_are_learned_too_are_asked_for(base):
    objective = student_of(base, mask_prompt=False)
    (example,) = objective.prepared(SOME[:1], ALONE)
    assert len(example.predictions.ids) == 6 and example.predictions.ids.dtype == torch.int32


def test_pieces_and_idle_batches_stay_whole(base):
    objective = student_of(base)
    batch = objective.batch(SOME, CPU)  # of examples that are not prepared
    assert objective(batch)[0].isfinite()
    idle, piece = objective.idle(batch), objective.piece(batch, 6)
    assert float(objective(idle)[0].detach()) == 0
    assert len(piece.batch.targets) == len(piece.predictions.ids) == len(piece.predictions.rest)
    assert objective.text(batch) is batch.batch


def test_what_the_teacher_cannot_take_is_refused(make_checkpoint):
    short = make_checkpoint("short", max_position_embeddings=8)
    with pytest.raises(UserError, match="takes 8 tokens, and the longest example has 9"):
        student_of(short).prepared([Example(array("i", range(9)), ((3, 9),))], ALONE)


def test_predictions_that_do_not_fit_are_refused(base, monkeypatch):
    monkeypatch.setattr(distill, "free_ram", lambda: 1000)
    with pytest.raises(UserError, match="top_k 64: the teacher's predictions of 10 tokens take"):
        student_of(base).prepared(SOME, ALONE)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_k": 0}, "top_k 0: must be at least 1"),
        ({"temperature": 0.0}, "temperature 0.0: must be a positive"),
        ({"weight": 1.5}, "weight 1.5: must be above 0 and at most 1"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        DistillConfig(**settings)
