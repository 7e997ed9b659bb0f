"""Inner products of the tasks' gradients by the last layer that they share, over the whole global batch.

The layer is a linear map W at the identity between the shared states h and whatever each task has for itself: with d_t
the gradient of task t's loss by W h, its gradient by W is the sum of d_t h^T over all tokens, (M, M). Every encoder has
this place, behind the last norm and any fusion, whichever of its weights train and wherever they lie. Getting there
takes no backward pass through the encoder: no expert's all-to-all, no recomputed layer, no encoder weight of ZeRO-3.
Unlike the states themselves, W sees the posts of all tasks: gradients by the states of different posts never meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from comoe.distributed import sum_over_ranks, world_size
from comoe.protocols import Probe


def shared_gradients(losses_T: Tensor, probe: Probe, tasks: Sequence[str]) -> Tensor:
    """Each task's gradient by the shared layer, (T, M, M), float32 or wider, of one micro-batch on this rank.

    Args:
        losses_T: the tasks' losses, from ``probe.logits``.
        probe: the tasks' second answers; its graph is used up.
        tasks: names, in the order of T.
    """
    copies = [probe.states[name] for name in tasks]
    # One backward pass for all tasks: each has a copy of its own.
    slopes = torch.autograd.grad(
        losses_T, copies, torch.ones_like(losses_T), allow_unused=True, materialize_grads=True
    )
    wide = torch.promote_types(copies[0].dtype, torch.float32)
    h_NM = copies[0].detach().flatten(0, 1).to(wide)
    return torch.stack([slope.flatten(0, 1).to(wide).T @ h_NM for slope in slopes])


def gram_over_ranks(gradients_TMM: Tensor) -> Tensor:
    """Inner products (T, T), float64, of the global gradients; a collective.

    Args:
        gradients_TMM: this rank's mean over micro-batches; the mean over ranks is the global gradient.
    """
    flat_TX = (sum_over_ranks(gradients_TMM) / world_size()).flatten(1).double()
    return flat_TX @ flat_TX.T
