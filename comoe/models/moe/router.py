"""What feeds a gate: the projection of tokens, the task's logits, and the gate that a recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import MoeConfig
from comoe.models.moe.gate import GATES, OWN, TopKGate, wide
from comoe.types import Routing

ROUTER_STD = 0.02
"""Standard deviation of a router's weights at the start; a normalized row of width M has logits of
0.02 sqrt(M)."""


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
        return F.linear(wide(x), wide(self.weight))


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
        self.draws = gate.draws
        self._task_logits_SE: Tensor | None = None
        self._selected_Sk: Tensor | None = None
        self._own_SE: Tensor | None = None
        self._routing: Routing | None = None

    def prepare(
        self,
        task_logits_SE: Tensor | None,
        selected_Sk: Tensor | None = None,
        own_SE: Tensor | None = None,
    ) -> None:
        """Hand over what the next ``route`` needs.

        Args:
            task_logits_SE: the task's part of the logits, float32, where the gate reads tasks.
            selected_Sk: experts that an earlier pass over the same tokens selected, None on a
                first pass.
            own_SE: experts that the token sees, bool; None for all.
        """
        self._task_logits_SE = task_logits_SE
        self._selected_Sk, self._own_SE = selected_Sk, own_SE

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
        self._routing = self.gate(
            sum(parts[1:], parts[0]), balance_bias_E, self._selected_Sk, self._own_SE
        )
        self._task_logits_SE = self._selected_Sk = self._own_SE = None
        return self._routing

    def collect(self) -> Routing:
        """The routing of the call since the last ``collect``."""
        routing, self._routing = self._routing, None
        assert routing is not None, "collect() comes once after each call of the mixture"
        return routing


ROUTES: dict[str, RouteInputs] = {
    "token": RouteInputs(token=True, task=False),
    "task": RouteInputs(token=False, task=True),
    "both": RouteInputs(token=True, task=True),
}
"""Name in ``model.moe.route_by`` -> what the gate reads."""


def logits_at_start(
    num_experts: int, std: float, *, prior: float | str = 0.0, num_tasks: int = 1
) -> Tensor:
    """Logits of the experts that a token sees at the start, float64: the expected order statistics
    of a normal distribution (Blom 1958), those of its task's experts raised by the prior.

    Args:
        num_experts: E.
        std: standard deviation of the logits.
        prior: ``model.moe.task_prior``.
        num_tasks: T.
    """

    def normal(count: int) -> Tensor:
        places = [(rank - 0.375) / (count + 0.25) for rank in range(1, count + 1)]
        return torch.tensor([NormalDist(0, std).inv_cdf(p) for p in places], dtype=torch.float64)

    if not prior:
        return normal(num_experts)
    own = max(1, num_experts // num_tasks)
    if prior == OWN:
        return normal(own)
    return torch.cat([normal(own) + prior, normal(num_experts - own)])


def mean_weight_at_start(config: MoeConfig, model_width: int, num_tasks: int = 1) -> float:
    """Mean weight of selected experts at ``gate_scale`` 1 and at the start, see ``TopKGate.weight_at_start``."""
    inputs = ROUTES[config.route_by]
    logit_std = math.sqrt((inputs.token + inputs.task) * model_width) * ROUTER_STD
    # A model whose sizes alone are wanted is built on the meta device, which has no numbers.
    with torch.device("cpu"):
        logits_E = logits_at_start(
            config.num_experts, logit_std, prior=config.task_prior, num_tasks=num_tasks
        )
        return GATES[config.gate](config.top_k, config.temperature).weight_at_start(logits_E)


def build_gate(config: MoeConfig, model_width: int, num_tasks: int = 1) -> TopKGate:
    """The gate that ``model.moe`` asks for.

    ``gate_scale: auto`` makes the mean weight of selected experts 1 at the start: k experts of
    width A / k then add up like the hidden units of one dense feed-forward of width A.
    """
    k, E = config.top_k, config.num_experts
    assert 1 <= k <= E, "the recipe's rules bind top_k to num_experts"
    gate = GATES[config.gate](k, config.temperature, config.cooperation_threshold)
    if config.gate_scale != "auto":
        return replace(gate, scale=config.gate_scale)
    return replace(gate, scale=1 / mean_weight_at_start(config, model_width, num_tasks))
