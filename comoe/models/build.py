"""How a model is built: pre-trained, from an export, or as its shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from comoe.config.recipe import ImageTextConfig, ModelConfig
from comoe.models.activation_checkpointing import recompute_layers
from comoe.models.encoders.build import (
    build_encoder,
    build_encoder_from_config,
    build_encoder_shape,
)
from comoe.models.lexicon import add_lexicon
from comoe.models.model import MultiTaskModel
from comoe.models.vision.tower import build_tower, build_tower_from_config, build_tower_shape
from comoe.tasks.lexicon import Lexicon, load_lexicon
from comoe.tasks.task import Task, decoder_tasks


def build_model(
    config: ModelConfig,
    tasks: Sequence[Task],
    *,
    encoder_config: dict[str, Any] | None = None,
    tower_config: dict[str, Any] | None = None,
    image_text: ImageTextConfig | None = None,
    recompute: bool = False,
    shape: bool = False,
    plain: bool = False,
    lexicon: Lexicon | None = None,
) -> MultiTaskModel:
    """Build the model; deterministic in torch's seed, so every rank that seeds alike gets the same weights.

    Args:
        config: ``model``; ``config.encoder`` must be a folder or hub name here.
        tasks: the tasks in the order of their ids.
        encoder_config: ``encoder.config.to_dict()`` of an export: no pre-trained weights are read
            then.
        tower_config: ``tower.inner.config.to_dict()`` likewise, where the export reads images.
        image_text: ``loss.image_text``, see ``MultiTaskModel``.
        recompute: keep only each layer's input for the backward pass (activation checkpointing).
        shape: build it on the meta device, every size and no number, so that a plan of the largest
            model takes no memory; of encoder and tower only config.json is read.
        plain: with ``encoder_config``, as of ``build_encoder_from_config``.
        lexicon: that ``config.lexicon`` names; None reads it.
    """
    generates, vision = bool(decoder_tasks(tasks)), config.vision
    if shape:
        encoder = build_encoder_shape(config, generates=generates)
    elif encoder_config is None:
        encoder = build_encoder(config, generates=generates)
    else:
        encoder = build_encoder_from_config(
            encoder_config, dropout=config.dropout, generates=generates, plain=plain
        )
    tower = None
    if tower_config is not None:
        tower = build_tower_from_config(tower_config, train=vision.train_tower)
    elif vision.tower is not None and shape:
        tower = build_tower_shape(vision, trust_remote_code=config.trust_remote_code)
    elif vision.tower is not None:
        # Reading it draws numbers in vain, how many depends on the layout; what is new must begin
        # alike on all.
        with torch.random.fork_rng([]):
            tower = build_tower(vision, trust_remote_code=config.trust_remote_code)
    if lexicon is None and config.lexicon.path is not None:
        lexicon = load_lexicon(config.lexicon.path)
    with torch.device("meta") if shape else nullcontext():
        model = MultiTaskModel(encoder, tasks, config, tower=tower, image_text=image_text)
        if lexicon is not None:
            add_lexicon(model, lexicon, as_input=config.lexicon.input)
    if recompute:
        recompute_layers(model.encoder, model.holder)
    return model
