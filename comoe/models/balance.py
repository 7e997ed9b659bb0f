"""The balance bias of a gate: how it moves after each optimizer step, so that every expert stays busy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def keep_bias(balance_bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """No balancing by bias."""


def nudge_bias(balance_bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """One step, in place: busy experts become harder to pick, idle ones easier.

    Args:
        balance_bias_E: float32 buffer of one gate.
        counts_E: routes per expert over all ranks and micro-steps of the optimizer step.
        rate: step u.

    Source: Loss-Free Balancing, arXiv:2408.15664.
    """
    load_E = counts_E.to(balance_bias_E.dtype)
    balance_bias_E.add_(rate * torch.sign(load_E.mean() - load_E))


BALANCES: dict[str, Callable[[Tensor, Tensor, float], None]] = {"none": keep_bias, "bias": nudge_bias}
"""Name in ``model.moe.balance`` -> (bias, counts, rate) -> None, run after each optimizer step."""
