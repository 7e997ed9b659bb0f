"""Gates: logits of S tokens over E experts become a ``Routing``; and the balance bias that keeps all experts busy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from comoe.config.recipe import MoeConfig
from comoe.types import Routing


@dataclass(frozen=True, slots=True)
class TopKGate:
    """What the gates share: float32 scores, then ``select_experts``."""

    top_k: int
    """Experts per token."""
    temperature: float = 1.0
    """Divides the logits."""
    cooperation_threshold: float = 0.0
    """A selected expert with a lower score gets the weight 0, never the best one."""
    scale: float = 1.0
    """Factor of the weights."""
    for_measuring: ClassVar[bool] = False
    """True where the gate ignores the tokens: good for speed figures, useless for training."""
    draws: ClassVar[bool] = False
    """True where training draws an expert per post, and evaluation runs the mean of the experts."""

    def __call__(
        self,
        logits_SE: Tensor,
        balance_bias_E: Tensor,
        selected_Sk: Tensor | None = None,
        own_SE: Tensor | None = None,
    ) -> Routing:
        """Route S tokens; deterministic. ``selected_Sk`` settles the experts, and only their
        weights are computed; with ``own_SE`` a token sees only these experts."""
        scores_SE = self.score(wide(logits_SE) / self.temperature)
        return select_experts(
            logits_SE,
            *restricted(scores_SE, balance_bias_E, own_SE),
            self.top_k,
            self.cooperation_threshold,
            selected_Sk,
            scale=self.scale,
        )

    def weight_at_start(self, logits_E: Tensor) -> float:
        """Mean weight of a selected expert at scale 1, without bias and threshold: 1 / k.

        With k = 1 it is the best expert's share of all scores.

        Args:
            logits_E: of the experts that a token sees, see ``logits_at_start``.
        """
        if self.top_k > 1:
            return 1 / self.top_k
        scores_E = self.score(logits_E[None] / self.temperature)[0]
        return float(scores_E.max() / scores_E.sum())

    def score(self, logits_SE: Tensor) -> Tensor:
        """Scores in (0, 1), float32, shape (S, E)."""
        raise NotImplementedError

    def z_penalty(self, logits_SE: Tensor) -> Tensor:
        """What the z-loss averages over tokens, float32, shape (S,)."""
        raise NotImplementedError


class SigmoidGate(TopKGate):
    """Independent scores: several experts can be strong for one token at once, so they cooperate.

    Source: TaCL-CoMoE (IJCNLP 2025), extended to the top k experts of each token.
    """

    __slots__ = ()

    def score(self, logits_SE: Tensor) -> Tensor:
        """Sigmoid of each logit."""
        return torch.sigmoid(logits_SE)

    def z_penalty(self, logits_SE: Tensor) -> Tensor:
        """Mean square of each token's logits; the log-sum-exp form would drive every score to 1/(E+1)."""
        return wide(logits_SE).square().mean(dim=1)


class SoftmaxGate(TopKGate):
    """Competing scores, the usual mixture of experts and the ablation of the cooperative gate."""

    __slots__ = ()

    def score(self, logits_SE: Tensor) -> Tensor:
        """Softmax over experts."""
        return torch.softmax(logits_SE, dim=1)

    def z_penalty(self, logits_SE: Tensor) -> Tensor:
        """Squared log-sum-exp of each token's logits. Source: ST-MoE, arXiv:2202.08906."""
        return torch.logsumexp(wide(logits_SE), dim=1).square()


class UniformGate(SigmoidGate):
    """All experts in turn with equal weights: a perfectly even load at the usual cost, for speed figures alone.

    Logits, scores and the choice of the best are computed as ever; the router gets a gradient of
    zero.
    """

    __slots__ = ()
    for_measuring = True

    def __call__(
        self,
        logits_SE: Tensor,
        balance_bias_E: Tensor,
        selected_Sk: Tensor | None = None,
        own_SE: Tensor | None = None,
    ) -> Routing:
        """Token s goes to the k experts from number s * k on, modulo E, whosever they are."""
        (S, E), k = logits_SE.shape, self.top_k
        places_SE = (
            torch.arange(E, device=logits_SE.device)
            - k * torch.arange(S, device=logits_SE.device)[:, None]
        )
        # Above any score, so that the top-k finds exactly these.
        turn_SE = 2.0 * (places_SE % E < k)
        routing = super().__call__(logits_SE, turn_SE, selected_Sk)
        return replace(routing, weights_Sk=0.0 * routing.weights_Sk + self.scale / k)

    def weight_at_start(self, logits_E: Tensor) -> float:
        """1 / k for every k."""
        return 1 / self.top_k


class RandomGate(UniformGate):
    """An expert of each layer for each post, drawn in training alone; equal weights.

    The block draws and hands the choice over as ``selected_Sk``. In evaluation the weights of the
    experts are averaged to one block, and what the gate says counts for nothing.

    Source: AdaMix, arXiv:2205.12410.
    """

    __slots__ = ()
    for_measuring = False
    draws = True


def draw(numbers_B: Tensor, salt: int) -> Tensor:
    """A number from 0 to 2^62 for each number, as if at random, on all machines alike: splitmix64.

    Args:
        numbers_B: int64.
        salt: another one gives other, unrelated numbers.
    """
    # Sums and products wrap as in unsigned arithmetic; a number that is given must be signed.
    x_B = numbers_B + (((salt + 1) * _GOLDEN + 2**63) % 2**64 - 2**63)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        # int64 has no logical shift: the copies of the sign are masked out.
        x_B = x_B ^ ((x_B >> shift) & ((1 << (64 - shift)) - 1))
        x_B = x_B if factor is None else x_B * factor
    return x_B & (2**62 - 1)


