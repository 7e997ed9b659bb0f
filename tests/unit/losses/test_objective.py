"""The objective: partitions of a batch add up, absent tasks are harmless, every term can be switched off."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from comoe.config.recipe import ContrastiveConfig, LossConfig, ModelConfig, Recipe
from comoe.losses.build import build_objective
from comoe.losses.objective import LOSSES, unit_scale
from comoe.models.moe.gate import GATES
from comoe.types import IGNORED, ModelOutput
from tests.helpers_contrastive import reference
from tests.helpers_model import (
    HF_CONFIGS,
    TASKS,
    cut,
    gradients,
    labels_for,
    moe_config,
    random_batch,
    scaled,
    tiny_objective,
    without_gradient,
)

NO_CONTRAST = LossConfig(contrastive=ContrastiveConfig(weight=0.0))


def without(batch, *names):
    blank = {
        task.name: labels_for(task, len(batch.row_ids_B), 9, None, labelled=False) for task in TASKS
    }
    return replace(
        batch,
        labels={
            name: blank[name] if name in names else value for name, value in batch.labels.items()
        },
    )


def some_missing(batch):
    batch.labels["mood"][[0, 3]] = IGNORED
    batch.labels["heat"][[1, 2, 4]] = math.nan
    return batch


def test_task_losses_are_means_over_labelled_rows():
    batch = some_missing(random_batch())
    objective = tiny_objective(loss=NO_CONTRAST).eval()
    step = objective(scaled(batch))
    logits, labels = step.output.logits, batch.labels
    expected = {
        "mood": F.cross_entropy(logits["mood"][[1, 2, 4, 5]], labels["mood"][[1, 2, 4, 5]]),
        "topic": F.cross_entropy(logits["topic"], labels["topic"]),
        "heat": F.mse_loss(logits["heat"][[0, 3, 5], 0], labels["heat"][[0, 3, 5]]),
        "words": F.cross_entropy(logits["words"].reshape(-1, 2), labels["words"].reshape(-1)),
        "signs": F.binary_cross_entropy_with_logits(logits["signs"], labels["signs"]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(step.terms[f"task/{name}"], value.detach())
    torch.testing.assert_close(step.loss, sum(expected.values()))
    assert not any(value.requires_grad for value in step.terms.values())


def test_posts_weigh_alike_however_the_step_is_cut():
    """Labelled posts of the five tasks: 4, 6, 3, 6 and 6; the reference is a float64 sum over posts."""
    batch = some_missing(random_batch())
    objective = tiny_objective(loss=replace(NO_CONTRAST, weighting="posts")).eval()
    logits = objective(scaled(batch)).output.logits
    counts, total = {"mood": 4, "heat": 3}, 0.0
    for task in TASKS:
        targets = batch.labels[task.name]
        mean = task.rules.loss(logits[task.name].detach(), targets, task).double()
        total += counts.get(task.name, 6) * mean / task.rules.normalizer(targets, task)
    parts = sum(objective(part).loss for part in cut(batch, [[0, 4], [1], [2, 3, 5]])) / 3
    for loss in (objective(scaled(batch)).loss, parts):
        assert loss.item() == pytest.approx(5 * total.item() / 25, rel=1e-6)


@pytest.mark.parametrize("z_weight", [0.0, 0.5])
def test_micro_batches_under_one_unit_scale_equal_the_whole_batch(z_weight):
    batch = some_missing(random_batch())
    objective = tiny_objective(loss=replace(NO_CONTRAST, z_weight=z_weight))
    whole = objective(scaled(batch))
    whole.loss.backward()
    expected = gradients(objective)
    objective.zero_grad(set_to_none=True)
    steps = [objective(part) for part in cut(batch, [[0, 1, 2], [3], [4, 5]])]
    for step in steps:
        (step.loss / 3).backward()
    torch.testing.assert_close(sum(step.loss for step in steps) / 3, whole.loss)
    for name in whole.terms:
        torch.testing.assert_close(sum(step.terms[name] for step in steps) / 3, whole.terms[name])
    torch.testing.assert_close(gradients(objective), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "absent", [[task.name] for task in TASKS] + [[task.name for task in TASKS]]
)
@pytest.mark.parametrize("route_by", ["token", "task"])
def test_an_absent_task_gets_zero_gradients_and_not_none(absent, route_by):
    objective = tiny_objective(moe_config(route_by=route_by))
    step = objective(scaled(without(random_batch(), *absent)))
    step.loss.backward()
    assert step.loss.isfinite() and all(step.terms[f"task/{name}"] == 0 for name in absent)
    assert without_gradient(objective) == []
    grads = gradients(objective)
    for number, task in enumerate(TASKS):
        head = grads[f"model.heads.{number}.output.weight"]
        assert head.any().item() is (task.name not in absent)


def test_the_projection_gets_a_zero_gradient_where_no_term_reads_it():
    objective = tiny_objective(loss=NO_CONTRAST)
    objective(scaled(random_batch())).loss.backward()
    gradient = objective.model.projection.weight.grad
    assert gradient is not None and not gradient.any()


def test_a_filler_row_adds_neither_loss_nor_gradients():
    objective = tiny_objective()
    filler = without(random_batch(rows=1), *[task.name for task in TASKS])
    filler = replace(filler, unit_scale_T=torch.full((3 * len(TASKS) + 3,), 0.5))
    step = objective(replace(filler, task_ids_B=torch.tensor([-1]), row_ids_B=torch.tensor([-1])))
    step.loss.backward()
    assert step.loss == 0 and not any(grad.any() for grad in gradients(objective).values())


SWITCHES = {
    "contrastive": LossConfig(),
    "balance": replace(NO_CONTRAST, balance_weight=0.5),
    "z": replace(NO_CONTRAST, z_weight=0.5),
    "task_separation": replace(NO_CONTRAST, task_separation_weight=0.5),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_term_can_be_switched_on_and_off(name):
    batch = scaled(random_batch())
    off, on = tiny_objective(loss=NO_CONTRAST), tiny_objective(loss=SWITCHES[name])
    assert off.terms == {} and list(on.terms) == [name]
    plain, step = off(batch), on(batch)
    assert not set(LOSSES) & set(plain.terms)
    weight = on.terms[name].weight
    assert step.terms[name] > 0
    torch.testing.assert_close(step.loss - plain.loss, weight * step.terms[name])


def test_terms_that_have_nothing_to_compare_are_off():
    loss = replace(NO_CONTRAST, task_separation_weight=0.5)
    assert tiny_objective(moe_config(num_experts=1, top_k=1), loss=loss).terms == {}
    assert tiny_objective(tasks=TASKS[:1], loss=loss).terms == {}
    loss = LossConfig(balance_weight=0.5, z_weight=0.5, task_separation_weight=0.5)
    plain = tuple(replace(task, contrastive=False) for task in TASKS)
    assert tiny_objective(moe_config(num_experts=0), tasks=plain, loss=loss).terms == {}


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_the_terms_on_the_gates_and_the_bias_add_up(balance):
    loss = replace(NO_CONTRAST, balance_weight=0.1, z_weight=0.2, task_separation_weight=0.3)
    batch, moe = scaled(random_batch()), moe_config(balance=balance)
    step, plain = (tiny_objective(moe, loss=each)(batch) for each in (loss, NO_CONTRAST))
    weights = {"balance": 0.1, "z": 0.2, "task_separation": 0.3}
    extra = sum(weight * step.terms[name] for name, weight in weights.items())
    torch.testing.assert_close(step.loss, plain.loss + extra)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2)])
def test_every_trained_parameter_gets_a_gradient_under_every_gate_and_term(gate, experts, top_k):
    weights = {"z_weight": 0.1, "task_separation_weight": 0.1}
    loss = LossConfig(**weights, balance_weight=0.1 if experts > 1 else 0.0)
    objective = tiny_objective(moe_config(gate=gate, num_experts=experts, top_k=top_k), loss=loss)
    step = objective(scaled(random_batch()))
    step.loss.backward()
    assert step.loss.isfinite() and without_gradient(objective) == []


def test_static_weights_scale_the_task_losses_in_the_total_alone():
    tasks = tuple(replace(task, weight=2.0) for task in TASKS)
    batch = scaled(random_batch())
    equal = tiny_objective(loss=NO_CONTRAST)(batch)
    static = tiny_objective(tasks=tasks, loss=replace(NO_CONTRAST, weighting="static"))(batch)
    torch.testing.assert_close(static.loss, 2 * equal.loss)
    torch.testing.assert_close(static.terms["task/mood"], equal.terms["task/mood"])
    assert static.terms["weight/mood"] == 2 * equal.terms["weight/mood"] == 2


def test_unit_scale_turns_a_rank_share_into_the_global_mean():
    units = torch.tensor([4.0, 0.0, 2.5], dtype=torch.float64)
    assert unit_scale(units, world_size=2, accumulation=3).tolist() == [
        1.5,
        0.0,
        pytest.approx(2.4),
    ]


def test_evaluation_returns_the_answer_alone_and_needs_no_labels():
    objective = tiny_objective().eval()
    batch = replace(random_batch(), labels={})
    output = objective(batch, mode="evaluate")
    assert isinstance(output, ModelOutput)
    torch.testing.assert_close(output.logits, objective.model(batch).logits)


def test_an_objective_is_built_from_a_recipe_which_switches_activation_checkpointing_on(tmp_path):
    AutoModel.from_config(HF_CONFIGS["bert"]).save_pretrained(tmp_path)
    recipe = Recipe(model=ModelConfig(encoder=str(tmp_path)))
    for switched in (False, True):
        recipe.train.activation_checkpointing = switched
        objective = build_objective(recipe, TASKS)
        assert objective.config is objective.model.config
        calls = []
        layer = objective.train().model.encoder.encoder.layer[0]
        layer.attention.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        objective(scaled(random_batch())).loss.backward()
        assert len(calls) == 1 + switched


def test_a_step_with_no_real_token_on_any_rank_costs_nothing():
    batch = replace(random_batch(rows=1, labelled=False), row_ids_B=torch.tensor([-1]))
    objective = tiny_objective(loss=LossConfig(balance_weight=0.1, z_weight=0.1))
    objective.begin_step()
    answer = objective(scaled(batch))
    answer.loss.backward()
    assert answer.loss == answer.terms["balance"] == answer.terms["z"] == 0
    assert not any(grad.any() for grad in gradients(objective).values())


def test_the_first_steps_learn_from_the_contrastive_loss_alone():
    """Value against the dense float64 formula, gradients against that of the term alone; then the tasks alone."""
    first = LossConfig(
        contrastive=ContrastiveConfig(weight=0.0, first_steps=2),
        weighting="uncertainty",
        z_weight=0.3,
        r_drop_weight=1.0,
    )
    objective, batch = tiny_objective(loss=first), scaled(some_missing(random_batch()))
    for step in (0, 1):
        found = objective(replace(batch, step=step))
        tasks = [task for task in TASKS if task.contrastive]
        rows = {"posts": batch.row_ids_B} | {
            f"{what}/{task.name}": values[task.name].detach()
            for what, values in (("z", found.output.embeddings), ("label", batch.labels))
            for task in tasks
        }
        assert found.loss.item() == pytest.approx(reference(tasks, rows)[0].item(), rel=1e-5)
        assert [found.terms[f"weight/{task.name}"].item() for task in TASKS] == [0.0] * 5
        assert found.terms["task/mood"] > 0 and "r_drop" not in found.terms
    found.loss.backward()
    moved = gradients(objective)
    (term,) = (term for term in objective.terms.values() if term.over_embeddings)
    objective.zero_grad(set_to_none=True)
    term.loss(objective.model(batch), batch)[0].backward()
    for name, alone in gradients(objective).items():
        assert moved[name] is not None, name
        torch.testing.assert_close(
            moved[name], torch.zeros_like(moved[name]) if alone is None else alone
        )
    assert not moved["weighting.log_variances_T"].any()
    assert (
        not moved["model.heads.0.output.weight"].any()
        and moved["model.heads.0.pooling.query"].any()
    )
    # As if it had never been there, but for what the embeddings are and nobody reads.
    after, plain = (
        tiny_objective(loss=loss)(replace(batch, step=2))
        for loss in (first, replace(first, contrastive=ContrastiveConfig(weight=0.0)))
    )
    assert after.loss == plain.loss and after.terms.keys() == plain.terms.keys()


def test_a_weight_keeps_the_contrastive_loss_beside_the_tasks_after_the_first_steps():
    batch = replace(scaled(random_batch()), step=2)
    beside = LossConfig(contrastive=ContrastiveConfig(weight=0.2))
    both = replace(beside, contrastive=ContrastiveConfig(weight=0.2, first_steps=2))
    assert tiny_objective(loss=both)(batch).loss == tiny_objective(loss=beside)(batch).loss


def test_weights_of_tasks_that_remember_do_not_count_the_first_steps():
    config = LossConfig(
        contrastive=ContrastiveConfig(first_steps=2),
        weighting="dynamic_average",
        weighting_window=1,
    )
    objective, batch = tiny_objective(loss=config), scaled(random_batch())
    for step in range(4):
        now = replace(batch, step=step)
        objective.end_step([objective(now)], [now])
    assert objective.weighting.steps == 2
