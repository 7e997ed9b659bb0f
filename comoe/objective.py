"""Model, task losses, auxiliary losses and their weighting as one module: a batch in, one scalar out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from comoe.distributed import gather_detached, gather_rows, sum_over_ranks, sum_with_gradient, world_size
from comoe.gradcache import Cached, Passes, cache_gradients, embeddings_alone, replayed
from comoe.losses.contrastive import ContrastiveLoss
from comoe.losses.image_text import ITCLoss, ITMLoss
from comoe.losses.routing import BalanceLoss, TaskSeparationLoss, ZLoss
from comoe.models.gate import build_gate
from comoe.models.multitask import MultiTaskModel, build_model
from comoe.protocols import Batch, Loss, ModelOutput, StepOutput, labelled_rows
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
    over_embeddings: bool = False
    """True for the contrastive term: GradCache takes it over the whole optimizer step."""
    takes_share: bool = False
    """True where the weight is a share of 1 that the tasks' losses lose."""


class Objective(nn.Module):
    """What the engine trains: forward gives the number to call backward on.

    Every number of a ``StepOutput`` is this rank's share, scaled so that the mean over ranks and micro-steps is the
    global value: that mean is what ZeRO and gradient accumulation take of the gradients.

    Args:
        model: the model.
        tasks: the same tasks in the same order.
        loss: ``loss`` of the recipe; a term whose weight is 0 is neither computed nor communicated.
        moe: ``model.moe`` of the recipe.
        seed: ``train.seed``; decides which texts the matching question is asked of.

    Raises:
        ValueError: an unknown weighting, or a balance term where every expert always runs.
    """

    def __init__(
        self, model: MultiTaskModel, tasks: Sequence[Task], loss: LossConfig, moe: MoeConfig, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.tasks = tuple(tasks)
        self.weighting = build_weighting(loss.weighting, self.tasks)
        built = {name: build(loss, moe, model, seed) for name, build in LOSSES.items()}
        self.terms = {name: term for name, term in built.items() if term is not None}
        # Temperatures to learn and queues to save.
        self.losses = nn.ModuleDict({n: t.loss for n, t in self.terms.items() if isinstance(t.loss, nn.Module)})
        # Terms that are given a share of 1 leave the rest of it to the tasks.
        self.task_share = 1.0 - sum(term.weight for term in self.terms.values() if term.takes_share)
        self._contrast = next((term.loss for term in self.terms.values() if term.over_embeddings), None)
        contrasted = [] if self._contrast is None else [task for task in self.tasks if task.contrastive]
        self.viewed = [task.name for task in contrasted if task.rules.views]

    @property
    def caches(self) -> bool:
        """True where there is a term that ``contrast`` can take over a whole step."""
        return self._contrast is not None

    def begin_step(self) -> None:
        """Tell the terms that a new optimizer step begins; call it before the first micro-step."""
        for term in self.terms.values():
            term.loss.begin_step()

    def forward(
        self, batch: Batch, evaluate: bool = False, embed: bool = False, cached: Cached | None = None
    ) -> StepOutput | ModelOutput | Passes:
        """Run one micro-batch.

        Args:
            batch: with ``unit_scale_T`` and the labels of every task, unless ``evaluate``.
            evaluate: return the model's answer alone; no loss, no collective of ours.
            embed: the first pass of ``comoe.gradcache``: return the embeddings of the forward passes alone.
            cached: what ``contrast`` made of this micro-batch; the second pass repeats the routing of the first.
        """
        if evaluate:
            return self.model(batch)
        passes = self._passes(batch, cached.picks if cached is not None else ((), ()))
        if embed:
            return embeddings_alone(passes)
        output = passes[0]
        losses_T = self.task_losses(output, batch)
        total, weights_T = self.weighting.combine(losses_T)
        total = self.task_share * total
        names = [task.name for task in self.tasks]
        terms = {f"task/{name}": value for name, value in zip(names, losses_T.detach(), strict=True)}
        terms |= {f"weight/{name}": value for name, value in zip(names, weights_T.detach(), strict=True)}
        for term in self.terms.values():
            if cached is not None and term.over_embeddings:
                value, logged = replayed(cached, output, term.loss.scales()), cached.terms
            else:
                value, logged = term.loss(output, batch)
            total = total + term.weight * value
            terms |= logged
        # The projection must get a gradient on every rank also where no term reads it, or ZeRO's buckets differ; and
        # every forward pass must be run backward on every rank: its experts may be on another.
        for embeddings_BP in [*output.embeddings.values(), *output.views.values()]:
            total = total + 0.0 * embeddings_BP.sum()
        return StepOutput(total, terms, output)

    def contrast(self, batches: Sequence[Batch], passes: Sequence[Passes]) -> list[Cached]:
        """The contrastive term over all micro-batches of a step, on all ranks, for their second passes."""
        assert self._contrast is not None, "loss.contrastive.chunk_size needs a contrastive term"
        return cache_gradients(self._contrast, self._contrast.scales(), batches, passes)

    def _passes(self, batch: Batch, picks: Sequence[Sequence[Tensor]]) -> Passes:
        """The model's answer, with the second views of the tasks that want them; and their own forward pass."""
        output = self.model(batch, picks[0])
        if not self.viewed:
            return (output,)
        rows_R = labelled_rows(batch, self.viewed).any(dim=1).nonzero().squeeze(1)
        # Every rank runs this pass too: one without such rows runs its first one, times zero.
        scale = float(len(rows_R) > 0)
        again = batch.take(rows_R) if len(rows_R) else batch.take(rows_R.new_zeros(1))
        second = self.model(
            again if scale else replace(again, row_ids_B=again.row_ids_B.new_full((1,), -1)), picks[1], compare=False
        )
        rows_R = rows_R if scale else rows_R.new_zeros(1)
        views = {
            name: torch.zeros_like(output.embeddings[name]).index_copy(0, rows_R, scale * second.embeddings[name])
            for name in self.viewed
        }
        return replace(output, views=views), second

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


def _contrastive(loss: LossConfig, moe: MoeConfig, model: MultiTaskModel, seed: int) -> Term | None:
    taking_part = [task for task in model.tasks if task.contrastive]
    if not loss.contrastive.weight or not taking_part:
        return None
    term = ContrastiveLoss(
        taking_part,
        loss.contrastive,
        width=model.projection.out_features,
        gather=gather_detached,
        world_size=world_size(),
    )
    return Term(loss.contrastive.weight, term, over_embeddings=True)


def _balance(loss: LossConfig, moe: MoeConfig, model: MultiTaskModel, seed: int) -> Term | None:
    if not loss.balance_weight or not moe.num_experts:
        return None
    if moe.top_k == moe.num_experts:
        raise ValueError(
            f"loss.balance_weight ({loss.balance_weight}) has nothing to balance: model.moe.top_k = "
            f"model.moe.num_experts = {moe.top_k}, so every expert runs for every token; set loss.balance_weight to 0."
        )
    return Term(loss.balance_weight, BalanceLoss(sum_over_ranks=sum_over_ranks))


def _z(loss: LossConfig, moe: MoeConfig, model: MultiTaskModel, seed: int) -> Term | None:
    if not loss.z_weight or not moe.num_experts:
        return None
    return Term(loss.z_weight, ZLoss(build_gate(moe).z_penalty))


def _task_separation(loss: LossConfig, moe: MoeConfig, model: MultiTaskModel, seed: int) -> Term | None:
    # One expert, or one task: there is nothing to separate.
    if not loss.task_separation_weight or moe.num_experts < 2 or len(model.tasks) < 2:
        return None
    term = TaskSeparationLoss([task.name for task in model.tasks], sum_with_gradient=sum_with_gradient)
    return Term(loss.task_separation_weight, term)


def _itc(loss: LossConfig, moe: MoeConfig, model: MultiTaskModel, seed: int) -> Term | None:
    if model.image_text is None or not model.image_text.compares:
        return None
    term = ITCLoss(loss.image_text, gather=gather_detached, world_size=world_size())
    return Term(loss.image_text.itc_weight, term, takes_share=True)


def _itm(loss: LossConfig, moe: MoeConfig, model: MultiTaskModel, seed: int) -> Term | None:
    if model.image_text is None or model.image_text.match is None:
        return None
    gathers = {"gather": gather_detached, "gather_with_gradient": gather_rows}
    term = ITMLoss(loss.image_text, seed=seed, world_size=world_size(), **gathers)
    return Term(loss.image_text.itm_weight, term, takes_share=True)


def build_objective(recipe: Recipe, tasks: Sequence[Task]) -> Objective:
    """Model and losses of a recipe whose ``model.encoder`` is resolved; deterministic in torch's seed."""
    model = build_model(
        recipe.model, tasks, image_text=recipe.loss.image_text, recompute=recipe.train.activation_checkpointing
    )
    return Objective(model, tasks, recipe.loss, recipe.model.moe, seed=recipe.train.seed)


LOSSES: dict[str, Callable[[LossConfig, MoeConfig, MultiTaskModel, int], Term | None]] = {
    "contrastive": _contrastive,
    "balance": _balance,
    "z": _z,
    "task_separation": _task_separation,
    "itc": _itc,
    "itm": _itm,
}
"""Auxiliary term -> (loss options, expert options, model, seed) -> term, None where it is switched off."""
