"""The cooperative block: experts beside a pre-trained feed-forward, on real tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from comoe.models.gate import ROUTES, Float32Linear, PendingRoute, RouterProjection, build_gate
from comoe.models.grouped import gated, run_grouped, run_tiled
from comoe.models.mixing import mix_experts, sort_routes
from comoe.protocols import Routing
from comoe.schema import MoeConfig

MIXTURE_PATTERN = r".*\.block\.mixture"
"""Matches the module path of each ``ExpertMixture``: what DeepSpeed AutoEP replaces."""


class Experts(nn.Module):
    """E gated feed-forwards in two tensors: ``down @ (silu(gate @ x) * (up @ x))``, no biases.

    ``gate_up_proj`` [E, 2F, M] holds the gate rows first, then the up rows; ``down_proj`` is [E, M, F]. Names and
    layout are what DeepSpeed AutoEP shards.

    Args:
        num_experts: E.
        model_width: M.
        expert_width: F.
        output_init: standard deviation of ``down_proj``; 0 makes every expert answer 0.
    """

    def __init__(self, num_experts: int, model_width: int, expert_width: int, *, output_init: float = 0.0) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_width, model_width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, model_width, expert_width))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=output_init)

    def forward(
        self, x_SM: Tensor, counts_E: Tensor, order_N: Tensor | None = None, weights_Sk: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of each row's experts.

        Args:
            x_SM: rows.
            counts_E: routes per expert, int64, sum N = S * k.
            order_N: ``sort_routes`` of the picks; None: one route per row, rows sorted by expert.
            weights_Sk: weight of each route; None: 1.

        Returns:
            Shape (S, M), the dtype of ``x_SM``.
        """
        if order_N is None or weights_Sk is None:
            order_N = torch.arange(x_SM.shape[0], device=x_SM.device)
            weights_Sk = torch.ones((x_SM.shape[0], 1), device=x_SM.device)
        gate_up, down = self.gate_up_proj.to(x_SM.dtype), self.down_proj.to(x_SM.dtype)
        if not x_SM.is_cuda:
            return mix_experts(x_SM, weights_Sk, order_N, counts_E.tolist(), *gate_up.chunk(2, dim=1), down)
        # The grouped kernel wants bfloat16 rows of a multiple of 16 bytes.
        aligned = all(width % 8 == 0 for width in down.shape[1:])
        run = run_grouped if x_SM.dtype == torch.bfloat16 and aligned else run_tiled
        answers_NM = run(x_SM.index_select(0, order_N // weights_Sk.shape[1]), counts_E, gate_up, down)
        routed_NM = torch.zeros_like(answers_NM).index_copy(0, order_N, answers_NM)
        routed_SkM = routed_NM.view(*weights_Sk.shape, -1)
        return (routed_SkM * weights_Sk.unsqueeze(-1)).sum(dim=1).to(x_SM.dtype)


class GatedFeedForward(nn.Module):
    """The expert that every token visits: the same gated form as ``Experts``, dense.

    Args:
        model_width: M.
        width: its hidden width.
        output_init: standard deviation of the output projection.
    """

    def __init__(self, model_width: int, width: int, *, output_init: float = 0.0) -> None:
        super().__init__()
        self.gate_up = nn.Linear(model_width, 2 * width, bias=False)
        self.down = nn.Linear(width, model_width, bias=False)
        nn.init.normal_(self.gate_up.weight, std=0.02)
        nn.init.normal_(self.down.weight, std=output_init)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., M) to (..., M)."""
        return self.down(gated(self.gate_up(x)))


class ExpertMixture(nn.Module):
    """Routes tokens to experts and adds their answers up, in one process; DeepSpeed AutoEP replaces it as a whole.

    Its owner calls ``router.prepare(task_logits_SE)``, then the mixture, then ``router.collect()``; the replacement's
    ``router`` answers the same two calls.

    Args:
        model_width: M.
        expert_width: F.
        config: ``model.moe``.
    """

    def __init__(self, model_width: int, expert_width: int, config: MoeConfig) -> None:
        super().__init__()
        inputs = ROUTES[config.route_by]
        self.gate = RouterProjection(model_width, config.num_experts)
        if not inputs.token:
            # AutoEP wants the weight to exist; nothing reads it, so nothing may train or decay it.
            nn.init.zeros_(self.gate.weight)
            self.gate.weight.requires_grad_(False)
        self.experts = Experts(config.num_experts, model_width, expert_width, output_init=config.output_init)
        self.router = PendingRoute(build_gate(config), inputs)

    def forward(self, hidden_1SM: Tensor) -> Tensor:
        """Weighted sum of each token's experts, shape (1, S, M)."""
        x_SM = hidden_1SM.reshape(-1, hidden_1SM.shape[-1])
        routing = self.router.route(self.gate, x_SM, self.gate.e_score_correction_bias)
        order_N = sort_routes(routing.indices_Sk)
        return self.experts(x_SM, routing.counts_E, order_N, routing.weights_Sk).view_as(hidden_1SM)


@dataclass(slots=True)
class RoutingContext:
    """What the blocks of one encode share."""

    real_index_S: Tensor
    """Positions of the real tokens in the flattened (B * L), int64."""
    token_rows_S: Tensor
    """Row of each real token, int64."""
    task_embeddings_BD: Tensor | None = None
    """Embedding of each row's task, where the gate reads tasks."""
    routings: dict[int, Routing] = field(default_factory=dict)
    """Layer -> what its gate decided, filled during the encode; a decoder's layers follow the encoder's."""
    picks: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> experts that an earlier pass over the same tokens picked (S, k): this one routes alike."""
    input_weights_B: Tensor | None = None
    """Weight of each row's embeddings, None for all 1; only in training."""


def without_tokens(routing: Routing) -> Routing:
    """The routing of no token, with a gradient of 0 to the gate."""
    return replace(of_first(routing, 0), counts_E=torch.zeros_like(routing.counts_E))


def of_first(routing: Routing, number: int) -> Routing:
    """The rows of the first tokens; loads stay those of all."""
    rows = {name: getattr(routing, name)[:number] for name in ("logits_SE", "scores_SE", "indices_Sk", "weights_Sk")}
    return replace(routing, **rows)


@dataclass(slots=True)
class ContextHolder:
    """The one place where the blocks of an encoder find the context of the encode that runs now.

    A block reads it once at the start of its forward and keeps nothing, so two encodes before one backward are safe;
    activation checkpointing (``comoe.models.recompute.recompute_layers``) captures the context per call.
    """

    context: RoutingContext | None = None
    """Set by the owner before each encode and cleared after it."""


class CooperativeBlock(nn.Module):
    """Pre-norm, experts, optional shared feed-forward, dropout: what is added beside one encoder layer's feed-forward.

    Args:
        model_width: M.
        expert_width: F.
        config: ``model.moe``.
        layer: number of the layer, from 0, the decoder's behind the encoder's.
        holder: where the context of the running encode is.
        dropout: probability on the update.

    Source: methods.md section 1; TaCL-CoMoE (IJCNLP 2025).
    """

    def __init__(
        self,
        model_width: int,
        expert_width: int,
        config: MoeConfig,
        *,
        layer: int,
        holder: ContextHolder,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.holder = holder
        self.norm = nn.LayerNorm(model_width)
        self.task_projection = (
            Float32Linear(config.task_embedding_width, config.num_experts) if ROUTES[config.route_by].task else None
        )
        self.mixture = ExpertMixture(model_width, expert_width, config)
        self.shared = (
            GatedFeedForward(model_width, config.shared_width, output_init=config.output_init)
            if config.shared_width
            else None
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLM: Tensor) -> Tensor:
        """The update of each token, zero on padding, shape (B, L, M); appends the routing to the context."""
        context = self.holder.context
        assert context is not None, "set holder.context before running the encoder"
        flat_NM = x_BLM.reshape(-1, x_BLM.shape[-1])
        # Padding would cost expert time and count as load, so only real tokens enter.
        x_SM = self.norm(flat_NM.index_select(0, context.real_index_S))
        task_logits_SE = None
        if self.task_projection is not None:
            task_logits_SE = self.task_projection(context.task_embeddings_BD).index_select(0, context.token_rows_S)
        # A routing that is there already means that this layer is being recomputed for its backward pass: it must
        # route as it did before, and not count its tokens a second time.
        earlier = context.routings.get(self.layer)
        picks_Sk = context.picks.get(self.layer) if earlier is None else earlier.indices_Sk
        self.mixture.router.prepare(task_logits_SE, picks_Sk)
        update_SM = self.mixture(x_SM.unsqueeze(0)).squeeze(0)
        routing = self.mixture.router.collect()
        if earlier is None:
            context.routings[self.layer] = routing
        if self.shared is not None:
            update_SM = update_SM + self.shared(x_SM)
        update_SM = self.dropout(update_SM).to(flat_NM.dtype)
        return torch.zeros_like(flat_NM).index_copy(0, context.real_index_S, update_SM).view_as(x_BLM)
