"""Between the shared encoder and a task's head what is the task's alone; before the encoder how much a post counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comoe.models.encoders.families import family_of, layers_of
from comoe.models.moe.block import ContextHolder
from comoe.tasks.task import Task
from comoe.types import Batch, labelled_rows

FAINTEST = 0.01
"""Least factor on what the encoder reads. Norms divide by the size of what is there: of nothing,
with no bias behind it (in a new encoder), each one multiplies the gradient by a million, until it
is not finite."""


def scale_inputs(encoder: nn.Module, holder: ContextHolder) -> None:
    """Let the encoder multiply the output of its embeddings, after their norm, by the weight of each row; in place.

    Args:
        encoder: a model of ``build_encoder``. Encoder-decoders and decoder-only models have no
            module of all that their embeddings do, so it is what the first layer reads; the decoder
            of an encoder-decoder reads its own words as they are.
        holder: its context has the weights of the running encode, None for all 1.
    """

    def scaled(states: Tensor) -> Tensor:
        weights_B = holder.context.input_weights_B
        return states if weights_B is None else states * weights_B.to(states.dtype)[:, None, None]

    def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
        # An encoder of text and pixels returns its mask too.
        return (scaled(output[0]), *output[1:]) if isinstance(output, tuple) else scaled(output)

    def scale_first(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return scaled(inputs[0]), *inputs[1:]

    family = family_of(encoder.config.model_type)
    if family.stacks or family.causal:
        layers_of(encoder)[0].register_forward_pre_hook(scale_first)
    else:
        encoder.embeddings.register_forward_hook(scale)


def note_inputs(layers: Iterable[nn.Module], note: Callable[[Tensor], None]) -> None:
    """Let layers hand over the states that they read, per text or per row, once in each pass."""

    def hook(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        note(inputs[0] if inputs else options["hidden_states"])

    for layer in layers:
        layer.register_forward_pre_hook(hook, with_kwargs=True)


def input_weights(batch: Batch, tasks: Sequence[Task]) -> Tensor | None:
    """Weight of what the encoder reads of each row, (B,), float32, at least FAINTEST; None where no task sets one.

    A row that serves several tasks has the largest of their weights, and a task that does not weigh
    its input has 1: so a post that one task reads whole is read whole. A row without any label has
    1.
    """
    weighing = [
        task.name for task in tasks if task.weighs("input") and task.name in batch.confidences
    ]
    if not weighing:
        return None
    labelled_BT = labelled_rows(batch, [task.name for task in tasks])
    whole_B = torch.ones(len(labelled_BT), device=labelled_BT.device)
    weights_BT = torch.stack(
        [batch.confidences[task.name] if task.name in weighing else whole_B for task in tasks],
        dim=1,
    )
    largest_B = torch.where(labelled_BT, weights_BT, -1.0).amax(dim=1)
    return torch.where(largest_B < 0, whole_B, largest_B.clamp_min(FAINTEST))
