"""The objective on posts with pictures: shares of the terms, second views and GradCache with both sides."""

from dataclasses import replace

import pytest
import torch

from comoe.config.recipe import ContrastiveConfig, ImageTextConfig, LossConfig
from comoe.losses.objective import Objective
from tests.helpers_model import TASKS, moe_config, scaled, without_gradient
from tests.helpers_vision import seeing_batch, seeing_model

CONTRASTED = tuple(replace(task, contrastive=True, contrastive_width=1.0) for task in TASKS)


def objective_of(
    fusion: str,
    image_text: ImageTextConfig,
    *,
    contrastive: ContrastiveConfig | None = None,
    **options,
) -> Objective:
    loss = LossConfig(
        contrastive=contrastive or ContrastiveConfig(weight=0.0), image_text=image_text
    )
    model = seeing_model(fusion, tasks=CONTRASTED, image_text=image_text, **options)
    return Objective(model, CONTRASTED, loss, moe_config(), seed=3).train()


@pytest.mark.parametrize(
    ("itc", "itm", "names"),
    [(0.1, 0.1, ["itc", "itm"]), (0.3, 0.0, ["itc"]), (0.0, 0.2, ["itm"]), (0.0, 0.0, [])],
)
def test_the_tasks_get_what_the_image_text_terms_leave_of_one(itc, itm, names):
    objective = objective_of("attention", ImageTextConfig(itc_weight=itc, itm_weight=itm))
    assert list(objective.terms) == names
    step = objective(scaled(seeing_batch(tasks=CONTRASTED)))
    tasks = sum(value for name, value in step.terms.items() if name.startswith("task/"))
    expected = (
        (1 - itc - itm) * tasks + itc * step.terms.get("itc", 0) + itm * step.terms.get("itm", 0)
    )
    torch.testing.assert_close(step.loss.detach(), expected)
    # One stream compares no two sides: the contrast's share goes to the tasks.
    one_stream = objective_of("vilt", ImageTextConfig())
    assert list(one_stream.terms) == ["itm"] and one_stream.task_share == 0.9
    apart = objective_of("vilt", ImageTextConfig(separate_passes=True))
    assert list(apart.terms) == ["itc", "itm"] and apart.task_share == 0.8


@pytest.mark.parametrize("fusion", ["attention", "tokens", "vilt"])
def test_the_cache_repeats_both_sides_and_their_dropout(fusion):
    contrastive = ContrastiveConfig(weight=0.5, chunk_size=3)
    image_text = ImageTextConfig(separate_passes=True)
    objective = objective_of(fusion, image_text, contrastive=contrastive, dropout=0.3)
    batches = [
        scaled(replace(seeing_batch(seed=seed, tasks=CONTRASTED), step=2)) for seed in (0, 1)
    ]
    with torch.random.fork_rng([]), torch.no_grad():
        passes = [objective(batch, mode="embed") for batch in batches]
    for first, batch, cached in zip(
        passes, batches, objective.contrast(batches, passes), strict=True
    ):
        second = objective(batch, cached=cached)
        for name, embeddings in first[0].embeddings.items():
            torch.testing.assert_close(second.output.embeddings[name].detach(), embeddings)
        torch.testing.assert_close(second.output.views["words"].detach(), first[0].views["words"])
        (second.loss / 2).backward()
    assert without_gradient(objective) == []
