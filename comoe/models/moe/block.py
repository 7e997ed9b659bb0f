"""The cooperative block: experts beside a pre-trained feed-forward, on real tokens only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from comoe.config.recipe import MoeConfig
from comoe.models.encoder_io import FanOut, TaskRows
from comoe.models.moe.experts import Experts, GatedFeedForward, sort_routes
from comoe.models.moe.gate import OWN, dealt_experts, draw
from comoe.models.moe.router import (
    ROUTER_STD,
    ROUTES,
    Float32Linear,
    PendingRoute,
    RouterProjection,
    build_gate,
)
from comoe.types import Routing

MIXTURE_PATTERN = r".*\.block\.mixture"
"""Matches the module path of each ``ExpertMixture``: what DeepSpeed AutoEP replaces."""


@dataclass(frozen=True, slots=True)
class AutoEPConfig:
    """The numbers that DeepSpeed reads from ``model.config``; the names are its own."""

    hidden_size: int
    """Model width M."""
    num_local_experts: int
    """Experts per layer E."""
    num_experts_per_tok: int
    """Experts per token k."""
    model_type: str = "comoe"
    """A name that AutoEP has no preset for."""


class ExpertMixture(nn.Module):
    """Routes tokens to experts and adds their outputs up, in one process; DeepSpeed AutoEP replaces it as a whole.

    Its owner calls ``router.prepare(task_logits_SE)``, then the mixture, then ``router.collect()``;
    the replacement's ``router`` has the same two methods.

    Args:
        model_width: M.
        expert_width: F.
        config: ``model.moe``.
        num_tasks: T.
    """

    def __init__(
        self, model_width: int, expert_width: int, config: MoeConfig, num_tasks: int = 1
    ) -> None:
        super().__init__()
        inputs = ROUTES[config.route_by]
        self.gate = RouterProjection(model_width, config.num_experts)
        if not inputs.token:
            # AutoEP wants the weight to exist; nothing reads it, so nothing may train or decay it.
            nn.init.zeros_(self.gate.weight)
            self.gate.weight.requires_grad_(False)
        self.experts = Experts(
            config.num_experts,
            model_width,
            expert_width,
            expert_init=config.expert_init,
            output_init=config.output_init,
        )
        self.router = PendingRoute(build_gate(config, model_width, num_tasks), inputs)

    def forward(self, hidden_1SM: Tensor) -> Tensor:
        """Weighted sum of each token's experts, shape (1, S, M)."""
        x_SM = hidden_1SM.reshape(-1, hidden_1SM.shape[-1])
        routing = self.router.route(self.gate, x_SM, self.gate.e_score_correction_bias)
        if self.router.draws and not self.training:
            return (self.experts.mean(x_SM) * routing.weights_Sk.to(x_SM.dtype)).view_as(hidden_1SM)
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
    task_ids_B: Tensor | None = None
    """Task of each row, int64, there too; 0 on a filler row."""
    draws_B: Tensor | None = None
    """A number for each row that a gate which draws makes its choice of, int64; in training."""
    routings: dict[int, Routing] = field(default_factory=dict)
    """Layer -> what its gate decided, filled during the encode; a decoder's layers follow the
    encoder's."""
    selected: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> experts that an earlier pass over the same tokens selected (S, k): this one routes
    alike."""
    mixing: dict[int, Tensor] = field(default_factory=dict)
    """Layer of a ``LoraGate`` -> weight of each expert per position (B * L, E), 0 on padding."""
    input_weights_B: Tensor | None = None
    """Weight of each row's embeddings, None for all 1; only in training."""
    lexicon_BLK: Tensor | None = None
    """Numbers of the lexicon for each token that the table of words is asked for."""
    fan_out: FanOut | None = None
    """Which text each row reads, where lower layers run once per text."""
    task_rows: TaskRows | None = None
    """Rows by task, where tasks have layers of their own."""
    inputs: list[Tensor] = field(default_factory=list)
    """States that layers read which say so (``note_inputs``), filled during the encode."""
    distances: list[Tensor] = field(default_factory=list)
    """How far the tasks' own layers are apart, one number each, filled likewise."""


def without_tokens(routing: Routing) -> Routing:
    """The routing of no token, with a gradient of 0 to the gate."""
    return replace(of_first(routing, 0), counts_E=torch.zeros_like(routing.counts_E))


def of_first(routing: Routing, number: int) -> Routing:
    """The rows of the first tokens; loads stay those of all."""
    rows = {name: tensor[:number] for name, tensor in routing.per_token().items()}
    return replace(routing, **rows)


@dataclass(slots=True)
class ContextHolder:
    """The one place where the blocks of an encoder find the context of the encode that runs now.

    A block reads it once at the start of its forward and keeps nothing, so two encodes before one
    backward are safe; activation checkpointing
    (``comoe.models.activation_checkpointing.recompute_layers``) captures the context per call.
    """

    context: RoutingContext | None = None
    """Set by the owner before each encode and cleared after it."""
    off: bool = False
    """Every block runs and adds 0: to measure what blocks are worth, on all ranks alike."""
    seed: int = 0
    """``train.seed``, for gates that draw."""
    view: int = 0
    """Number of the pass over the same batch: another one draws anew."""
    measures_distance: bool = False
    """Training passes measure how far the tasks' own layers are apart."""


