"""A model on a cluster in numbers: parameters, operations, bytes sent, seconds. Pure formulas, nothing is built.

Letters: L encoder layers, M width, F' feed-forward width, E experts in each of L' layers, k per
token, F expert width, V vocabulary, W ranks, EP ranks per set of experts, D dense and X expert
parameters, p bytes per weight (2 in bf16, 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from comoe.experiments.cluster.shape import PlannedModel
from comoe.train.memory_plan import FULL, HALF

ADAM_BYTES = 4 + 2 * 4 + 4 * 4
"""Bytes that one AdamW step reads and writes per parameter beside the weight: gradient, master
copy, both moments."""


USEFUL_ROWS = 300
"""Tokens per expert below which a Hopper GPU's grouped product is bound by reading the expert's
weights."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a rank has to work with."""

    memory: float
    """Bytes of one GPU."""
    per_node: int
    """GPUs of one machine."""
    intra: float
    """Bytes per second that one GPU sends to another of its machine."""
    inter: float
    """Bytes per second that one GPU sends to other machines; all of a machine's GPUs send at
    once."""
    flops: float
    """Operations per second of one GPU's matrix products, at its best."""
    read: float
    """Bytes per second from the GPU's memory."""
    efficiency: float = 0.4
    """Share of ``flops`` that training reaches; measure it with launch/bench.py."""


