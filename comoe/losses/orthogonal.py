"""Penalties on what tasks have for themselves: a private part that repeats the shared states (the difference loss), own
layers that part (soft sharing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from comoe.losses.routing import RunningSums
from comoe.types import Batch, ModelOutput, labelled_rows


def cross_sums(shared_BLM: Tensor, private_BLM: Tensor, counted_BL: Tensor) -> Tensor:
    """Sums over tokens of [s; 1] [p; 1]^T: products, both sums and the count, (M + 1, M + 1), float32 or wider.

    s is the shared state brought to length 1. p is the private update over the same length, taken
    as a number: it is not brought to length 1 itself, because it begins at 0, where its direction
    means nothing and has no slope.

    Args:
        shared_BLM: shared states.
        private_BLM: what a private part adds to them.
        counted_BL: 1 on tokens that count, else 0.
    """
    dtype = torch.promote_types(shared_BLM.dtype, torch.float32)
    lengths_BL1 = torch.linalg.vector_norm(
        shared_BLM.detach().to(dtype), dim=2, keepdim=True
    ).clamp_min(1e-12)
    counted_BL1 = counted_BL.to(dtype).unsqueeze(2)
    shared = F.pad(F.normalize(shared_BLM.to(dtype), dim=2), (0, 1), value=1.0) * counted_BL1
    private = F.pad(private_BLM.to(dtype) / lengths_BL1, (0, 1), value=1.0)
    return shared.flatten(0, 1).T @ private.flatten(0, 1)


def overlap(sums_TNN: Tensor) -> Tensor:
    """Squared Frobenius norm of the covariance of shared and private features, the mean over tasks with tokens.

    0 where no linear map of the shared features predicts a feature of a private part. A
    mean over tokens, so it does not depend on their number.

    Args:
        sums_TNN: ``cross_sums`` of each task, N = M + 1; a task without tokens takes no part.
    """
    counts_T = sums_TNN[:, -1, -1]
    sizes_T11 = counts_T.clamp_min(1)[:, None, None]
    products_TMM, shared_TM1, private_T1M = (
        sums_TNN[:, :-1, :-1],
        sums_TNN[:, :-1, -1:],
        sums_TNN[:, -1:, :-1],
    )
    covariance_TMM = products_TMM / sizes_T11 - (shared_TM1 / sizes_T11) * (private_T1M / sizes_T11)
    return covariance_TMM.square().sum(dim=(1, 2)).sum() / (counts_T > 0).sum().clamp_min(1)


class OrthogonalLoss:
    """``overlap`` of shared states and private parts on the tokens of all ranks; a token counts for
    each task that its row has a label of.

    Under accumulation the sums are those of the optimizer step so far, as in
    ``TaskSeparationLoss``. Ranks exchange T (M + 1)^2 numbers in each forward pass, and again in
    its backward pass.

    Args:
        tasks: names of all tasks.

    Source: the difference loss ``||S^T P||_F^2`` of Bousmalis et al. 2016, arXiv:1608.06019, and
    Liu et al. 2017, arXiv:1704.05742; centered as in the former.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._sums = RunningSums()

    def begin_step(self) -> None:
        """Forget the sums: a new optimizer step begins."""
        self._sums.begin_step()

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The global term, the same on every rank; term ``orthogonal``, detached."""
        sharing, labelled_BT = output.sharing, labelled_rows(batch, self.tasks)
        own = [
            cross_sums(
                sharing.shared_BLM,
                sharing.private[task],
                sharing.mask_BL * labelled_BT[:, [number]],
            )
            for number, task in enumerate(self.tasks)
        ]
        total = overlap(self._sums.add(torch.stack(own)))
        return total, {"orthogonal": total.detach()}


class SoftSharingLoss:
    """Squared distance of the tasks' own layers, which the model measures while it has their weights
    whole (``comoe.models.encoders.own_layers.OwnLayer.distance``).

    For two tasks ||W_1 - W_2||^2, for T the sum over pairs over T - 1.

    Source: Duong et al. 2015, ACL, doi 10.3115/v1/p15-2139.
    """

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The term, the same on every rank and in every micro-step; ``soft_sharing``, detached."""
        distance = output.sharing.distance
        return distance, {"soft_sharing": distance.detach()}
