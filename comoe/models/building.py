"""Builds the whole model: pre-trained, from an export's configuration, or as its shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from comoe.models.encoder import build_encoder, build_encoder_from_config, build_encoder_shape
from comoe.models.multitask import MultiTaskModel
from comoe.models.vision import build_tower, build_tower_from_config, build_tower_shape
from comoe.schema import ImageTextConfig, ModelConfig
from comoe.tasks.catalog import Task


def build_model(
    config: ModelConfig,
    tasks: Sequence[Task],
    *,
    encoder_config: dict[str, Any] | None = None,
    tower_config: dict[str, Any] | None = None,
    image_text: ImageTextConfig | None = None,
    recompute: bool = False,
) -> MultiTaskModel:
    """Build the model; deterministic in torch's seed, so every rank that seeds alike gets the same weights.

    Args:
        config: ``model``; ``config.encoder`` must be a folder or hub name here.
        tasks: the tasks in the order of their ids.
        encoder_config: ``encoder.config.to_dict()`` of an export: no pre-trained weights are read then.
        tower_config: ``tower.inner.config.to_dict()`` likewise, where the export reads pictures.
        image_text: ``loss.image_text``, see ``MultiTaskModel``.
        recompute: activation checkpointing, see ``MultiTaskModel``.
    """
    generates = any(task.rules.generates for task in tasks)
    if encoder_config is None:
        encoder = build_encoder(config, generates=generates)
    else:
        encoder = build_encoder_from_config(encoder_config, dropout=config.dropout, generates=generates)
    tower = None
    if tower_config is not None:
        tower = build_tower_from_config(tower_config, train=config.vision.train_tower)
    elif config.vision.tower is not None:
        # Reading draws numbers in vain, how many depends on the layout; what is new must begin alike on all.
        with torch.random.fork_rng([]):
            tower = build_tower(config.vision, trust_remote_code=config.trust_remote_code)
    return MultiTaskModel(encoder, tasks, config, tower=tower, image_text=image_text, recompute=recompute)


def build_model_shape(
    config: ModelConfig, tasks: Sequence[Task], *, image_text: ImageTextConfig | None = None, recompute: bool = False
) -> MultiTaskModel:
    """The model of ``build_model`` on the meta device: every size and no number, so that a plan of the largest one
    takes no memory. Of encoder and tower only config.json is read; arguments of ``build_model``."""
    generates = any(task.rules.generates for task in tasks)
    encoder = build_encoder_shape(config, generates=generates)
    tower = None
    if config.vision.tower is not None:
        tower = build_tower_shape(config.vision, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        return MultiTaskModel(encoder, tasks, config, tower=tower, image_text=image_text, recompute=recompute)
