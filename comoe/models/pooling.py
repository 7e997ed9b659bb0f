"""What posts are pooled by: over their tokens, over the layers of the encoder, over posts that are read together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INSTANCE_WIDTH = 128
"""Hidden width of the attention over posts, as in the paper."""


class AttentionPooling(nn.Module):
    """Weighted mean of the real tokens' states; a learned query decides the weights.

    Args:
        model_width: M.

    Source: task-specific attention of Stein & Keller and TaCL-CoMoE; the weights are the
    explanation shown to users.
    """

    mixes_layers = False
    """Whether the states are a mixture of all layers'."""
    learned = True
    """Whether each task learns to pool the same states in its own way."""

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


class LayersPooling(AttentionPooling):
    """``AttentionPooling`` of the task's own mixture of all layers' states."""

    mixes_layers = True


class MeanPooling(nn.Module):
    """Mean of the real tokens' states; arguments and results as for ``AttentionPooling``.

    Args:
        model_width: M.
    """

    mixes_layers = learned = False

    def __init__(self, model_width: int) -> None:
        super().__init__()

    def forward(self, hidden_BLM: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled states (B, M) and equal weights (B, L) of the real tokens."""
        weights_BL = mask_BL.float() / mask_BL.sum(dim=1, keepdim=True)
        pooled_BM = torch.einsum("bl,blm->bm", weights_BL, hidden_BLM.float())
        return pooled_BM.to(hidden_BLM.dtype), weights_BL


class FirstPooling(MeanPooling):
    """State of the first token, which BERT and its like are trained to put a text's sense into."""

    def forward(self, hidden_BLM: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled states (B, M) and weights (B, L), 1 on the first token."""
        is_first_L = torch.arange(mask_BL.shape[1], device=mask_BL.device) == 0
        return hidden_BLM[:, 0], is_first_L.float().expand(mask_BL.shape)


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
    "first": FirstPooling,
    "last": LastPooling,
    "layers": LayersPooling,
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


class LayerMixture(nn.Module):
    """A task's mixture of the states of all layers: gamma times their mean by softmax(w), at the start the plain mean.

    Args:
        num_states: layers, and one for what the first one reads.

    Source: Peters et al. 2018, ELMo, arXiv:1802.05365, equation 1.
    """

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_states))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Mix states (B, L, M), the lowest first; in their dtype, of shares in float32 or wider."""
        wide = torch.promote_types(states[0].dtype, torch.float32)
        shares = torch.softmax(self.weights.to(wide), dim=0) * self.scale.to(wide)
        return sum(share * state_BLM for share, state_BLM in zip(shares, states, strict=True))
