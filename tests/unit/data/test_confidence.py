"""The confidence of a label: what it multiplies, for every kind of task, and where it does not count."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from comoe.config.recipe import ContrastiveConfig, LossConfig, TaskConfig
from comoe.losses.objective import Objective
from comoe.models.encoders.input_scaling import input_weights, scale_inputs
from comoe.models.moe.block import ContextHolder, RoutingContext
from comoe.tasks.task import Task, build_task
from comoe.types import IGNORED
from tests.helpers_model import (
    CAUSAL,
    HF_CONFIGS,
    SEQ2SEQ,
    TASKS,
    cut,
    moe_config,
    random_batch,
    scaled,
    tiny_model,
)

OFF = LossConfig(contrastive=ContrastiveConfig(weight=0.0))
SURE = torch.tensor([1.0, 0.5, 0.0, 0.25, 1.0, 0.75])


def weighed(strategy, tasks=TASKS):
    return tuple(replace(task, confidence_strategy=strategy) for task in tasks)


def objective_of(tasks, **options):
    moe = moe_config()
    return Objective(tiny_model(moe, tasks=tasks, **options), tasks, OFF, moe)


def sure(batch, values=SURE, tasks=TASKS):
    return replace(batch, confidences={task.name: values for task in tasks})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", [None, (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("kind", ["single_label", "multi_label", "tags", "regression"])
def test_every_kind_weighs_its_rows_and_weights_of_1_change_no_bit(kind, class_weights, smoothing):
    labels = () if kind == "regression" else ("a", "b", "c")
    more = (
        {}
        if kind == "regression"
        else {"class_weights": class_weights, "label_smoothing": smoothing}
    )
    task = Task("t", kind, labels, "none", **more)
    torch.manual_seed(0)
    shape = {"tags": (40, 7, 3), "regression": (40, 1)}.get(kind, (40, 3))
    logits = (3 * torch.randn(shape)).requires_grad_()
    if kind == "regression":
        targets = torch.randn(40)
        targets[3] = math.nan
    elif kind == "multi_label":
        targets = torch.randint(0, 2, (40, 3)).float()
        targets[3] = math.nan
    else:
        targets = torch.randint(0, 3, shape[:-1])
        targets[3] = IGNORED
    rules = task.rules
    plain, ones = (
        rules.loss(logits, targets, task),
        rules.loss(logits, targets, task, torch.ones(40)),
    )
    gradients = [torch.autograd.grad(value, logits)[0] for value in (plain, ones)]
    assert torch.equal(plain, ones) and torch.equal(*gradients)

    weights = torch.rand(40)
    alone = torch.stack([rules.loss(logits[[row]], targets[[row]], task) for row in range(40)])
    torch.testing.assert_close(rules.loss(logits, targets, task, weights), (alone * weights).sum())
    nothing = rules.loss(logits, targets, task, torch.zeros(40))
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


@pytest.mark.parametrize("strategy", ["input", "output", "input_output"])
def test_full_confidence_equals_no_strategy_to_the_bit(strategy):
    batch = scaled(random_batch())
    plain = objective_of(TASKS)(batch)
    step = objective_of(weighed(strategy))(sure(batch, torch.ones(6)))
    assert torch.equal(step.loss, plain.loss)
    assert all(torch.equal(step.terms[name], plain.terms[name]) for name in plain.terms)


def test_the_output_strategy_multiplies_each_post_and_divides_by_all_of_them():
    batch = sure(scaled(random_batch()))
    step = objective_of(weighed("output"))(batch)
    losses = F.cross_entropy(step.output.logits["mood"], batch.labels["mood"], reduction="none")
    torch.testing.assert_close(step.terms["task/mood"], (losses * SURE).sum().detach() / 6)
    plain = objective_of(weighed("input"))(replace(batch, confidences={"mood": SURE}))
    assert plain.terms["task/mood"] != step.terms["task/mood"]


@pytest.mark.parametrize("strategy", ["input", "output", "input_output"])
def test_confidence_counts_alike_however_the_batch_is_cut(strategy):
    objective, batch = objective_of(weighed(strategy)), sure(random_batch())
    parts = [objective(part).loss for part in cut(batch, [[0, 1, 2], [3], [4, 5]])]
    torch.testing.assert_close(sum(parts) / 3, objective(scaled(batch)).loss)


def last_of_the_embeddings(model, family):
    """The module whose weights, all times a number, make all that the encoder's layers read times that number."""
    encoder = model.encoder
    if family in ("bart", "mbart"):
        return encoder.layernorm_embedding
    if family == "gpt2":
        nn.init.zeros_(encoder.wpe.weight)
        return encoder.wte
    if family in (*SEQ2SEQ, *CAUSAL):
        return encoder.embed_tokens
    return encoder.embeddings.norm if family == "modernbert" else encoder.embeddings.LayerNorm


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", HF_CONFIGS)
def test_the_input_strategy_scales_what_the_embeddings_norm_answers(family, recompute):
    batch = random_batch()
    model = tiny_model(tasks=weighed("input"), family=family, recompute=recompute)
    expected = tiny_model(family=family)
    norm = last_of_the_embeddings(expected, family)
    nn.init.uniform_(norm.weight.data, 0.5, 2.0)
    with torch.no_grad():
        last_of_the_embeddings(model, family).weight.copy_(norm.weight)
        for parameter in norm.parameters():
            parameter.mul_(0.3)
    found = model(sure(batch, torch.full((6,), 0.3))).logits
    for name, logits in expected(batch).logits.items():
        torch.testing.assert_close(found[name], logits, atol=1e-5, rtol=1e-4)
    # The confidence is for training: an answer does not know it.
    model.eval(), expected.eval()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.div_(0.3)
    for name, logits in expected(batch).logits.items():
        torch.testing.assert_close(model(sure(batch)).logits[name], logits, atol=1e-5, rtol=1e-4)


