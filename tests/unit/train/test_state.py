"""The rate of each step against hand values, and patience."""

import math

import pytest
import torch

from comoe.config.recipe import TrainConfig
from comoe.tasks.task import Task
from comoe.train.state import (
    TrainState,
    diverged,
    diverged_losses,
    outer_rate,
    rate_factor,
    total_steps,
)


def factors(total: int, **options: float | str) -> list[float]:
    config = TrainConfig(**options)
    return [rate_factor(step, total=total, config=config) for step in range(total)]


def test_a_linear_schedule_rises_to_the_peak_and_falls_towards_zero():
    expected = [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert factors(10, schedule="linear", warmup_fraction=0.2) == pytest.approx(expected)


def test_a_cosine_schedule_is_half_way_down_in_the_middle():
    expected = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert factors(4, schedule="cosine", warmup_fraction=0.0) == pytest.approx(expected)
    assert expected[2] == pytest.approx(0.5)


def test_a_constant_schedule_without_warm_up_is_one_everywhere():
    assert factors(5, schedule="constant", warmup_fraction=0.0) == [1.0] * 5


def test_no_step_has_a_rate_of_zero():
    for schedule in ("linear", "cosine", "constant"):
        for total in (1, 2, 3, 50):
            assert min(factors(total, schedule=schedule, warmup_fraction=0.06)) > 0, (
                schedule,
                total,
            )


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    assert factors(3, schedule="linear", warmup_fraction=0.99) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_the_contrastive_stage_and_the_tasks_have_each_a_schedule_of_their_own():
    config = TrainConfig(schedule="linear", warmup_fraction=0.2)
    found = [rate_factor(step, total=15, config=config, first=5) for step in range(15)]
    assert found == factors(5, schedule="linear", warmup_fraction=0.2) + factors(
        10, schedule="linear", warmup_fraction=0.2
    )


def test_reptiles_rate_falls_linearly_over_the_inner_loops_and_none_is_cut_short():
    config = TrainConfig(reptile_steps=3, reptile_rate=0.8, epochs=1.0)
    assert total_steps(config, steps_per_epoch=10) == 12
    rates = [outer_rate(steps, total=12, config=config) for steps in range(1, 13)]
    assert rates == pytest.approx([0, 0, 0.8, 0, 0, 0.6, 0, 0, 0.4, 0, 0, 0.2])
    each = [outer_rate(steps, total=4, config=TrainConfig(reptile_steps=1)) for steps in (1, 2, 4)]
    assert each == pytest.approx([1.0, 0.75, 0.25])
    assert outer_rate(3, total=12, config=TrainConfig()) == 0
    assert total_steps(TrainConfig(epochs=1.0), steps_per_epoch=10) == 10


def test_the_best_evaluation_is_remembered_with_its_step():
    state = TrainState(step=10)
    assert state.record(-0.5, patience=0)
    state.step = 20
    assert not state.record(-0.5, patience=0), "an equal value is no gain"
    state.step = 30
    assert state.record(0.1, patience=0)
    assert (state.best_value, state.best_step, state.evaluations_without_gain) == (0.1, 30, 0)


def test_a_value_that_is_no_number_is_never_the_best():
    state = TrainState()
    assert not state.record(float("nan"), patience=0)
    assert state.best_value is None
    assert state.record(-3.0, patience=0)


def test_patience_ends_the_run_after_that_many_evaluations_in_a_row_without_a_gain():
    state = TrainState()
    for value in (0.5, 0.4, 0.6, 0.6):
        state.record(value, patience=2)
        assert state.finished == ""
    state.record(0.5, patience=2)
    assert state.finished == "no better value in 2 evaluations"


def test_patience_of_zero_never_ends_the_run():
    state = TrainState()
    for _ in range(20):
        state.record(0.0, patience=0)
    assert state.finished == "" and state.evaluations_without_gain == 19


def test_patience_survives_a_restart():
    state = TrainState(step=7, posts_seen=70)
    state.record(0.5, patience=2)
    state.record(0.4, patience=2)
    restored = TrainState(**state.to_dict())
    assert restored == state
    restored.record(0.4, patience=2)
    assert restored.finished


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.1e6, -3e38])
def test_a_weight_that_has_diverged_is_named(value):
    weights = {
        "encoder.a": torch.tensor([1e6, -1e6]),
        "none": torch.zeros(0),
        "head": torch.ones(2),
    }
    assert diverged(weights) == ""
    weights["head"][1] = value
    assert diverged(weights).startswith("1 of 2 weights, such as head (")


@pytest.mark.parametrize(
    ("mood", "heat", "told"),
    [(999.0, 1e30, ""), (1001.0, 1.0, "mood 1e+03"), (float("inf"), float("inf"), "mood inf"),
     (float("nan"), float("nan"), "mood nan, heat nan")],
)  # fmt: skip
def test_a_loss_that_has_diverged_is_named(mood, heat, told):
    tasks = (
        Task("mood", "single_label", ("bad", "good"), "macro_f1"),
        Task("heat", "regression", (), "mae"),
        Task("without posts", "single_label", ("a", "b"), "macro_f1"),
    )
    assert diverged_losses({"mood": {"loss": mood}, "heat": {"loss": heat}}, tasks) == told
