"""Model, task losses, auxiliary losses and their weighting as one module: a batch in, one scalar out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comoe.distributed import gather_rows, sum_over_ranks, sum_with_gradient, world_size
from comoe.losses.contrastive import ContrastiveLoss
from comoe.losses.routing import BalanceLoss, TaskSeparationLoss, ZLoss
from comoe.models.gate import build_gate
from comoe.models.multitask import MultiTaskModel, build_model
from comoe.protocols import Batch, Loss, ModelOutput, StepOutput
from comoe.schema import LossConfig, MoeConfig, Recipe
from comoe.tasks.catalog import Task
from comoe.weighting import build_weighting


@dataclass(frozen=True, slots=True)
class Term:
    """One auxiliary term of the objective."""

    weight: float
    """Factor in the total."""
    loss: Loss
    """The term."""


class Objective(nn.Module):
    """What the engine trains: forward gives the number to call backward on.

    Every number of a ``StepOutput`` is this rank's share, scaled so that the mean over ranks and micro-steps is the
    global value: that mean is what ZeRO and gradient accumulation take of the gradients.

    Args:
        model: the model.
        tasks: the same tasks in the same order.
        loss: ``loss`` of the recipe; a term whose weight is 0 is neither computed nor communicated.
        moe: ``model.moe`` of the recipe.

    Raises:
        ValueError: an unknown weighting, or a balance term where every expert always runs.
    """

    def __init__(self, model: MultiTaskModel, tasks: Sequence[Task], loss: LossConfig, moe: MoeConfig) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.tasks = tuple(tasks)
        self.weighting = build_weighting(loss.weighting, self.tasks)
        built = {name: build(loss, moe, self.tasks) for name, build in LOSSES.items()}
        self.terms = {name: term for name, term in built.items() if term is not None}

    def begin_step(self) -> None:
        """Tell the terms that a new optimizer step begins; call it before the first micro-step."""
        for term in self.terms.values():
            term.loss.begin_step()

    def forward(self, batch: Batch, evaluate: bool = False) -> StepOutput | ModelOutput:
        """Run one micro-batch.

        Args:
            batch: with ``unit_scale_T`` and the labels of every task, unless ``evaluate``.
            evaluate: return the model's answer alone; no loss, no collective of ours.
        """
        output = self.model(batch)
        if evaluate:
            return output
        losses_T = self.task_losses(output, batch)
        total, weights_T = self.weighting.combine(losses_T)
        names = [task.name for task in self.tasks]
        terms = {f"task/{name}": value for name, value in zip(names, losses_T.detach(), strict=True)}
        terms |= {f"weight/{name}": value for name, value in zip(names, weights_T.detach(), strict=True)}
        for term in self.terms.values():
            value, logged = term.loss(output, batch)
            total = total + term.weight * value
            terms |= logged
        # The projection must get a gradient on every rank also where no term reads it, or ZeRO's buckets differ.
        for embeddings_BP in output.embeddings.values():
            total = total + 0.0 * embeddings_BP.sum()
        return StepOutput(total, terms, output)

    def task_losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        """This micro-batch's share of each task's mean loss, (T,), float32; 0 with a gradient for an absent task."""
        assert batch.unit_scale_T is not None, "training needs batch.unit_scale_T (see unit_scale)"
        losses = [
            task.rules.loss(output.logits[task.name], batch.labels[task.name], task) * scale
            for task, scale in zip(self.tasks, batch.unit_scale_T[:-1].float(), strict=True)
        ]
        return torch.stack(losses)


def count_units(batch: Batch, tasks: Sequence[Task]) -> Tensor:
    """What each task's mean is divided by, then what means over tokens are, in one micro-batch: (T + 1,), float64.

    Sum it over the micro-steps of a rank, then over ranks, then pass it to ``unit_scale``. The tokens of a filler row
    do not count.
    """
    units = [task.rules.units(batch.labels[task.name], task).double() for task in tasks]
    tokens = batch.attention_mask_BL[batch.row_ids_B >= 0].sum(dtype=torch.float64)
    return torch.stack([*units, tokens])


def unit_scale(units_T: Tensor, *, world_size: int, accumulation: int) -> Tensor:
    """``Batch.unit_scale_T``: W * accumulation / units of the whole optimizer step, float32; 0 for an absent task."""
    scale_T = world_size * accumulation / units_T.double()
    return torch.where(units_T > 0, scale_T, torch.zeros_like(scale_T)).float()


def _contrastive(loss: LossConfig, moe: MoeConfig, tasks: Sequence[Task]) -> Term | None:
    taking_part = [task for task in tasks if task.contrastive]
    if not loss.contrastive.weight or not taking_part:
        return None
    term = ContrastiveLoss(
        taking_part, temperature=loss.contrastive.temperature, gather=gather_rows, world_size=world_size()
    )
    return Term(loss.contrastive.weight, term)


def _balance(loss: LossConfig, moe: MoeConfig, tasks: Sequence[Task]) -> Term | None:
    if not loss.balance_weight or not moe.num_experts:
        return None
    if moe.top_k == moe.num_experts:
        raise ValueError(
            f"loss.balance_weight ({loss.balance_weight}) has nothing to balance: model.moe.top_k = "
            f"model.moe.num_experts = {moe.top_k}, so every expert runs for every token; set loss.balance_weight to 0."
        )
    return Term(loss.balance_weight, BalanceLoss(sum_over_ranks=sum_over_ranks))


def _z(loss: LossConfig, moe: MoeConfig, tasks: Sequence[Task]) -> Term | None:
    if not loss.z_weight or not moe.num_experts:
        return None
    return Term(loss.z_weight, ZLoss(build_gate(moe).z_penalty))


def _task_separation(loss: LossConfig, moe: MoeConfig, tasks: Sequence[Task]) -> Term | None:
    # One expert, or one task: there is nothing to separate.
    if not loss.task_separation_weight or moe.num_experts < 2 or len(tasks) < 2:
        return None
    term = TaskSeparationLoss([task.name for task in tasks], sum_with_gradient=sum_with_gradient)
    return Term(loss.task_separation_weight, term)


def build_objective(recipe: Recipe, tasks: Sequence[Task]) -> Objective:
    """Model and losses of a recipe whose ``model.encoder`` is resolved; deterministic in torch's seed."""
    model = build_model(recipe.model, tasks, recompute=recipe.train.activation_checkpointing)
    return Objective(model, tasks, recipe.loss, recipe.model.moe)


LOSSES: dict[str, Callable[[LossConfig, MoeConfig, Sequence[Task]], Term | None]] = {
    "contrastive": _contrastive,
    "balance": _balance,
    "z": _z,
    "task_separation": _task_separation,
}
"""Auxiliary term -> (loss options, expert options, tasks) -> term, None where it is switched off."""
