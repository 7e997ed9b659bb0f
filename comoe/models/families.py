"""Families of encoders: where their layers are, where the cooperative blocks attach, and which layers train."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from comoe.models.moe import ContextHolder, CooperativeBlock
from comoe.rules import unknown_name
from comoe.schema import MoeConfig


class BeforeResidualNorm(nn.Module):
    """Wraps a layer's ``output`` module, LN(dropout(dense(hidden)) + x): the block's update joins the residual x.

    So the sum under the norm is FFN(x) + block(x) + x: the block sits beside the feed-forward.
    """

    def __init__(self, inner: nn.Module, block: CooperativeBlock) -> None:
        super().__init__()
        self.inner = inner
        self.block = block

    def forward(self, hidden_BLF: Tensor, x_BLM: Tensor) -> Tensor:
        """The layer's output; ``hidden_BLF`` is the feed-forward's hidden state, ``x_BLM`` its input."""
        return self.inner(hidden_BLF, x_BLM + self.block(x_BLM))


class BesideFeedForward(nn.Module):
    """Wraps a whole feed-forward: FFN(x) + block(x)."""

    def __init__(self, inner: nn.Module, block: CooperativeBlock) -> None:
        super().__init__()
        self.inner = inner
        self.block = block

    def forward(self, x_BLM: Tensor) -> Tensor:
        """The feed-forward's output with the block's update, before residual and norm."""
        return self.inner(x_BLM) + self.block(x_BLM)


@dataclass(frozen=True, slots=True)
class Family:
    """Where one model family keeps its layers and its feed-forward, and what its forward takes."""

    layers: str = "encoder.layer"
    """Path of the list of layers."""
    site: str = "output"
    """Attribute of a layer that is wrapped."""
    wrapper: Callable[[nn.Module, CooperativeBlock], nn.Module] = BeforeResidualNorm
    """Wraps it."""
    dropout: str = "hidden_dropout_prob"
    """Field of the configuration with the dropout of hidden states."""
    has_pooler: bool = True
    """True where the constructor takes ``add_pooling_layer``: the pooler is left out, it would get no gradient."""
    has_segments: bool = True
    """True where the forward takes ``token_type_ids``."""
    first_position: int = 0
    """Positions of the table that no token ever uses (RoBERTa counts from padding + 1)."""
    after_layers: tuple[str, ...] = ()
    """Paths of modules that run after the last layer: they train with it."""
    single_stream: bool = False
    """True where one encoder reads text and pixels, and needs no vision tower."""


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face ``model_type``; ValueError with the supported ones for another."""
    if model_type not in FAMILIES:
        raise unknown_name("model.encoder: the encoder's model_type", model_type, FAMILIES)
    return FAMILIES[model_type]


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """The encoder's layers, first to last."""
    return operator.attrgetter(family_of(encoder.config.model_type).layers)(encoder)


def reads_segments(hf_config: Any) -> bool:
    """True where the encoder tells segments apart: a table of one row would fail on the second segment's id."""
    return family_of(hf_config.model_type).has_segments and hf_config.type_vocab_size > 1


def freeze_encoder(encoder: nn.Module, train_layers: int | str) -> None:
    """Leave only the last layers to training, in place; before ``attach_blocks``, whose blocks always train.

    Args:
        encoder: a model of ``build_encoder``.
        train_layers: ``model.train_layers``: all, none, or the number of last layers. A number freezes the embeddings
            and all else that runs before those layers.

    Raises:
        ValueError: another word, or a number of layers that the encoder does not have.
    """
    layers = layers_of(encoder)
    if isinstance(train_layers, str):
        if train_layers not in TRAINED_LAYERS:
            raise unknown_name("model.train_layers", train_layers, TRAINED_LAYERS)
        encoder.requires_grad_(TRAINED_LAYERS[train_layers])
        return
    if not 1 <= train_layers <= len(layers):
        raise ValueError(
            f"model.train_layers ({train_layers}) must be all, none, or a number from 1 to {len(layers)}, the layers "
            f"of {encoder.config.model_type} here."
        )
    encoder.requires_grad_(False)
    after = [operator.attrgetter(path)(encoder) for path in family_of(encoder.config.model_type).after_layers]
    for module in [*layers[-train_layers:], *after]:
        module.requires_grad_(True)


