"""Model, task losses, auxiliary terms and their weighting as one module: a batch in, one scalar out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from comoe.config.recipe import LossConfig, MoeConfig, Recipe
from comoe.distributed import (
    gather_detached,
    gather_rows,
    sum_over_ranks,
    sum_with_gradient,
    world_size,
)
from comoe.losses.adversarial import AdversarialLoss, count_domains
from comoe.losses.contrastive.gradcache import (
    Cached,
    Passes,
    cache_gradients,
    embeddings_alone,
    replayed,
)
from comoe.losses.contrastive.loss import ContrastiveLoss
from comoe.losses.image_text import ITCLoss, ITMLoss
from comoe.losses.orthogonal import OrthogonalLoss
from comoe.losses.routing import BalanceLoss, TaskSeparationLoss, ZLoss
from comoe.losses.weighting.gradient_surgery import gram_over_ranks, shared_gradients
from comoe.losses.weighting.strategies import WEIGHTINGS, build_weighting
from comoe.models.model import MultiTaskModel, build_model, build_model_shape
from comoe.models.moe.gate import build_gate
from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch, Loss, ModelOutput, StepOutput, labelled_rows


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


@dataclass(frozen=True, slots=True)
class Parts:
    """What a term is built from."""

    loss: LossConfig
    """``loss`` of the recipe."""
    moe: MoeConfig
    """``model.moe`` of the recipe."""
    model: MultiTaskModel
    """The model."""
    seed: int
    """``train.seed``."""
    num_domains: int
    """Values of ``Batch.domains_B``; 0 where nothing is predicted."""


def build_terms(parts: Parts) -> dict[str, Term]:
    """The terms that the recipe switches on, in the order of ``LOSSES``."""
    built = {name: build(parts) for name, build in LOSSES.items()}
    return {name: term for name, term in built.items() if term is not None}


def _contrastive(parts: Parts) -> Term | None:
    config = parts.loss.contrastive
    taking_part = [task for task in parts.model.tasks if task.contrastive]
    if not config.weight or not taking_part:
        return None
    assert parts.model.projection is not None, (
        "a task of the contrastive loss has a head that pools"
    )
    width = parts.model.projection.out_features
    term = ContrastiveLoss(
        taking_part, config, width=width, gather=gather_detached, world_size=world_size()
    )
    return Term(config.weight, term, over_embeddings=True)


def _balance(parts: Parts) -> Term | None:
    weight, moe = parts.loss.balance_weight, parts.moe
    if not weight or not moe.num_experts:
        return None
    if moe.top_k == moe.num_experts:
        raise ValueError(
            f"loss.balance_weight ({weight}) has nothing to balance: model.moe.top_k = model.moe.num_experts = "
            f"{moe.top_k}, so every expert runs for every token; set loss.balance_weight to 0."
        )
    return Term(weight, BalanceLoss(sum_over_ranks=sum_over_ranks))


def _z(parts: Parts) -> Term | None:
    if not parts.loss.z_weight or not parts.moe.num_experts:
        return None
    return Term(parts.loss.z_weight, ZLoss(build_gate(parts.moe).z_penalty))


def _task_separation(parts: Parts) -> Term | None:
    weight, tasks = parts.loss.task_separation_weight, parts.model.tasks
    # One expert, or one task: there is nothing to separate.
    if not weight or parts.moe.num_experts < 2 or len(tasks) < 2:
        return None
    return Term(
        weight,
        TaskSeparationLoss([task.name for task in tasks], sum_with_gradient=sum_with_gradient),
    )


def _itc(parts: Parts) -> Term | None:
    config, sides = parts.loss.image_text, parts.model.image_text
    if sides is None or not sides.compares:
        return None
    return Term(
        config.itc_weight,
        ITCLoss(config, gather=gather_detached, world_size=world_size()),
        takes_share=True,
    )


def _itm(parts: Parts) -> Term | None:
    config, sides = parts.loss.image_text, parts.model.image_text
    if sides is None or sides.match is None:
        return None
    gathers = {"gather": gather_detached, "gather_with_gradient": gather_rows}
    return Term(
        config.itm_weight,
        ITMLoss(config, seed=parts.seed, world_size=world_size(), **gathers),
        takes_share=True,
    )


def _orthogonal(parts: Parts) -> Term | None:
    if not parts.loss.orthogonal_weight or parts.model.private is None:
        return None
    names = [task.name for task in parts.model.tasks]
    return Term(
        parts.loss.orthogonal_weight, OrthogonalLoss(names, sum_with_gradient=sum_with_gradient)
    )


def _adversarial(parts: Parts) -> Term | None:
    config = parts.loss.adversarial
    if not config.weight:
        return None
    assert parts.num_domains > 1, (
        "loss.adversarial needs the number of values that find_domains found"
    )
    width = parts.model.config.hidden_size
    return Term(
        config.weight, AdversarialLoss(config, model_width=width, num_domains=parts.num_domains)
    )


LOSSES: dict[str, Callable[[Parts], Term | None]] = {
    "contrastive": _contrastive,
    "balance": _balance,
    "z": _z,
    "task_separation": _task_separation,
    "itc": _itc,
    "itm": _itm,
    "orthogonal": _orthogonal,
    "adversarial": _adversarial,
}
"""Auxiliary term -> parts -> term, None where it is switched off."""


class Objective(nn.Module):
    """What the engine trains: forward gives the number to call backward on.

    Every number of a ``StepOutput`` is this rank's share, scaled so that the mean over ranks and
    micro-steps is the global value: that mean is what ZeRO and gradient accumulation take of the
    gradients.

    Args:
        model: the model.
        tasks: the same tasks in the same order.
        loss: ``loss`` of the recipe; a term whose weight is 0 is neither computed nor communicated.
        moe: ``model.moe`` of the recipe.
        seed: ``train.seed``; decides which texts the matching question is asked of.
        num_domains: values that ``loss.adversarial`` predicts; 0 without it.

    Raises:
        ValueError: an unknown weighting, one that reads gradients where a decoder answers some
            task, or a balance term where every expert always runs.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Sequence[Task],
        loss: LossConfig,
        moe: MoeConfig,
        *,
        seed: int = 0,
        num_domains: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.tasks = tuple(tasks)
        self.weighting = build_weighting(loss.weighting, self.tasks, loss)
        refuse_decoded(loss.weighting, [task.name for task in self.tasks if task.rules.generates])
        self.terms = build_terms(Parts(loss, moe, model, seed, num_domains))
        # Temperatures and a discriminator to learn, queues to save.
        self.losses = nn.ModuleDict(
            {n: t.loss for n, t in self.terms.items() if isinstance(t.loss, nn.Module)}
        )
        # Terms that are given a share of 1 leave the rest of it to the tasks.
        self.task_share = 1.0 - sum(term.weight for term in self.terms.values() if term.takes_share)
        self._contrast = next(
            (term.loss for term in self.terms.values() if term.over_embeddings), None
        )
        contrasted = (
            [] if self._contrast is None else [task for task in self.tasks if task.contrastive]
        )
        self.viewed = [task.name for task in contrasted if task.rules.views]

    @property
    def caches(self) -> bool:
        """True where there is a term that ``contrast`` can take over a whole step."""
        return self._contrast is not None

    def begin_step(self) -> None:
        """Tell the terms that a new optimizer step begins; call it before the first micro-step."""
        for term in self.terms.values():
            term.loss.begin_step()

    def end_step(self, outputs: Sequence[StepOutput], batches: Sequence[Batch]) -> None:
        """Tell the weighting what an optimizer step had, on all ranks, once it has changed the weights.

        Args:
            outputs: of this rank's micro-steps.
            batches: of any device.
        """
        if not self.weighting.remembers:
            return
        names = [f"task/{task.name}" for task in self.tasks]
        losses_T = torch.stack(
            [torch.stack([output.terms[name] for name in names]) for output in outputs]
        ).double()
        losses_T = sum_over_ranks(losses_T.mean(dim=0)) / world_size()
        present_T = self._present(batches[0]).to(losses_T.device)
        self.weighting.end_step(losses_T, present_T, gram_TT=outputs[0].gram_TT)

    def forward(
        self,
        batch: Batch,
        evaluate: bool = False,
        embed: bool = False,
        cached: Cached | None = None,
        gradients: bool = False,
        gram_TT: Tensor | None = None,
    ) -> StepOutput | ModelOutput | Passes | Tensor:
        """Run one micro-batch.

        Args:
            batch: with ``unit_scale_T`` and the labels of every task, unless ``evaluate``.
            evaluate: return the model's answer alone; no loss, no collective of ours.
            embed: the first pass of ``comoe.losses.contrastive.gradcache``: return the embeddings
                of the forward passes alone.
            cached: what ``contrast`` made of this micro-batch; the second pass repeats the routing
                of the first.
            gradients: return this rank's share of the tasks' gradients by the last shared layer
                alone, (T, M, M).
            gram_TT: their inner products over all micro-batches and ranks; None takes this one for
                the whole step.
        """
        if evaluate:
            return self.model(batch)
        repeats = cached is not None or gram_TT is not None
        probed = gradients or (self.weighting.reads_gradients and gram_TT is None and not embed)
        passes = self._passes(
            batch, cached.picks if cached is not None else ((), ()), probed=probed
        )
        if embed:
            return embeddings_alone(passes)
        output = passes[0]
        if probed:
            with torch.enable_grad():
                again_T = self.task_losses(replace(output, logits=output.probe.logits), batch)
            found_TMM = shared_gradients(again_T, output.probe, [task.name for task in self.tasks])
            if gradients:
                return found_TMM
            output, gram_TT = replace(output, probe=None), gram_over_ranks(found_TMM)
        losses_T = self.task_losses(output, batch)
        total, weights_T = self.weighting(
            losses_T, self._present(batch), gram_TT=gram_TT, step=batch.step
        )
        total, weights_T = self.task_share * total, self.task_share * weights_T
        names = [task.name for task in self.tasks]
        terms = {
            f"task/{name}": value for name, value in zip(names, losses_T.detach(), strict=True)
        }
        terms |= {
            f"weight/{name}": value for name, value in zip(names, weights_T.detach(), strict=True)
        }
        # The first passes ran no term, and the next micro-batch must find the random numbers where
        # they left them.
        with torch.random.fork_rng([total.device] if total.is_cuda else [], enabled=repeats):
            for term in self.terms.values():
                if cached is not None and term.over_embeddings:
                    value, logged = replayed(cached, output, term.loss.scales()), cached.terms
                else:
                    value, logged = term.loss(output, batch)
                total = total + term.weight * value
                terms |= logged
        # The projection must get a gradient on every rank also where no term reads it, or ZeRO's
        # buckets differ; and every forward pass must be run backward on every rank: its experts may
        # be on another.
        for embeddings_BP in [*output.embeddings.values(), *output.views.values()]:
            total = total + 0.0 * embeddings_BP.sum()
        return StepOutput(total, terms, output, gram_TT)

    def contrast(self, batches: Sequence[Batch], passes: Sequence[Passes]) -> list[Cached]:
        """The contrastive term over all micro-batches of a step, on all ranks, for their second passes."""
        assert self._contrast is not None, "loss.contrastive.chunk_size needs a contrastive term"
        return cache_gradients(self._contrast, self._contrast.scales(), batches, passes)

    def _present(self, batch: Batch) -> Tensor:
        """Tasks that some post of the optimizer step has: bool (T,)."""
        assert batch.unit_scale_T is not None, "training needs batch.unit_scale_T (see unit_scale)"
        return batch.unit_scale_T[: len(self.tasks)] > 0

    def _passes(self, batch: Batch, picks: Sequence[Sequence[Tensor]], *, probed: bool) -> Passes:
        """The model's answer, with the second views of the tasks that want them; and their own forward pass."""
        output = self.model(batch, picks[0], probed=probed)
        if not self.viewed:
            return (output,)
        rows_R = labelled_rows(batch, self.viewed).any(dim=1).nonzero().squeeze(1)
        # Every rank runs this pass too: one without such rows runs its first one, times zero.
        scale = float(len(rows_R) > 0)
        again = batch.take(rows_R) if len(rows_R) else batch.take(rows_R.new_zeros(1))
        filler = replace(again, row_ids_B=again.row_ids_B.new_full((1,), -1))
        second = self.model(again if scale else filler, picks[1], compare=False, decode=False)
        rows_R = rows_R if scale else rows_R.new_zeros(1)
        views = {
            name: torch.zeros_like(output.embeddings[name]).index_copy(
                0, rows_R, scale * second.embeddings[name]
            )
            for name in self.viewed
        }
        return replace(output, views=views), second

    def task_losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        """This micro-batch's share of each task's mean loss, (T,), float32; 0 with a gradient for an absent task."""
        assert batch.unit_scale_T is not None, "training needs batch.unit_scale_T (see unit_scale)"
        losses = [
            task.rules.loss(
                output.logits[task.name],
                batch.labels[task.name],
                task,
                batch.confidences.get(task.name) if task.weighs("output") else None,
            )
            * scale
            for task, scale in zip(
                self.tasks, batch.unit_scale_T[: len(self.tasks)].float(), strict=True
            )
        ]
        return torch.stack(losses)


