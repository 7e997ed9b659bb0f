"""The auxiliary terms of the objective: which there are, and how a recipe builds each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from comoe.distributed import gather_detached, gather_rows, sum_over_ranks, sum_with_gradient, world_size
from comoe.losses.adversarial import AdversarialLoss
from comoe.losses.contrastive import ContrastiveLoss
from comoe.losses.image_text import ITCLoss, ITMLoss
from comoe.losses.orthogonal import OrthogonalLoss
from comoe.losses.routing import BalanceLoss, TaskSeparationLoss, ZLoss
from comoe.models.gate import build_gate
from comoe.models.multitask import MultiTaskModel
from comoe.protocols import Loss
from comoe.schema import LossConfig, MoeConfig


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
    assert parts.model.projection is not None, "a task of the contrastive loss has a head that pools"
    width = parts.model.projection.out_features
    term = ContrastiveLoss(taking_part, config, width=width, gather=gather_detached, world_size=world_size())
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
    return Term(weight, TaskSeparationLoss([task.name for task in tasks], sum_with_gradient=sum_with_gradient))


def _itc(parts: Parts) -> Term | None:
    config, sides = parts.loss.image_text, parts.model.image_text
    if sides is None or not sides.compares:
        return None
    return Term(config.itc_weight, ITCLoss(config, gather=gather_detached, world_size=world_size()), takes_share=True)


def _itm(parts: Parts) -> Term | None:
    config, sides = parts.loss.image_text, parts.model.image_text
    if sides is None or sides.match is None:
        return None
    gathers = {"gather": gather_detached, "gather_with_gradient": gather_rows}
    return Term(
        config.itm_weight, ITMLoss(config, seed=parts.seed, world_size=world_size(), **gathers), takes_share=True
    )


def _orthogonal(parts: Parts) -> Term | None:
    if not parts.loss.orthogonal_weight or parts.model.private is None:
        return None
    names = [task.name for task in parts.model.tasks]
    return Term(parts.loss.orthogonal_weight, OrthogonalLoss(names, sum_with_gradient=sum_with_gradient))


def _adversarial(parts: Parts) -> Term | None:
    config = parts.loss.adversarial
    if not config.weight:
        return None
    assert parts.num_domains > 1, "loss.adversarial needs the number of values that find_domains found"
    width = parts.model.config.hidden_size
    return Term(config.weight, AdversarialLoss(config, model_width=width, num_domains=parts.num_domains))


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
