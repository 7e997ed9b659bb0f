"""Task heads, what tasks have behind the encoder, and second logits for gradients at the shared states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.models.moe.experts import GatedFeedForward
from comoe.models.pooling import OVER_POSTS, POOLINGS, LayerMixture
from comoe.tasks.task import Task
from comoe.types import IGNORED, Probe

FIRST_LOGITS = 0.5
"""Standard deviation of the logits of a head that starts at texts: a likely label has about twice
the probability of an unlikely one, so that texts which mislead cost little."""

LEAST_SPREAD = 1e-3
"""Least standard deviation that is scaled to it, as a share of the states' length."""


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
        num_layers: of the encoder, for a pooling that mixes them.
    """

    def __init__(
        self,
        task: Task,
        model_width: int,
        *,
        dropout: float,
        pooling: str = "attention",
        num_layers: int = 0,
    ) -> None:
        super().__init__()
        self.mode = task.mode
        self.mixture = LayerMixture(num_layers + 1) if POOLINGS[pooling].mixes_layers else None
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

    def mixed(self, states: Sequence[Tensor]) -> Tensor:
        """What the head reads of the states of all layers, (B, L, M): the last ones, or their mixture."""
        return states[-1] if self.mixture is None else self.mixture(states)

    def pool(self, hidden_BLM: Tensor, mask_BL: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Pooled states (B, M) and weights (B, L); None for a head that does not pool."""
        return (None, None) if self.pooling is None else self.pooling(hidden_BLM, mask_BL)

    def forward(
        self, hidden_BLM: Tensor, mask_BL: Tensor, bags_B: Tensor | None = None
    ) -> HeadOutput:
        """Logits of every row; rows of other tasks too, so that every parameter gets a gradient on every rank.

        Rows that are read together (``bags_B``, None where each is alone) have the same.
        """
        return self.predict(hidden_BLM, *self.pool(hidden_BLM, mask_BL), bags_B)

    def predict(
        self,
        hidden_BLM: Tensor,
        pooled_BM: Tensor | None,
        attention_BL: Tensor | None,
        bags_B: Tensor | None,
    ) -> HeadOutput:
        """Logits from the states and what ``pool`` made of them, as ``forward``."""
        weights_B = None
        if self.over_posts is not None:
            if bags_B is None:
                bags_B = torch.arange(len(pooled_BM), device=pooled_BM.device)
            pooled_BM, weights_B = self.over_posts(pooled_BM, bags_B)
        if self.mode == "tokens":
            return HeadOutput(self.output(self.dropout(hidden_BLM)).float(), pooled_BM, None)
        # Without outputs: no columns, yet part of the graph.
        logits = pooled_BM[:, :0] if self.output is None else self.output(self.dropout(pooled_BM))
        return HeadOutput(logits.float(), pooled_BM, attention_BL, weights_B)


def projection_of(
    heads: Sequence[TaskHead], model_width: int, width: int, *, decodes: bool
) -> nn.Linear | None:
    """Makes embeddings of pooled states. None without a head that pools: nothing to project, and no gradient.

    Models of tags alone have always had one.
    """
    if not any(head.pooling is not None for head in heads) and (decodes or not heads):
        return None
    projection = nn.Linear(model_width, width, bias=False)
    nn.init.normal_(projection.weight, std=0.02)
    return projection


def run_heads(
    heads: Sequence[TaskHead],
    read: Callable[[int], Tensor],
    mask_BL: Tensor,
    bags_B: Tensor | None,
    attention: TaskAttention | None,
    only: int | None = None,
) -> list[HeadOutput]:
    """Outputs of all heads, or of one of them; with attention between the tasks that pool.

    What tasks have pooled of a post looks at one another before posts are read together.

    Args:
        heads: the heads.
        read: place of a head -> the states that it reads, (B, L, M).
        mask_BL: 1 on real tokens.
        bags_B: ``Batch.bags_B``.
        attention: between what they pool, None for none.
        only: place of the one.
    """
    places = range(len(heads)) if only is None else (only,)
    if attention is None:
        return [heads[place](read(place), mask_BL, bags_B) for place in places]
    states = [read(place) for place in range(len(heads))]
    pools = [list(head.pool(own, mask_BL)) for head, own in zip(heads, states, strict=True)]
    taking_part = [pool for head, pool in zip(heads, pools, strict=True) if head.mode == "pooled"]
    seen_BTM = attention(torch.stack([pooled_BM for pooled_BM, _ in taking_part], dim=1))
    for pool, seen_BM in zip(taking_part, seen_BTM.unbind(1), strict=True):
        pool[0] = seen_BM
    return [heads[place].predict(states[place], *pools[place], bags_B) for place in places]


