"""What experts and gate are worth: the model with all experts off, and with experts in turn, against itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comoe.evaluation.evaluate import higher_is_better, take_rows
from comoe.evaluation.tables import in_columns, marked
from comoe.models.model import MultiTaskModel
from comoe.models.moe.gate import TopKGate
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.task import Task
from comoe.types import Routing

OFF, IN_TURN = "experts_off", "experts_in_turn"
"""Keys in ``results.json``."""

GROUPS = 50
"""Groups of posts that the standard errors are computed over."""

LEAST = 0.01
"""Experts add something if without them the loss is higher by this share of itself, or the mean
metric lower by this much, and by two standard errors."""


@dataclass(frozen=True, slots=True)
class InTurn:
    """A trained gate that sends tokens to experts in turn, each token's weight split evenly."""

    gate: TopKGate

    def __call__(
        self,
        logits_SE: Tensor,
        balance_bias_E: Tensor,
        selected_Sk: Tensor | None = None,
        own_SE: Tensor | None = None,
    ) -> Routing:
        """Token s goes to the k experts from number s * k on, modulo E, whosever they are.

        A token's weights sum to what they sum to as trained: only the choice is taken away.
        """
        routing = self.gate(logits_SE, balance_bias_E, selected_Sk, own_SE)
        (S, E), k = logits_SE.shape, routing.indices_Sk.shape[1]
        places_Sk = torch.arange(S * k, device=logits_SE.device).view(S, k)
        indices_Sk = places_Sk % E
        weights_Sk = routing.weights_Sk.mean(dim=1, keepdim=True).repeat(1, k)
        counts_E = torch.bincount(indices_Sk.reshape(-1), minlength=E)
        return replace(routing, indices_Sk=indices_Sk, weights_Sk=weights_Sk, counts_E=counts_E)


@contextmanager
def experts_off(model: MultiTaskModel) -> Iterator[None]:
    """Within the context every block adds 0, its shared expert too; ranks still exchange tokens."""
    model.holder.off = True
    try:
        yield
    finally:
        model.holder.off = False


@contextmanager
def experts_in_turn(model: MultiTaskModel) -> Iterator[None]:
    """Within the context experts take turns, whatever the token and the task."""
    routes = [block.pending for block in model.moe_layers()]
    before = [route.gate for route in routes]
    try:
        for route in routes:
            route.gate = InTurn(route.gate)
        yield
    finally:
        for route, gate in zip(routes, before, strict=True):
            route.gate = gate


CONDITIONS: dict[str, Callable[[MultiTaskModel], AbstractContextManager[None]]] = {
    OFF: experts_off,
    IN_TURN: experts_in_turn,
}
"""Key in ``results.json`` -> what is done to the model."""


def change(
    before: Mapping[str, Sequence[PostOutput]],
    after: Mapping[str, Sequence[PostOutput]],
    tasks: Sequence[Task],
) -> dict[str, Any]:
    """How metrics and losses on the same posts differ: after minus before.

    Args:
        before: ``Evaluation.outputs`` of the model as trained.
        after: of the changed model, for the same posts; some post has a label of a task that is
            not auxiliary.
        tasks: the tasks.

    Returns:
        ``posts``; ``tasks``: task -> its main metric and ``loss`` as differences, and their
        standard errors ``metric_error`` and ``loss_error``; ``mean``: ``metric`` (difference of the
        mean metric, below 0 where it became worse), ``loss`` (relative rise of the mean loss over
        tasks: 0.1 is 10 %), and their errors; ``adds_nothing``: neither is worse by ``LEAST`` and
        by two standard errors. Standard errors are those of the paired difference: the jackknife
        over ``GROUPS`` groups of posts.
    """
    rows = sorted({output.row for outputs in before.values() for output in outputs})
    group_of = {row: place % GROUPS for place, row in enumerate(rows)}
    groups = min(GROUPS, len(rows))
    by_task, metrics, losses = {}, [], []
    for task in tasks:
        if not task.rules.scored:
            continue
        old, new = (
            _measures(outputs[task.name], task, group_of, groups) for outputs in (before, after)
        )
        if old is None or new is None:
            continue
        metric_J, loss_J = new - old
        by_task[task.name] = {
            task.metric: float(metric_J[0]),
            "loss": float(loss_J[0]),
            "metric_error": _error(metric_J),
            "loss_error": _error(loss_J),
        }
        if not task.auxiliary:
            metrics.append(higher_is_better(task.metric, metric_J))
            losses.append((old[1], new[1]))
    metric_J, (old_J, new_J) = np.mean(metrics, axis=0), np.mean(losses, axis=0)
    # A loss can be 0 to float32's last digit.
    loss_J = (new_J - old_J) / np.maximum(old_J, 1e-9)
    mean = {"metric": float(metric_J[0]), "loss": float(loss_J[0])}
    mean |= {"metric_error": _error(metric_J), "loss_error": _error(loss_J)}
    worse = {"metric": -mean["metric"], "loss": mean["loss"]}
    adds = any(by >= max(LEAST, 2 * mean[f"{name}_error"]) for name, by in worse.items())
    return {"posts": len(rows), "mean": mean, "adds_nothing": not adds, "tasks": by_task}


