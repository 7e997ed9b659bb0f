"""Costs of a model on a cluster, by formulas: parameters, operations, bytes sent, seconds.

Symbols: L encoder layers, M width, F' feed-forward width, E experts in each of L' layers, k per
token, F expert width, V vocabulary, W ranks, EP ranks per set of experts, D dense and X expert
parameters, of which those that train, p bytes per weight (2 in bf16, else 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from comoe.experiments.cluster.shape import PlannedModel
from comoe.train.memory_plan import FULL, HALF

ADAM_BYTES = 4 + 2 * 4 + 4 * 4
"""Bytes that one AdamW step reads and writes per parameter, without the weight: gradient, master
copy, both moments."""

USEFUL_ROWS = 300
"""Tokens per expert below which a Hopper GPU's grouped matrix product is memory-bound."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The hardware of a rank."""

    memory: float
    """Bytes of one GPU."""
    per_node: int
    """GPUs of one machine."""
    intra: float
    """Bytes per second from one GPU to another of its machine."""
    inter: float
    """Bytes per second from one GPU to other machines, with all GPUs of a machine sending."""
    flops: float
    """Peak operations per second of one GPU's matrix products."""
    read: float
    """Bytes per second from the GPU's memory."""
    efficiency: float = 0.4
    """Share of ``flops`` that training reaches; measure it with comoe bench."""