def probe(
    shared_BLM: Tensor,
    tasks: Mapping[int, Task],
    predict: Callable[[int, Tensor], Tensor],
) -> Probe:
    """Run what each task has for itself on a copy of its own of the shared states, gradients on, whatever is around.

    It is a second run, because ZeRO-3 counts the backward passes of a module and allows one for
    each forward pass. It draws the dropout that the tasks draw next, and leaves the random numbers
    as they were.

    Args:
        shared_BLM: the last states that all tasks read.
        tasks: number -> task, in the order in which they draw dropout.
        predict: (number of the task, shared states) -> its head's logits.
    """
    states, logits = {}, {}
    with (
        torch.random.fork_rng([shared_BLM.device] if shared_BLM.is_cuda else []),
        torch.enable_grad(),
    ):
        for number, task in tasks.items():
            states[task.name] = shared_BLM.detach().requires_grad_()
            logits[task.name] = predict(number, states[task.name])
    return Probe(states, logits)


class MaskedWordHead(nn.Module):
    """Finds hidden tokens: linear layer, GELU, norm, and the input embeddings as output layer, with a bias.

    Args:
        embedding: the encoder's input embeddings; of their weights the head has no copy.
        model_width: M.

    Source: BERT, arXiv:1810.04805.
    """

    def __init__(self, embedding: nn.Embedding, model_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(model_width, embedding.embedding_dim)
        self.norm = nn.LayerNorm(embedding.embedding_dim)
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, states_BLM: Tensor, masked_ids_BL: Tensor, embedding: nn.Embedding) -> Tensor:
        """Log-probability of each row's hidden tokens, and how many are the likeliest, float32, (B, 2).

        The vocabulary is read at hidden tokens alone. Without any the result is 0 and connected to
        every weight.
        """
        rows_N, columns_N = (masked_ids_BL != IGNORED).nonzero(as_tuple=True)
        ids_N = masked_ids_BL[rows_N, columns_N]
        x_NE = self.norm(F.gelu(self.dense(states_BLM[rows_N, columns_N])))
        logits_NV = F.linear(x_NE, embedding.weight, self.bias)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        logs_N = -F.cross_entropy(logits_NV, ids_N, reduction="none")
        right_N = (logits_NV.argmax(dim=1) == ids_N).to(logs_N.dtype)
        found_N2 = torch.stack([logs_N, right_N], dim=1)
        return found_N2.new_zeros(len(states_BLM), 2).index_add(0, rows_N, found_N2)


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


class TaskAttention(nn.Module):
    """What tasks have pooled of a row look at one another; what each finds is added to it.

    x + W_o softmax(q k^T / sqrt(width)) v over the tasks of a row, with q, k, v = W_(q, k, v) (norm(x) + e) and a
    vector e of each task. W_o begins at 0, so at the start nothing is added.

    Args:
        num_tasks: T, of those that pool.
        model_width: M.
        width: ``model.task_attention_width``.

    Source: cross-task attention, Lopes et al. 2023, arXiv:2206.08927; scaled dot products of Vaswani
    et al. 2017, arXiv:1706.03762, with one head.
    """

    def __init__(self, num_tasks: int, model_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model_width)
        self.tasks_TM = nn.Parameter(torch.empty(num_tasks, model_width))
        nn.init.normal_(self.tasks_TM, std=0.02)
        self.query, self.key, self.value = (
            nn.Linear(model_width, width, bias=False) for _ in range(3)
        )
        self.output = nn.Linear(width, model_width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, pooled_BTM: Tensor) -> Tensor:
        """The pooled states with what each task found, (B, T, M)."""
        x_BTM = self.norm(pooled_BTM) + self.tasks_TM
        scores_BTT = self.query(x_BTM) @ self.key(x_BTM).mT / self.query.out_features**0.5
        weights_BTT = torch.softmax(scores_BTT.float(), dim=2).to(scores_BTT.dtype)
        return pooled_BTM + self.output(weights_BTT @ self.value(x_BTM))


def attention_of(heads: Sequence[TaskHead], model_width: int, width: int) -> TaskAttention | None:
    """Attention between the tasks of heads that pool; None where ``width`` is 0, or there are not two."""
    pooled = sum(head.mode == "pooled" for head in heads)
    return TaskAttention(pooled, model_width, width) if width and pooled > 1 else None