def refuse_decoded(weighting: str, decoded: Sequence[str]) -> None:
    """Refuse a weighting that reads the tasks' gradients where a decoder answers tasks: what it
    shares with the heads ends at the encoder, and the decoder itself would be left out.

    Raises:
        ValueError: there are such tasks.
    """
    if decoded and WEIGHTINGS[weighting].reads_gradients:
        raise ValueError(
            f"loss.weighting ({weighting}) reads the gradient of each task by the last states that all tasks share, "
            f"which leaves a decoder out, but a decoder answers {', '.join(decoded)}; choose another weighting, such "
            "as uncertainty_positive or dynamic_average, or give these tasks a kind that a head answers."
        )


def count_units(batch: Batch, tasks: Sequence[Task]) -> Tensor:
    """What each task's mean is divided by, then what the means at ``DOMAINS``, ``TOKENS`` and
    ``ANSWER_TOKENS`` are, in one micro-batch: (T + 3,), float64.

    Sum it over the micro-steps of a rank, then over ranks, then pass it to ``unit_scale``. The
    tokens of a filler row do not count. A post counts whole, whatever its confidence.
    """
    units = [task.rules.units(batch.labels[task.name], task).double() for task in tasks]
    real_B = batch.row_ids_B >= 0
    tokens = batch.attention_mask_BL[real_B].sum(dtype=torch.float64)
    answers = torch.zeros_like(tokens)
    if batch.answers_BD is not None:
        answers = (batch.answers_BD[real_B] != IGNORED).sum(dtype=torch.float64)
    return torch.stack([*units, count_domains(batch), tokens, answers])