def attach_blocks(encoder: nn.Module, config: MoeConfig, holder: ContextHolder) -> list[CooperativeBlock]:
    """Put a cooperative block beside the feed-forward of each chosen layer, in place.

    Args:
        encoder: a model of ``build_encoder``.
        config: ``model.moe``; ``num_experts`` 0 attaches nothing.
        holder: shared by all blocks; its context must be set before the encoder runs.

    Returns:
        The blocks in layer order.
    """
    if config.num_experts == 0:
        return []
    family = family_of(encoder.config.model_type)
    layers = layers_of(encoder)
    width = encoder.config.hidden_size
    dropout = getattr(encoder.config, family.dropout)
    blocks = []
    for number in chosen_layers(config.layers, len(layers)):
        block = CooperativeBlock(
            width, expert_width(config, width), config, layer=number, holder=holder, dropout=dropout
        )
        site = getattr(layers[number], family.site)
        setattr(layers[number], family.site, family.wrapper(site, block))
        blocks.append(block)
    return blocks


def expert_width(config: MoeConfig, model_width: int) -> int:
    """Hidden width F of one expert; ``auto`` is a quarter of the encoder's width, at least 16."""
    if config.expert_width == "auto":
        return max(16, model_width // 4)
    if not isinstance(config.expert_width, int) or config.expert_width < 1:
        raise ValueError(f"model.moe.expert_width ({config.expert_width}) must be auto or a whole number above 0.")
    return config.expert_width


def chosen_layers(layers: str | list[int], num_layers: int) -> list[int]:
    """Numbers of the layers that get experts, ascending; ValueError for an unknown word or a number out of range."""
    if isinstance(layers, str):
        if layers not in LAYER_CHOICES:
            raise unknown_name("model.moe.layers", layers, LAYER_CHOICES)
        return LAYER_CHOICES[layers](num_layers)
    wrong = [number for number in layers if not 0 <= number < num_layers]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"model.moe.layers ({layers}) must list different numbers from 0 to {num_layers - 1}, at least one; "
            "set model.moe.num_experts to 0 for an encoder without experts."
        )
    return sorted(layers)


def longest_input(hf_config: Any) -> int:
    """Most tokens that the encoder's position table can number."""
    return hf_config.max_position_embeddings - family_of(hf_config.model_type).first_position


LAYER_CHOICES: dict[str, Callable[[int], list[int]]] = {
    "all": lambda count: list(range(count)),
    "alternate": lambda count: list(range((count - 1) % 2, count, 2)),
    "last_half": lambda count: list(range(count // 2, count)),
}
"""Word in ``model.moe.layers`` -> number of layers -> chosen layers."""

TRAINED_LAYERS: dict[str, bool] = {"all": True, "none": False}
"""Word in ``model.train_layers`` -> whether the encoder trains; a number means so many last layers."""

FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": Family(first_position=2),
    "xlm-roberta": Family(first_position=2),
    "camembert": Family(first_position=2),
    "electra": Family(has_pooler=False),
    "deberta-v2": Family(has_pooler=False),
    "mpnet": Family(has_segments=False, first_position=2),
    "distilbert": Family(
        layers="transformer.layer",
        site="ffn",
        wrapper=BesideFeedForward,
        dropout="dropout",
        has_pooler=False,
        has_segments=False,
    ),
    "modernbert": Family(
        layers="layers",
        site="mlp",
        wrapper=BesideFeedForward,
        dropout="mlp_dropout",
        has_pooler=False,
        has_segments=False,
        after_layers=("final_norm",),
    ),
    # A layer before its norm: the block brings a norm of its own.
    "vilt": Family(after_layers=("layernorm",), single_stream=True),
}
"""Hugging Face ``model_type`` -> family."""
