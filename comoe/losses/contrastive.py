"""Task-adaptive contrastive loss: posts of one task with the same label attract each other, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from comoe.protocols import IGNORED, Batch, ModelOutput
from comoe.tasks.catalog import Task

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""Rows of this rank -> (rows of all ranks with gradient, index of this rank's first row)."""


def contrastive_sums(
    embeddings_NP: Tensor,
    tasks_N: Tensor,
    labels_N: Tensor,
    *,
    num_tasks: int,
    temperature: float,
    gather: Gather,
) -> tuple[Tensor, Tensor]:
    """This rank's share of each task's contrastive loss.

    Rows are (post, task) pairs. The positives of a row are the other rows of its task and label in the global batch,
    its rivals all other rows of its task:
    L_i = logsumexp over rivals of s_ij - mean over positives of s_ip, with s = z z^T / temperature.

    Args:
        embeddings_NP: unit-length rows of this rank, of all tasks; N differs between ranks and may be 0.
        tasks_N: task index per row, int64.
        labels_N: label per row, int64, never missing.
        num_tasks: length of the answer.
        temperature: divides the cosines.
        gather: reached by every rank in every call, with rows or without.

    Returns:
        The sum of L_i over this rank's anchors with a positive, divided by the number of such anchors on all ranks,
        per task (T,), differentiable; and that global number (T,). The sum over ranks is the mean over anchors. A task
        without any positive pair gets 0 with a gradient of 0.

    Source: supervised contrastive learning, arXiv:2004.11362, per task as in TaCL-CoMoE; methods.md section 2.
    """
    # One gather for all tasks. Task and label travel as two more columns: whole numbers below 2^24 are exact.
    columns_N2 = torch.stack([tasks_N, labels_N], dim=1).to(embeddings_NP.dtype)
    packed_GQ, offset = gather(torch.cat([embeddings_NP, columns_N2], dim=1))
    all_GP, keys_G2 = packed_GQ[:, :-2], packed_GQ[:, -2:].detach()

    _, group_G, sizes = torch.unique(keys_G2, dim=0, return_inverse=True, return_counts=True)
    positives_G = (sizes - 1)[group_G]
    task_G = keys_G2[:, 0].long()
    anchors_T = torch.bincount(task_G[positives_G > 0], minlength=num_tasks)

    # Anchors only: a row without a positive would be 0/0. With no anchor at all the sums below are empty, zero, and
    # still tied to the gather, whose backward pass is a collective that every rank must reach.
    own_N = torch.arange(offset, offset + embeddings_NP.shape[0], device=embeddings_NP.device)
    own_A = own_N[positives_G[own_N] > 0]
    similarity_AG = all_GP[own_A] @ all_GP.T / temperature
    other_AG = own_A[:, None] != torch.arange(all_GP.shape[0], device=own_A.device)
    rival_AG = other_AG & (task_G[own_A, None] == task_G)
    positive_AG = other_AG & (group_G[own_A, None] == group_G)
    lse_A = torch.logsumexp(similarity_AG.masked_fill(~rival_AG, float("-inf")), dim=1)
    attraction_A = (similarity_AG * positive_AG).sum(dim=1) / positives_G[own_A]
    # A product and not index_add: the sum has the same order on every run, on a GPU too.
    is_task_AT = task_G[own_A, None] == torch.arange(num_tasks, device=own_A.device)
    shares_T = (lse_A - attraction_A) @ is_task_AT.to(lse_A.dtype) / anchors_T.clamp_min(1)
    return shares_T, anchors_T


class ContrastiveLoss:
    """Sum over tasks of their contrastive losses, scaled so that the mean over ranks is the global value.

    Args:
        tasks: those that take part, each with a pooled head and one label per post.
        temperature: divides the cosines.
        gather: differentiable gather over ranks (``comoe.distributed.gather_rows``).
        world_size: number of ranks W that the gradient is averaged over.
    """

    def __init__(self, tasks: Sequence[Task], *, temperature: float, gather: Gather, world_size: int) -> None:
        if not temperature > 0:
            raise ValueError(f"loss.contrastive.temperature ({temperature}) must be above 0; 0.1 is the default.")
        self.names = [task.name for task in tasks]
        self.temperature = temperature
        self.gather = gather
        self.world_size = world_size

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share of the term; terms ``contrastive`` and ``contrastive/<task>``, detached."""
        embeddings = torch.cat([output.embeddings[name] for name in self.names])
        labels = torch.cat([batch.labels[name] for name in self.names])
        tasks = torch.arange(len(self.names), device=labels.device).repeat_interleave(len(labels) // len(self.names))
        labelled = (labels != IGNORED).nonzero().squeeze(1)
        shares_T, _ = contrastive_sums(
            embeddings[labelled],
            tasks[labelled],
            labels[labelled],
            num_tasks=len(self.names),
            temperature=self.temperature,
            gather=self.gather,
        )
        shares_T = shares_T * self.world_size
        total = shares_T.sum()
        terms = {f"contrastive/{name}": share for name, share in zip(self.names, shares_T.detach(), strict=True)}
        return total, {"contrastive": total.detach(), **terms}
