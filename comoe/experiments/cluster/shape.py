"""The sizes of a model that a plan of a cluster is made of.

They are those of BERT's formulas, or, where the encoder's folder has a config.json of a known family,
counted on the model's shape: so decoder-only models, LoRA experts and frozen layers are in the plan.
Letters as in ``costs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from comoe.config.files import read_json
from comoe.config.recipe import Recipe, TaskConfig
from comoe.models.encoders.attach import FORMS, attach_experts, trained_layers
from comoe.models.encoders.families import (
    FAMILIES,
    TWO_SIDED,
    chosen_layers,
    expert_width,
    freeze_encoder,
    has_decoder,
    layers_of,
)
from comoe.models.encoders.own_layers import give_own_layers
from comoe.models.moe.block import ContextHolder
from comoe.models.moe.lora import adapters_of, is_linear, widths_of
from comoe.models.pooling import POOLINGS
from comoe.starter.registry import PREFIXES, prepare
from comoe.tasks.kinds.registry import KINDS
from comoe.train.memory_plan import kept_of_token, stack_shapes, tokens_of_words


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted on an encoder's shape."""

    parameters: int
    """Without experts and gates."""
    frozen: int
    """Of them those that do not train."""
    operations: int
    """Of a token in the linear maps of all layers."""
    frozen_operations: int
    """Of them in maps that do not train."""
    attended: int
    """Width of a token's queries, heads times width of a head."""
    copied: int = 0
    """Of the parameters, those of all tasks' own layers but one task's."""
    adapters: int = 0
    """Parameters of LoRA experts."""
    adapter_numbers: int = 0
    """Numbers that they keep of a token, see ``comoe.train.memory_plan.Work``."""
    two_stacks: bool = False
    """True for an encoder-decoder, with both stacks counted."""
    answers: float = 0.0
    """Tokens of a post that are predicted over the vocabulary."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """An encoder, or a decoder-only model, with its experts."""

    layers: int  # L
    width: int  # M
    ffn_width: int  # F'
    vocabulary: int  # V
    positions: int = 512
    tasks: int = 1
    outputs: int = 2
    """Labels of all tasks together."""
    projection: int = 128
    """Width of the contrastive embeddings."""
    moe_layers: int = 0  # L'
    num_experts: int = 0  # E
    top_k: int = 0  # k
    expert_width: int = 0  # F
    shared_width: int = 0
    """Width of the shared expert; 0 is none."""
    private_width: int = 0
    """Width of each task's private part; 0 is none."""
    own_layers: int = 0
    """Last layers that each task has for itself."""
    task_attention_width: int = 0
    """Width of the attention between tasks; 0 is none."""
    mixes_layers: bool = False
    """Whether each head mixes the states of all layers."""
    counted: Counted | None = None
    """What was counted instead of by the formulas."""

    @property
    def frozen(self) -> int:
        """Of D those that do not train."""
        return 0 if self.counted is None else self.counted.frozen

    @property
    def encoder_parameters(self) -> int:
        """Counted, or embeddings (V + positions + 2 segments) M with their norm; per layer 4 M (M + 1) of
        attention, 2 M F' + F' + M of the feed-forward network and two norms: BERT and RoBERTa
        without the pooler."""
        if self.counted is not None:
            return self.counted.parameters
        table = (self.vocabulary + self.positions + 2 + 2) * self.width
        return table + self.layers * self._layer_parameters + self.copied_parameters

    @property
    def _layer_parameters(self) -> int:
        attention, norms = 4 * self.width * (self.width + 1), 4 * self.width
        return attention + 2 * self.width * self.ffn_width + self.ffn_width + self.width + norms

    @property
    def copied_parameters(self) -> int:
        """Of all tasks' own layers but one task's: a token goes through one copy."""
        if self.counted is not None:
            return self.counted.copied
        return (self.tasks - 1) * self.own_layers * self._layer_parameters

    @property
    def dense_parameters(self) -> int:
        """D: encoder; norm, gate and shared expert of each block; heads (query, mixture of layers and
        linear layer); projection; private parts; attention between tasks."""
        block = self.width * (2 + self.num_experts + 3 * self.shared_width)
        heads = (self.tasks + self.projection) * self.width + self.outputs * (self.width + 1)
        heads += self.tasks * (self.layers + 2) * self.mixes_layers
        if self.task_attention_width and self.tasks > 1:
            heads += self.width * (2 + self.tasks + 4 * self.task_attention_width)
        private = self.width * (2 + 3 * self.private_width) if self.private_width else 0
        return self.encoder_parameters + self.moe_layers * block + heads + self.tasks * private

    @property
    def expert_parameters(self) -> int:
        """X: gate, up and down matrix of every expert, L' E 3 M F; LoRA experts as counted."""
        if self.counted is not None and self.counted.adapters:
            return self.counted.adapters
        return self.moe_layers * self.num_experts * 3 * self.width * self.expert_width

    @property
    def active_parameters(self) -> int:
        """Active parameters per token: D + X k / E; all LoRA experts run, and of own layers one copy."""
        dense = self.dense_parameters - self.copied_parameters
        if self.counted is not None and self.counted.adapters:
            return dense + self.expert_parameters
        return dense + self.expert_parameters * self.top_k // max(1, self.num_experts)


