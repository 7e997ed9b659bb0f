"""Gates: logits of S tokens over E experts become a ``Routing``; and the balance bias that keeps all experts busy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import MoeConfig
from comoe.types import Routing

ROUTER_STD = 0.02
"""Standard deviation of a router's weights at the start; a normalized row of width M has logits of
0.02 sqrt(M)."""


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

    def __call__(
        self, logits_SE: Tensor, balance_bias_E: Tensor, selected_Sk: Tensor | None = None
    ) -> Routing:
        """Route S tokens; deterministic. ``selected_Sk`` settles the experts, and only their weights are computed."""
        scores_SE = self.score(_wide(logits_SE) / self.temperature)
        return select_experts(
            logits_SE,
            scores_SE,
            balance_bias_E,
            self.top_k,
            self.cooperation_threshold,
            selected_Sk,
            scale=self.scale,
        )

    def weight_at_start(self, num_experts: int, logit_std: float) -> float:
        """Mean weight of a selected expert at scale 1, without bias and threshold: 1 / k.

        With k = 1 it is the best expert's share of all scores, for logits at the expected order
        statistics of a normal distribution (Blom 1958).

        Args:
            num_experts: E.
            logit_std: standard deviation of the logits.
        """
        if self.top_k > 1:
            return 1 / self.top_k
        places = [(rank - 0.375) / (num_experts + 0.25) for rank in range(1, num_experts + 1)]
        logits_E = torch.tensor([NormalDist(0, logit_std).inv_cdf(place) for place in places])
        scores_E = self.score(logits_E.double()[None] / self.temperature)[0]
        return float(scores_E[-1] / scores_E.sum())

    def score(self, logits_SE: Tensor) -> Tensor:
        """Scores in (0, 1), float32, shape (S, E)."""
        raise NotImplementedError

    def z_penalty(self, logits_SE: Tensor) -> Tensor:
        """What the z-loss averages over tokens, float32, shape (S,)."""
        raise NotImplementedError


class SigmoidGate(TopKGate):
    """Independent scores: several experts can be strong for one token at once, so they cooperate.

    Source: TaCL-CoMoE (IJCNLP 2025), scaled to top-k tokens by methods.md section 1.
    """

    __slots__ = ()

    def score(self, logits_SE: Tensor) -> Tensor:
        """Sigmoid of each logit."""
        return torch.sigmoid(logits_SE)

    def z_penalty(self, logits_SE: Tensor) -> Tensor:
        """Mean square of each token's logits; the log-sum-exp form would drive every score to 1/(E+1)."""
        return _wide(logits_SE).square().mean(dim=1)


class SoftmaxGate(TopKGate):
    """Competing scores, the usual mixture of experts and the ablation of the cooperative gate."""

    __slots__ = ()

    def score(self, logits_SE: Tensor) -> Tensor:
        """Softmax over experts."""
        return torch.softmax(logits_SE, dim=1)

    def z_penalty(self, logits_SE: Tensor) -> Tensor:
        """Squared log-sum-exp of each token's logits. Source: ST-MoE, arXiv:2202.08906."""
        return torch.logsumexp(_wide(logits_SE), dim=1).square()


class UniformGate(SigmoidGate):
    """All experts in turn with equal weights: a perfectly even load at the usual cost, for speed figures alone.

    Logits, scores and the choice of the best are computed as ever; the router gets a gradient of
    zero.
    """

    __slots__ = ()
    for_measuring = True

    def __call__(
        self, logits_SE: Tensor, balance_bias_E: Tensor, selected_Sk: Tensor | None = None
    ) -> Routing:
        """Token s goes to the k experts from number s * k on, modulo E."""
        (S, E), k = logits_SE.shape, self.top_k
        places_SE = (
            torch.arange(E, device=logits_SE.device)
            - k * torch.arange(S, device=logits_SE.device)[:, None]
        )
        # Above any score, so that the top-k finds exactly these.
        turn_SE = 2.0 * (places_SE % E < k)
        routing = super().__call__(logits_SE, turn_SE, selected_Sk)
        return replace(routing, weights_Sk=0.0 * routing.weights_Sk + self.scale / k)

    def weight_at_start(self, num_experts: int, logit_std: float) -> float:
        """1 / k for every k."""
        return 1 / self.top_k


def _wide(tensor: Tensor) -> Tensor:
    # Routing decisions are float32 whatever the model's precision (float64 stays, for references in
    # tests).
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
        balance_bias_E: added for the selection only, so that it moves load without changing a weight.
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


