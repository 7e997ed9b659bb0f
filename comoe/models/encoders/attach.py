"""What an encoder gets: experts of ``model.moe`` beside the feed-forward of chosen layers or in their linear maps, and
layers of the tasks' own."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from comoe.config.recipe import ModelConfig, MoeConfig
from comoe.models.encoders.adapters import run_per_row
from comoe.models.encoders.families import (
    chosen_of_stacks,
    expert_width,
    family_of,
    freeze_encoder,
    layers_by_stack,
    layers_of,
)
from comoe.models.encoders.own_layers import OwnLayer, give_own_layers
from comoe.models.moe.block import ContextHolder, CooperativeBlock, GatedBlock
from comoe.models.moe.lora import LoraGate, LoraLinear, is_linear
from comoe.models.moe.router import ROUTES


def adapt_encoder(
    encoder: nn.Module, config: ModelConfig, holder: ContextHolder, num_tasks: int
) -> tuple[list[OwnLayer], list[GatedBlock]]:
    """Freeze what does not train, give tasks the layers of their own, attach the experts, in place.

    Args:
        encoder: a model of ``build_encoder``.
        config: ``model``.
        holder: its context must be set before the encoder runs.
        num_tasks: tasks of the model.

    Returns:
        The tasks' own layers, and what has a gate, in layer order.
    """
    # Before the blocks: they train in every layer.
    freeze_encoder(encoder, trained_layers(config))
    own = (
        give_own_layers(encoder, config.own_layers, num_tasks, holder) if config.own_layers else []
    )
    more = {"dropout": config.dropout, "own_layers": len(own)}
    return own, attach_experts(encoder, config.moe, holder, num_tasks, **more)


def attach_experts(
    encoder: nn.Module,
    config: MoeConfig,
    holder: ContextHolder,
    num_tasks: int = 1,
    *,
    dropout: float | None = None,
    own_layers: int = 0,
) -> list[GatedBlock]:
    """Give the chosen layers their experts, in place.

    Where the gate reads tasks, or tasks have layers of their own, the layers below the first one with
    experts, or of a task's own, run once per text.

    Args:
        encoder: a model of ``build_encoder``.
        config: ``model.moe``; ``num_experts`` 0 attaches nothing.
        holder: shared by all blocks; its context must be set before the encoder runs.
        num_tasks: tasks of the model.
        dropout: ``model.dropout``.
        own_layers: ``model.own_layers``, last layers that get no experts.

    Returns:
        The blocks in layer order, one per gate.
    """
    counts, blocks = list(map(len, layers_by_stack(encoder))), []
    counts[0] -= own_layers
    if config.num_experts:
        chosen = chosen_of_stacks(config.layers, counts)
        blocks = FORMS[config.form].attach(encoder, config, chosen, holder, num_tasks, dropout)
    if own_layers or (blocks and ROUTES[config.route_by].task):
        first = min([counts[0], *(block.layer for block in blocks[:1])])
        run = list(layers_by_stack(encoder)[0])[first:]
        after_first = family_of(encoder.config.model_type).after_first
        if first == 0 and after_first is not None:
            between = operator.attrgetter(after_first)(encoder)
            run += [] if between is None else [between]
        run_per_row(run, holder)
    return blocks


def _beside(
    encoder: nn.Module,
    config: MoeConfig,
    chosen: Sequence[int],
    holder: ContextHolder,
    num_tasks: int,
    dropout: float | None,
) -> list[GatedBlock]:
    """A cooperative block beside the feed-forward of each chosen layer; its dropout is the layer's own."""
    family = family_of(encoder.config.model_type)
    layers, width = layers_of(encoder), encoder.config.hidden_size
    own = 0.0 if family.dropout is None else getattr(encoder.config, family.dropout)
    blocks = []
    more = {"holder": holder, "dropout": own, "num_tasks": num_tasks}
    for number in chosen:
        block = CooperativeBlock(width, expert_width(config, width), config, layer=number, **more)
        family.attach(layers[number], block)
        blocks.append(block)
    return blocks


def _inside(
    encoder: nn.Module,
    config: MoeConfig,
    chosen: Sequence[int],
    holder: ContextHolder,
    num_tasks: int,
    dropout: float | None,
) -> list[GatedBlock]:
    """LoRA experts in the linear maps of each chosen layer, and a gate per layer or per stack."""
    layers, width = layers_of(encoder), encoder.config.hidden_size
    of_encoder = len(layers_by_stack(encoder)[0])
    skipped = family_of(encoder.config.model_type).without_experts
    gates: list[LoraGate] = []
    for number in chosen:
        layer, in_decoder = layers[number], number >= of_encoder
        own = SCOPES[config.gate_scope]
        if own or not gates or in_decoder != (gates[-1].layer >= of_encoder):
            gate = LoraGate(width, config, layer=number, holder=holder, num_tasks=num_tasks)
            layer.block = gate
            layer.register_forward_pre_hook(gate.open, with_kwargs=True)
            gates.append(gate)
        more = {"layer": gates[-1].layer, "holder": holder}
        more["dropout"] = config.dropout if dropout is None else dropout
        for place, name in _maps(layer, config.targets, skipped):
            setattr(place, name, LoraLinear(getattr(place, name), config, **more))
    return gates


def _maps(
    layer: nn.Module, targets: str, skipped: tuple[str, ...]
) -> Iterator[tuple[nn.Module, str]]:
    """Where the linear maps of a layer that get experts are: owners, and names there."""
    for path, module in list(layer.named_modules()):
        in_attention = ATTENTION.search(path) is not None
        if is_linear(module) and TARGETS[targets](in_attention) and not path.endswith(skipped):
            owner, _, name = path.rpartition(".")
            yield layer.get_submodule(owner), name


ATTENTION = re.compile("attn|attention", re.IGNORECASE)
"""In the path, within a layer, of whatever belongs to its attention, in every family."""


def trained_layers(config: ModelConfig) -> int | str:
    """``model.train_layers``, auto resolved."""
    if config.train_layers != "auto":
        return config.train_layers
    freezes = config.moe.num_experts and FORMS[config.moe.form].freezes
    return "none" if freezes else "all"


@dataclass(frozen=True, slots=True)
class Form:
    """One way to put experts into a model."""

    attach: Callable[
        [nn.Module, MoeConfig, Sequence[int], ContextHolder, int, float | None], list[GatedBlock]
    ]
    """As ``attach_experts``, of at least one expert, with the numbers of the chosen layers."""
    freezes: bool
    """Whether the pre-trained model stays as it is unless the recipe says otherwise."""
    over_ranks: bool
    """Whether expert parallelism can share the experts out among ranks."""


FORMS: dict[str, Form] = {
    "beside": Form(_beside, freezes=False, over_ranks=True),
    "lora": Form(_inside, freezes=True, over_ranks=False),
}
"""Word in ``model.moe.form`` -> form."""


TARGETS: dict[str, Callable[[bool], bool]] = {
    "attention": lambda in_attention: in_attention,
    "feed_forward": lambda in_attention: not in_attention,
    "all": lambda in_attention: True,
}
"""Word in ``model.moe.targets`` -> whether a map, in the attention or not, gets experts."""


SCOPES: dict[str, bool] = {"model": False, "layer": True}
"""Word in ``model.moe.gate_scope`` -> whether each layer has a gate of its own."""
