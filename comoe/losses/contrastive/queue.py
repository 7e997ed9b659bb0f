"""Past embeddings of each task, to compare with beyond the batch (XBM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The last rows of each task, first in, first out; the same on all ranks, because all put in the same rows.

    Everything is a buffer of whole numbers, so that it goes into checkpoints and a cast of the
    model to bf16 leaves it alone; floating-point rows are kept as the bits of their float32 values.

    Args:
        num_tasks: tasks T.
        size: rows per task Q.
        width: P.
        num_keys: numbers per key K.

    Source: cross-batch memory, arXiv:1912.06798.
    """

    def __init__(self, num_tasks: int, *, size: int, width: int, num_keys: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("bits_TQP", torch.zeros(num_tasks, size, width, dtype=torch.int32))
        self.register_buffer(
            "key_bits_TQK", torch.zeros(num_tasks, size, num_keys, dtype=torch.int32)
        )
        self.register_buffer("posts_TQ", torch.zeros(num_tasks, size, dtype=torch.int64))
        self.register_buffer("added_T", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def read(self, task: int, *, added: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (Q, P), keys (Q, K), both float32, and posts (Q,) of what is there, in no order.

        Args:
            task: index of the task.
            added: ``added_T`` of the task, on the host.
        """
        filled = min(added, self.size)
        rows_QP = self.bits_TQP[task, :filled].view(torch.float32)
        return (
            rows_QP,
            self.key_bits_TQK[task, :filled].view(torch.float32),
            self.posts_TQ[task, :filled],
        )

    @torch.no_grad()
    def put(
        self, task: int, rows_NP: Tensor, keys_NK: Tensor, posts_N: Tensor, *, added: int
    ) -> None:
        """Put rows in, in the place of the oldest ones; a row that is not finite is left out.

        Args:
            task: index of the task.
            rows_NP: unit-length rows of all ranks, in the same order on all of them.
            keys_NK: their keys.
            posts_N: their posts.
            added: ``added_T`` of the task, on the host.
        """
        rows_NP = rows_NP.float()
        finite = rows_NP.isfinite().all(dim=1).nonzero()[:, 0]
        last = finite[-self.size :]
        # Where rows are left out at the front, the places go on as if they had been put in and
        # pushed out again.
        first = added + len(finite) - len(last)
        places = (first + torch.arange(len(last), device=last.device)) % self.size
        self.bits_TQP[task, places] = rows_NP[last].view(torch.int32)
        self.key_bits_TQK[task, places] = keys_NK[last].float().view(torch.int32)
        self.posts_TQ[task, places] = posts_N[last]
        self.added_T[task] += len(finite)
