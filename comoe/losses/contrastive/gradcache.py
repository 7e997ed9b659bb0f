"""GradCache: a contrastive batch as large as the whole optimizer step, in the memory of one forward pass.

A first pass without gradient embeds every micro-batch. The contrastive loss of all these
embeddings, over all ranks, gives a gradient for each of them. The second pass is the ordinary one,
micro-batch by micro-batch, with the inner product of embeddings and cached gradients in the place
of the term: its gradient is that of the large batch.

Source: Gao et al. 2021, arXiv:2101.06983. The second pass repeats the first one's dropout and, what
the paper has no need of, its routing: a near-tie between experts must not be decided another way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from comoe.types import IGNORED, Batch, ModelOutput

Passes = tuple[ModelOutput, ...]
"""The forward passes of one micro-batch: the posts, then their second views where asked."""


@dataclass(frozen=True, slots=True)
class Cached:
    """What the first pass leaves to the second pass of one micro-batch."""

    selected: tuple[tuple[Tensor, ...], ...]
    """Forward pass -> layer with experts -> selected experts (S, k), int64; none for a filler
    row."""
    gradients: Mapping[str, Tensor]
    """Task -> gradient of this rank's share of the term by each embedding (B, P), float32."""
    view_gradients: Mapping[str, Tensor]
    """The same for the second views."""
    scales: Tensor
    """Gradient by the tasks' inverse temperatures, on the first micro-batch; zeros on the
    others."""
    value: Tensor
    """This rank's share of the term, detached scalar."""
    terms: Mapping[str, Tensor]
    """What the term logs."""
    accumulation: int
    """Micro-batches of the step; the engine divides by it."""


def targets_of(batch: Batch) -> Batch:
    """The batch without its images: the contrastive term reads labels, row and task ids."""
    return replace(batch, pixels_I3HW=None, image_rows_I=None, image_numbers_I=None)


def concatenated(batches: Sequence[Batch]) -> Batch:
    """Labels, row and task ids of several micro-batches as one batch, tags padded to the longest;
    its tokens are those of the first one and mean nothing."""
    labels = {}
    for task in batches[0].labels:
        targets = [batch.labels[task] for batch in batches]
        if targets[0].ndim > 1 and not targets[0].is_floating_point():
            length = max(target.shape[1] for target in targets)
            targets = [
                F.pad(target, (0, length - target.shape[1]), value=IGNORED) for target in targets
            ]
        labels[task] = torch.cat(targets)
    return replace(
        batches[0],
        labels=labels,
        row_ids_B=torch.cat([batch.row_ids_B for batch in batches]),
        task_ids_B=torch.cat([batch.task_ids_B for batch in batches]),
    )


def cache_gradients(
    term: Callable[[ModelOutput, Batch, Tensor], tuple[Tensor, Mapping[str, Tensor]]],
    scales: Tensor,
    batches: Sequence[Batch],
    passes: Sequence[Passes],
) -> list[Cached]:
    """The term over all micro-batches of this rank (it gathers over the ranks itself), and its gradients.

    Args:
        term: (model output, batch, inverse temperatures) -> this rank's share and what to log.
        scales: the tasks' inverse temperatures.
        batches: this rank's micro-batches, on the device.
        passes: of mode ``embed``, the embeddings with ``views``.
    """
    first = [outputs[0] for outputs in passes]
    embeddings, views = (
        {
            task: torch.cat([part[task] for part in parts]).detach().requires_grad_()
            for task in parts[0]
        }
        for parts in ([output.embeddings for output in first], [output.views for output in first])
    )
    scales = scales.detach().requires_grad_()
    output = ModelOutput({}, embeddings, {}, (), first[0].token_rows_S[:0], views=views)
    with torch.enable_grad():
        value, terms = term(output, concatenated(batches), scales)
    leaves = [*embeddings.values(), *views.values(), scales]
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    sizes = [len(batch.row_ids_B) for batch in batches]
    parts = [gradient.split(sizes) for gradient in found[:-1]]
    cached = []
    for number, outputs in enumerate(passes):
        mine = [part[number] for part in parts]
        cached.append(
            Cached(
                selected=tuple(output.selected for output in outputs),
                gradients=dict(zip(embeddings, mine, strict=False)),
                view_gradients=dict(zip(views, mine[len(embeddings) :], strict=True)),
                scales=found[-1] if number == 0 else torch.zeros_like(found[-1]),
                value=value.detach(),
                terms=terms,
                accumulation=len(batches),
            )
        )
    return cached


def replayed(cached: Cached, output: ModelOutput, scales: Tensor) -> Tensor:
    """A scalar worth this rank's share of the term whose gradient, averaged over the micro-batches, is the cached one.

    Args:
        cached: of this micro-batch.
        output: the second pass.
        scales: the tasks' inverse temperatures, with gradient.
    """
    products = [
        (output.embeddings[task] * gradient).sum() for task, gradient in cached.gradients.items()
    ]
    products += [
        (output.views[task] * gradient).sum() for task, gradient in cached.view_gradients.items()
    ]
    surrogate = cached.accumulation * (torch.stack(products).sum() + (scales * cached.scales).sum())
    return surrogate + (cached.value - surrogate.detach())
