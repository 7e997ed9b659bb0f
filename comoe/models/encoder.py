"""Pre-trained encoders, and where the cooperative blocks attach to each family."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from comoe.models.moe import ContextHolder, CooperativeBlock
from comoe.rules import unknown_name
from comoe.schema import ModelConfig, MoeConfig


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


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face ``model_type``; ValueError with the supported ones for another."""
    if model_type not in FAMILIES:
        raise unknown_name("model.encoder: the encoder's model_type", model_type, FAMILIES)
    return FAMILIES[model_type]


def build_encoder(config: ModelConfig) -> nn.Module:
    """Load the pre-trained encoder of ``model.encoder`` in float32, without its pooler.

    Raises:
        ValueError: no such folder or hub name, no network, unreadable or incomplete weights, or a family without a
            row in ``FAMILIES``.
    """
    name = config.encoder
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if (looks_local and not folder.is_dir()) or (folder.is_dir() and not (folder / "config.json").is_file()):
        raise ValueError(
            f"model.encoder ({name}) is not a folder with an encoder (config.json is missing); give a folder that "
            "save_pretrained wrote, a hub name, kit:minilm or smoke:encoder."
        )
    source = str(folder) if folder.is_dir() else name
    with _readable_errors(name):
        hf_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    arguments = _prepared(hf_config, config.dropout)
    with _readable_errors(name), _quiet():
        encoder, report = AutoModel.from_pretrained(
            source,
            config=hf_config,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
    if report["missing_keys"]:
        # The library would fill them with random numbers and go on.
        raise ValueError(
            f"model.encoder ({name}) has no weights for {', '.join(sorted(report['missing_keys'])[:3])} "
            f"({len(report['missing_keys'])} in all); its weights file does not belong to its config.json."
        )
    return encoder


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"model.encoder ({name}) could not be loaded: {reason} Give the folder of a downloaded encoder, a hub name "
            "that this machine can reach, kit:minilm or smoke:encoder."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    # The library prints a bar and a table of unused weights on every rank; missing ones are an error above.
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def build_encoder_from_config(hf_config: dict[str, Any], *, dropout: float | None = None) -> nn.Module:
    """The same network with random weights, from ``encoder.config.to_dict()``: an export fills the weights in."""
    fields = dict(hf_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    arguments = _prepared(config, dropout)
    return AutoModel.from_config(config, dtype=torch.float32, **arguments)


def _prepared(hf_config: Any, dropout: float | None) -> dict[str, Any]:
    family = family_of(hf_config.model_type)
    if dropout is not None:
        for key, value in hf_config.to_dict().items():
            if "dropout" in key and isinstance(value, float | int):
                setattr(hf_config, key, dropout)
    return {"add_pooling_layer": False} if family.has_pooler else {}


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
    layers = operator.attrgetter(family.layers)(encoder)
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

FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": Family(first_position=2),
    "xlm-roberta": Family(first_position=2),
    "camembert": Family(first_position=2),
    "electra": Family(has_pooler=False),
    "mpnet": Family(has_segments=False, first_position=2),
    "distilbert": Family(
        layers="transformer.layer",
        site="ffn",
        wrapper=BesideFeedForward,
        dropout="dropout",
        has_pooler=False,
        has_segments=False,
    ),
}
"""Hugging Face ``model_type`` -> family."""
