"""The whole model in plain PyTorch: encoder with cooperative blocks, one head per task, one shared projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from comoe.models.encoder import build_encoder, build_encoder_from_config
from comoe.models.families import attach_blocks, freeze_encoder, reads_segments
from comoe.models.gate import ROUTES
from comoe.models.heads import TaskHead
from comoe.models.moe import ContextHolder, CooperativeBlock, RoutingContext, without_tokens
from comoe.models.recompute import recompute_layers
from comoe.protocols import Batch, ModelOutput
from comoe.schema import ModelConfig
from comoe.tasks.catalog import Task

HEAD_DROPOUT = 0.1
"""Dropout of the heads where ``model.dropout`` is null."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers that DeepSpeed reads from ``model.config``; the names are its own."""

    hidden_size: int
    """Model width M."""
    num_local_experts: int
    """Experts per layer E."""
    num_experts_per_tok: int
    """Experts per token k."""
    model_type: str = "comoe"
    """A name that AutoEP has no preset for."""


class MultiTaskModel(nn.Module):
    """Posts in, every task's answer out; knows no loss.

    Args:
        encoder: a model of ``build_encoder``; blocks are attached to it here.
        tasks: in the order of the task ids.
        config: ``model``.
        recompute: keep only each layer's input for the backward pass (activation checkpointing).
    """

    def __init__(
        self, encoder: nn.Module, tasks: Sequence[Task], config: ModelConfig, *, recompute: bool = False
    ) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.config = ModelShape(width, config.moe.num_experts, config.moe.top_k)
        self.tasks = tuple(tasks)
        self.holder = ContextHolder()
        self.encoder = encoder
        self.has_segments = reads_segments(encoder.config)
        # Before the blocks: they train in every layer.
        freeze_encoder(encoder, config.train_layers)
        self._blocks = tuple(attach_blocks(encoder, config.moe, self.holder))
        if recompute:
            recompute_layers(encoder, self.holder)
        reads_task = bool(self._blocks) and ROUTES[config.moe.route_by].task
        self.task_embedding = nn.Embedding(len(tasks), config.moe.task_embedding_width) if reads_task else None
        dropout = HEAD_DROPOUT if config.dropout is None else config.dropout
        # A list, not a dict by name: a task may be called "type" or "expert", which torch and DeepSpeed keep for
        # themselves.
        self.heads = nn.ModuleList(TaskHead(task, width, dropout=dropout) for task in self.tasks)
        self.projection = nn.Linear(width, config.projection_width, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)

    def forward(self, batch: Batch, picks: Sequence[Tensor] = ()) -> ModelOutput:
        """Answer every task on every row.

        Args:
            batch: the rows.
            picks: per layer with experts, the experts (S, k) that an earlier pass over the same batch picked; this one
                routes every token as that one did.
        """
        # One device-to-host wait per forward: the number of real tokens decides shapes.
        rows_S, columns_S = batch.attention_mask_BL.nonzero(as_tuple=True)
        context = RoutingContext(rows_S * batch.attention_mask_BL.shape[1] + columns_S, rows_S)
        context.picks = dict(zip((block.layer for block in self._blocks), picks, strict=False))
        if self.task_embedding is not None:
            # A filler row has no task; its answer is never used, so any embedding will do.
            context.task_embeddings_BD = self.task_embedding(batch.task_ids_B.clamp_min(0))
        hidden_BLM = self.encode(batch, context)
        logits, embeddings, attentions = {}, {}, {}
        for task, head in zip(self.tasks, self.heads, strict=True):
            answer = head(hidden_BLM, batch.attention_mask_BL)
            logits[task.name] = answer.logits
            if answer.pooled_BM is not None:
                embeddings[task.name] = F.normalize(self.projection(answer.pooled_BM).float(), dim=1)
                attentions[task.name] = answer.attention_BL
        routings = tuple(routing for _, routing in sorted(context.routings.items()))
        # A filler row stands alone. Its tokens had to run, but no loss and no statistic may count them.
        if len(batch.row_ids_B) == 1 and int(batch.row_ids_B) < 0:
            routings, rows_S = tuple(map(without_tokens, routings)), rows_S[:0]
        return ModelOutput(logits, embeddings, attentions, routings, rows_S)

    def encode(self, batch: Batch, context: RoutingContext) -> Tensor:
        """The encoder's last states (B, L, M); ``context`` collects the routings."""
        segments = {"token_type_ids": batch.token_type_ids_BL} if self.has_segments else {}
        self.holder.context = context
        try:
            answer = self.encoder(batch.input_ids_BL, attention_mask=batch.attention_mask_BL, **segments)
        finally:
            self.holder.context = None
        return answer.last_hidden_state

    def moe_layers(self) -> list[CooperativeBlock]:
        """The cooperative blocks in layer order."""
        return list(self._blocks)


def parameter_group(name: str) -> str:
    """Which learning rate a parameter follows: "encoder", "experts" or "heads", from its path.

    Blocks and the task embedding are "experts": everything that is new beside the pre-trained layers.
    """
    parts = name.split(".")
    groups = [PARAMETER_GROUPS[part] for part in parts if part in PARAMETER_GROUPS]
    assert groups, f"{name} lies in none of the modules {', '.join(PARAMETER_GROUPS)} of MultiTaskModel"
    # The blocks live inside the encoder they are attached to.
    return "experts" if groups[0] == "encoder" and "block" in parts else groups[0]


def build_model(
    config: ModelConfig,
    tasks: Sequence[Task],
    *,
    encoder_config: dict[str, Any] | None = None,
    recompute: bool = False,
) -> MultiTaskModel:
    """Build the model; deterministic in torch's seed, so every rank that seeds alike gets the same weights.

    Args:
        config: ``model``; ``config.encoder`` must be a folder or hub name here.
        tasks: the tasks in the order of their ids.
        encoder_config: ``encoder.config.to_dict()`` of an export: no pre-trained weights are read then.
        recompute: activation checkpointing, see ``MultiTaskModel``.
    """
    if encoder_config is None:
        encoder = build_encoder(config)
    else:
        encoder = build_encoder_from_config(encoder_config, dropout=config.dropout)
    return MultiTaskModel(encoder, tasks, config, recompute=recompute)


PARAMETER_GROUPS: dict[str, str] = {
    "encoder": "encoder",
    "task_embedding": "experts",
    "heads": "heads",
    "projection": "heads",
}
"""Child of ``MultiTaskModel`` -> group of its parameters."""