_GOLDEN, _FIRST, _SECOND = (
    0x9E3779B97F4A7C15,
    0xBF58476D1CE4E5B9 - 2**64,
    0x94D049BB133111EB - 2**64,
)
"""Constants of splitmix64 (Steele et al. 2014), those above 2^63 as int64 has them."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32: so routing decides, whatever the model's precision (float64 stays, for
    references in tests)."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def best_experts(scores_SE: Tensor, top_k: int) -> Tensor:
    """Numbers of each token's ``top_k`` largest scores, largest first, int64; the scores are overwritten."""
    if scores_SE.is_cuda or top_k > 2:
        return torch.topk(scores_SE, top_k, dim=1).indices
    # On a CPU topk sorts every row; one or two passes for the maximum take a third of its time.
    first_S1 = scores_SE.argmax(dim=1, keepdim=True)
    if top_k == 1:
        return first_S1
    second_S1 = scores_SE.scatter_(1, first_S1, -torch.inf).argmax(dim=1, keepdim=True)
    return torch.cat([first_S1, second_S1], dim=1)


def restricted(
    scores_SE: Tensor, balance_bias_E: Tensor, own_SE: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and bias such that only a token's own experts count; as they are without ``own_SE`` (bool)."""
    if own_SE is None:
        return scores_SE, balance_bias_E
    return scores_SE * own_SE, torch.where(own_SE, balance_bias_E, -torch.inf)


def select_experts(
    logits_SE: Tensor,
    scores_SE: Tensor,
    balance_bias_E: Tensor,
    top_k: int,
    threshold: float,
    selected_Sk: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Routing:
    """Select the top-k experts of each token by score plus bias and weigh them by score alone.

    Args:
        logits_SE: what the scores were made of, kept for the z-loss.
        scores_SE: non-negative scores, float32.
        balance_bias_E: added for the selection only, so that it moves load without changing a weight;
            also one row per token.
        top_k: experts per token.
        threshold: selected experts with a lower score weigh 0, except for each token's best one.
        selected_Sk: experts selected before, int64: a recomputation must not decide near-ties another
            way.
        scale: factor of the normalized weights.

    Returns:
        The routing; weights are differentiable through the scores. With one expert out of several
        the weight is ``scale`` times its share of the scores of all experts: normalized over the
        selected one alone it would be constant and the router would learn nothing.

    Source: sigmoid gate of TaCL-CoMoE; bias of Loss-Free Balancing, arXiv:2408.15664.
    """
    indices_Sk = selected_Sk
    if indices_Sk is None:
        indices_Sk = best_experts(scores_SE.detach() + balance_bias_E, top_k)
    chosen_Sk = scores_SE.gather(1, indices_Sk)
    if threshold > 0:
        weak_Sk = (chosen_Sk < threshold) & (chosen_Sk < chosen_Sk.amax(dim=1, keepdim=True))
        chosen_Sk = chosen_Sk.masked_fill(weak_Sk, 0.0)
    others = scores_SE if top_k == 1 else chosen_Sk
    # Scores of logits below -100 are 0 in float32; the floor keeps 0/0 away and changes no other
    # sum.
    tiny = torch.finfo(chosen_Sk.dtype).tiny
    weights_Sk = scale * chosen_Sk / others.sum(dim=1, keepdim=True).clamp_min(tiny)
    counts_E = torch.bincount(indices_Sk.reshape(-1), minlength=scores_SE.shape[1])
    return Routing(logits_SE, scores_SE, indices_Sk, weights_Sk, counts_E)


OWN = "own"
"""Word of ``model.moe.task_prior``: a task sees the experts that it was dealt and no other."""


def dealt_experts(tasks_B: Tensor, num_experts: int, num_tasks: int) -> Tensor:
    """Which experts belong to each row's task, bool (B, E): expert e to task e mod T; where there
    are more tasks than experts, task t has expert t mod E.

    Args:
        tasks_B: numbers of tasks, int64.
        num_experts: E.
        num_tasks: T.
    """
    experts_E = torch.arange(num_experts, device=tasks_B.device)
    if num_tasks > num_experts:
        return tasks_B[:, None] % num_experts == experts_E
    return experts_E % num_tasks == tasks_B[:, None]


def balanced_together(config: MoeConfig, num_tasks: int) -> list[slice]:
    """Groups of experts whose loads a balance rule makes even: all, or under ``task_prior: own``
    those of each task, because the tasks' tokens are not equally many."""
    if config.task_prior != OWN:
        return [slice(None)]
    return [slice(task, None, num_tasks) for task in range(num_tasks)]


GATES: dict[str, type[TopKGate]] = {
    "sigmoid": SigmoidGate,
    "softmax": SoftmaxGate,
    "random": RandomGate,
    "uniform": UniformGate,
}
"""Name in ``model.moe.gate`` -> class; made from (top_k, temperature,
cooperation_threshold, scale)."""


def keep_bias(balance_bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """No balancing by bias."""


def nudge_bias(balance_bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """One step, in place: busy experts become harder to select, idle ones easier.

    Args:
        balance_bias_E: float32 buffer of one gate.
        counts_E: routes per expert over all ranks and micro-steps of the optimizer step.
        rate: step u.

    Source: Loss-Free Balancing, arXiv:2408.15664.
    """
    load_E = counts_E.to(balance_bias_E.dtype)
    balance_bias_E.add_(rate * torch.sign(load_E.mean() - load_E))


BALANCES: dict[str, Callable[[Tensor, Tensor, float], None]] = {
    "none": keep_bias,
    "bias": nudge_bias,
}
"""Name in ``model.moe.balance`` -> (bias, counts, rate) -> None, run after each optimizer step."""
