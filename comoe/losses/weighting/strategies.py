"""How the losses of the tasks become one number: fixed, learned, or from how the tasks' gradients agree.

A weighting gets this micro-step's shares of the tasks' mean losses (their mean over ranks and
micro-steps is the global value) and returns the scalar to call backward on. What it carries from
step to step is the same on all ranks. A task that no post of the optimizer step has is left out of
everything.

Carried numbers are buffers of whole numbers, the bits of float64: so they go into checkpoints, move
between layouts (``carried.safetensors``), and a cast of the model to bf16 leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import LossConfig
from comoe.losses.weighting.gradient_surgery import cagrad, pcgrad
from comoe.tasks.task import Task


class Weighting(nn.Module):
    """What all weightings have in common.

    Args:
        tasks: in the order of T.
        config: ``loss`` of the recipe.

    Attributes:
        adapts: the weights follow the training, and so need two tasks.
        reads_gradients: ``forward`` wants ``gram_TT``.
        remembers: it wants ``end_step``.
        waits: steps at the start whose weights are all 1.
    """

    adapts = True
    reads_gradients = False
    remembers = False
    waits = 0

    def __init__(self, tasks: Sequence[Task], config: LossConfig) -> None:
        super().__init__()

    def forward(
        self,
        losses_T: Tensor,
        present_T: Tensor,
        *,
        posts_T: Tensor | None = None,
        gram_TT: Tensor | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Scalar to call backward on, and what each loss is multiplied by (T,), detached, for the log.

        Args:
            losses_T: shares of the mean losses, float32 or wider; 0 with a gradient of 0 for an
                absent task.
            present_T: bool, tasks that some post of the optimizer step has; the same on all ranks.
            posts_T: numbers proportional to the labeled posts that each task has in the optimizer
                step; the same on all ranks.
            gram_TT: inner products of the tasks' gradients by the last shared layer, of all ranks
                and micro-steps, float64; 0 for an absent task.
            step: optimizer step, from 0.
        """
        weights_T = self.weights(present_T, gram_TT=gram_TT, step=step).to(losses_T)
        return (losses_T * weights_T).sum(), weights_T

    def weights(self, present_T: Tensor, *, gram_TT: Tensor | None, step: int) -> Tensor:
        """What each loss is multiplied by in this step (T,), without gradient; arguments of ``forward``."""
        raise NotImplementedError

    def end_step(
        self, losses_T: Tensor, present_T: Tensor, *, gram_TT: Tensor | None = None
    ) -> None:
        """An optimizer step has changed the weights of the model; only where the weighting remembers.

        Args:
            losses_T: global mean losses of the step, float64, the same on all ranks.
            present_T: as in ``forward``, and the same for ``gram_TT``.
        """

    def _carry(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.double().view(torch.int64))


