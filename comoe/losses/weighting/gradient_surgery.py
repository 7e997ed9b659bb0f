"""How gradients of tasks that pull in different directions are combined, from their inner products alone.

Each function takes the Gram matrix of K gradients, float64, (K, K), and gives factors (K,): the
combined direction is the sum of factor times gradient. All factors 1 are the plain sum.

The layer is a linear map W at the identity between the shared states h and whatever each task has
for itself: with d_t the gradient of task t's loss by W h, its gradient by W is the sum of d_t h^T
over all tokens, (M, M). Every encoder has this place, behind the last norm and any fusion,
whichever of its weights train and wherever they lie. Getting there takes no backward pass through
the encoder: no expert's all-to-all, no recomputed layer, no encoder weight of ZeRO-3. Unlike the
states themselves, W sees the posts of all tasks: gradients by the states of different posts never
meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from comoe.distributed import sum_over_ranks, world_size
from comoe.types import Probe

_SMALL = 1e-10
"""Of the mean squared gradient: under the root of a squared length, which may be 0 where gradients
cancel out."""


def pcgrad(gram_KK: np.ndarray, *, step: int) -> np.ndarray:
    """Each gradient, in turn, loses what it has against each of the others; the sum of what is left.

    Args:
        gram_KK: inner products.
        step: seeds the order in which a gradient meets the others.

    Source: projecting conflicting gradients, arXiv:2001.06782.
    """
    count = len(gram_KK)
    rng = np.random.default_rng(step)
    factors_K = np.zeros(count)
    for own in range(count):
        # What is left of this gradient, as a combination of all of them.
        left_K = np.eye(count)[own]
        for other in rng.permutation(count):
            product = left_K @ gram_KK[:, other]
            if other != own and product < 0 and gram_KK[other, other] > 0:
                left_K[other] -= product / gram_KK[other, other]
        factors_K += left_K
    return factors_K


def cagrad(gram_KK: np.ndarray, *, strength: float) -> np.ndarray:
    """The direction near the mean gradient that helps the worst-off task most, times K.

    d = g0 + c |g0| g_w / |g_w|, where g0 is the mean gradient and the weights w, at least 0 with
    sum 1, make g_w . g0 + c |g0| |g_w| smallest. Times K, so that c = 0 is the plain sum; the
    authors' code divides by 1 + c^2 as well, which this does not.

    Args:
        gram_KK: inner products.
        strength: c, from 0 to below 1.

    Source: conflict-averse gradient descent, arXiv:2110.14048.
    """
    count = len(gram_KK)
    scale = np.trace(gram_KK) / max(count, 1)
    if count < 2 or not strength or not scale > 0:
        return np.ones(count)
    gram_KK = gram_KK / scale
    mean_K = gram_KK.mean(axis=1)
    reach = strength * np.sqrt(max(mean_K.mean(), 0.0))

    def length(weights_K: np.ndarray) -> float:
        return np.sqrt(max(weights_K @ gram_KK @ weights_K, 0.0) + _SMALL)

    def value_and_slope(weights_K: np.ndarray) -> tuple[float, np.ndarray]:
        norm = length(weights_K)
        return mean_K @ weights_K + reach * norm, mean_K + reach * (gram_KK @ weights_K) / norm

    found = minimize(
        value_and_slope,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
        options={"ftol": 1e-15, "maxiter": 200},
    )
    weights_K = found.x.clip(min=0)
    weights_K = weights_K / weights_K.sum()
    return 1 + count * reach * weights_K / length(weights_K)


def shared_gradients(losses_T: Tensor, probe: Probe, tasks: Sequence[str]) -> Tensor:
    """Each task's gradient by the shared layer, (T, M, M), float32 or wider, of one micro-batch on this rank.

    Args:
        losses_T: the tasks' losses, from ``probe.logits``.
        probe: the tasks' second logits; its graph is used up.
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
        gradients_TMM: this rank's mean over micro-batches; the mean over ranks is the global
            gradient.
    """
    flat_TX = (sum_over_ranks(gradients_TMM) / world_size()).flatten(1).double()
    return flat_TX @ flat_TX.T