def _measures(
    outputs: Sequence[PostOutput], task: Task, group_of: Mapping[int, int], groups: int
) -> np.ndarray | None:
    """Main metric and mean loss of all posts, then without each group: (2, 1 + groups), float64."""
    _, targets = task.rules.stack(outputs, task)
    labelled = [outputs[place] for place in np.flatnonzero(task.rules.labelled(targets))]
    if not labelled:
        return None
    gold, scores = task.rules.gold_and_scores(labelled, task)
    predicted = task.rules.decided(scores, task)
    group_N = np.array([group_of[output.row] for output in labelled])
    parts: list[list[PostOutput]] = [[] for _ in range(groups)]
    for output in labelled:
        parts[group_of[output.row]].append(output)
    stacked = [task.rules.stack(part, task) for part in parts]
    losses_G = np.array([float(task.rules.loss(*pair, task)) for pair in stacked])
    units_G = np.array([float(task.rules.normalizer(targets, task)) for _, targets in stacked])
    metrics, losses = [], []
    for left_out in range(-1, groups):
        kept = np.flatnonzero(group_N != left_out)
        kept_G = np.arange(groups) != left_out
        metrics.append(task.rules.measure(take_rows(gold, kept), take_rows(predicted, kept), task))
        losses.append(losses_G[kept_G].sum() / max(units_G[kept_G].sum(), 1e-9))
    return np.array([metrics, losses])


def _error(values_J: np.ndarray) -> float:
    """Jackknife standard error: the value of all posts first, then those without one group each."""
    groups = len(values_J) - 1
    if groups < 2:
        return math.inf
    return math.sqrt((groups - 1) * float(values_J[1:].var()))


def experts_table(results: Mapping[str, Any], tasks: Sequence[Task]) -> list[tuple[str, ...]]:
    """Head and rows: per task, and in the mean, what changes with experts off and in turn."""
    found = [results[key] for key in CONDITIONS if key in results]
    rows = [("task", "metric", *("off", "loss", "in turn", "loss")[: 2 * len(found)])]
    for task in tasks:
        if task.name in found[0]["tasks"]:
            values = [one["tasks"][task.name] for one in found]
            cells = [f"{value[name]:+.4f}" for value in values for name in (task.metric, "loss")]
            rows.append((marked(task), task.metric, *cells))
    means = [one["mean"] for one in found]
    cells = [part for mean in means for part in (f"{mean['metric']:+.4f}", _percent(mean["loss"]))]
    return [*rows, ("mean", "", *cells)]


def experts_lines(results: Mapping[str, Any], tasks: Sequence[Task]) -> list[str]:
    """The table as lines of text, and what follows from it; none where nothing was measured."""
    if OFF not in results:
        return []
    rows = experts_table(results, tasks)
    turn = "; in turn instead of routed" if IN_TURN in results else ""
    title = f"experts (change on {results[OFF]['posts']} validation posts: all off{turn})"
    return [title, *in_columns(rows[0], rows[1:], left=2), *verdicts(results)]


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """One sentence on the experts and, where they add something, one on the gate."""
    lines = []
    for key, what, done in (
        (OFF, "the experts", "switching them off"),
        (IN_TURN, "the gate", "sending tokens to experts in turn"),
    ):
        if key not in results:
            continue
        found = results[key]
        mean = found["mean"]
        changes = (
            f"{done} changes the mean loss by {_percent(mean['loss'])} (standard error "
            f"{_percent(mean['loss_error']).lstrip('+')}), the mean metric by {mean['metric']:+.4f}."
        )
        # A change that is large enough, but not for so few posts, is not the same as none.
        sure = " that is sure" * (max(mean["loss"], -mean["metric"]) >= LEAST)
        nothing = f"warning: {what} add{'s' * (key == IN_TURN)} nothing{sure}: "
        lines.append(
            nothing + changes if found["adds_nothing"] else changes[0].upper() + changes[1:]
        )
        if found["adds_nothing"]:
            break
    return lines


def _percent(share: float | None) -> str:
    """A relative change; a question mark for the standard error of a single post."""
    return "?" if share is None or math.isinf(share) else f"{100 * share:+.1f} %"