def unit_scale(units_T: Tensor, *, world_size: int, accumulation: int) -> Tensor:
    """``Batch.unit_scale_T``: W * accumulation / units of the whole optimizer step, float32; 0 for an absent task."""
    scale_T = world_size * accumulation / units_T.double()
    return torch.where(units_T > 0, scale_T, torch.zeros_like(scale_T)).float()


def build_objective(
    recipe: Recipe, tasks: Sequence[Task], *, num_domains: int = 0, shape: bool = False
) -> Objective:
    """Model and losses of a recipe whose ``model.encoder`` is resolved; deterministic in torch's seed.

    Args:
        recipe: the recipe.
        tasks: in the order of their ids.
        num_domains: values that ``loss.adversarial`` predicts.
        shape: build it on the meta device, without reading weights: to be measured, not to be run.

    Raises:
        ValueError: an encoder that cannot be loaded, or nothing in the model trains.
    """
    build = build_model_shape if shape else build_model
    recompute = recipe.train.activation_checkpointing
    model = build(recipe.model, tasks, image_text=recipe.loss.image_text, recompute=recompute)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"model.train_layers ({recipe.model.train_layers}) leaves nothing to train: a decoder answers every task, "
            "so there are no heads; set it to all or to a number of last layers, or give the model experts "
            "(model.moe.num_experts) or private parts (model.private_width)."
        )
    with torch.device("meta") if shape else nullcontext():
        return Objective(
            model,
            tasks,
            recipe.loss,
            recipe.model.moe,
            seed=recipe.train.seed,
            num_domains=num_domains,
        )
