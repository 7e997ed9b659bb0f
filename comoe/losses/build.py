"""How model and losses of a recipe are built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from comoe.config.recipe import Recipe
from comoe.losses.objective import Objective
from comoe.models.build import build_model
from comoe.tasks.task import Task


def build_objective(
    recipe: Recipe, tasks: Sequence[Task], *, num_domains: int = 0, shape: bool = False
) -> Objective:
    """Model and losses of a recipe whose ``model.encoder`` is resolved; deterministic in torch's seed.

    Args:
        recipe: the recipe.
        tasks: in the order of their ids.
        num_domains: values that ``loss.adversarial`` predicts.
        shape: build it on the meta device, without reading weights: to be measured, not to be run.

    Raises:
        ValueError: an encoder that cannot be loaded, or nothing in the model trains.
    """
    model = build_model(
        recipe.model,
        tasks,
        image_text=recipe.loss.image_text,
        recompute=recipe.train.activation_checkpointing,
        shape=shape,
    )
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"model.train_layers ({recipe.model.train_layers}) leaves nothing to train: a decoder predicts every task, "
            "so there are no heads; set it to all or to a number of last layers, or give the model "
            "experts (model.moe.num_experts) or private parts (model.private_width)."
        )
    with torch.device("meta") if shape else nullcontext():
        return Objective(
            model,
            tasks,
            recipe.loss,
            recipe.model.moe,
            seed=recipe.train.seed,
            num_domains=num_domains,
            distill=recipe.distill,
        )
