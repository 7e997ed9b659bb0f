"""Weighting by the tasks' gradients: the inner products are those of a real layer, over any micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from comoe.config.recipe import ContrastiveConfig, LossConfig, Recipe
from comoe.losses.objective import Objective, Term
from comoe.losses.weighting.gradient_surgery import cagrad, gram_over_ranks, pcgrad
from comoe.types import IGNORED, Batch
from tests.helpers_model import (
    TASKS,
    WIDTH,
    cut,
    gradients,
    moe_config,
    random_batch,
    tiny_objective,
)

PLAIN = LossConfig(contrastive=ContrastiveConfig(weight=0.0))
COMBINED = {
    "gradnorm": lambda gram_TT: np.ones(len(gram_TT)),
    "pcgrad": lambda gram_TT: pcgrad(gram_TT, step=5),
    "cagrad": lambda gram_TT: cagrad(gram_TT, strength=0.5),
}


def objective_with(weighting: str, **options) -> Objective:
    return tiny_objective(moe_config(), loss=replace(PLAIN, weighting=weighting), **options).train()


def a_batch() -> Batch:
    batch = random_batch(rows=12)
    batch.labels["mood"][::3] = IGNORED
    batch.labels["words"][:7] = IGNORED
    return replace(batch, step=5)


def chunks_of(batch: Batch, count: int) -> list[Batch]:
    return cut(batch, [rows.tolist() for rows in np.array_split(np.arange(12), count)])


def gram_of(objective: Objective, batches: list[Batch]) -> torch.Tensor:
    """What the engine does before a step of several micro-batches."""
    with torch.random.fork_rng([]), torch.no_grad():
        return gram_over_ranks(
            sum(objective(batch, mode="task_gradients") for batch in batches) / len(batches)
        )


def gradients_of_a_layer(objective: Objective, batch: Batch) -> np.ndarray:
    """Each task's gradient by a linear layer that really stands there, at the identity, from a
    backward pass of its own through the whole model: (T, M * M), float64."""
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    torch.nn.init.eye_(layer.weight)
    encode = objective.model.encode

    def with_layer(*arguments):
        encoding = encode(*arguments)
        return replace(encoding, fused_BLM=layer(encoding.fused_BLM))

    objective.model.encode = with_layer
    losses_T = objective.task_losses(objective.model(batch), batch)
    rows = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses_T]
    del objective.model.encode
    return torch.stack(rows).flatten(1).double().numpy()


@pytest.mark.parametrize("weighting", COMBINED)
def test_weights_and_gradients_are_those_of_full_gradients_by_a_real_layer(weighting):
    (batch,) = chunks_of(a_batch(), 1)
    objective = objective_with(weighting)
    full = gradients_of_a_layer(objective, batch)
    output = objective(batch)
    np.testing.assert_allclose(output.gram_TT.numpy(), full @ full.T, rtol=1e-4, atol=1e-6)
    expected = COMBINED[weighting](full @ full.T)
    weights = np.array([float(output.terms[f"weight/{task.name}"]) for task in TASKS])
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    assert weighting == "gradnorm" or np.abs(weights - 1).max() > 0.01
    output.loss.backward()
    losses_T = objective.task_losses(objective.model(batch), batch)
    for name, weight in objective.named_parameters():
        if weight.requires_grad:
            apart = [
                torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)[0]
                for loss in losses_T
            ]
            parts = [f * g.double() for f, g in zip(expected, apart, strict=True) if g is not None]
            wanted = sum(parts, torch.zeros_like(weight, dtype=torch.float64))
            torch.testing.assert_close(weight.grad.double(), wanted, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("private_width", [0, 4])
def test_any_micro_batches_give_the_inner_products_and_the_gradient_of_the_whole_batch(
    private_width,
):
    objective = objective_with("pcgrad", private_width=private_width)
    (whole,) = chunks_of(a_batch(), 1)
    expected = objective(whole)
    expected.loss.backward()
    wanted = {name: g.clone() for name, g in gradients(objective).items() if g is not None}
    for count in (2, 5):
        objective.zero_grad()
        parts = chunks_of(a_batch(), count)
        gram_TT = gram_of(objective, parts)
        torch.testing.assert_close(gram_TT, expected.gram_TT, rtol=1e-4, atol=1e-6)
        # A micro-batch alone has other inner products: this test can fail.
        assert not torch.allclose(gram_of(objective, parts[:1]), gram_TT, rtol=0.1)
        for part in parts:
            (objective(part, gram_TT=gram_TT).loss / count).backward()
        found = gradients(objective)
        for name, value in wanted.items():
            close = 1e-6 + 1e-4 * float(value.abs().max())
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=close, msg=name)


def test_the_second_answers_draw_the_dropout_of_the_first_and_no_random_number_more():
    objective, (batch,) = (
        objective_with("pcgrad", dropout=0.4, private_width=4),
        chunks_of(a_batch(), 1),
    )
    torch.manual_seed(3)
    output = objective.model(batch, probed=True)
    after = torch.rand(1)
    for task in TASKS:
        assert torch.equal(output.probe.logits[task.name], output.logits[task.name])
    torch.manual_seed(3)
    objective.model(batch)
    assert torch.equal(torch.rand(1), after)


class Drawing:
    """A term that draws random numbers, as the matching of texts and pictures does."""

    def begin_step(self):
        pass

    def __call__(self, output, batch):
        return 0.0 * torch.rand(7).sum(), {}


def test_the_pass_for_gradients_draws_the_dropout_of_the_pass_that_trains():
    objective, parts = objective_with("pcgrad", dropout=0.4), chunks_of(a_batch(), 3)
    objective.terms["drawing"] = Term(1.0, Drawing())
    torch.manual_seed(3)
    first = gram_of(objective, parts)
    # What the trained pass finds by itself, in the same places of the random stream.
    found = []
    for part in parts:
        state = torch.get_rng_state()
        found.append(objective(part, mode="task_gradients"))
        torch.set_rng_state(state)
        objective(part, gram_TT=first)
    torch.testing.assert_close(gram_over_ranks(sum(found) / 3), first)


def test_reverting_to_equal_is_the_plain_sum_bit_for_bit():
    (batch,) = chunks_of(a_batch(), 1)
    objective = objective_with("equal")
    output = objective(batch)
    assert output.gram_TT is None
    plain = objective.task_losses(objective.model(batch), batch).sum()
    assert torch.equal(output.loss.detach(), plain.detach())
    output.loss.backward()
    grads = {name: g.clone() for name, g in gradients(objective).items() if g is not None}
    objective.zero_grad()
    plain.backward()
    found = gradients(objective)
    for name, value in grads.items():
        own = torch.zeros_like(value) if found[name] is None else found[name]
        assert torch.equal(value, own), name


@pytest.mark.parametrize("weighting", ["gradnorm", "dynamic_average"])
def test_the_end_of_a_step_tells_the_mean_losses_of_its_micro_steps(weighting):
    whole, parts = (objective_with(weighting) for _ in range(2))
    for step in range(3):
        for objective, count in ((whole, 1), (parts, 3)):
            objective.weighting.window = 1
            batches = chunks_of(random_batch(rows=12, seed=step), count)
            gram_TT = gram_of(objective, batches) if objective.weighting.reads_gradients else None
            outputs = [objective(batch, gram_TT=gram_TT) for batch in batches]
            objective.end_step(outputs, batches)
    present_T = torch.ones(len(TASKS), dtype=torch.bool)
    found, expected = (o.weighting.weights(present_T, gram_TT=None, step=0) for o in (parts, whole))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert float((expected - 1).abs().max()) > 1e-3


def test_a_share_that_other_terms_take_is_in_the_logged_weight():
    (batch,) = chunks_of(a_batch(), 1)
    objective = objective_with("static")
    objective.task_share = 0.75
    assert float(objective(batch).terms["weight/mood"]) == 0.75


def test_what_a_weighting_learns_has_its_own_rate_and_no_decay():
    from comoe.train.parallel.setup import parameter_groups

    recipe = Recipe(loss=replace(PLAIN, weighting="uncertainty", weighting_rate=0.3))
    objective = objective_with("uncertainty")
    (group,) = [
        group for group in parameter_groups(objective, recipe) if group["role"] == "weighting"
    ]
    assert group["lr"] == 0.3 and group["weight_decay"] == 0.0 and recipe.train.weight_decay > 0
    assert [id(parameter) for parameter in group["params"]] == [
        id(objective.weighting.log_variances_T)
    ]