class Float32Linear(nn.Module):
    """A bias-free linear map computed in float32 also where the model is bfloat16: both operands are cast.

    Args:
        in_width: width of the input.
        out_width: width of the output.
        std: standard deviation of the weights at the start.
    """

    def __init__(self, in_width: int, out_width: int, *, std: float = ROUTER_STD) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., in_width) to (..., out_width), float32."""
        return F.linear(_wide(x), _wide(self.weight))


class RouterProjection(Float32Linear):
    """The token part of a gate's logits, and the balance bias.

    DeepSpeed AutoEP copies ``weight`` [E, M] and the buffer ``e_score_correction_bias`` [E] into
    its own router by exactly these names. The buffer steps by 0.001 and so must stay
    float32 through ``.bfloat16()``.
    """

    def __init__(self, model_width: int, num_experts: int) -> None:
        super().__init__(model_width, num_experts)
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterProjection:
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        # A move to another device is followed, a change of precision is not.
        if self.e_score_correction_bias.dtype != bias_E.dtype:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self


@dataclass(frozen=True, slots=True)
class RouteInputs:
    """What a gate reads."""

    token: bool
    """The token's state."""
    task: bool
    """The embedding of the task that the token's row is for."""


class PendingRoute:
    """Carries one call's task logits to the router and its routing back to the owner of the block.

    The owner calls ``prepare``, runs the mixture, then calls ``collect``; the router calls
    ``route`` in between. Both slots are emptied by their reader, so nothing of one encode can leak
    into the next.

    Args:
        gate: the gate's rule.
        inputs: whether the router's own token logits count.
    """

    def __init__(self, gate: TopKGate, inputs: RouteInputs) -> None:
        self.gate = gate
        self.inputs = inputs
        self._task_logits_SE: Tensor | None = None
        self._selected_Sk: Tensor | None = None
        self._routing: Routing | None = None

    def prepare(self, task_logits_SE: Tensor | None, selected_Sk: Tensor | None = None) -> None:
        """Hand over what the next ``route`` needs.

        Args:
            task_logits_SE: the task's part of the logits, float32, where the gate reads tasks.
            selected_Sk: experts that an earlier pass over the same tokens selected, None on a
                first pass.
        """
        self._task_logits_SE = task_logits_SE
        self._selected_Sk = selected_Sk

    def route(self, project: nn.Module, hidden_SM: Tensor, balance_bias_E: Tensor) -> Routing:
        """Add up the logits and decide.

        Args:
            project: the token projection (S, M) -> (S, E); called only where the gate reads tokens.
                A module, not its weight: under ZeRO-3 a weight is whole only inside its own
                module's forward.
            hidden_SM: the tokens.
            balance_bias_E: moves the selection, never a weight.
        """
        parts = [project(hidden_SM)] if self.inputs.token else []
        if self.inputs.task:
            assert self._task_logits_SE is not None, (
                "prepare() must hand over task logits before each call"
            )
            parts.append(self._task_logits_SE)
        self._routing = self.gate(sum(parts[1:], parts[0]), balance_bias_E, self._selected_Sk)
        self._task_logits_SE = self._selected_Sk = None
        return self._routing

    def collect(self) -> Routing:
        """The routing of the call since the last ``collect``."""
        routing, self._routing = self._routing, None
        assert routing is not None, "collect() comes once after each call of the mixture"
        return routing


def build_gate(config: MoeConfig, model_width: int) -> TopKGate:
    """The gate that ``model.moe`` asks for.

    ``gate_scale: auto`` makes the mean weight of selected experts 1 at the start: k experts of
    width A / k then add up like the hidden units of one dense feed-forward of width A.
    """
    k, E = config.top_k, config.num_experts
    assert 1 <= k <= E, "the recipe's rules bind top_k to num_experts"
    gate = GATES[config.gate](k, config.temperature, config.cooperation_threshold)
    if config.gate_scale != "auto":
        return replace(gate, scale=config.gate_scale)
    inputs = ROUTES[config.route_by]
    logit_std = math.sqrt((inputs.token + inputs.task) * model_width) * ROUTER_STD
    return replace(gate, scale=1 / gate.weight_at_start(E, logit_std))


GATES: dict[str, type[TopKGate]] = {
    "sigmoid": SigmoidGate,
    "softmax": SoftmaxGate,
    "uniform": UniformGate,
}
"""Name in ``model.moe.gate`` -> class; made from (top_k, temperature,
cooperation_threshold, scale)."""


ROUTES: dict[str, RouteInputs] = {
    "token": RouteInputs(token=True, task=False),
    "task": RouteInputs(token=False, task=True),
    "both": RouteInputs(token=True, task=True),
}
"""Name in ``model.moe.route_by`` -> what the gate reads."""


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