class GatedBlock(nn.Module):
    """What experts have in common, wherever they lie: their layer, the context, and the task's part of the gate.

    Args:
        model_width: M.
        config: ``model.moe``.
        layer: number of the layer, from 0, the decoder's behind the encoder's.
        holder: where the context of the running encode is.
        num_tasks: T.
        norm: what the experts or the gate read is normalized.
    """

    def __init__(
        self,
        model_width: int,
        config: MoeConfig,
        *,
        layer: int,
        holder: ContextHolder,
        num_tasks: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_tasks, self.task_prior = num_tasks, config.task_prior
        self.num_experts = config.num_experts
        self.holder = holder
        self.norm = nn.LayerNorm(model_width) if norm else None
        self.task_projection = None
        if ROUTES[config.route_by].task:
            # Entries of task embeddings have variance 1, as those of a normalized row: at the start
            # the task's logits vary as much as the token's.
            width = config.task_embedding_width
            self.task_projection = Float32Linear(
                width, config.num_experts, std=ROUTER_STD * math.sqrt(model_width / width)
            )

    @property
    def pending(self) -> PendingRoute:
        """Where the gate is."""
        raise NotImplementedError

    @property
    def balance_bias_E(self) -> Tensor:
        """What moves the selection, float32, a buffer."""
        raise NotImplementedError

    def of_tasks(self, context: RoutingContext) -> tuple[Tensor | None, Tensor | None]:
        """The task's part of each token's logits, with its prior, and which experts the token sees; None for all."""
        if self.task_projection is None:
            return None, None
        logits_BE, rows_S = self.task_projection(context.task_embeddings_BD), context.token_rows_S
        if not self.task_prior:
            return logits_BE.index_select(0, rows_S), None
        own_BE = dealt_experts(context.task_ids_B, logits_BE.shape[1], self.num_tasks)
        if self.task_prior == OWN:
            return logits_BE.index_select(0, rows_S), own_BE.index_select(0, rows_S)
        return (logits_BE + self.task_prior * own_BE).index_select(0, rows_S), None


class CooperativeBlock(GatedBlock):
    """Pre-norm, experts, optional shared feed-forward, dropout: what is added beside one encoder layer's feed-forward.

    Args:
        model_width: M.
        expert_width: F.
        config: ``model.moe``.
        layer: number of the layer, from 0, the decoder's behind the encoder's.
        holder: where the context of the running encode is.
        dropout: probability on the update.
        num_tasks: T.

    Source: docs/method.md; TaCL-CoMoE (IJCNLP 2025). A shared expert beside those of the
    tasks: PLE (RecSys 2020).
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
        num_tasks: int = 1,
    ) -> None:
        more = {"layer": layer, "holder": holder, "num_tasks": num_tasks}
        super().__init__(model_width, config, **more)
        self.shared = None
        self.mixture = ExpertMixture(model_width, expert_width, config, num_tasks)
        if config.shared_width:
            self.shared = GatedFeedForward(
                model_width,
                config.shared_width,
                expert_init=config.expert_init,
                output_init=config.output_init,
            )
        self.dropout = nn.Dropout(dropout)

    @property
    def pending(self) -> PendingRoute:
        """Where the gate is, in one process and under AutoEP."""
        router = self.mixture.router
        return router if isinstance(router, PendingRoute) else router.pending

    @property
    def balance_bias_E(self) -> Tensor:
        """What moves the selection, float32, a buffer."""
        router = self.mixture.router
        owner = self.mixture.gate if isinstance(router, PendingRoute) else router
        return owner.e_score_correction_bias

    def forward(self, x_BLM: Tensor) -> Tensor:
        """The update of each token, zero on padding, shape (B, L, M); appends the routing to the context."""
        context = self.holder.context
        assert context is not None, "set holder.context before running the encoder"
        flat_NM = x_BLM.reshape(-1, x_BLM.shape[-1])
        # Padding would cost expert time and count as load, so only real tokens enter.
        real_SM = flat_NM.index_select(0, context.real_index_S)
        x_SM = self.norm(real_SM)
        task_logits_SE, own_SE = self.of_tasks(context)
        # A routing that is there already means that this layer is being recomputed for its backward
        # pass: it must route as it did before, and not count its tokens a second time.
        earlier = context.routings.get(self.layer)
        selected_Sk = context.selected.get(self.layer) if earlier is None else earlier.indices_Sk
        if context.draws_B is not None and selected_Sk is None:
            numbers_S = draw(context.draws_B, self.layer)[context.token_rows_S]
            selected_Sk = (numbers_S % self.num_experts)[:, None]
        self.mixture.router.prepare(task_logits_SE, selected_Sk, own_SE)
        update_SM = self.mixture(x_SM.unsqueeze(0)).squeeze(0)
        routing = self.mixture.router.collect()
        if self.shared is not None:
            update_SM = update_SM + self.shared(x_SM)
        update_SM = self.dropout(update_SM).to(flat_NM.dtype)
        if self.holder.off:
            update_SM = torch.zeros_like(update_SM)
        if not self.training:
            energies = [part_SM.float().square().sum(dim=1) for part_SM in (update_SM, real_SM)]
            routing = replace(routing, energies_S2=torch.stack(energies, dim=1))
        if earlier is None:
            context.routings[self.layer] = routing
        update_NM = torch.zeros_like(flat_NM).index_copy(0, context.real_index_S, update_SM)
        return update_NM.view_as(x_BLM)