def shape_of_recipe(recipe: Recipe, encoder_shape: str | None = None) -> PlannedModel:
    """The sizes of a recipe's model, from the encoder's config.json, without building it.

    Args:
        recipe: its experts, tasks and, without ``encoder_shape``, its encoder.
        encoder_shape: "layers,width,feed-forward width,vocabulary" instead of the recipe's encoder.

    Raises:
        ValueError: a shape that is not four positive integers, or a missing encoder.
    """
    moe = recipe.model.moe
    if encoder_shape:
        parts = encoder_shape.split(",")
        if len(parts) != 4 or not all(part.strip().isdigit() and int(part) for part in parts):
            raise ValueError(
                f"--encoder-shape is {encoder_shape!r}; it must be layers,width,feed-forward "
                "width,vocabulary, such as 24,1024,4096,50265."
            )
        layers, width, ffn_width, vocabulary, positions = [*map(int, parts), 512]
    else:
        folder = _folder_of(recipe.model.encoder)
        config: Mapping[str, Any] = read_json(folder / "config.json")
        if config.get("model_type") in (*FAMILIES, *TWO_SIDED):
            return _counted_shape(recipe, folder)
        layers, width, ffn_width, vocabulary, positions = _sizes(folder / "config.json", config)
    if moe.num_experts and not FORMS[moe.form].over_ranks:
        raise ValueError(
            f"model.moe.form is {moe.form}: its experts are counted in the linear maps of the encoder, so "
            "model.encoder must be a folder with a config.json of a known family; leave out --encoder-shape."
        )
    return _shape(recipe, layers, width, ffn_width, vocabulary, positions=positions)


def _shape(
    recipe: Recipe, layers: int, width: int, ffn_width: int, vocabulary: int, **more: Any
) -> PlannedModel:
    """The encoder's sizes, and the recipe's own."""
    moe = recipe.model.moe
    beside = bool(moe.num_experts) and FORMS[moe.form].over_ranks
    return PlannedModel(
        layers=layers,
        width=width,
        ffn_width=ffn_width,
        vocabulary=vocabulary,
        tasks=len(recipe.tasks),
        outputs=sum(max(1, len(task.labels)) for task in recipe.tasks.values()),
        projection=recipe.model.projection_width,
        moe_layers=len(chosen_layers(moe.layers, layers - recipe.model.own_layers))
        if beside
        else 0,
        num_experts=moe.num_experts if beside else 0,
        top_k=moe.top_k if beside else 0,
        expert_width=expert_width(moe, width),
        shared_width=moe.shared_width,
        private_width=recipe.model.private_width,
        own_layers=recipe.model.own_layers,
        task_attention_width=recipe.model.task_attention_width,
        mixes_layers=POOLINGS[recipe.model.pooling].mixes_layers,
        **more,
    )


