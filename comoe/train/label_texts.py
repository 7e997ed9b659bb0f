"""Heads that start at texts which say what their labels mean: ``tasks.<name>.descriptions``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.data.tokens.split import TokenizedSplit, TokenRow
from comoe.distributed import broadcast_object, is_main
from comoe.models.encoders.build import build_encoder
from comoe.models.encoders.families import layers_of, reads_segments
from comoe.models.encoders.input_scaling import note_inputs
from comoe.models.heads import TaskHead
from comoe.models.model import MultiTaskModel
from comoe.tasks.task import head_tasks

POSTS = 256
"""Most training posts of a task that center and scale of its first logits are taken from."""

ROWS = 32
"""Rows of one pass of the encoder."""


def start_heads(
    model: MultiTaskModel,
    recipe: Recipe,
    collator: Collator,
    train: TokenizedSplit,
    *,
    device: torch.device,
) -> None:
    """Let the heads of tasks with ``descriptions`` start at their texts (``TaskHead.start_at``).

    Texts and posts are pooled by the head itself, over the last states of the pre-trained encoder
    alone, which rank 0 reads once more, whole under ZeRO-3 too. Every rank must call it, before
    DeepSpeed takes the model.

    Args:
        model: with its first weights.
        recipe: resolved.
        collator: of the run.
        train: the training posts.
        device: where rank 0 runs the encoder.

    Raises:
        ValueError: an encoder that cannot read text without an image.
    """
    heads = dict(zip(head_tasks(model.tasks).values(), model.heads, strict=True))
    described = {task: head for task, head in heads.items() if recipe.tasks[task.name].descriptions}
    if not described:
        return
    if model.fusion is not None and model.tower is None:
        raise ValueError(
            f"tasks.{next(iter(described)).name}.descriptions are texts without an image, but model.encoder "
            f"({recipe.model.encoder}) reads both in one stream; leave them out, or choose an encoder of text."
        )
    if is_main():
        with torch.random.fork_rng([]):
            encoder, lower = build_encoder(recipe.model).to(device).eval(), []
        note_inputs(layers_of(encoder), lower.append)
    for task, head in described.items():
        if is_main():
            texts = [recipe.tasks[task.name].descriptions[label] for label in task.labels]
            described_labels = collator.encode_texts(texts, config=recipe.data, asked=[task])
            posts = np.flatnonzero(train.labelled[:, model.tasks.index(task)])[:POSTS]
            rows = (described_labels.rows(np.arange(len(texts))), train.rows(posts))
            head.start_at(*(_pooled(encoder, lower, head, some) for some in rows))
        for weights in head.output.parameters():
            weights.data = broadcast_object(weights.data)


@torch.no_grad()
def _pooled(
    encoder: nn.Module, lower: list[Tensor], head: TaskHead, rows: Sequence[TokenRow]
) -> Tensor:
    """Pooled states of some texts, (N, M), on the CPU; ``lower`` is filled with what layers read."""
    device = next(encoder.parameters()).device
    found = []
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        arguments = {
            "input_ids": _padded([row.input_ids for row in some]).to(device),
            "attention_mask": _padded([np.ones(len(row.input_ids)) for row in some]).to(device),
        }
        if reads_segments(encoder.config):
            arguments["token_type_ids"] = _padded([row.token_types for row in some]).to(device)
        lower.clear()
        last_NLM = encoder(**arguments).last_hidden_state
        states_NLM = head.mixed([states.cpu() for states in (*lower, last_NLM)])
        found.append(head.pool(states_NLM, arguments["attention_mask"].cpu())[0])
    return torch.cat(found)


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    # Zeros behind the real tokens, which no mask lets through.
    return pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True)
