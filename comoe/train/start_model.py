"""The model as a run begins with it: built, its heads at the texts of their labels, or with an export's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.data.tokens.split import TokenizedSplit
from comoe.data.tokens.vocabulary import embedding_problem
from comoe.losses.build import build_objective
from comoe.losses.objective import Objective
from comoe.models.encoders.families import longest_input
from comoe.models.model import MultiTaskModel
from comoe.starter.registry import as_typed
from comoe.train.checkpoint.folder import find_checkpoint
from comoe.train.label_texts import start_heads
from comoe.train.parallel.setup import building, seed_random
from comoe.train.start_from import start_from_export


def start_model(
    typed: Recipe,
    recipe: Recipe,
    splits: Mapping[str, TokenizedSplit],
    collator: Collator,
    settings: Mapping[str, Any],
    *,
    device: torch.device,
    begun: Path | None = None,
) -> tuple[Objective, list[str]]:
    """Model and objective with the weights that training begins with, and what the data report says of them.

    Every rank must call it, before DeepSpeed takes the model.

    Args:
        typed: as the user wrote it.
        recipe: resolved.
        splits: with soft labels.
        collator: of the run.
        settings: complete DeepSpeed configuration.
        device: of this rank.
        begun: folder of the run to resume; what its checkpoint replaces is not read.

    Raises:
        ValueError: as ``build_model``; or ``model.start_from`` or a task's descriptions do not fit.
    """
    with as_typed(typed, recipe), building(settings):
        objective = build_model(recipe, splits, collator)
    start_heads(objective.model, recipe, collator, splits["train"], device=device)
    if begun is not None and find_checkpoint(begun / "checkpoints", verify=False) is not None:
        return objective, []
    return objective, start_from_export(recipe.model, objective.model)


def build_model(
    recipe: Recipe,
    splits: Mapping[str, TokenizedSplit],
    collator: Collator,
    *,
    shape: bool = False,
) -> Objective:
    """Model and objective, the same weights on every rank; ``shape`` leaves the weights out.

    Raises:
        ValueError: posts are longer than the encoder can number.
    """
    seed_random(recipe.train.seed)
    domains = collator.domains
    objective = build_objective(
        recipe, collator.tasks, num_domains=len(domains.names) if domains else 0, shape=shape
    )
    if problem := embedding_problem(collator.tokenizer, objective.model.encoder.config):
        raise ValueError(f"model.encoder ({recipe.model.encoder}): {problem}; give it its own.")
    _check_ends(objective.model, collator, recipe.model.encoder)
    # Many tokenizers do not know the number of positions of their encoder.
    limit, whole = objective.model.longest_text, longest_input(objective.model.encoder.config)
    longest = max(int(split.lengths.max()) for split in splits.values() if len(split))
    if longest > limit:
        beside = " beside image tokens and generated texts" if limit < whole else ""
        raise ValueError(
            f"data.max_length ({recipe.data.max_length}) lets posts of {longest} tokens through, but model.encoder "
            f"({recipe.model.encoder}) numbers at most {limit}{beside}; set data.max_length to {limit} or less."
        )
    return objective


def _check_ends(model: MultiTaskModel, collator: Collator, name: str) -> None:
    """ValueError where texts are learned with another end than the one that stops a search."""
    decoder, token = model.decoder or model.causal_decoder, collator.tokenizer.eos_token_id
    if decoder is None or not decoder.text_tasks or token in decoder.generator.ends:
        return
    raise ValueError(
        f"model.encoder ({name}): its tokenizer ends a text with token {token}, and the model's texts end with "
        f"{decoder.generator.ends or 'none'}; write {token} as eos_token_id into the folder's generation_config.json."
    )
