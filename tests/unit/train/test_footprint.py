"""What a built model takes, against sums made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from comoe.config.load import recipe_from_dict
from comoe.models.model import MultiTaskModel
from comoe.train.memory_plan import (
    MemoryPlan,
    RunSize,
    Work,
    count_parameters,
    kept_whole,
    plan_memory,
    plan_run,
)
from comoe.train.parallel.ds_config import Layout
from tests.helpers_model import TASKS, WIDTH, moe_config, tiny_model
from tests.helpers_vision import seeing_model

EXPERTS = 3 * 4 * 3 * 16 * WIDTH
"""Layers, experts, matrices, expert width, model width."""


def plan(model: MultiTaskModel, *, stage: int = 2, bf16: bool = True, **zero: int) -> MemoryPlan:
    recipe = recipe_from_dict(
        {"tasks": {"mood": {"path": "x"}}, "train": {"activation_checkpointing": True}}
    )
    layout = Layout(2, 2, stage, 6, 1, bf16)
    return plan_run(
        recipe,
        layout,
        model,
        SimpleNamespace(lengths=np.array([4, 6])),
        {"zero_optimization": zero},
    )


def total(model: MultiTaskModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_counted_by_kind():
    model = tiny_model(train_layers="none")
    found = count_parameters(model, top_k=2)
    assert found["experts"] == EXPERTS
    assert found["total"] == found["dense"] + EXPERTS == total(model)
    assert found["active"] == total(model) - EXPERTS // 2
    frozen = sum(p.numel() for name, p in model.encoder.named_parameters() if ".block." not in name)
    assert found["frozen"] == frozen > 0
    assert count_parameters(tiny_model(), top_k=2)["frozen"] == 0


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_the_plan_of_a_run_knows_its_feed_forward_heads_recomputation_and_frozen_weights(family):
    model = tiny_model(moe_config(), family=family, train_layers="none")
    found = count_parameters(model, top_k=2)
    size = RunSize(
        found["dense"], EXPERTS, frozen=found["frozen"], world_size=2, ep_size=2, bf16=True, bucket_elements=90_000,
    )  # fmt: skip
    work = Work(
        tokens=30, layers=3, width=WIDTH, ffn_width=24,
        # One of the five tasks labels words: its head pools nothing.
        tasks=len(TASKS) - 1, moe_layers=3, top_k=2, expert_width=16, recompute=True,
    )  # fmt: skip
    expected = plan_memory(size, work)
    assert plan(model, reduce_bucket_size=90_000) == expected


def test_the_reduction_bucket_is_deepspeeds_own_where_the_json_says_nothing_and_holds_the_largest_weight():
    def bucket(**zero: int) -> int:
        parts = {
            part.name: part.device_bytes for part in plan(tiny_model(), bf16=False, **zero).parts
        }
        return parts["reduction bucket"]

    assert bucket() == 4 * 500_000_000
    assert bucket(reduce_bucket_size=1) == 4 * max(
        parameter.numel() for parameter in tiny_model().parameters()
    )


def test_stage_3_plans_for_the_weights_that_it_keeps_whole():
    model = tiny_model()
    whole = total(model) - EXPERTS // 2

    def gathered(**zero: int) -> int:
        parts = {
            part.name: part.device_bytes for part in plan(model, stage=3, bf16=False, **zero).parts
        }
        return parts["gathered weights"]

    assert gathered() == 4 * whole
    assert gathered(stage3_max_live_parameters=100, stage3_max_reuse_distance=600) == 4 * 300
    assert gathered(stage3_max_live_parameters=500, stage3_max_reuse_distance=600) == 4 * 500


def test_what_stays_whole_is_bounded_by_half_of_the_distance_to_the_next_use_or_by_what_may_live():
    assert kept_whole({}) == 1_000_000_000
    assert kept_whole({"stage3_max_live_parameters": 10}) == 500_000_000


def test_a_tower_counts_as_frozen_weights_or_with_what_it_keeps_for_its_backward_pass():
    def of(**vision):
        model = seeing_model("tokens", **vision)
        parts = {part.name: part.device_bytes for part in plan(model, bf16=False).parts}
        return model, count_parameters(model, top_k=2), parts["activations (rough)"]

    (model, frozen, little), (_, trained, much) = of(), of(train_tower=True)
    size = sum(parameter.numel() for parameter in model.tower.parameters())
    assert frozen["total"] == trained["total"] == total(model)
    assert frozen["frozen"] == size > trained["frozen"] == 0
    # Six pictures of five tokens through two layers of width 12, feed-forward 16.
    assert much - little == 2 * 6 * 5 * ((8 * 12 + 2 * 16) * 4 + 2 * 12)
    # The text encoder reads five image tokens beside five of text.
    assert little == 2 * of_text()


def of_text() -> int:
    """Activations without the image tokens that the text encoder reads."""
    parts = {part.name: part.device_bytes for part in plan(tiny_model(), bf16=False).parts}
    return parts["activations (rough)"]