@dataclass(frozen=True, slots=True)
class PlannedLayout:
    """The parallel layout and batch of a run."""

    ranks: int  # W
    ep_size: int  # EP
    stage: int
    """ZeRO stage."""
    tokens: int
    """Tokens of one forward pass on one rank, padding included."""
    length: int
    """Tokens of one post."""
    accumulation: int = 1
    """Forward passes per optimizer step."""
    bf16: bool = True
    recompute: bool = False
    """Activation checkpointing: each layer's forward pass and its all-to-alls run twice."""
    keep: int = 100_000_000
    """Weights that stage 3 may keep gathered from the forward to the backward pass: the maximum of
    ``stage3_max_live_parameters`` and half of ``stage3_max_reuse_distance`` (the passes meet in the
    last layer); as in ds_configs/zero3.json."""

    @property
    def number(self) -> int:
        """p."""
        return HALF if self.bf16 else FULL


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends per optimizer step."""

    all_to_all: float
    """Tokens to the experts of other ranks and back, forward and backward."""
    dense_reduce: float
    dense_gather: float
    expert_reduce: float
    """Gradients of experts, between the W / EP ranks with the same experts."""
    expert_gather: float


def forward_operations(shape: PlannedModel, length: int) -> float:
    """Floating-point operations of one token's forward pass; a multiply-add counts as two.

    Encoder: L (8 M^2 + 4 M F' + 4 length M), where the last term is the attention matrix, or as
    counted; blocks: L' (2 M E + 6 k M F + 6 M F_shared); tasks: 6 M F_private each. Without embeddings
    and heads.

    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix; three matrices per gated expert.
    """
    width, counted = shape.width, shape.counted
    dense = width * shape.layers * (8 * width + 4 * shape.ffn_width + 4 * length)
    if counted is not None:
        dense = counted.operations + 4 * length * counted.attended * shape.layers
    blocks = shape.moe_layers * (2 * shape.num_experts + 6 * shape.shared_width)
    private = shape.tasks * 6 * shape.private_width
    return dense + width * (blocks + private) + expert_operations(shape)


def expert_operations(shape: PlannedModel) -> float:
    """The experts' share of ``forward_operations``: L' 6 k M F, of LoRA experts 2 for each weight."""
    if shape.counted is not None and shape.counted.adapters:
        return 2 * shape.counted.adapters
    return shape.moe_layers * 6 * shape.top_k * shape.width * shape.expert_width


def all_to_all_bytes(shape: PlannedModel, layout: PlannedLayout) -> float:
    """Bytes that one rank sends to other ranks' experts per optimizer step, under even routing.

    Each token goes to its k experts and back, and so do its gradients: 4 p S k M (EP - 1) / EP per
    block and forward pass, 6 with recomputation. Without the token counts (4 E bytes).

    Source: Lepikhin et al. 2020, GShard, arXiv:2006.16668; the four exchanges as in DeepSpeed's
    AutoEP layer.
    """
    remote = (layout.ep_size - 1) / layout.ep_size
    passes = shape.moe_layers * layout.accumulation
    exchanges = 6 if layout.recompute else 4
    return exchanges * layout.number * layout.tokens * shape.top_k * shape.width * passes * remote


def traffic(shape: PlannedModel, layout: PlannedLayout) -> Traffic:
    """Bytes that one rank sends per optimizer step, with ring collectives.

    Over n ranks an all-reduce of b bytes sends 2 b (n - 1) / n, an all-gather or a reduce-scatter
    b (n - 1) / n. n is W for dense parameters and W / EP for the X / EP parameters of a rank's
    experts. Frozen weights have no gradient, and only stage 3 gathers them.

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

    def sent(parameters: float, ranks: int, frozen: int = 0) -> tuple[float, float]:
        once = layout.number * (ranks - 1) / ranks
        moved = parameters if layout.stage == 3 else parameters - frozen
        return rounds * times * once * (parameters - frozen), gathers * once * moved

    dense = sent(shape.dense_parameters, layout.ranks, shape.frozen)
    routed = sent(experts, layout.ranks // layout.ep_size)
    return Traffic(all_to_all_bytes(shape, layout), *dense, *routed)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step on one rank."""

    compute: float
    """Forward and backward passes."""
    all_to_all: float
    collectives: float
    """Reduction of gradients and gathering of weights."""
    optimizer: float
    """AdamW on this rank's partition."""

    @property
    def total(self) -> float:
        """Sum of the parts: nothing overlaps."""
        return self.compute + self.all_to_all + self.collectives + self.optimizer


def step_time(shape: PlannedModel, layout: PlannedLayout, cluster: Cluster) -> StepTime:
    """The roofline of one optimizer step, without kernel launches, the host, skewed routing and latency.

        compute       3 x forward operations x tokens / (flops x efficiency), 4 x with recomputation, 1 x less in
                      frozen maps, which have no gradient; the experts' part at least as many reads of their weights,
                      which dominate with few tokens per expert
        all-to-all    the part to other machines by ``inter``, then the rest by ``intra``
        collectives   see ``_ring_seconds``; no overlap with computation (``overlap_comm``)
        optimizer     (28 + p) (D + X) / W bytes / read, of what trains

    Source: Williams et al. 2009 (roofline); backward is twice the forward pass (arXiv:2104.04473).
    """
    passes = (4 if layout.recompute else 3) * layout.accumulation
    rate = cluster.flops * cluster.efficiency / (passes * layout.tokens)
    routed = expert_operations(shape)
    weights = layout.number * shape.expert_parameters / layout.ep_size
    compute = max(routed / rate, passes * weights / cluster.read)
    rest = forward_operations(shape, layout.length) - routed
    if shape.counted is not None:
        rest -= shape.counted.frozen_operations * layout.accumulation / passes
    compute += rest / rate
    sent = traffic(shape, layout)
    # Ranks of one expert group are neighbors, so they fill machines first.
    near, exchange = min(layout.ep_size, cluster.per_node), 0.0
    if layout.ep_size > 1:
        remote = (layout.ep_size - near) / (layout.ep_size - 1)
        exchange = sent.all_to_all * ((1 - remote) / cluster.intra + remote / cluster.inter)
    groups, local = layout.ranks // layout.ep_size, max(1, cluster.per_node // layout.ep_size)
    dense = sent.dense_reduce + sent.dense_gather
    experts = sent.expert_reduce + sent.expert_gather
    share = (shape.dense_parameters - shape.frozen + shape.expert_parameters) / layout.ranks
    return StepTime(
        compute=compute,
        all_to_all=exchange,
        collectives=_ring_seconds(dense, layout.ranks, cluster.per_node, cluster)
        + _ring_seconds(experts, groups, local, cluster),
        optimizer=share * (ADAM_BYTES + layout.number) / cluster.read,
    )


def _ring_seconds(sent: float, ranks: int, local: int, cluster: Cluster) -> float:
    """Seconds of a ring over ``ranks``, of which ``local`` are on one machine and share its network links."""
    if ranks == 1:
        return 0.0
    if ranks <= local:
        return sent / cluster.intra
    inside = sent / cluster.intra if local > 1 else 0.0
    return max(inside, sent / (local * cluster.inter))