@dataclass(frozen=True, slots=True)
class PlannedLayout:
    """How a run lies over the ranks."""

    ranks: int
    """W."""
    ep_size: int
    """EP."""
    stage: int
    """ZeRO stage."""
    tokens: int
    """Tokens of one forward pass on one rank, padding included."""
    length: int
    """Tokens of one post."""
    accumulation: int = 1
    """Forward passes per optimizer step."""
    bf16: bool = True
    """bfloat16, else float32."""
    recompute: bool = False
    """Activation checkpointing: each layer's forward pass runs, and exchanges its routes, once
    more."""
    keep: int = 100_000_000
    """Weights that stage 3 may keep whole from the forward to the backward pass: the larger of
    ``stage3_max_live_parameters`` and half of ``stage3_max_reuse_distance`` (the passes meet in the
    last layer); both as in ds_configs/zero3.json."""

    @property
    def number(self) -> int:
        """p."""
        return HALF if self.bf16 else FULL


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends per optimizer step."""

    all_to_all: float
    """Routes to the experts of other ranks and back, forward and backward."""
    dense_reduce: float
    """Gradients of dense parameters."""
    dense_gather: float
    """Dense weights."""
    expert_reduce: float
    """Gradients of experts, between the W / EP ranks that hold the same ones."""
    expert_gather: float
    """Weights of experts, between the same ranks."""


def forward_operations(shape: PlannedModel, length: int) -> float:
    """Floating-point operations of one token's forward pass; a multiplication with its addition counts two.

    L (8 M^2 + 4 M F' + 4 length M) for the encoder, of which the last is the attention matrix, L'
    (2 M E + 6 k M F + 6 M F_shared) for the blocks, 6 M F_private per task. Embeddings and heads
    are left out.

    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix; three matrices per gated expert.
    """
    width = shape.width
    dense = shape.layers * (8 * width + 4 * shape.ffn_width + 4 * length)
    blocks = shape.moe_layers * (2 * shape.num_experts + 6 * shape.shared_width)
    private = shape.tasks * 6 * shape.private_width
    return width * (dense + blocks + private) + expert_operations(shape)


def expert_operations(shape: PlannedModel) -> float:
    """The routed experts' share of ``forward_operations``: L' 6 k M F."""
    return shape.moe_layers * 6 * shape.top_k * shape.width * shape.expert_width


def all_to_all_bytes(shape: PlannedModel, layout: PlannedLayout) -> float:
    """Bytes that one rank sends to other ranks' experts per optimizer step, under even routing.

    Each token travels to its k experts and back, and its gradients do the same: 4 p S k M (EP - 1)
    / EP per block and forward pass, 6 under recomputation. The counts that go ahead (4 E bytes) are
    left out.

    Source: Lepikhin et al. 2020, GShard, arXiv:2006.16668; the four exchanges were read in
    DeepSpeed's AutoEP layer.
    """
    away = (layout.ep_size - 1) / layout.ep_size
    passes = shape.moe_layers * layout.accumulation
    exchanges = 6 if layout.recompute else 4
    return exchanges * layout.number * layout.tokens * shape.top_k * shape.width * passes * away


def traffic(shape: PlannedModel, layout: PlannedLayout) -> Traffic:
    """Bytes that one rank sends per optimizer step, each collective in its ring form over n ranks.

    Over n ranks an all-reduce of b bytes sends 2 b (n - 1) / n, an all-gather or a reduce-scatter
    of b bytes in all b (n - 1) / n. n is W for dense parameters and W / EP for the X / EP
    parameters of a rank's experts.

        stage 1     gradients all-reduced once, weights gathered once
        stage 2     gradients all-reduced in every forward pass, weights gathered once
        stage 3     gradients reduce-scattered in every forward pass; weights gathered once in every forward pass, and
                    those beyond ``keep`` once more for the backward pass

    Source: Thakur et al. 2005 (rings); Rajbhandari et al. 2020, arXiv:1910.02054; DeepSpeed 0.19.8
    reduces the buckets of stage 2 by all-reduce.
    """
    experts = shape.expert_parameters / layout.ep_size
    times = 1 if layout.stage == 1 else layout.accumulation
    whole = shape.dense_parameters + experts
    again = max(0.0, 1 - layout.keep / whole)
    gathers = 1 if layout.stage < 3 else layout.accumulation * (1 + again)
    rounds = 2 if layout.stage < 3 else 1

    def sent(parameters: float, ranks: int) -> tuple[float, float]:
        once = layout.number * parameters * (ranks - 1) / ranks
        return rounds * times * once, gathers * once

    dense = sent(shape.dense_parameters, layout.ranks)
    routed = sent(experts, layout.ranks // layout.ep_size)
    return Traffic(all_to_all_bytes(shape, layout), *dense, *routed)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step on one rank."""

    compute: float
    """Forward and backward passes."""
    all_to_all: float
    """Waiting for routes."""
    collectives: float
    """Waiting for gradients and weights."""
    optimizer: float
    """AdamW on this rank's share."""

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.all_to_all + self.collectives + self.optimizer


def step_time(shape: PlannedModel, layout: PlannedLayout, cluster: Cluster) -> StepTime:
    """The roofline of one optimizer step; launches, the host, skewed routing and latency are not in it.

        compute       3 x forward operations x tokens / (flops x efficiency), 4 x under recomputation; the experts' part
                      at least as many times the reading of their weights, which rules where an expert sees few tokens
        all-to-all    the part that leaves the machine by ``inter``, the rest by ``intra``, one after the other
        collectives   see ``_ring_seconds``; none hides behind computation, as ``overlap_comm`` would let some
        optimizer     (28 + p) (D + X) / W bytes / read

    Source: Williams et al. 2009 (roofline); backward is twice the forward pass (arXiv:2104.04473).
    """
    passes = (4 if layout.recompute else 3) * layout.accumulation
    rate = cluster.flops * cluster.efficiency / (passes * layout.tokens)
    routed = expert_operations(shape)
    weights = layout.number * shape.expert_parameters / layout.ep_size
    compute = max(routed / rate, passes * weights / cluster.read)
    compute += (forward_operations(shape, layout.length) - routed) / rate
    moved = traffic(shape, layout)
    groups, beside = layout.ranks // layout.ep_size, max(1, cluster.per_node // layout.ep_size)
    dense, experts = (
        moved.dense_reduce + moved.dense_gather,
        moved.expert_reduce + moved.expert_gather,
    )
    share = (shape.dense_parameters + shape.expert_parameters) / layout.ranks
    return StepTime(
        compute=compute,
        all_to_all=_exchange_seconds(moved.all_to_all, layout.ep_size, cluster),
        collectives=_ring_seconds(dense, layout.ranks, cluster.per_node, cluster)
        + _ring_seconds(experts, groups, beside, cluster),
        optimizer=share * (ADAM_BYTES + layout.number) / cluster.read,
    )


def _ring_seconds(sent: float, ranks: int, beside: int, cluster: Cluster) -> float:
    """Seconds of a ring over ``ranks``, of which ``beside`` sit in one machine and share its way out."""
    if ranks == 1:
        return 0.0
    if ranks <= beside:
        return sent / cluster.intra
    inside = sent / cluster.intra if beside > 1 else 0.0
    return max(inside, sent / (beside * cluster.inter))


def _exchange_seconds(sent: float, ep_size: int, cluster: Cluster) -> float:
    """Seconds of the all-to-alls; ranks of one expert group are neighbours, so they fill machines first."""
    if ep_size == 1:
        return 0.0
    near = min(ep_size, cluster.per_node)
    outside = (ep_size - near) / (ep_size - 1)
    return sent * ((1 - outside) / cluster.intra + outside / cluster.inter)
