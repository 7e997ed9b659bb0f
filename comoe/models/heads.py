"""Pooling, task heads, private parts, and second logits for gradients at the shared states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.models.moe.experts import GatedFeedForward
from comoe.tasks.task import Task
from comoe.types import Probe

INSTANCE_WIDTH = 128
"""Hidden width of the attention over posts, as in the paper."""

FIRST_LOGITS = 0.5
"""Standard deviation of the logits of a head that starts at texts: a likely label has about twice
the probability of an unlikely one, so that texts which mislead cost little."""

LEAST_SPREAD = 1e-3
"""Least standard deviation that is scaled to it, as a share of the states' length."""


class AttentionPooling(nn.Module):
    """Weighted mean of the real tokens' states; a learned query decides the weights.

    Args:
        model_width: M.

    Source: task-specific attention of Stein & Keller and TaCL-CoMoE; the weights are the
    explanation shown to users.
    """

    def __init__(self, model_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(model_width))
        nn.init.normal_(self.query, std=0.02)

    def forward(self, hidden_BLM: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Pool each row.

        Args:
            hidden_BLM: the encoder's last states.
            mask_BL: 1 on real tokens, at least one per row.

        Returns:
            Pooled states (B, M) in the states' dtype and weights (B, L), float32, zero on padding;
            rows sum to 1.
        """
        # One float32 copy in bf16, none in float32.
        wide_BLM = hidden_BLM.float()
        scores_BL = wide_BLM @ self.query.float()
        attention_BL = torch.softmax(scores_BL.masked_fill(mask_BL == 0, float("-inf")), dim=1)
        pooled_BM = torch.einsum("bl,blm->bm", attention_BL, wide_BLM)
        return pooled_BM.to(hidden_BLM.dtype), attention_BL


class MeanPooling(nn.Module):
    """Mean of the real tokens' states; arguments and results as for ``AttentionPooling``.

    Args:
        model_width: M.
    """

    def __init__(self, model_width: int) -> None:
        super().__init__()

    def forward(self, hidden_BLM: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled states (B, M) and equal weights (B, L) of the real tokens."""
        weights_BL = mask_BL.float() / mask_BL.sum(dim=1, keepdim=True)
        pooled_BM = torch.einsum("bl,blm->bm", weights_BL, hidden_BLM.float())
        return pooled_BM.to(hidden_BLM.dtype), weights_BL


class LastPooling(MeanPooling):
    """State of the last real token, which alone has seen all others in a decoder-only model."""

    def forward(self, hidden_BLM: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled states (B, M) and weights (B, L), 1 on the last real token."""
        last_B = mask_BL.sum(dim=1) - 1
        weights_BL = F.one_hot(last_B, mask_BL.shape[1]).float()
        rows_B = torch.arange(len(last_B), device=last_B.device)
        return hidden_BLM[rows_B, last_B], weights_BL


POOLINGS: dict[str, type[nn.Module]] = {
    "attention": AttentionPooling,
    "mean": MeanPooling,
    "last": LastPooling,
}
"""Word in ``model.pooling`` -> module."""


class AuthorPooling(nn.Module):
    """Weighted mean of the pooled states of an author's posts: softmax over w . tanh(V h) of the author's rows.

    It begins near the plain mean.

    Args:
        model_width: M.

    Source: attention-based multiple instance learning, Ilse et al. 2018, arXiv:1802.04712, eq. 8.
    """

    def __init__(self, model_width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(model_width, INSTANCE_WIDTH)
        self.score = nn.Linear(INSTANCE_WIDTH, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, pooled_BM: Tensor, bags_B: Tensor) -> tuple[Tensor, Tensor]:
        """Pool the rows of each bag.

        Args:
            pooled_BM: pooled states of single posts.
            bags_B: ``Batch.bags_B``.

        Returns:
            States (B, M), on each row that of its bag, in the dtype of the posts', and the weight of each row in its
            bag (B,), float32.
        """
        scores_B = self.score(torch.tanh(self.hidden(pooled_BM))).float().squeeze(1)
        same_BB = bags_B[:, None] == bags_B
        weights_BB = torch.softmax(scores_B.masked_fill(~same_BB, float("-inf")), dim=1)
        mixed_BM = (weights_BB @ pooled_BM.float()).to(pooled_BM.dtype)
        return mixed_BM, weights_BB.diagonal()


class NeighborPooling(nn.Module):
    """Adds to a post's state what attention finds in its neighbors: one hop of a graph of posts.

    With h the post, n_j its neighbors, n the mean of these by softmax over w . tanh(V n_j + U h): h + W2 gelu(W1 [h;
    n]). W2 begins at 0, so at the start a post is read alone; n is 0 where it has no neighbor.

    Args:
        model_width: M.

    Source: graph attention networks, Velickovic et al. 2018, arXiv:1710.10903, with additive attention and a residual.
    """

    def __init__(self, model_width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(model_width, INSTANCE_WIDTH)
        self.center = nn.Linear(model_width, INSTANCE_WIDTH, bias=False)
        self.score = nn.Linear(INSTANCE_WIDTH, 1, bias=False)
        self.mix = nn.Linear(2 * model_width, model_width)
        self.output = nn.Linear(model_width, model_width)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, pooled_BM: Tensor, bags_B: Tensor) -> tuple[Tensor, Tensor]:
        """As ``AuthorPooling``; the first row of a bag is the post, whose weight is 0."""
        same_BB = bags_B[:, None] == bags_B
        # The first row of each row's bag.
        first_B = same_BB.int().argmax(dim=1)
        posts_BM = pooled_BM[first_B]
        hidden_BH = torch.tanh(self.center(posts_BM) + self.hidden(pooled_BM))
        scores_B = self.score(hidden_BH).float().squeeze(1)
        rows_B = torch.arange(len(first_B), device=first_B.device)
        near_BB = same_BB & (first_B != rows_B)
        has_B1 = near_BB.any(dim=1, keepdim=True)
        scores_BB = scores_B.masked_fill(~near_BB & has_B1, float("-inf"))
        weights_BB = torch.softmax(scores_BB, dim=1) * has_B1
        mixed_BM = (weights_BB @ pooled_BM.float()).to(pooled_BM.dtype)
        update_BM = self.output(F.gelu(self.mix(torch.cat([posts_BM, mixed_BM], dim=1))))
        return posts_BM + update_BM.to(posts_BM.dtype), weights_BB.diagonal()


OVER_POSTS: dict[str, type[nn.Module]] = {"author": AuthorPooling, "neighbors": NeighborPooling}
"""``Task.reads`` -> module over the pooled states of what is read together."""


def mean_state(hidden_NLM: Tensor, mask_NL: Tensor) -> Tensor:
    """Mean over real tokens, (N, M)."""
    weights_NL = mask_NL.to(hidden_NLM.dtype)
    return torch.einsum("nlm,nl->nm", hidden_NLM, weights_NL) / weights_NL.sum(dim=1, keepdim=True)


class HeadOutput(NamedTuple):
    """Of one head."""

    logits: Tensor
    """Float32, (B, Y), or (B, L, Y) per token."""
    pooled_BM: Tensor | None
    """Pooled states; None for a head on tokens that takes no part in the contrastive loss."""
    attention_BL: Tensor | None
    """Pooling weights that explain the prediction; None for a head on tokens, whose prediction does
    not come from them."""
    weights_B: Tensor | None = None
    """Weight of each row among those that are read together; None where each is alone."""


class TaskHead(nn.Module):
    """Pooling (where a task labels tokens only for the contrastive loss), dropout, linear layer (where it has outputs).

    Args:
        task: decides the number of outputs and whether they are per token.
        model_width: M.
        dropout: probability before the linear layer.
        pooling: ``model.pooling``.
    """

    def __init__(
        self, task: Task, model_width: int, *, dropout: float, pooling: str = "attention"
    ) -> None:
        super().__init__()
        self.mode = task.mode
        self.pooling = (
            POOLINGS[pooling](model_width) if self.mode == "pooled" or task.contrastive else None
        )
        self.over_posts = OVER_POSTS[task.reads](model_width) if task.reads in OVER_POSTS else None
        self.dropout = nn.Dropout(dropout)
        num_outputs = task.rules.num_outputs(task.labels)
        self.output = nn.Linear(model_width, num_outputs) if num_outputs else None
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=0.02)
            nn.init.zeros_(self.output.bias)

    @torch.no_grad()
    def start_at(self, texts_YM: Tensor, posts_BM: Tensor) -> None:
        """Let the logits start as the likeness of a post to the texts of the labels.

        w_y = a d_y / |d_y| with d_y = t_y - mean t, and b_y = -w_y . mean p: the mean post is of no
        label, and a gives the logits of the posts the standard deviation ``FIRST_LOGITS``. Centered
        on the texts instead, logits of short plain sentences would favor one label for all posts.

        Args:
            texts_YM: pooled states of the labels' texts.
            posts_BM: of some posts of the task.
        """
        texts_YM, posts_BM = texts_YM.double(), posts_BM.double()
        directions_YM = F.normalize(texts_YM - texts_YM.mean(dim=0), dim=1)
        mean_M = posts_BM.mean(dim=0)
        spread = ((posts_BM - mean_M) @ directions_YM.T).square().mean().sqrt()
        # Posts that are all alike say nothing of the scale.
        least = LEAST_SPREAD * posts_BM.norm(dim=1).mean()
        weight_YM = FIRST_LOGITS / spread.clamp_min(least) * directions_YM
        self.output.weight.copy_(weight_YM)
        self.output.bias.copy_(-weight_YM @ mean_M)

    def forward(
        self, hidden_BLM: Tensor, mask_BL: Tensor, bags_B: Tensor | None = None
    ) -> HeadOutput:
        """Logits of every row; rows of other tasks too, so that every parameter gets a gradient on every rank.

        Rows that are read together (``bags_B``, None where each is alone) have the same.
        """
        pooled_BM = attention_BL = weights_B = None
        if self.pooling is not None:
            pooled_BM, attention_BL = self.pooling(hidden_BLM, mask_BL)
        if self.over_posts is not None:
            if bags_B is None:
                bags_B = torch.arange(len(mask_BL), device=mask_BL.device)
            pooled_BM, weights_B = self.over_posts(pooled_BM, bags_B)
        if self.mode == "tokens":
            return HeadOutput(self.output(self.dropout(hidden_BLM)).float(), pooled_BM, None)
        # Without outputs: no columns, yet part of the graph.
        logits = pooled_BM[:, :0] if self.output is None else self.output(self.dropout(pooled_BM))
        return HeadOutput(logits.float(), pooled_BM, attention_BL, weights_B)


def probe(
    shared_BLM: Tensor,
    tasks: Sequence[Task],
    predict: Callable[[int, Tensor], Tensor],
) -> Probe:
    """Run what each task has for itself on a copy of its own of the shared states, gradients on, whatever is around.

    It is a second run, because ZeRO-3 counts the backward passes of a module and allows one for
    each forward pass. It draws the dropout that the tasks draw next, and leaves the random numbers
    as they were.

    Args:
        shared_BLM: the last states that all tasks read.
        tasks: the tasks.
        predict: (number of the task, shared states) -> its head's logits.
    """
    states, logits = {}, {}
    with (
        torch.random.fork_rng([shared_BLM.device] if shared_BLM.is_cuda else []),
        torch.enable_grad(),
    ):
        for number, task in enumerate(tasks):
            states[task.name] = shared_BLM.detach().requires_grad_()
            logits[task.name] = predict(number, states[task.name])
    return Probe(states, logits)


class PrivatePart(nn.Module):
    """A task's own gated feed-forward on the last shared states: norm, feed-forward, dropout; its output is added.

    Its output projection begins at 0, so at the start every task reads the shared states as they
    are.

    Args:
        model_width: M.
        width: ``model.private_width``.
        dropout: probability on the update.

    Source: the shared-private scheme of Liu et al. 2017, arXiv:1704.05742, as a residual.
    """

    def __init__(self, model_width: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model_width)
        self.feed_forward = GatedFeedForward(model_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, shared_BLM: Tensor) -> Tensor:
        """What is added to the shared states, (B, L, M)."""
        return self.dropout(self.feed_forward(self.norm(shared_BLM))).to(shared_BLM.dtype)
