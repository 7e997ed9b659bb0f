"""Task weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comoe.weighting import WEIGHTINGS, build_weighting
from tests.helpers_model import HEAT, MOOD

TASKS = (replace(MOOD, weight=0.5), replace(HEAT, weight=3.0))


@pytest.mark.parametrize(("name", "weights"), [("equal", [1.0, 1.0]), ("static", [0.5, 3.0])])
def test_the_total_is_the_weighted_sum_and_the_gradient_the_weights(name, weights):
    losses = torch.tensor([2.0, 10.0], requires_grad=True)
    total, logged = build_weighting(name, TASKS).combine(losses)
    assert total.item() == 2.0 * weights[0] + 10.0 * weights[1] and logged.tolist() == weights
    total.backward()
    assert losses.grad.tolist() == weights


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_do_not_lose_precision_with_the_model(name):
    tasks = (replace(MOOD, weight=0.3), HEAT)
    weighting = build_weighting(name, tasks).bfloat16()
    _, weights = weighting.combine(torch.ones(2))
    assert weights.dtype == torch.float32 and weights[0].item() == pytest.approx(0.3 if name == "static" else 1.0)


def test_an_unknown_weighting_names_the_nearest():
    with pytest.raises(ValueError, match="loss.weighting is 'statik'.*did you mean static"):
        build_weighting("statik", TASKS)
