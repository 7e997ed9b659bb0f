"""Adversarial sharing: shared states from which a discriminator cannot tell a post's domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import AdversarialConfig
from comoe.models.pooling import mean_state
from comoe.types import DOMAINS, Batch, ModelOutput

ON_DOMAINS = ("adversarial", "adversarial_accuracy", "adversarial_commonest")
"""Terms that a step in which no post has a domain has no value of."""


def reversal_strength(progress: float, gamma: float) -> float:
    """2 / (1 + exp(-gamma p)) - 1: 0 at the start, towards 1; the encoder is left alone while the discriminator is new.

    Source: Ganin & Lempitsky 2015, arXiv:1409.7495, with gamma 10.
    """
    return 2 / (1 + math.exp(-gamma * progress)) - 1


def reversed_gradient(states: Tensor, strength: float) -> Tensor:
    """The states as they are; their gradient is multiplied by ``-strength``."""
    return _Reversal.apply(states, strength)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


class Discriminator(nn.Module):
    """Two layers that classify a pooled representation; no dropout: it would draw between two passes.

    Args:
        model_width: M.
        hidden_width: of the layer between.
        num_domains: number of classes.
    """

    def __init__(self, model_width: int, hidden_width: int, num_domains: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(model_width, hidden_width)
        self.output = nn.Linear(hidden_width, num_domains)

    def forward(self, pooled_BM: Tensor) -> Tensor:
        """Logits (B, values), float32 or wider."""
        # A model stored in bf16 has its discriminator in bf16 too.
        logits = self.output(F.gelu(self.hidden(pooled_BM.to(self.hidden.weight.dtype))))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class AdversarialLoss(nn.Module):
    """How well a discriminator finds the domain of a post in its mean shared state; the encoder learns against it.

    The value is the discriminator's mean cross-entropy over the posts of the whole optimizer step
    that have a domain (``Batch.domains_B``), on all ranks. Gradients of the discriminator are those
    of the value; those of the shared states are them times ``-reversal_strength``. Shared states
    are those before any private part.

    Args:
        config: ``loss.adversarial``; its weight is the objective's.
        model_width: M.
        num_domains: values of ``Batch.domains_B``.

    Source: Ganin et al. 2016, arXiv:1505.07818; for tasks Liu et al. 2017, arXiv:1704.05742.
    """

    def __init__(self, config: AdversarialConfig, *, model_width: int, num_domains: int) -> None:
        super().__init__()
        self.gamma = config.gamma
        self.num_domains = num_domains
        self.discriminator = Discriminator(model_width, config.hidden_width, num_domains)

    def begin_step(self) -> None:
        """Nothing is carried between micro-steps."""

    def forward(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """This rank's share of the term; ``adversarial``, and of the same posts the discriminator's
        accuracy, the share with the commonest value of the training split, 1 / values, and the
        strength of the reversal.
        """
        strength = reversal_strength(batch.progress, self.gamma)
        states_BLM = output.sharing.shared_BLM
        wide_BLM = states_BLM.to(torch.promote_types(states_BLM.dtype, torch.float32))
        pooled_BM = mean_state(wide_BLM, output.sharing.mask_BL)
        # A rank without any post with a domain comes here too: every parameter needs a gradient on
        # every rank.
        logits_BD = self.discriminator(reversed_gradient(pooled_BM, strength))
        targets_B, scale = batch.domains_B, batch.unit_scale_T[DOMAINS]
        losses_B = F.cross_entropy(logits_BD, targets_B.clamp_min(0), reduction="none")
        weights_B = batch.domain_weights_B.to(losses_B.dtype)
        total = scale * (losses_B * weights_B).sum()
        terms = {
            "adversarial": total.detach(),
            "adversarial_accuracy": scale
            * ((logits_BD.detach().argmax(dim=1) == targets_B) * weights_B).sum(),
            # Domains are numbered from the commonest.
            "adversarial_commonest": scale * ((targets_B == 0) * weights_B).sum(),
            "adversarial_even": torch.full_like(total.detach(), 1 / self.num_domains),
            "adversarial_lambda": torch.full_like(total.detach(), strength),
        }
        return total, terms


def count_domains(batch: Batch) -> Tensor:
    """What the mean over posts with a domain is divided by, on this rank, float64 scalar."""
    if batch.domain_weights_B is None:
        return torch.zeros((), dtype=torch.float64, device=batch.row_ids_B.device)
    return batch.domain_weights_B.sum(dtype=torch.float64)
