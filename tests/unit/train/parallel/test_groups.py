"""Optimizer groups of the router, and the balance bias under the schedule of the rates."""

from types import SimpleNamespace

import pytest
import torch

from comoe.config.recipe import Recipe
from comoe.train.parallel.engine import Engine
from comoe.train.parallel.setup import parameter_groups
from tests.helpers_model import moe_config, tiny_objective


@pytest.mark.parametrize(
    ("router_rate", "expert_rate", "expected"),
    [("auto", 5e-4, 5e-3), ("auto", 4e-3, 0.01), ("auto", 0.1, 0.1), (0.25, 5e-4, 0.25), (0.0, 5e-4, 0.0),
     (None, 5e-4, None)],
)  # fmt: skip
def test_the_router_has_a_rate_of_its_own_or_is_a_part_of_the_experts(
    router_rate, expert_rate, expected
):
    recipe = Recipe()
    recipe.train.router_learning_rate = router_rate
    recipe.train.expert_learning_rate = expert_rate
    objective = tiny_objective(moe_config(route_by="both", shared_width=8))
    groups = {group["name"]: group for group in parameter_groups(objective, recipe)}
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    where = {names[id(p)]: name for name, group in groups.items() for p in group["params"]}
    assert len(where) == len(names)
    router = [
        where[name]
        for name in where
        if any(part in name for part in ("mixture.gate.", "task_projection", "task_embedding"))
    ]
    assert len(router) == 2 * 3 + 1
    assert set(router) == {"experts/decay" if expected is None else "router/decay"}
    if expected is not None:
        assert groups["router/decay"]["lr"] == pytest.approx(expected)
        assert sum(group["role"] == "router" for group in groups.values()) == 1
    assert groups["experts/decay"]["lr"] == expert_rate


@pytest.mark.parametrize(("schedule", "expected"), [("follow_rate", 0.25), ("constant", 1.0)])
def test_the_balance_bias_follows_the_rates(schedule, expected):
    recipe = Recipe()
    recipe.model.moe.balance_rate, recipe.model.moe.balance_schedule = 0.5, schedule
    model = tiny_objective().model
    group = dict(lr=1.0, weight_decay=0.0, name="a", fused=None, foreach=None, role="encoder")
    optimizer = SimpleNamespace(param_groups=[group])
    layers = model.moe_layers()
    routers = [SimpleNamespace(e_score_correction_bias=torch.zeros(4)) for _ in layers]
    for layer, router in zip(layers, routers, strict=True):
        layer.mixture.router = router
    module = SimpleNamespace(model=model)
    engine = Engine(
        SimpleNamespace(device=torch.device("cpu"), optimizer=optimizer, module=module), recipe
    )
    engine.set_rate_factor(0.25)
    routing = SimpleNamespace(counts_E=torch.tensor([8, 4, 4, 0]))
    engine._update_balance([SimpleNamespace(routings=[routing] * len(layers))])
    for router in routers:
        step = 0.5 * expected
        assert router.e_score_correction_bias.tolist() == [-step, 0.0, 0.0, step]
