"""A model in numbers, from a recipe and its encoder's config.json, without building it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe.config.recipe import Recipe
from comoe.models.encoders.families import chosen_layers, expert_width
from comoe.starter.registry import PREFIXES, prepare


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """An encoder with cooperative blocks."""

    layers: int
    """L."""
    width: int
    """M."""
    ffn_width: int
    """F'."""
    vocabulary: int
    """V."""
    positions: int = 512
    """Rows of the table of positions."""
    tasks: int = 1
    """Heads that pool."""
    outputs: int = 2
    """Labels of all tasks together."""
    projection: int = 128
    """Width of the embeddings that the contrastive loss compares."""
    moe_layers: int = 0
    """L'."""
    num_experts: int = 0
    """E."""
    top_k: int = 0
    """k."""
    expert_width: int = 0
    """F."""
    shared_width: int = 0
    """Width of the expert that every token visits; 0 is none."""
    private_width: int = 0
    """Width of each task's private part; 0 is none."""

    @property
    def encoder_parameters(self) -> int:
        """Embeddings (V + positions + 2 segments) M with their norm, and per layer 4 M (M + 1) of
        attention, 2 M F' + F' + M of the feed-forward and two norms: BERT's and RoBERTa's form,
        without the pooler."""
        attention, norms = 4 * self.width * (self.width + 1), 4 * self.width
        feed_forward = 2 * self.width * self.ffn_width + self.ffn_width + self.width
        table = (self.vocabulary + self.positions + 2 + 2) * self.width
        return table + self.layers * (attention + feed_forward + norms)

    @property
    def dense_parameters(self) -> int:
        """D: encoder; norm, gate and shared expert of each block; heads (query and linear layer);
        projection; private parts."""
        block = self.width * (2 + self.num_experts + 3 * self.shared_width)
        heads = (self.tasks + self.projection) * self.width + self.outputs * (self.width + 1)
        private = self.width * (2 + 3 * self.private_width) if self.private_width else 0
        return self.encoder_parameters + self.moe_layers * block + heads + self.tasks * private

    @property
    def expert_parameters(self) -> int:
        """X: gate, up and down matrix of every expert, L' E 3 M F."""
        return self.moe_layers * self.num_experts * 3 * self.width * self.expert_width

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: D + X k / E."""
        routed = self.expert_parameters * self.top_k // max(1, self.num_experts)
        return self.dense_parameters + routed


def shape_of_recipe(recipe: Recipe, encoder_shape: str | None = None) -> PlannedModel:
    """The numbers of a recipe's model, without building it.

    Args:
        recipe: its experts, tasks and, without ``encoder_shape``, its encoder.
        encoder_shape: "layers,width,feed-forward width,vocabulary" instead of the recipe's encoder.

    Raises:
        ValueError: a shape that is not four whole numbers, or an encoder that is not on this
            machine.
    """
    layers, width, ffn_width, vocabulary, positions = (
        _parsed(encoder_shape) if encoder_shape else _read(recipe.model.encoder)
    )
    moe = recipe.model.moe
    labels = sum(max(1, len(task.labels)) for task in recipe.tasks.values())
    return PlannedModel(
        layers=layers,
        width=width,
        ffn_width=ffn_width,
        vocabulary=vocabulary,
        positions=positions,
        tasks=len(recipe.tasks),
        outputs=labels,
        projection=recipe.model.projection_width,
        moe_layers=len(chosen_layers(moe.layers, layers)) if moe.num_experts else 0,
        num_experts=moe.num_experts,
        top_k=moe.top_k if moe.num_experts else 0,
        expert_width=expert_width(moe, width),
        shared_width=moe.shared_width,
        private_width=recipe.model.private_width,
    )


def _parsed(text: str) -> list[int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) for part in parts):
        rule = "it must be layers,width,feed-forward width,vocabulary, such as 24,1024,4096,50265"
        raise ValueError(f"--encoder-shape is {text!r}; {rule}.")
    return [*map(int, parts), 512]


def _read(encoder: str) -> list[int]:
    folder = (
        prepare([encoder])[encoder] if encoder.startswith(PREFIXES) else Path(encoder).expanduser()
    )
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"model.encoder ({encoder}) is no folder with a config.json; give its numbers by --encoder-shape "
            f"layers,width,feed-forward width,vocabulary."
        )
    config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    found = []
    for names in _NAMES:
        known = [config[name] for name in names if name in config]
        if not known:
            raise ValueError(
                f"{file} has no {names[0]}; give the encoder's numbers by --encoder-shape."
            )
        found.append(int(known[0]))
    return found


_NAMES = (
    ("num_hidden_layers", "n_layers"),
    ("hidden_size", "dim"),
    ("intermediate_size", "hidden_dim"),
    ("vocab_size",),
    ("max_position_embeddings",),
)
"""What families call the five numbers in config.json."""
