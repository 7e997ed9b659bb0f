"""AutoEP's layer with comoe's gate and, on a CPU, with comoe's dispatch and arithmetic.

On a GPU AutoEP does everything but the gate. Its CPU path is a reference: it pads every expert,
copies all routed rows four times more than it must, and makes each expert's gradient as large as
that of all experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.module_inject import auto_ep_layer
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import Tensor

from comoe.config.recipe import MoeConfig
from comoe.distributed import all_gather_in_group
from comoe.models.moe.experts import mix_experts, run_dense, sort_routes
from comoe.models.moe.router import ROUTES, Float32Linear, PendingRoute, build_gate
from comoe.types import Routing


class CooperativeRouter(TokenChoiceTopKRouter):
    """AutoEP's router with comoe's gate: same parameters and buffers, our rule, task logits from the owning layer."""

    def __init__(self, moe: MoeConfig, num_tasks: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.gate = Float32Linear(settings["dim"], settings["num_experts"])
        gate = build_gate(moe, settings["dim"], num_tasks)
        self.pending = PendingRoute(gate, ROUTES[moe.route_by])

    def prepare(
        self,
        task_logits_SE: Tensor | None,
        selected_Sk: Tensor | None = None,
        own_SE: Tensor | None = None,
    ) -> None:
        """See ``PendingRoute.prepare``."""
        self.pending.prepare(task_logits_SE, selected_Sk, own_SE)

    def collect(self) -> Routing:
        """See ``PendingRoute.collect``."""
        return self.pending.collect()

    def forward(
        self, tokens_SM: Tensor, expert_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What AutoEP reads: weights (S, k), indices (S, k), tokens per expert (E,) int32."""
        routing = self.pending.route(self.gate, tokens_SM, self.e_score_correction_bias)
        return routing.weights_Sk, routing.indices_Sk, routing.counts_E.to(torch.int32)


class CooperativeExperts(GroupedExperts):
    """AutoEP's experts of this rank; on a CPU they weigh and add up as well, by ``comoe.models.moe.experts``."""

    def forward(
        self,
        x_RM: Tensor,
        counts_E: Tensor,
        order_N: Tensor | None = None,
        weights_Rk: Tensor | None = None,
        *,
        mean_over: Any = None,
    ) -> Tensor:
        """Rows sorted by expert to their outputs, as in AutoEP; with an order and weights, rows to
        weighted sums; with a group of ranks, the output of the mean of all their experts."""
        if mean_over is not None:
            gate_up, down = (
                all_gather_in_group(part[None], mean_over).mean(dim=0).to(x_RM.dtype)
                for part in (torch.cat([self.w1, self.w3], dim=1).mean(dim=0), self.w2.mean(dim=0))
            )
            return run_dense(x_RM, gate_up, down)
        if order_N is None or weights_Rk is None:
            return super().forward(x_RM, counts_E)
        # A module, so that ZeRO-3 makes its weights whole around this call.
        weights = (weight.to(x_RM.dtype) for weight in (self.w1, self.w3, self.w2))
        return mix_experts(x_RM, weights_Rk, order_N, counts_E.tolist(), *weights)


class CooperativeLayer(auto_ep_layer.AutoEPMoELayer):
    """AutoEP's layer; on a CPU without padding or scatter, and with one gather each way."""

    def _forward(self, hidden_1SM: Tensor) -> Tensor:
        x_SM = hidden_1SM.reshape(-1, hidden_1SM.shape[-1])
        if self.router.pending.draws and not self.training:
            weights_Sk, _, counts_E = self.router(x_SM, self.expert_bias)
            mean_SM = self.experts(x_SM, counts_E, mean_over=self.ep_group)
            return (mean_SM * weights_Sk.to(x_SM.dtype)).view_as(hidden_1SM)
        if hidden_1SM.is_cuda:
            return super()._forward(hidden_1SM)
        weights_Sk, indices_Sk, counts_E = self.router(x_SM, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts_E)
        order_N = sort_routes(indices_Sk)
        if self.ep_size == 1:
            return self.experts(x_SM, counts_E, order_N, weights_Sk).view_as(hidden_1SM)
        return self._over_ranks(x_SM, weights_Sk, indices_Sk, counts_E, order_N).view_as(hidden_1SM)

    def _over_ranks(
        self,
        x_SM: Tensor,
        weights_Sk: Tensor,
        indices_Sk: Tensor,
        counts_E: Tensor,
        order_N: Tensor,
    ) -> Tensor:
        """Rows and their weights to the ranks of their experts, outputs back, and their sum per token."""
        plan = auto_ep_layer.compute_split_plan(
            selected_experts=indices_Sk,
            num_experts=self.num_experts,
            ep_size=self.ep_size,
            num_local_experts=self.num_local_experts,
            ep_group=self.ep_group,
            num_tokens_per_expert=counts_E,
        )
        exchange = auto_ep_layer._AllToAllV.apply
        tokens_N = order_N // self.top_k
        rows_RM = exchange(
            self.ep_group, x_SM.index_select(0, tokens_N), plan.input_splits, plan.output_splits
        )
        # The weights travel too: the experts multiply them into their hidden state, a quarter as
        # wide as the output.
        weights_N1 = weights_Sk.reshape(-1, 1).index_select(0, order_N)
        weights_R1 = exchange(self.ep_group, weights_N1, plan.input_splits, plan.output_splits)
        counts_WE = plan.local_counts_by_source
        owner_R = (
            torch.arange(self.num_local_experts)
            .repeat(self.ep_size)
            .repeat_interleave(counts_WE.reshape(-1))
        )
        answers_RM = self.experts(rows_RM, counts_WE.sum(dim=0), sort_routes(owner_R), weights_R1)
        answers_NM = exchange(self.ep_group, answers_RM, plan.output_splits, plan.input_splits)
        return torch.zeros_like(x_SM).index_add(0, tokens_N, answers_NM)


@contextmanager
def our_classes(moe: MoeConfig, num_tasks: int) -> Iterator[None]:
    """Inside, AutoEP replaces blocks by these classes: it takes none, but looks the names up in its module."""
    ours = {
        "TokenChoiceTopKRouter": lambda **settings: CooperativeRouter(moe, num_tasks, **settings),
        "GroupedExperts": CooperativeExperts,
        "AutoEPMoELayer": CooperativeLayer,
    }
    originals = {name: getattr(auto_ep_layer, name) for name in ours}
    try:
        for name, replacement in ours.items():
            setattr(auto_ep_layer, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(auto_ep_layer, name, original)
