"""R-Drop: two passes under different dropout, against sums of divergences in float64."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from comoe.config.recipe import ContrastiveConfig, LossConfig
from comoe.tasks.kinds.registry import KINDS
from comoe.types import IGNORED
from tests.helpers_model import (
    TASKS,
    cut,
    moe_config,
    random_batch,
    scaled,
    tiny_objective,
    without_gradient,
)

PLAIN = LossConfig(contrastive=ContrastiveConfig(weight=0.0))
WEIGHT = 20.0


def both_ways(kind: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(p || q) + KL(q || p) of each row (word), float64, by torch's distributions."""
    make = {
        "regression": lambda z: Normal(z[..., 0], torch.ones_like(z[..., 0])),
        "multi_label": lambda z: Bernoulli(logits=z),
    }.get(kind, lambda z: Categorical(logits=z))
    p, q = make(one.double()), make(other.double())
    found = kl_divergence(p, q) + kl_divergence(q, p)
    return found.mean(dim=-1) if kind == "multi_label" else found


def some_missing():
    batch = random_batch()
    batch.labels["mood"][[0, 3]] = IGNORED
    batch.labels["words"][1] = IGNORED
    batch.labels["words"][2, :2] = IGNORED
    return batch


def reference(one, other, batch) -> torch.Tensor:
    """Sum over tasks of the mean over labelled posts of half of ``both_ways``; of tags, of the mean over words."""
    total = torch.zeros((), dtype=torch.float64)
    for task in TASKS:
        targets = batch.labels[task.name]
        values = both_ways(task.kind, one[task.name].detach(), other[task.name].detach())
        if task.kind == "tags":
            posts = [row[target != IGNORED] for row, target in zip(values, targets, strict=True)]
            means = torch.stack([row.mean() for row in posts if len(row)])
        else:
            means = values[KINDS[task.kind].labelled(targets)]
        total += 0.5 * means.mean()
    return total


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression", "tags"])
def test_the_divergence_is_that_of_the_distributions_and_so_is_its_gradient(kind):
    width = 1 if kind == "regression" else 3
    shape = (5, 4, width) if kind == "tags" else (5, width)
    draw = torch.Generator().manual_seed(1)
    one, other = (2 * torch.randn(shape, generator=draw) for _ in range(2))
    expected = both_ways(kind, one, other)
    torch.testing.assert_close(
        KINDS[kind].disagreements(one, other).double(), expected, rtol=1e-5, atol=1e-6
    )
    assert not KINDS[kind].disagreements(one, one).any()
    slow = [z.double().requires_grad_() for z in (one, other)]
    fast = [z.clone().requires_grad_() for z in (one, other)]
    wanted = torch.autograd.grad(both_ways(kind, *slow).sum(), slow)
    found = torch.autograd.grad(KINDS[kind].disagreements(*fast).sum(), fast)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("repeats", [False, True])
def test_two_passes_are_the_mean_of_their_losses_and_the_divergence(repeats):
    batch = scaled(some_missing())
    objective = tiny_objective(loss=replace(PLAIN, r_drop_weight=WEIGHT), dropout=0.3).train()
    torch.manual_seed(3)
    one = objective.model(batch)
    between = torch.get_rng_state()
    other = objective.model(batch)
    losses = [objective.task_losses(each, batch).detach().double() for each in (one, other)]
    divergence = reference(one.logits, other.logits, batch)
    torch.manual_seed(3)
    # Where a weighting or GradCache runs earlier passes, the next micro-batch must draw what they drew.
    gram = torch.eye(len(TASKS), dtype=torch.float64) if repeats else None
    step = objective(batch, gram_TT=gram)
    assert torch.equal(torch.get_rng_state(), between) is repeats
    expected = sum(losses).sum() / 2 + WEIGHT * divergence
    assert WEIGHT * divergence > 0.01
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.terms["r_drop"].item() == pytest.approx(divergence.item(), rel=1e-3)
    assert torch.equal(step.output.logits["mood"], one.logits["mood"])
    step.loss.backward()
    assert without_gradient(objective) == []


def test_micro_batches_add_up_and_without_dropout_nothing_is_added():
    batch = some_missing()
    objective = tiny_objective(loss=replace(PLAIN, r_drop_weight=WEIGHT)).eval()
    whole, plain = objective(scaled(batch)), tiny_objective(loss=PLAIN).eval()(scaled(batch))
    assert whole.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert whole.terms["r_drop"] == 0
    other = tiny_objective(seed=1).eval().model
    parts = cut(batch, [[0, 4], [1], [2, 3, 5]])
    each = [objective._divergences(objective.model(part), other(part), part) for part in parts]
    logits = objective.model(batch).logits, other(batch).logits
    found = (sum(each) / 3).sum().item()
    assert found == pytest.approx(reference(*logits, batch).item(), rel=1e-5)


def test_without_dropout_two_draws_of_experts_are_made_to_agree():
    """AdaMix: the two passes of a post go through other experts, and nothing else differs."""
    moe = moe_config(gate="random", top_k=1, balance="none")
    objective = tiny_objective(moe, loss=replace(PLAIN, r_drop_weight=WEIGHT))
    model, batch = objective.model, scaled(replace(random_batch(), step=2))
    found = objective(batch)
    passes = []
    for view in (0, 1):
        model.holder.view = view
        passes.append(model(batch))
    picks = [torch.cat([r.indices_Sk for r in output.routings]) for output in passes]
    assert not torch.equal(*picks)
    expected = reference(*(output.logits for output in passes), batch)
    assert expected > 1e-3
    torch.testing.assert_close(found.terms["r_drop"].double(), expected, rtol=1e-4, atol=1e-6)
    model.holder.view = 0
    again = objective(batch)
    assert torch.equal(again.loss, found.loss)
