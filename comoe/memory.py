"""How much memory one rank needs, as a plan before anything is built: ZeRO, expert parallelism, precision, offload.

With D dense and X expert parameters (of all experts), W ranks, EP ranks per set of experts, and p bytes per weight (2
in bf16, else 4), one rank holds, in bytes:

    weights       p (D + X / EP)    stage 1, 2          p (D + X) / W    stage 3
    gradients     4 (D + X / EP)    stage 1             4 (D + X) / W    stage 2, 3      (summed in float32)
    master copy   4 (D + X) / W     all stages, in float32 too: ZeRO clones its share
    moments       4 n (D + X) / W   n = 2 for AdamW, 1 for SGD with momentum, else 0
    bucket        p R               R gradient elements on their way to the other ranks
    activations   a rough mean, see ``_encoder_activations`` and ``_expert_activations``

Expert parallelism divides what ZeRO below stage 3 leaves whole; the optimizer's share is (D + X) / W at every EP,
because the W / EP ranks that hold the same experts split their state. What stage 3 gathers for the moment, one layer
and a little ahead, is not counted.

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054; the float32 facts were read in DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from comoe.config import unknown_name

FULL = 4
"""Bytes of a float32."""
HALF = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One line of the plan, for one rank."""

    name: str
    """What it is."""
    device_bytes: int
    """Bytes on the accelerator (on a CPU: in main memory)."""
    host_bytes: int = 0
    """Bytes in main memory because of the optimizer offload."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one rank."""

    parts: tuple[MemoryPart, ...]
    """Its parts, largest groups as in the module's formulas."""
    setting: str
    """The layout in words."""

    @property
    def device_bytes(self) -> int:
        """Sum on the accelerator."""
        return sum(part.device_bytes for part in self.parts)

    @property
    def host_bytes(self) -> int:
        """Sum in main memory because of the offload; 0 without one."""
        return sum(part.host_bytes for part in self.parts)

    def lines(self) -> list[str]:
        """The plan as a table for people, MiB (2**20 bytes); the second column appears with an offload only."""
        rows = [*self.parts, MemoryPart("total", self.device_bytes, self.host_bytes)]
        head = [f"memory per rank, estimated ({self.setting})"]
        if self.host_bytes:
            head.append(f"  {'':<26}{'device':>14}{'host':>14}")
        return head + [
            f"  {row.name:<26}{_mebibytes(row.device_bytes)}{_mebibytes(row.host_bytes) if self.host_bytes else ''}"
            for row in rows
        ]


def plan_memory(
    dense_parameters: int,
    *,
    expert_parameters: int,
    world_size: int,
    ep_size: int,
    stage: int,
    bf16: bool,
    optimizer: str,
    momentum: float = 0.0,
    offload: bool = False,
    bucket_elements: int = 0,
    tokens: int = 0,
    layers: int = 0,
    width: int = 0,
    moe_layers: int = 0,
    top_k: int = 0,
    expert_width: int = 0,
) -> MemoryPlan:
    """Estimate the memory of one rank by the formulas of this module.

    Args:
        dense_parameters: D, everything but experts.
        expert_parameters: X, all experts of all layers together.
        world_size: ranks W.
        ep_size: ranks that share one set of experts; divides ``world_size``.
        stage: ZeRO stage 1, 2 or 3.
        bf16: bfloat16 weights and activations with float32 masters; else float32.
        optimizer: key of ``MOMENTS``.
        momentum: of sgd; 0 needs no buffer.
        offload: master copy, moments and, from stage 2 on, gradients live in main memory.
        bucket_elements: R, ``reduce_bucket_size`` of the DeepSpeed JSON.
        tokens: real tokens of one micro-batch on one rank (posts times their mean length); 0 leaves activations out.
        layers: encoder layers.
        width: encoder width M.
        moe_layers: layers with experts.
        top_k: experts per token k.
        expert_width: width F of one expert.

    Raises:
        ValueError: an unknown optimizer, a stage other than 1, 2, 3, or ranks that ``ep_size`` does not divide.
    """
    _check(optimizer=optimizer, stage=stage, world_size=world_size, ep_size=ep_size)
    number = HALF if bf16 else FULL
    whole = dense_parameters + math.ceil(expert_parameters / ep_size)
    share = math.ceil((dense_parameters + expert_parameters) / world_size)
    routes = moe_layers * tokens * top_k
    parts = (
        MemoryPart("weights", number * (share if stage == 3 else whole)),
        _part("gradients", FULL * (whole if stage == 1 else share), on_host=offload and stage > 1),
        _part("master copy (float32)", FULL * share, on_host=offload),
        _part(f"moments of {optimizer}", FULL * MOMENTS[optimizer](momentum) * share, on_host=offload),
        MemoryPart("reduction bucket", number * bucket_elements),
        MemoryPart("activations (rough)", _encoder_activations(layers * tokens * width, number)
                   + _expert_activations(routes, width=width, expert_width=expert_width, number=number)),
    )  # fmt: skip
    return MemoryPlan(parts, _in_words(world_size, ep_size, stage, bf16=bf16, offload=offload))


def _check(*, optimizer: str, stage: int, world_size: int, ep_size: int) -> None:
    if optimizer not in MOMENTS:
        raise unknown_name("train.optimizer", optimizer, MOMENTS)
    if stage not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage}; it must be 1, 2 or 3.")
    if world_size % ep_size:
        raise ValueError(f"ep_size ({ep_size}) must divide the number of ranks ({world_size}).")


def _part(name: str, size: int, *, on_host: bool) -> MemoryPart:
    return MemoryPart(name, 0, size) if on_host else MemoryPart(name, size)


def _encoder_activations(units: int, number: int) -> int:
    """Bytes that an encoder's layers keep for the backward pass, without padding and without the attention matrix.

    16 numbers and two one-byte dropout masks per unit; torch's attention does not keep its matrix.

    Args:
        units: layers times tokens times width.
        number: bytes per number.

    Source: Korthikanti et al. 2022, arXiv:2205.05198: 34 bytes per unit in 16 bits.
    """
    return units * (16 * number + 2)


def _expert_activations(routes: int, *, width: int, expert_width: int, number: int) -> int:
    """Bytes that experts keep: per route (one token to one expert) input and output, gate, up, and two products."""
    return routes * (2 * width + 4 * expert_width) * number


def _in_words(world_size: int, ep_size: int, stage: int, *, bf16: bool, offload: bool) -> str:
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    precision = "bf16" if bf16 else "float32"
    return f"{ranks}, EP {ep_size}, ZeRO {stage}, {precision}{', optimizer offload' if offload else ''}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:>10,.1f} MiB"


MOMENTS: dict[str, Callable[[float], int]] = {
    "adamw": lambda momentum: 2,
    "sgd": lambda momentum: int(momentum > 0),
}
"""Optimizer -> float32 numbers it keeps per parameter, given its momentum."""
