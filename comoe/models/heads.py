"""Task heads: attention pooling and a linear layer, a linear layer on each token, or pooling alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from comoe.tasks.catalog import Task


class AttentionPooling(nn.Module):
    """Weighted mean of the real tokens' states; a learned query decides the weights.

    Args:
        model_width: M.

    Source: task-specific attention of Stein & Keller and TaCL-CoMoE; the weights are the explanation shown to users.
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
            Pooled states (B, M) in the states' dtype and weights (B, L), float32, zero on padding, rows sum to 1.
        """
        # One float32 copy in bf16, none in float32.
        wide_BLM = hidden_BLM.float()
        scores_BL = wide_BLM @ self.query.float()
        attention_BL = torch.softmax(scores_BL.masked_fill(mask_BL == 0, float("-inf")), dim=1)
        pooled_BM = torch.einsum("bl,blm->bm", attention_BL, wide_BLM)
        return pooled_BM.to(hidden_BLM.dtype), attention_BL


class HeadOutput(NamedTuple):
    """What one head answers."""

    logits: Tensor
    """Float32, (B, Y), or (B, L, Y) per token."""
    pooled_BM: Tensor | None
    """Pooled states; None for a head on tokens that takes no part in the contrastive loss."""
    attention_BL: Tensor | None
    """Pooling weights that explain the answer; None for a head on tokens, whose answer does not come from them."""


class TaskHead(nn.Module):
    """Pooling (where a task labels tokens only for the contrastive loss), dropout, linear layer (where it has outputs).

    Args:
        task: decides the number of outputs and whether the answer is per token.
        model_width: M.
        dropout: probability before the linear layer.
    """

    def __init__(self, task: Task, model_width: int, *, dropout: float) -> None:
        super().__init__()
        self.per_token = task.rules.per_token
        self.pooling = AttentionPooling(model_width) if task.rules.pooled or task.contrastive else None
        self.dropout = nn.Dropout(dropout)
        num_outputs = task.rules.num_outputs(task.labels)
        self.output = nn.Linear(model_width, num_outputs) if num_outputs else None
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=0.02)
            nn.init.zeros_(self.output.bias)

    def forward(self, hidden_BLM: Tensor, mask_BL: Tensor) -> HeadOutput:
        """Answer every row; rows of other tasks too, so that every parameter gets a gradient on every rank."""
        pooled_BM, attention_BL = (None, None) if self.pooling is None else self.pooling(hidden_BLM, mask_BL)
        if self.per_token:
            return HeadOutput(self.output(self.dropout(hidden_BLM)).float(), pooled_BM, None)
        # Without outputs: no columns, yet part of the graph.
        logits = pooled_BM[:, :0] if self.output is None else self.output(self.dropout(pooled_BM))
        return HeadOutput(logits.float(), pooled_BM, attention_BL)
