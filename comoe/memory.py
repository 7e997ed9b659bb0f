"""How much memory one rank needs, as a plan before anything is built: ZeRO, expert parallelism, precision, offload.

With D dense and X expert parameters (of all experts), W ranks, EP ranks per set of experts, and p bytes per weight (2
in bf16, else 4), one rank holds, in bytes (frozen parameters count as weights and nothing else):

    weights       p (D + X / EP)    stage 1, 2          p (D + X) / W    stage 3
    gradients     4 (D + X / EP)    stage 1             4 (D + X) / W    stage 2, 3      (summed in float32)
                  2 (D + X / EP)    more at stage 1 in bf16: its optimizer keeps both widths until the step
    master copy   4 (D + X) / W     all stages, in float32 too: ZeRO clones its share
    moments       4 n (D + X) / W   n = 2 for AdamW, 1 for SGD with momentum, else 0
    bucket        p R               R gradient elements on their way to the other ranks
    activations   what the backward pass reads, see ``Work`` and ``DecoderWork``
    vocabulary    (8 + p') A V          A tokens of answers over a vocabulary of V, p' = 2 in bf16, else 0
    dispatch      4 p S k M         one layer's routes: sent, received, padded for the grouped product, answered

Expert parallelism divides what ZeRO below stage 3 leaves whole; the optimizer's share is (D + X) / W at every EP,
because the W / EP ranks that hold the same experts split their state. Stage 2 in float32 keeps the whole of every
tensor that its share cuts, see ``whole_tensors``; what stage 3 gathers for the moment is one line of its own.

Not counted: allocator slack; what only losses learn (temperatures, a discriminator of some ten thousand numbers); what
weightings that read gradients keep for a moment, per task what a head keeps, the slope of the last states and 2 M^2
numbers; and in ``step()`` one more float32 copy of the largest group's share, when the activations are gone.
``tests/multiprocess/test_memory_measured.py`` compares each line with tensors of real runs.

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054; the float32 facts were read in DeepSpeed 0.19.8 and measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comoe.config import unknown_name
from comoe.memory_work import FULL, HALF, DecoderWork, Work


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
        """The plan as a table for people, in MiB, from 10 GiB on in GiB; the second column is there with an offload."""
        rows = [*self.parts, MemoryPart("total", self.device_bytes, self.host_bytes)]
        head = [f"memory per rank, estimated ({self.setting})"]
        if self.host_bytes:
            head.append(f"  {'':<26}{'device':>14}{'host':>14}")
        return head + [
            f"  {row.name:<26}{_readable(row.device_bytes)}{_readable(row.host_bytes) if self.host_bytes else ''}"
            for row in rows
        ]


def reduction_elements(bucket: int, *, largest: int) -> int:
    """Gradient elements that may be on their way to the other ranks at once.

    Args:
        bucket: ``reduce_bucket_size`` of the DeepSpeed JSON.
        largest: elements of the largest weight: one that is larger than the bucket, such as the table of words, goes
            by itself.
    """
    return max(bucket, largest)


def plan_memory(
    dense_parameters: int,
    *,
    expert_parameters: int,
    frozen_parameters: int = 0,
    world_size: int,
    ep_size: int,
    stage: int,
    bf16: bool,
    optimizer: str,
    momentum: float = 0.0,
    offload: bool = False,
    bucket_elements: int = 0,
    gathered_elements: int = 0,
    tensor_groups: Sequence[tuple[Sequence[int], int]] = (),
    tower: Work | None = None,
    decoder: DecoderWork | None = None,
    **work: int | bool | None,
) -> MemoryPlan:
    """Estimate the memory of one rank by the formulas of this module.

    Args:
        dense_parameters: D, everything but experts.
        expert_parameters: X, all experts of all layers together.
        frozen_parameters: of D those that do not train: weights alone, no gradient, master copy or moment.
        world_size: ranks W.
        ep_size: ranks that share one set of experts; divides ``world_size``.
        stage: ZeRO stage 1, 2 or 3.
        bf16: bfloat16 weights and activations with float32 masters; else float32.
        optimizer: key of ``MOMENTS``.
        momentum: of sgd; 0 needs no buffer.
        offload: master copy, moments and, from stage 2 on, gradients live in main memory.
        bucket_elements: R, ``reduce_bucket_size`` of the DeepSpeed JSON.
        gathered_elements: weights that stage 3 holds whole at a time, such as two encoder layers; 0 leaves them out.
        tensor_groups: for each optimizer group the sizes of its tensors in order and the ranks that share it; makes
            the gradients of stage 2 in float32 exact. Empty takes the even share.
        tower: what a vision tower that trains goes through; a frozen one keeps nothing for a backward pass.
        decoder: what a decoder goes through; None without one.
        work: fields of ``Work``; without them activations and dispatch are 0.

    Raises:
        ValueError: an unknown optimizer, a stage other than 1, 2, 3, or ranks that ``ep_size`` does not divide.
    """
    _check(optimizer=optimizer, stage=stage, world_size=world_size, ep_size=ep_size)
    number = HALF if bf16 else FULL
    whole = dense_parameters + math.ceil(expert_parameters / ep_size)
    share = math.ceil((dense_parameters + expert_parameters) / world_size)
    trained = math.ceil((dense_parameters - frozen_parameters + expert_parameters) / world_size)
    passed = Work(**work)
    gradients = _gradients(whole - frozen_parameters, trained, stage=stage, bf16=bf16, tensor_groups=tensor_groups)
    parts = (
        MemoryPart("weights", number * (share if stage == 3 else whole)),
        _part("gradients", gradients, on_host=offload and stage > 1),
        _part("master copy (float32)", FULL * trained, on_host=offload),
        _part(f"moments of {optimizer}", FULL * MOMENTS[optimizer](momentum) * trained, on_host=offload),
        MemoryPart("reduction bucket", number * bucket_elements),
        MemoryPart("gathered weights", number * gathered_elements if stage == 3 else 0),
        *_passing(passed, tower or Work(), decoder, number),
    )
    return MemoryPlan(parts, _in_words(world_size, ep_size, stage, bf16=bf16, offload=offload))


def _passing(passed: Work, seen: Work, decoder: DecoderWork | None, number: int) -> list[MemoryPart]:
    """What a forward pass leaves for the backward pass, and needs for a moment."""
    written = decoder or DecoderWork()
    activations = passed.activation_bytes(number) + seen.layers * seen.layer_bytes(number)
    parts = [MemoryPart("activations (rough)", activations + written.activation_bytes(number))]
    if decoder is not None:
        parts.append(MemoryPart("logits of the vocabulary", decoder.vocabulary_bytes(number)))
    # One layer at a time.
    moved = max(passed.dispatch_bytes(number), written.own.dispatch_bytes(number))
    return [*parts, MemoryPart("dispatch buffers", moved)]


def whole_tensors(sizes: Sequence[int], *, ranks: int) -> int:
    """Elements of the tensors that one rank's even share of a flat group cuts or holds; the most over ranks.

    Args:
        sizes: elements of the group's tensors, in order.
        ranks: ranks that share the group.
    """
    share = math.ceil(sum(sizes) / ranks)
    most = 0
    for rank in range(ranks):
        start, held = 0, 0
        for size in sizes:
            if start < (rank + 1) * share and start + size > rank * share:
                held += size
            start += size
        most = max(most, held)
    return most


def _gradients(
    whole: int, share: int, *, stage: int, bf16: bool, tensor_groups: Sequence[tuple[Sequence[int], int]]
) -> int:
    """Bytes of gradients when the backward pass ends."""
    if stage == 1:
        return (FULL + HALF * bf16) * whole
    if stage == 2 and not bf16 and tensor_groups:
        return FULL * sum(whole_tensors(sizes, ranks=ranks) for sizes, ranks in tensor_groups)
    return FULL * share


def _check(*, optimizer: str, stage: int, world_size: int, ep_size: int) -> None:
    if optimizer not in MOMENTS:
        raise unknown_name("train.optimizer", optimizer, MOMENTS)
    if stage not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage}; it must be 1, 2 or 3.")
    if world_size % ep_size:
        raise ValueError(f"ep_size ({ep_size}) must divide the number of ranks ({world_size}).")


def _part(name: str, size: int, *, on_host: bool) -> MemoryPart:
    return MemoryPart(name, 0, size) if on_host else MemoryPart(name, size)


def _in_words(world_size: int, ep_size: int, stage: int, *, bf16: bool, offload: bool) -> str:
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    precision = "bf16" if bf16 else "float32"
    return f"{ranks}, EP {ep_size}, ZeRO {stage}, {precision}{', optimizer offload' if offload else ''}"


def _readable(size: int) -> str:
    if size >= 10 * 2**30:
        return f"{size / 2**30:>10,.1f} GiB"
    return f"{size / 2**20:>10,.1f} MiB"


MOMENTS: dict[str, Callable[[float], int]] = {
    "adamw": lambda momentum: 2,
    "sgd": lambda momentum: int(momentum > 0),
}
"""Optimizer -> float32 numbers it keeps per parameter, given its momentum."""
