"""Four ways to compute a contrastive loss, forward and backward, as one rank of several that one process plays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from comoe.losses.contrastive import ContrastiveLoss
from comoe.protocols import Batch, ModelOutput
from comoe.schema import ContrastiveConfig
from comoe.tasks.catalog import Task

TEMPERATURE = 0.1
LABELS = 3
"""Labels of the posts, as many as a sentiment task has."""
REFERENCE_POSTS = 4
"""Posts of one rank in the reference code's own settings."""


@dataclass(frozen=True, slots=True)
class Posts:
    """The posts of all ranks as the first rank has them before the loss begins."""

    own_BP: Tensor
    """Its embeddings."""
    others_GP: Tensor
    """Those of the other ranks: what their sends will bring."""
    labels_G: Tensor
    """Labels of all posts, its own first."""

    def everyone(self) -> Tensor:
        """What a gather makes: a new tensor with the rows of all ranks."""
        return torch.cat([self.own_BP, self.others_GP])


def make_posts(count: int, ranks: int, *, width: int) -> Posts:
    """Random unit-length rows with random labels, the same on every call."""
    draw = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(count, width, generator=draw), dim=1)
    own = count // ranks
    return Posts(rows[:own].clone(), rows[own:].clone(), torch.randint(0, LABELS, (count,), generator=draw))


def ours(posts: Posts) -> Callable[[], Tensor]:
    """The closed form."""
    task = Task("posts", "single_label", tuple(map(str, range(LABELS))), "accuracy", contrastive=True)
    own, ranks = len(posts.own_BP), len(posts.labels_G) // len(posts.own_BP)
    loss = ContrastiveLoss(
        (task,),
        ContrastiveConfig(temperature=TEMPERATURE),
        width=posts.own_BP.shape[1],
        gather=PlayedRanks(posts, ranks),
        world_size=ranks,
    )
    blank, ids = torch.ones(own, 1, dtype=torch.int64), torch.arange(own)
    batch = Batch(blank, blank, None, blank.bool(), ids, ids, {"posts": posts.labels_G[:own]})

    def step() -> Tensor:
        own_BP = posts.own_BP.detach().requires_grad_()
        loss(ModelOutput({}, {"posts": own_BP}, {}, (), ids[:0]), batch)[0].backward()
        return own_BP.grad

    return step


class PlayedRanks:
    """The gather of the first rank: its rows, then those that the others would send, into a new tensor.

    Only the numbers that the others compute from their own rows are made up: they are those of the first rank again.
    """

    def __init__(self, posts: Posts, ranks: int) -> None:
        self.ranks = ranks
        others = posts.labels_G[len(posts.own_BP) :, None]
        self.packed_GQ = torch.cat([posts.others_GP, others, torch.zeros(len(others), 1), others], dim=1)

    def __call__(self, rows: Tensor, *, sizes: Sequence[int] | None = None) -> tuple[Tensor, int]:
        is_packed = rows.shape[1] == self.packed_GQ.shape[1]
        return torch.cat([rows, self.packed_GQ]) if is_packed else rows.repeat(self.ranks, 1), 0


def full(posts: Posts) -> Callable[[], Tensor]:
    """Gather with gradient, and the matrix of all anchors with all rows, through autograd; as SupCon is published."""
    return lambda: _dense(posts.everyone().requires_grad_(), posts.labels_G, len(posts.labels_G))


def local(posts: Posts) -> Callable[[], Tensor]:
    """open_clip's ``local_loss``: this rank's anchors with all rows, gathered with gradient, through autograd."""
    return lambda: _dense(posts.everyone().requires_grad_(), posts.labels_G, len(posts.own_BP))


def reference(posts: Posts) -> Callable[[], Tensor]:
    """The loss of the code beside the TaCL-CoMoE paper: the few posts of one rank, normalised over the anchors."""

    def step() -> Tensor:
        rows_NP = posts.own_BP[:REFERENCE_POSTS].detach().requires_grad_()
        labels_N = posts.labels_G[:REFERENCE_POSTS]
        similarity_NN = F.normalize(rows_NP, dim=1) @ F.normalize(rows_NP, dim=1).T / TEMPERATURE
        other_NN = ~torch.eye(len(rows_NP), dtype=torch.bool)
        positive_NN = (labels_N[:, None] == labels_N) & other_NN
        exp_NN = similarity_NN.exp() * other_NN
        log_NN = similarity_NN - torch.log(exp_NN.sum(dim=0, keepdim=True) + 1e-12)
        (-(log_NN * positive_NN).sum(1) / (positive_NN.sum(1) + 1e-12)).mean().backward()
        return rows_NP.grad

    return step


def _dense(rows_GP: Tensor, labels_G: Tensor, anchors: int) -> Tensor:
    similarity_AG = (rows_GP[:anchors] / TEMPERATURE) @ rows_GP.T
    self_AG = torch.eye(anchors, len(rows_GP), dtype=torch.bool)
    positive_AG = (labels_G[:anchors, None] == labels_G) & ~self_AG
    lse_A = similarity_AG.masked_fill(self_AG, -torch.inf).logsumexp(dim=1)
    counts_A = (torch.bincount(labels_G) - 1)[labels_G[:anchors]]
    attraction_A = (similarity_AG * positive_AG).sum(dim=1) / counts_A.clamp_min(1)
    ((lse_A - attraction_A) * (counts_A > 0)).mean().backward()
    return rows_GP.grad


FORMS: dict[str, Callable[[Posts], Callable[[], Tensor]]] = {
    "ours": ours,
    "full": full,
    "local": local,
    "reference": reference,
}
"""Contestant -> (posts) -> one forward and backward pass, which gives the gradient of the rows it began with."""
