"""Soft parameter sharing: the last layers of an encoder once per task, and how far the tasks' copies are apart."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from comoe.models.encoder_io import FanOut
from comoe.models.encoders.families import layers_by_stack
from comoe.models.moe.block import ContextHolder


class OwnLayer(nn.Module):
    """An encoder layer of which each task has a copy: a row goes through that of its task.

    Every copy runs in every pass, on all ranks: one whose task has no row runs on the first row, and
    what it makes of it is dropped. So each weight has a gradient everywhere, if only 0.

    Args:
        layer: the first copy; the others are made of it.
        num_tasks: T.
        holder: where the context of the running encode is.
        shared: objects that the copies refer to and do not copy.

    Source: soft parameter sharing, Duong et al. 2015, ACL, doi 10.3115/v1/p15-2139; the layers
    below are shared hard.
    """

    def __init__(
        self, layer: nn.Module, num_tasks: int, holder: ContextHolder, shared: dict[int, Any]
    ) -> None:
        super().__init__()
        self.copies = nn.ModuleList([layer, *_copied(layer, num_tasks - 1, shared)])
        self.holder = holder
        # ModernBERT's pass reads it.
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        # Behind the pass and outside of what is computed again for the backward pass; in front of
        # the hook with which ZeRO-3 puts the weights away.
        self.register_forward_hook(self._measure)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the layer gives, each row from the copy of its task."""
        rows, outputs = self.holder.context.task_rows, []
        for rows_R, own in zip(rows.of_task, self.copies, strict=True):
            take = FanOut(rows_R, len(rows.places_B)).to_rows
            given = {name: take(value) for name, value in options.items()}
            outputs.append(own(*map(take, inputs), **given))
        return rows.together(outputs)

    def distance(self) -> Tensor:
        """Sum over pairs of tasks of the squared distance of their copies, over T - 1; scalar,
        float32 or wider. 0 for one task."""
        num_tasks, total = len(self.copies), torch.zeros(())
        if num_tasks == 1:
            return total
        for same in zip(*(own.parameters() for own in self.copies), strict=True):
            wide = torch.promote_types(same[0].dtype, torch.float32)
            weights_TX = torch.stack([weight.flatten().to(wide) for weight in same])
            # The sum over pairs is T times the sum of the squared distances from the mean.
            total = total.to(weights_TX) + (weights_TX - weights_TX.mean(dim=0)).square().sum()
        return num_tasks / (num_tasks - 1) * total

    @staticmethod
    def _measure(own: OwnLayer, inputs: Any, output: Any) -> None:
        if own.holder.measures_distance and own.training and torch.is_grad_enabled():
            own.holder.context.distances.append(own.distance())


def _copied(layer: nn.Module, count: int, shared: dict[int, Any]) -> list[nn.Module]:
    """Copies of a layer, whole where ZeRO-3 has split it; DeepSpeed splits them with all that is new."""
    split = [weight for weight in layer.parameters() if hasattr(weight, "ds_id")]
    for weight in split:
        weight.all_gather()
    copies = [copy.deepcopy(layer, dict(shared)) for _ in range(count)]
    for weight in split:
        weight.partition()
    return copies


def give_own_layers(
    encoder: nn.Module, num_layers: int, num_tasks: int, holder: ContextHolder
) -> list[OwnLayer]:
    """Give each task the last layers of the encoder for itself, in place, before blocks are attached.

    Args:
        encoder: a model of ``build_encoder`` of one stack.
        num_layers: ``model.own_layers``, at least 1.
        num_tasks: T.
        holder: its context must say which task a row is for.

    Returns:
        The layers, first to last.

    Raises:
        ValueError: no layer would be left to share.
    """
    (layers,) = layers_by_stack(encoder)
    if num_layers >= len(layers):
        raise ValueError(
            f"model.own_layers ({num_layers}) must leave a layer that all tasks share; "
            f"model.encoder has {len(layers)} layers: set it to {len(layers) - 1} or less."
        )
    config = {id(encoder.config): encoder.config}
    for number in range(len(layers) - num_layers, len(layers)):
        layers[number] = OwnLayer(layers[number], num_tasks, holder, config)
        layers[number].requires_grad_(True)
    return list(layers[len(layers) - num_layers :])
