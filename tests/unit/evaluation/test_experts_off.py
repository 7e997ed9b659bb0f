"""Experts off is a model without blocks, in turn is the uniform gate, and a change has its standard error."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comoe.evaluation.experts_off import (
    CONDITIONS,
    GROUPS,
    IN_TURN,
    OFF,
    change,
    experts_in_turn,
    experts_lines,
    experts_off,
    verdicts,
)
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.kinds.generation import GeneratedText
from comoe.tasks.task import Task
from tests.helpers_model import MOOD, TASKS, moe_config, random_batch, tiny_model


def logits_of(model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(random_batch()).logits


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_off_is_the_encoder_alone(route_by):
    model = tiny_model(moe_config(route_by=route_by, shared_width=8)).double().eval()
    bare = tiny_model(moe_config(num_experts=0)).double().eval()
    bare.load_state_dict(
        {name.replace(".output.inner.", ".output."): value for name, value in model.state_dict().items()
         if name.replace(".output.inner.", ".output.") in bare.state_dict()}
    )  # fmt: skip
    whole = logits_of(model)
    with experts_off(model):
        off = logits_of(model)
    torch.testing.assert_close(off, logits_of(bare), rtol=0, atol=1e-12)
    assert (off["mood"] - whole["mood"]).abs().max() > 1e-4
    torch.testing.assert_close(logits_of(model), whole, rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [2, 4])
def test_in_turn_is_the_uniform_gate(top_k):
    model = tiny_model(moe_config(top_k=top_k)).double().eval()
    uniform = tiny_model(moe_config(top_k=top_k, gate="uniform")).double().eval()
    uniform.load_state_dict(model.state_dict())
    whole = logits_of(model)
    with experts_in_turn(model):
        turned = logits_of(model)
    torch.testing.assert_close(turned, logits_of(uniform), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_of(model), whole, rtol=0, atol=0)


def test_in_turn_keeps_the_weight_of_a_single_expert():
    model = tiny_model(moe_config(top_k=1)).eval()
    with torch.no_grad(), experts_in_turn(model):
        turned = model(random_batch()).routings[0]
    trained = model(random_batch()).routings[0]
    torch.testing.assert_close(turned.weights_Sk, trained.weights_Sk.detach())
    assert turned.indices_Sk[:5, 0].tolist() == [0, 1, 2, 3, 0]


def posts(logits_NY: np.ndarray, targets_N: np.ndarray) -> list[PostOutput]:
    return [
        PostOutput(3 * row, *pair)
        for row, pair in enumerate(zip(logits_NY, targets_N, strict=True))
    ]


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_a_change_has_the_paired_standard_error(noise):
    rng = np.random.default_rng(0)
    count = GROUPS - 4
    before, targets = rng.normal(size=(count, 3)), rng.integers(0, 3, count)
    after = before + noise * rng.normal(size=before.shape)
    task = replace(MOOD, metric="accuracy")
    found = change({"mood": posts(before, targets)}, {"mood": posts(after, targets)}, [task])
    old, new = (
        F.cross_entropy(torch.tensor(logits), torch.tensor(targets), reduction="none").numpy()
        for logits in (before, after)
    )
    of_task, mean = found["tasks"]["mood"], found["mean"]
    assert of_task["loss"] == pytest.approx((new - old).mean(), abs=1e-6)
    error = (new - old).std(ddof=1) / math.sqrt(count)
    assert of_task["loss_error"] == pytest.approx(error, abs=1e-6)
    right = [(logits.argmax(axis=1) == targets).astype(float) for logits in (after, before)]
    gained = right[0] - right[1]
    assert mean["metric"] == of_task["accuracy"] == pytest.approx(gained.mean())
    assert mean["metric_error"] == pytest.approx(gained.std(ddof=1) / math.sqrt(count))
    assert mean["loss"] == pytest.approx(new.mean() / old.mean() - 1, abs=1e-6)
    # The delta method, which the jackknife tends to.
    share = (new - new.mean() / old.mean() * old).std(ddof=1) / old.mean()
    assert mean["loss_error"] == pytest.approx(share / math.sqrt(count), rel=0.1)
    assert found["posts"] == count and found["adds_nothing"] == (noise < 2)


@pytest.mark.parametrize(("factor", "nothing"), [(1.0, True), (0.95, True), (0.6, False)])
def test_experts_add_something_if_the_loss_rises_without_them(factor, nothing):
    """A calibrated model, and one with smaller logits: no prediction changes."""
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(4000, 3))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = (rng.random((4000, 1)) > shares.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    before, after = posts(logits, targets), posts(factor * logits, targets)
    found = change({"mood": before}, {"mood": after}, [MOOD])
    assert found["adds_nothing"] == nothing
    results = {OFF: found, IN_TURN: found}
    warned = [line for line in experts_lines(results, [MOOD]) if line.startswith("warning: ")]
    assert len(warned) == nothing
    # A single expert has no turns to take.
    assert experts_lines({OFF: found}, [MOOD])[1].split() == ["task", "metric", "off", "loss"]


@pytest.mark.parametrize(
    ("loss", "metric", "sure"),
    [(0.06, 0.0, True), (0.0, -0.02, True), (0.005, -0.005, False), (-0.2, 0.1, False)],
)
def test_a_large_change_on_few_posts_is_not_called_none(loss, metric, sure):
    mean = {"loss": loss, "loss_error": 0.05, "metric": metric, "metric_error": 0.05}
    (line,) = verdicts({OFF: {"adds_nothing": True, "mean": mean}})
    assert line.startswith("warning: the experts add nothing") and ("that is sure" in line) == sure


def test_every_kind_is_measured_also_where_groups_stay_empty():
    batch, model = random_batch(rows=7), tiny_model(moe_config()).eval()
    told, rows = Task("told", "text", (), "token_f1", prompt="{text}"), list(range(7))
    texts = [PostOutput(row, GeneratedText(-1.0 - row, -2.0, "good"), (2, "good")) for row in rows]
    masked = Task("masked", "masked_words", (), "masked_accuracy", auxiliary=True)
    hidden = [PostOutput(row, np.array([-2.0, 1.0], dtype=np.float32), 2) for row in rows[:2]]

    def outputs(condition):
        with condition(model):
            output = model(batch)
        kept = {task.name: task.rules.outputs(output, batch, rows, task=task) for task in TASKS}
        return kept | {"told": texts, "masked": hidden}

    before = outputs(nullcontext)
    for condition in CONDITIONS.values():
        found = change(before, outputs(condition), [*TASKS, told, masked])["tasks"]
        assert list(found) == [*(task.name for task in TASKS), "told", "masked"]
        assert all(math.isfinite(value) for one in found.values() for value in one.values())
        assert found["told"]["loss"] == 0 != found["mood"]["loss"]