def _counted_shape(recipe: Recipe, folder: Path) -> PlannedModel:
    """The sizes of a model of a known family, counted on its shape; no weight is read."""
    # The library's models take seconds to import.
    from comoe.models.encoders.build import build_encoder_shape

    config = replace(recipe.model, encoder=str(folder))
    decoded = [task for task in recipe.tasks.values() if KINDS[task.kind].mode == "decoder"]
    encoder = build_encoder_shape(config, generates=bool(decoded))
    sizes = encoder.config
    freeze_encoder(encoder, trained_layers(config))
    maps = [
        module for layer in layers_of(encoder) for module in layer.modules() if is_linear(module)
    ]
    holder, tasks, own_layers = ContextHolder(), len(recipe.tasks), []
    if config.own_layers:
        own_layers = give_own_layers(encoder, config.own_layers, tasks, holder)
    weights = [weight.numel() for weight in encoder.parameters()]
    frozen = sum(weight.numel() for weight in encoder.parameters() if not weight.requires_grad)
    own = sum(weight.numel() for layer in own_layers for weight in layer.parameters())
    if config.moe.num_experts and not FORMS[config.moe.form].over_ranks:
        with torch.device("meta"):
            more = {"dropout": config.dropout, "own_layers": config.own_layers}
            attach_experts(encoder, config.moe, holder, tasks, **more)
    adapters = adapters_of(encoder)
    operations = [2 * math.prod(widths_of(module)) for module in maps]
    still = [not module.weight.requires_grad for module in maps]
    heads = sizes.num_attention_heads
    counted = Counted(
        parameters=sum(weights),
        frozen=frozen,
        operations=sum(operations),
        frozen_operations=sum(count for count, one in zip(operations, still, strict=True) if one),
        attended=heads * (getattr(sizes, "head_dim", None) or sizes.hidden_size // heads),
        copied=own - own // tasks,
        adapters=sum(one.lora_A.numel() + one.lora_B.numel() for one in adapters),
        adapter_numbers=sum(map(kept_of_token, adapters)),
        two_stacks=has_decoder(encoder),
        answers=sum(map(_answer_tokens, decoded)) / len(recipe.tasks),
    )
    (layers, *_), (ffn_width, *_) = stack_shapes(sizes)
    return _shape(recipe, layers, sizes.hidden_size, ffn_width, sizes.vocab_size, counted=counted)


def _answer_tokens(task: TaskConfig) -> int:
    """Tokens that a decoder learns of a post, of free text at most."""
    if not KINDS[task.kind].exclusive:
        return task.max_answer_length
    return tokens_of_words(task.label_words or task.labels)


def _folder_of(encoder: str) -> Path:
    folder = (
        prepare([encoder])[encoder] if encoder.startswith(PREFIXES) else Path(encoder).expanduser()
    )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.encoder ({encoder}) is not a folder with a config.json; set its sizes with "
            f"--encoder-shape layers,width,feed-forward width,vocabulary."
        )
    return folder


def _sizes(file: Path, config: Mapping[str, Any]) -> list[int]:
    sizes = []
    for names in _SIZE_NAMES:
        known = [config[name] for name in names if name in config]
        if not known:
            raise ValueError(
                f"{file} has no {names[0]}; set the encoder's sizes with --encoder-shape."
            )
        sizes.append(int(known[0]))
    return sizes


_SIZE_NAMES = (
    ("num_hidden_layers", "n_layers"),
    ("hidden_size", "dim"),
    ("intermediate_size", "hidden_dim"),
    ("vocab_size",),
    ("max_position_embeddings",),
)
"""Names of the five sizes in config.json, by model family."""
