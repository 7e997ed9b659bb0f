"""The objective with soft labels: its value, its parts, and what does not change it."""

from dataclasses import replace

import pytest
import torch

from comoe.config.recipe import DistillConfig, LossConfig
from comoe.losses.objective import Objective
from comoe.types import IGNORED
from tests.helpers_model import TASKS, cut, gradients, moe_config, random_batch, scaled, tiny_model

PLAIN = LossConfig()
PLAIN.contrastive.weight = 0.0
KNOWN = TASKS[:4]
"""Tasks with soft labels; the last one has gold labels alone."""


def soft_batch(rows=8, *, seed=0):
    """Gold labels of some tasks are missing, and soft labels of some posts."""
    batch = random_batch(rows, seed=seed)
    batch.labels["mood"][::2] = IGNORED
    batch.labels["topic"][:] = IGNORED
    soft, generator = {}, torch.Generator().manual_seed(seed + 1)
    for task in KNOWN:
        shape = batch.labels[task.name].shape[:2] if task.mode == "tokens" else (rows,)
        logits = 2 * torch.randn(*shape, task.rules.num_outputs(task.labels), generator=generator)
        soft[task.name] = task.rules.soft_labels(logits, task)
        soft[task.name][3] = torch.nan
    soft["words"][~batch.word_starts_BL] = torch.nan
    return replace(batch, soft_labels=soft, progress=0.25)


def objective_of(**distill) -> Objective:
    moe = moe_config()
    return Objective(tiny_model(moe), TASKS, PLAIN, moe, distill=DistillConfig(**distill))


@pytest.mark.parametrize("annealing", ["none", "linear"])
def test_a_tasks_loss_is_the_mean_soft_loss_and_a_share_of_the_mean_gold_loss(annealing):
    objective, batch = (
        objective_of(annealing=annealing, gold_weight=0.4, temperature=2.0),
        soft_batch(),
    )
    step = objective(scaled(batch))
    logits = {name: value.detach() for name, value in step.output.logits.items()}
    for task in TASKS:
        gold, targets = task.rules.loss, batch.labels[task.name]
        units = task.rules.normalizer(targets, task)
        gold = gold(logits[task.name], targets, task).double() / units if units else 0.0
        if task not in KNOWN:
            assert float(step.terms[f"task/{task.name}"]) == pytest.approx(float(gold), rel=1e-5)
            continue
        soft = batch.soft_labels[task.name]
        losses = task.rules.soft_losses(logits[task.name], soft, task, temperature=2.0).double()
        rows = losses.reshape(len(soft), -1).sum(dim=1)
        has_gold = task.rules.labelled(targets).double()
        weight = 0.25 if annealing == "linear" else 0.4
        rows = rows * (1 - 0.25 * has_gold) if annealing == "linear" else rows
        mean = rows.sum() / task.rules.soft_present(soft).sum()
        expected = mean + weight * gold
        assert float(step.terms[f"task/{task.name}"]) == pytest.approx(float(expected), rel=1e-5)
        assert float(step.terms[f"soft/{task.name}"]) == pytest.approx(float(mean), rel=1e-5)
    assert float(step.terms["task/topic"]) > 0, "a task without any gold label is learned"


def test_micro_steps_add_up_to_the_whole_step():
    objective, batch = objective_of(annealing="linear"), soft_batch()
    objective(scaled(batch)).loss.backward()
    whole = {name: g.clone() for name, g in gradients(objective).items() if g is not None}
    objective.zero_grad()
    for part in cut(batch, [[0, 1, 2], [3], [4, 5, 6, 7]]):
        (objective(part).loss / 3).backward()
    found = gradients(objective)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-6)


def test_soft_labels_of_gold_labels_are_gold_labels():
    """One-hot soft labels, no gold weight: the gradients of training on gold labels."""
    batch = random_batch(6)
    names = ("mood", "topic", "signs")
    soft = {
        task.name: batch.labels[task.name]
        if task.kind == "multi_label"
        else torch.nn.functional.one_hot(batch.labels[task.name], len(task.labels)).float()
        for task in TASKS
        if task.name in names
    }
    found = []
    for case in (batch, replace(batch, soft_labels=soft)):
        objective = objective_of(gold_weight=0.0)
        objective(scaled(case)).loss.backward()
        found.append([p.grad for p in objective.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
