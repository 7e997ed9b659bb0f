"""Inverse temperatures of the contrastive loss, fixed or learned per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comoe.losses.contrastive.closed_form import MIN_TEMPERATURE


class Scales(nn.Module):
    """The tasks' inverse temperatures, fixed or learned; a module of its own, because ZeRO-3 has a
    parameter there only while its module runs.

    Args:
        temperatures: of the tasks, where learned at the start.
        learned: make their logarithms a parameter.
    """

    def __init__(self, temperatures: Sequence[float], *, learned: bool) -> None:
        super().__init__()
        self.fixed = tuple(1 / temperature for temperature in temperatures)
        self.log_scales_T = nn.Parameter(torch.tensor(self.fixed).log()) if learned else None

    def forward(self) -> Tensor:
        """(T,), at most 100, computed in float32 or wider. A model stored in bf16 rounds the
        parameter itself, so its temperatures go in steps of 2 or 3 %; the optimizer's own copy does
        not.

        The gradient is as if nothing had been cut: ``ContrastiveLoss`` stops it where it would lead
        further.
        """
        if self.log_scales_T is None:
            return torch.tensor(self.fixed, dtype=torch.float64)
        wide = torch.promote_types(self.log_scales_T.dtype, torch.float32)
        return _Powers.apply(self.log_scales_T.to(wide), 1 / MIN_TEMPERATURE)


class _Powers(torch.autograd.Function):
    """e to the given powers, no more than a ceiling; the gradient goes on as that of e to the power would."""

    @staticmethod
    def forward(ctx: Any, powers: Tensor, ceiling: float) -> Tensor:
        values = powers.exp().clamp_max(ceiling)
        ctx.save_for_backward(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        return gradient * values, None
