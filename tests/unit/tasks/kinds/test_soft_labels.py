"""Soft losses and divergences of every kind against float64 references; missing rows cost and teach nothing."""

import numpy as np
import pytest
import torch

from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.task import Task
from tests.unit.tasks.kinds.test_kinds import TASKS, logits_of

SOFT = sorted(name for name, kind in KINDS.items() if kind.soft)
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.25])


def soft_of(kind: str) -> torch.Tensor:
    """Soft labels of 5 rows, the second one and some words missing."""
    soft = TASKS[kind].rules.soft_labels(logits_of(kind, seed=7), TASKS[kind])
    soft[1] = torch.nan
    if KINDS[kind].mode == "tokens":
        soft[:, 0] = torch.nan
    return soft


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def reference(kind: str, logits: torch.Tensor, soft: torch.Tensor, T: float) -> np.ndarray:
    """Loss of each row (word), float64, NaN where there is no soft label."""
    z, p, task = logits.double().numpy(), soft.double().numpy(), TASKS[kind]
    if kind == "regression":
        return (z[:, 0] - (p[:, 0] - task.label_mean) / task.label_std) ** 2
    if kind == "multi_label":
        a, b = p ** (1 / T), (1 - p) ** (1 / T)
        p, q = a / (a + b), 1 / (1 + np.exp(-z / T))
        return -(p * np.log(q) + (1 - p) * np.log(1 - q)).mean(axis=-1) * T**2
    softened = p ** (1 / T) / (p ** (1 / T)).sum(axis=-1, keepdims=True)
    return -(softened * log_softmax(z / T)).sum(axis=-1) * T**2


@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("kind", SOFT)
def test_the_soft_loss_is_that_of_the_float64_reference(kind, T):
    logits, soft, task = logits_of(kind).requires_grad_(), soft_of(kind), TASKS[kind]
    expected = reference(kind, logits.detach(), soft, T)
    rows = np.nan_to_num(expected).reshape(5, -1).sum(axis=1)
    assert task.rules.soft_units(soft) == np.isfinite(expected).sum()
    for weights, wanted in ((None, rows.sum()), (WEIGHTS, rows @ WEIGHTS.double().numpy())):
        loss = task.rules.soft_loss(logits, soft, task, weights, temperature=T)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted, rel=2e-5)
    parts = [
        task.rules.soft_loss(logits[r], soft[r], task, temperature=T) for r in ([0, 3], [1, 2, 4])
    ]
    assert sum(parts).item() == pytest.approx(rows.sum(), rel=2e-5)
    task.rules.soft_loss(logits, soft, task, temperature=T).backward()
    assert logits.grad.isfinite().all() and not logits.grad[1].any() and logits.grad[0].any()


@pytest.mark.parametrize("kind", SOFT)
def test_the_divergence_is_what_the_loss_has_above_its_least_value(kind):
    logits, soft, task = logits_of(kind), soft_of(kind), TASKS[kind]
    found = task.rules.soft_divergences(logits, soft, task)
    own = task.rules.soft_logits(soft, task).nan_to_num()
    least = reference(kind, own, soft, 1.0) if kind != "regression" else 0.0
    expected = (reference(kind, logits, soft, 1.0) - least) * (0.5 if kind == "regression" else 1.0)
    np.testing.assert_allclose(found.numpy(), np.nan_to_num(expected), atol=2e-5, rtol=2e-5)
    assert task.rules.soft_divergences(own, soft, task).abs().max() < 1e-5 and found.max() > 0.1


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_probabilities_of_0_and_1_are_finite_at_every_temperature(kind):
    task, soft = TASKS[kind], torch.tensor([[0.0, 0.0, 1.0]])
    logits = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    for T in (0.5, 1.0, 4.0):
        loss = task.rules.soft_loss(logits, soft, task, temperature=T)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
    gold = (2,) if kind == "multi_label" else 2
    targets = task.rules.collate([gold], labels=task.labels, length=1)
    exact = task.rules.loss(logits, targets, task)
    torch.testing.assert_close(task.rules.soft_loss(logits, soft, task), exact)


def test_a_teacher_of_numbers_answers_in_the_unit_of_its_labels():
    teacher = Task("x", "regression", (), "mae", label_mean=40.0, label_std=2.5)
    student = Task("x", "regression", (), "mae", label_mean=10.0, label_std=30.0)
    said = teacher.rules.soft_labels(torch.tensor([[1.0], [-2.0]]), teacher)
    assert said.tolist() == [[42.5], [35.0]]
    logits = (said - 10.0) / 30.0
    assert student.rules.soft_loss(logits, said, student).item() == pytest.approx(0, abs=1e-9)