class Equal(Weighting):
    """The plain sum: every task's mean loss counts alike, however many posts it has."""

    adapts = False

    def forward(self, losses_T: Tensor, present_T: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        return losses_T.sum(), losses_T.new_ones(losses_T.shape)


class PerPost(Weighting):
    """Every labeled post of the step counts the same: the mean loss over all of them, times the tasks.

    A task's weight is T times its share of the step's labels (a post with two labels has two), so
    that its mean loss times its weight is a sum over posts that all weigh T / labels. Where all
    tasks have equally many posts it is ``equal``.
    """

    adapts = False

    def __init__(self, tasks: Sequence[Task], config: LossConfig) -> None:
        super().__init__(tasks, config)
        self.count = sum(task.rules.scored for task in tasks)

    def forward(
        self, losses_T: Tensor, present_T: Tensor, *, posts_T: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        posts_T = posts_T.double()
        weights_T = self.count * posts_T / posts_T.sum().clamp_min(1e-30)
        weights_T = weights_T.to(losses_T)
        return (losses_T * weights_T).sum(), weights_T


class Static(Weighting):
    """The sum under the user's numbers, ``tasks.<name>.weight``."""

    adapts = False

    def __init__(self, tasks: Sequence[Task], config: LossConfig) -> None:
        super().__init__(tasks, config)
        # Numbers, not a buffer: they are in the recipe, and a buffer would turn bfloat16 with the
        # model.
        self.numbers = [task.weight for task in tasks]

    def weights(self, present_T: Tensor, *, gram_TT: Tensor | None, step: int) -> Tensor:
        return torch.tensor(self.numbers, device=present_T.device)


class Uncertainty(Weighting):
    """A learned variance s^2 per task: sum of L / (2 s^2) + (log s^2) / 2; at the optimum s^2 = L.

    The parameter is v = log s^2, from 0 on, so every weight begins at 1/2. It is learned at
    ``loss.weighting_rate`` under the schedule of all rates, without decay. A model stored in bf16
    reads it rounded to 3 digits; what is trained is the float32 copy that ZeRO keeps of every
    parameter.

    Source: Kendall et al. 2018, arXiv:1705.07115.
    """

    def __init__(self, tasks: Sequence[Task], config: LossConfig) -> None:
        super().__init__(tasks, config)
        self.log_variances_T = nn.Parameter(torch.zeros(len(tasks)))

    def forward(self, losses_T: Tensor, present_T: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        log_variances_T = self.log_variances_T.to(
            torch.promote_types(losses_T.dtype, torch.float32)
        )
        weights_T = 0.5 * torch.exp(-log_variances_T)
        # Added on every rank and in every micro-step: so their mean has it once.
        prices_T = torch.where(present_T, self.price(log_variances_T), 0.0)
        return (losses_T * weights_T + prices_T).sum(), weights_T.detach()

    def price(self, log_variances_T: Tensor) -> Tensor:
        """What a large variance costs, (T,)."""
        return 0.5 * log_variances_T


class UncertaintyPositive(Uncertainty):
    """The same with log(1 + s^2), which is never below 0; at the optimum s^2 = (L + sqrt(L^2 + 8 L)) / 4.

    Source: Liebel & Koerner 2018, arXiv:1805.06334, with v = log s^2 as the parameter: s itself
    could cross 0.
    """

    def price(self, log_variances_T: Tensor) -> Tensor:
        return F.softplus(log_variances_T)


class DynamicAverage(Weighting):
    """Tasks whose loss falls slowly weigh more: K softmax(r / temperature) over the K tasks that are present.

    r is a task's mean loss in the last whole window of steps over that in the window before; 1
    until both are there. A mean is over those steps of the window that have the task; a window
    without it does not count for it.

    Source: dynamic weight average, arXiv:1803.10704, where a window is an epoch.
    """

    remembers = True

    def __init__(self, tasks: Sequence[Task], config: LossConfig) -> None:
        super().__init__(tasks, config)
        self.temperature, self.window = config.weighting_temperature, config.weighting_window
        self.waits = 2 * self.window
        nothing = torch.full((len(tasks),), torch.nan)
        self._carry("last_bits_T", nothing)
        self._carry("earlier_bits_T", nothing)
        self._carry("sum_bits_T", torch.zeros(len(tasks)))
        self.register_buffer("counts_T", torch.zeros(len(tasks), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def weights(self, present_T: Tensor, *, gram_TT: Tensor | None, step: int) -> Tensor:
        last_T, earlier_T = (
            self.last_bits_T.view(torch.float64),
            self.earlier_bits_T.view(torch.float64),
        )
        known_T = earlier_T > 0
        ratios_T = torch.where(known_T, last_T / earlier_T.where(known_T, 1.0), 1.0)
        # Absent tasks take no share; all of them absent would be 0/0.
        shares_T = torch.softmax(
            (ratios_T / self.temperature).masked_fill(~present_T, -torch.inf), dim=0
        )
        return torch.where(present_T, present_T.sum() * shares_T, 0.0)

    def end_step(
        self, losses_T: Tensor, present_T: Tensor, *, gram_TT: Tensor | None = None
    ) -> None:
        sums_T, last_T, earlier_T = (
            bits_T.view(torch.float64)
            for bits_T in (self.sum_bits_T, self.last_bits_T, self.earlier_bits_T)
        )
        sums_T += torch.where(present_T, losses_T, 0.0)
        self.counts_T += present_T
        self.steps += 1
        ends_T = (self.steps % self.window == 0) & (self.counts_T > 0)
        earlier_T.copy_(torch.where(ends_T, last_T, earlier_T))
        last_T.copy_(torch.where(ends_T, sums_T / self.counts_T.clamp_min(1), last_T))
        sums_T.masked_fill_(ends_T, 0.0)
        self.counts_T.masked_fill_(ends_T, 0)


class GradNorm(Weighting):
    """Learned weights, T in sum, that bring the tasks' weighted gradients to sizes by how far each task has come.

    w_t |g_t| is to be mean(w |g|) r_t^alpha, where r_t is L_t / L_t(first step), over its mean.
    Once per optimizer step, log w takes a step of ``loss.weighting_rate`` down the slope of sum_t
    |w_t |g_t| - target_t|, divided by mean(w |g|), the targets held fixed; then present tasks are
    rescaled to the sum that they had. The logarithm keeps weights positive, the division makes the
    rate independent of the gradients' size.

    Source: arXiv:1711.02257.
    """

    reads_gradients = True
    remembers = True

    def __init__(self, tasks: Sequence[Task], config: LossConfig) -> None:
        super().__init__(tasks, config)
        self.rate, self.alpha = config.weighting_rate, config.gradnorm_alpha
        self._carry("weight_bits_T", torch.ones(len(tasks)))
        self._carry("first_bits_T", torch.zeros(len(tasks)))

    def weights(self, present_T: Tensor, *, gram_TT: Tensor | None, step: int) -> Tensor:
        return torch.where(present_T, self.weight_bits_T.view(torch.float64), 0.0)

    def end_step(
        self, losses_T: Tensor, present_T: Tensor, *, gram_TT: Tensor | None = None
    ) -> None:
        assert gram_TT is not None, "GradNorm reads gradients"
        weights_T, first_T = (
            self.weight_bits_T.view(torch.float64),
            self.first_bits_T.view(torch.float64),
        )
        first_T.copy_(torch.where(present_T & (first_T == 0), losses_T, first_T))
        # Nothing is known of a task that had no loss yet.
        active_T = present_T & (first_T > 0)
        sizes_T = weights_T * gram_TT.diagonal().clamp_min(0).sqrt()
        mean = _mean(sizes_T, active_T)
        ratios_T = torch.where(active_T, losses_T / first_T.where(active_T, 1.0), 0.0)
        targets_T = mean * (ratios_T / _mean(ratios_T, active_T).clamp_min(1e-30)) ** self.alpha
        slopes_T = sizes_T / mean.clamp_min(1e-30) * torch.sign(sizes_T - targets_T)
        moved_T = torch.where(active_T, weights_T * torch.exp(-self.rate * slopes_T), weights_T)
        before, after = weights_T[active_T].sum(), moved_T[active_T].sum()
        weights_T.copy_(torch.where(active_T, moved_T * (before / after), weights_T))


class FromGradients(Weighting):
    """Factors from the inner products of the gradients of the present tasks; found on the host, once per micro-step."""

    reads_gradients = True

    def weights(self, present_T: Tensor, *, gram_TT: Tensor | None, step: int) -> Tensor:
        assert gram_TT is not None, "this weighting reads gradients"
        table_TT, present = gram_TT.double().cpu().numpy(), present_T.nonzero()[:, 0].cpu().numpy()
        gram_KK = table_TT[np.ix_(present, present)]
        factors_T = np.zeros(len(table_TT))
        # Where a gradient is not finite, neither is the loss, and the step will change nothing.
        factors_T[present] = self.combine(gram_KK, step) if np.isfinite(gram_KK).all() else 1.0
        return torch.from_numpy(factors_T).to(present_T.device)

    def combine(self, gram_KK: np.ndarray, step: int) -> np.ndarray:
        """Factors (K,) of K gradients, from their inner products."""
        raise NotImplementedError


class PCGrad(FromGradients):
    """What two tasks' gradients have against each other is taken out of both (``pcgrad``)."""

    def combine(self, gram_KK: np.ndarray, step: int) -> np.ndarray:
        return pcgrad(gram_KK, step=max(step, 0))


class CAGrad(FromGradients):
    """The direction near the mean that helps the worst-off task most (``cagrad``)."""

    def __init__(self, tasks: Sequence[Task], config: LossConfig) -> None:
        super().__init__(tasks, config)
        self.strength = config.cagrad_c

    def combine(self, gram_KK: np.ndarray, step: int) -> np.ndarray:
        return cagrad(gram_KK, strength=self.strength)


def _mean(values_T: Tensor, active_T: Tensor) -> Tensor:
    return torch.where(active_T, values_T, 0.0).sum() / active_T.sum().clamp_min(1)


WEIGHTINGS: dict[str, Callable[[Sequence[Task], LossConfig], Weighting]] = {
    "equal": Equal,
    "posts": PerPost,
    "static": Static,
    "uncertainty": Uncertainty,
    "uncertainty_positive": UncertaintyPositive,
    "dynamic_average": DynamicAverage,
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
}
"""Name in ``loss.weighting`` -> class, made from the tasks and ``loss`` of the recipe."""