def test_each_row_has_its_own_input_weight():
    batch, model = random_batch(), tiny_model(tasks=weighed("input"))
    together = model(sure(batch)).logits["mood"]
    for row in range(6):
        rows = torch.tensor([row])
        torch.testing.assert_close(
            model(sure(batch).take(rows)).logits["mood"], together[rows], atol=1e-5, rtol=1e-4
        )


def test_a_post_of_confidence_0_does_not_blow_up_the_gradients_of_an_encoder_without_biases():
    """As a new BERT is: the norms of all its layers would divide by nothing."""
    norms = []
    for least in (0.0, 1.0):
        objective = objective_of(weighed("input"))
        objective(sure(scaled(random_batch()), SURE.clamp_min(least))).loss.backward()
        gradients = [p.grad for p in objective.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
    assert norms[0] < 10 * norms[1]


def test_an_encoder_that_answers_a_tuple_is_scaled_too():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings, self.config = nn.Identity(), SimpleNamespace(model_type="vilt")

    holder, encoder = ContextHolder(), Encoder()
    scale_inputs(encoder, holder)
    states, mask = torch.ones(2, 3, 4), torch.ones(2, 3)
    nothing = torch.zeros(0, dtype=torch.long)
    holder.context = RoutingContext(nothing, nothing, input_weights_B=torch.tensor([0.5, 2.0]))
    found, same = encoder.embeddings((states, mask))
    assert found[:, 0, 0].tolist() == [0.5, 2.0] and same is mask
    holder.context = RoutingContext(nothing, nothing)
    assert encoder.embeddings(states) is states


def test_a_post_of_several_tasks_enters_with_the_largest_of_their_weights():
    a, b = (
        Task(name, "single_label", ("x", "y"), "macro_f1", confidence_strategy="input")
        for name in "ab"
    )
    whole = Task("c", "single_label", ("x", "y"), "macro_f1", confidence_strategy="output")
    labels = {
        "a": torch.tensor([0, 0, IGNORED, 0, IGNORED]),
        "b": torch.tensor([0, IGNORED, 0, 0, IGNORED]),
        "c": torch.tensor([IGNORED, IGNORED, IGNORED, 0, IGNORED]),
    }
    sure_of = {
        "a": torch.tensor([0.2, 0.3, 0.9, 0.1, 0.1]),
        "b": torch.tensor([0.6, 0.9, 0.0, 0.1, 0.1]),
    }
    batch = replace(
        random_batch(rows=5), labels=labels, confidences=sure_of | {"c": torch.full((5,), 0.5)}
    )
    torch.testing.assert_close(
        input_weights(batch, (a, b, whole)), torch.tensor([0.6, 0.3, 0.01, 1.0, 1.0])
    )
    assert input_weights(replace(batch, confidences={}), (a, b, whole)) is None
    assert input_weights(batch, (whole,)) is None


def test_a_strategy_needs_labels():
    def build(labels=("x", "y"), **options):
        config, counts = TaskConfig(path="p", confidence="sure", **options), {"x": 1, "y": 1}
        return build_task("t", config, labels=labels, label_counts=counts)

    assert build().confidence_strategy == "none"
    assert build(confidence_strategy="input_output").weighs("input")
    with pytest.raises(ValueError, match="no meaning for a task without labels"):
        build((), kind="unlabelled", confidence_strategy="input")
