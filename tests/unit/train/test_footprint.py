"""What a built model takes, against sums made by hand."""

from dataclasses import replace
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


def plan(
    model: MultiTaskModel,
    *,
    stage: int = 2,
    bf16: bool = True,
    loss: dict | None = None,
    **zero: int,
) -> MemoryPlan:
    train = {"activation_checkpointing": True}
    recipe = recipe_from_dict(
        {"tasks": {"mood": {"path": "x"}}, "train": train, "loss": loss or {}}
    )
    posts = SimpleNamespace(lengths=np.array([4, 6]), texts_read=lambda most: 1)
    settings = {"zero_optimization": zero}
    return plan_run(recipe, Layout(2, 2, stage, 6, 1, bf16), model, posts, settings)


def part(name: str, model: MultiTaskModel, **options: int) -> int:
    """Bytes of one part of a plan in float32."""
    parts = plan(model, bf16=False, **options).parts
    return {one.name: one.device_bytes for one in parts}[name]


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
    for passes, loss in (
        (2, {"r_drop_weight": 1.0}),
        (2, {"contrastive": {"views": 2}}),
        (3, {"contrastive": {"views": 2}, "r_drop_weight": 1.0}),
        (1, {"contrastive": {"views": 2, "weight": 0.0}}),
    ):
        expected = plan_memory(size, replace(work, tokens=30 * passes))
        assert plan(model, reduce_bucket_size=90_000, loss=loss) == expected


def test_the_reduction_bucket_is_deepspeeds_own_where_the_json_says_nothing_and_holds_the_largest_weight():
    model = tiny_model()
    assert part("reduction bucket", model) == 4 * 500_000_000
    largest = max(parameter.numel() for parameter in model.parameters())
    assert part("reduction bucket", model, reduce_bucket_size=1) == 4 * largest


def test_stage_3_plans_for_the_weights_that_it_keeps_whole():
    model = tiny_model()
    live, reuse = "stage3_max_live_parameters", "stage3_max_reuse_distance"
    assert part("gathered weights", model, stage=3) == 4 * (total(model) - EXPERTS // 2)
    # Half of the distance to the next use, or what may live.
    for most, kept in ((100, 300), (500, 500)):
        assert part("gathered weights", model, stage=3, **{live: most, reuse: 600}) == 4 * kept
    assert kept_whole({}) == 1_000_000_000 and kept_whole({live: 10}) == 500_000_000


def test_mixtures_of_layers_and_the_distances_of_tied_weights_are_in_the_plan():
    # Each head's mixture of its 30 tokens.
    found = [
        part("activations (rough)", tiny_model(pooling=word)) for word in ("attention", "layers")
    ]
    assert found[1] - found[0] == len(TASKS) * 30 * WIDTH * 4
    # Texts are read once by two layers, and what they read is kept once more for each row.
    work = Work(tokens=10, layers=3, shared_layers=2, shared_tokens=4, width=8)
    outer = replace(work, mixing_heads=2, tied=100).outer_bytes(4)
    assert outer - work.outer_bytes(4) == 10 * 8 * 4 * (2 + 3) + 100 * 4
    own = tiny_model(own_layers=1)
    layer = sum(parameter.numel() for parameter in own.own_layers[0].parameters())
    before = part("activations (rough)", own)
    own.holder.measures_distance = True
    assert part("activations (rough)", own) - before == 4 * layer


def test_a_tower_counts_as_frozen_weights_or_with_what_it_keeps_for_its_backward_pass():
    def of(**vision):
        model = seeing_model("tokens", **vision)
        return model, count_parameters(model, top_k=2), part("activations (rough)", model)

    (model, frozen, little), (_, trained, much) = of(), of(train_tower=True)
    size = sum(parameter.numel() for parameter in model.tower.parameters())
    assert frozen["total"] == trained["total"] == total(model)
    assert frozen["frozen"] == size > trained["frozen"] == 0
    # Six pictures of five tokens through two layers of width 12, feed-forward 16.
    assert much - little == 2 * 6 * 5 * ((8 * 12 + 2 * 16) * 4 + 2 * 12)
    # The text encoder reads five image tokens beside five of text.
    assert little == 2 * part("activations (rough)", tiny_model())
