"""Activation checkpointing: each encoder layer keeps its input and computes the rest again in its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comoe.models.encoders.families import layers_of
from comoe.models.moe.block import ContextHolder


def recompute_layers(encoder: nn.Module, holder: ContextHolder) -> None:
    """Activation checkpointing, in place: a layer keeps its input and computes the rest again in its backward pass.

    The second pass sees the context of its own encode, whatever was encoded since, draws the same
    dropout and routes every token as the first pass did.

    Args:
        encoder: a model of ``build_encoder``, blocks attached.
        holder: where its blocks find the context.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    for layer in layers_of(encoder):
        # The forward is wrapped, not the module: its path, and so the names of its weights, stay as
        # they are.
        layer.forward = partial(_recomputed, layer, layer.forward, holder)


def _recomputed(
    layer: nn.Module,
    forward: Callable[..., Any],
    holder: ContextHolder,
    *inputs: Any,
    **options: Any,
) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*inputs, **options)
    context = holder.context

    def run(*inputs: Any, **options: Any) -> Any:
        current, holder.context = holder.context, context
        try:
            output = forward(*inputs, **options)
        finally:
            holder.context = current
        # Some families return a tuple with the states first.
        if isinstance(output, tuple):
            return _FirstInBackward.apply(output[0]), *output[1:]
        return _FirstInBackward.apply(output)

    # The second pass must not stop early in the middle of a module: ZeRO-3 would not put its
    # weights away.
    return checkpoint(run, *inputs, use_reentrant=False, early_stop=False, **options)


class _FirstInBackward(torch.autograd.Function):
    """Changes nothing, but wants back what it saved: so the second pass runs before any other backward step.

    Else it would begin inside the last norm's backward pass, and ZeRO-3, which gathers weights
    module by module, would put that norm's frozen weights away again at the end of the second pass.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states.new_empty(0))
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert len(ctx.saved_tensors) == 1
        return gradient
