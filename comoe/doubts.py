"""Options that a recipe sets in vain or unwisely: said once when a run starts, never a reason to stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from comoe.models.balance import BALANCES, keep_bias
from comoe.models.gate import GATES, ROUTES
from comoe.schema import MoeConfig, Recipe
from comoe.weighting import WEIGHTINGS


def doubts(recipe: Recipe) -> list[str]:
    """One sentence for each option that has no effect or is known to harm.

    Args:
        recipe: that passed ``validate``; names that no table holds raise their own error elsewhere and are left out.
    """
    return [sentence for check in CHECKS for sentence in check(recipe)]


def _gate_for_measuring(recipe: Recipe) -> list[str]:
    moe = recipe.model.moe
    if not moe.num_experts or moe.gate not in GATES or not GATES[moe.gate].for_measuring:
        return []
    return [f"model.moe.gate is {moe.gate}, which ignores the tokens: it is for measuring speed, not for training."]


def _temperature(recipe: Recipe) -> list[str]:
    moe = recipe.model.moe
    if not moe.num_experts or moe.temperature == 1:
        return []
    return [
        f"model.moe.temperature is {moe.temperature}; a temperature other than 1 in the gate costs sample efficiency "
        "(arXiv:2602.01466)."
    ]


def _unread_by_the_gate(recipe: Recipe) -> list[str]:
    moe = recipe.model.moe
    if not moe.num_experts:
        return []
    reads_task = moe.route_by not in ROUTES or ROUTES[moe.route_by].task
    nudges = moe.balance not in BALANCES or BALANCES[moe.balance] is not keep_bias
    idle = {
        "task_embedding_width": (not reads_task, f"route_by {moe.route_by} reads no task"),
        "balance_rate": (not nudges, f"balance is {moe.balance}"),
        "cooperation_threshold": (moe.top_k == 1, "top_k is 1 and a token's best expert always counts"),
    }
    return [
        _in_vain(f"model.moe.{name}", getattr(moe, name), why)
        for name, (is_idle, why) in idle.items()
        if is_idle and _is_set(moe, name)
    ]


def _without_experts(recipe: Recipe) -> list[str]:
    loss, moe, few = recipe.loss, recipe.model.moe, []
    if not moe.num_experts:
        few = ["balance_weight", "z_weight", "task_separation_weight"]
    elif moe.num_experts == 1 or len(recipe.tasks) == 1:
        few = ["task_separation_weight"]
    why = f"with {moe.num_experts} experts per layer and {len(recipe.tasks)} task(s) it has nothing to work on"
    found = [_in_vain(f"loss.{name}", getattr(loss, name), why) for name in few if getattr(loss, name)]
    if not moe.num_experts and moe.shared_width:
        found.append(_in_vain("model.moe.shared_width", moe.shared_width, "num_experts is 0, so no layer has a block"))
    return found


def _task_weights(recipe: Recipe) -> list[str]:
    weighting = recipe.loss.weighting
    if weighting not in WEIGHTINGS or WEIGHTINGS[weighting].reads_task_weights:
        return []
    readers = " and ".join(name for name, kind in WEIGHTINGS.items() if kind.reads_task_weights)
    return [
        _in_vain(f"tasks.{name}.weight", task.weight, f"loss.weighting is {weighting}; {readers} would read it")
        for name, task in recipe.tasks.items()
        if task.weight != 1
    ]


def _momentum(recipe: Recipe) -> list[str]:
    train = recipe.train
    if train.optimizer == "sgd" or not train.momentum:
        return []
    return [_in_vain("train.momentum", train.momentum, f"train.optimizer is {train.optimizer}; train.betas rule there")]


def _contrastive(recipe: Recipe) -> list[str]:
    contrastive = recipe.loss.contrastive
    if contrastive.weight:
        idle = {"queue_warmup": (contrastive.queue_warmup and not contrastive.queue_size, "queue_size is 0")}
    else:
        why = "loss.contrastive.weight is 0"
        idle = {name: (getattr(contrastive, name), why) for name in ("queue_size", "learn_temperature")}
    return [
        _in_vain(f"loss.contrastive.{name}", getattr(contrastive, name), why)
        for name, (is_idle, why) in idle.items()
        if is_idle
    ]


def _is_set(config: MoeConfig, name: str) -> bool:
    default = {field.name: field.default for field in dataclasses.fields(config)}[name]
    return getattr(config, name) != default


def _in_vain(path: str, value: Any, why: str) -> str:
    return f"{path} is {value}, without effect: {why}."


CHECKS: tuple[Callable[[Recipe], list[str]], ...] = (
    _gate_for_measuring, _temperature, _unread_by_the_gate, _without_experts, _task_weights, _contrastive, _momentum
)  # fmt: skip
"""Each looks at a recipe and gives sentences."""
