"""Memory, traffic and time of a model on 1 to 4096 GPUs, and the best layout: ``comoe scale --plan``."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from comoe.config.load import load_recipe
from comoe.experiments.cluster.costs import (
    USEFUL_ROWS,
    Cluster,
    PlannedLayout,
    StepTime,
    Traffic,
    step_time,
    traffic,
)
from comoe.experiments.cluster.shape import PlannedModel, shape_of_recipe
from comoe.train.memory_plan import (
    DecoderWork,
    MemoryPlan,
    RunSize,
    Work,
    plan_memory,
    reduction_elements,
)

BUCKET = 50_000_000
"""``reduce_bucket_size`` of the files in ds_configs/."""

USABLE = 0.9
"""Usable share of a GPU's memory: the rest is for the driver and the allocator."""

NEAR = 0.95
"""Share of the best speed from which layouts count as equally fast; the simplest is named."""

MICRO_BATCHES = tuple(2**power for power in range(11))
"""Posts per forward pass on one rank that are tried."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout with its memory, traffic and step time, per rank."""

    layout: PlannedLayout
    memory: MemoryPlan
    traffic: Traffic
    time: StepTime

    @property
    def posts(self) -> int:
        """Posts per forward pass on one rank."""
        return self.layout.tokens // self.layout.length

    @property
    def batch(self) -> int:
        """Posts per optimizer step on all ranks."""
        return self.posts * self.layout.accumulation * self.layout.ranks

    @property
    def tokens_per_second(self) -> float:
        """Total of all ranks."""
        return self.batch * self.layout.length / self.time.total


def estimate(shape: PlannedModel, layout: PlannedLayout, cluster: Cluster) -> Candidate:
    """Memory, traffic and step time of one layout with AdamW."""
    whole = shape.dense_parameters + shape.expert_parameters // layout.ep_size
    size = RunSize(
        shape.dense_parameters,
        shape.expert_parameters,
        frozen=shape.frozen,
        world_size=layout.ranks,
        ep_size=layout.ep_size,
        stage=layout.stage,
        bf16=layout.bf16,
        optimizer="adamw",
        bucket_elements=reduction_elements(
            BUCKET, largest=0 if shape.frozen else shape.vocabulary * shape.width
        ),
        gathered_elements=min(whole, layout.keep),
    )
    work = Work(
        tokens=layout.tokens,
        layers=shape.layers,
        width=shape.width,
        ffn_width=shape.ffn_width,
        tasks=shape.tasks,
        mixing_heads=shape.tasks * shape.mixes_layers,
        moe_layers=shape.moe_layers,
        top_k=shape.top_k,
        expert_width=shape.expert_width,
        adapter_numbers=0 if shape.counted is None else shape.counted.adapter_numbers,
        recompute=layout.recompute,
    )
    written = None
    if shape.counted is not None and shape.counted.answers:
        tokens = math.ceil(layout.tokens / layout.length * shape.counted.answers)
        written = DecoderWork(Work(tokens=tokens), vocabulary=shape.vocabulary)
    memory = plan_memory(size, work, decoder=written)
    return Candidate(layout, memory, traffic(shape, layout), step_time(shape, layout, cluster))


def alternatives(
    shape: PlannedModel,
    cluster: Cluster,
    *,
    ranks: int,
    length: int,
    batch: int | None = None,
    recompute: bool = False,
) -> list[Candidate]:
    """For every EP that divides ranks and experts, and every ZeRO stage, the fastest micro-batch that fits.

    If none fits, the layout has a micro-batch of one post; see ``fits``.

    Args:
        shape: the model.
        cluster: one GPU and its links.
        ranks: GPUs.
        length: tokens per post.
        batch: posts per optimizer step on all ranks; None is one forward pass per rank, so that the
            batch grows with the ranks.
        recompute: activation checkpointing.
    """
    micro_batches = [(posts, 1) for posts in MICRO_BATCHES]
    if batch is not None:
        share = max(1, -(-batch // ranks))
        micro_batches = [(n, -(-share // n)) for n in MICRO_BATCHES if n <= share]
    experts = shape.num_experts or 1
    sizes = [size for size in range(1, experts + 1) if ranks % size == 0 and experts % size == 0]
    found = []
    for ep_size in sizes:
        for stage in (1, 2, 3):
            layout = PlannedLayout(ranks, ep_size, stage, length, length, recompute=recompute)
            tried = [
                estimate(shape, replace(layout, tokens=posts * length, accumulation=times), cluster)
                for posts, times in micro_batches
            ]
            able = [candidate for candidate in tried if fits(candidate, cluster)]
            found.append(max(able, key=lambda c: c.tokens_per_second) if able else tried[0])
            if able:
                best = found[-1].tokens_per_second
                # The formulas have no fixed cost per pass: prefer fewer passes for a given batch.
                order = able if batch is None else reversed(able)
                found[-1] = next(c for c in order if c.tokens_per_second >= NEAR * best)
    return found


def fits(candidate: Candidate, cluster: Cluster) -> bool:
    """True if the layout uses at most ``USABLE`` of the GPU's memory."""
    return candidate.memory.device_bytes <= USABLE * cluster.memory


def recommend(found: Sequence[Candidate], cluster: Cluster) -> Candidate | None:
    """Of the layouts within a twentieth of the fastest the one with the lowest ZeRO stage, then the
    smallest EP, then the smallest batch; None if nothing fits."""
    able = [candidate for candidate in found if fits(candidate, cluster)]
    best = max((candidate.tokens_per_second for candidate in able), default=0.0)
    near = [candidate for candidate in able if candidate.tokens_per_second >= NEAR * best]
    return min(near, key=lambda c: (c.layout.stage, c.layout.ep_size, c.batch), default=None)


def plan_lines(
    shape: PlannedModel,
    cluster: Cluster,
    *,
    gpus: Sequence[int],
    length: int,
    batch: int | None = None,
    recompute: bool = False,
) -> list[str]:
    """The printed plan: one row per number of GPUs, then memory and alternatives of the largest that fits.

    Arguments as in ``alternatives``; ``gpus`` are numbers of ranks.
    """
    lines = [
        f"parameters: {shape.dense_parameters / 1e6:,.1f} M dense, {shape.expert_parameters / 1e6:,.1f} M in experts, "
        f"{shape.active_parameters / 1e6:,.1f} M active per token"
        + (f", {shape.frozen / 1e6:,.1f} M frozen" if shape.frozen else ""),
        f"bfloat16, AdamW, {length} tokens per post, {cluster.efficiency:.0%} of the peak reached in matrix products",
        "bytes are sent by one GPU per step; the batch "
        + ("grows with the GPUs" if batch is None else "is fixed"),
        "",
    ]
    rows, details = [HEAD], []
    for ranks in gpus:
        found = alternatives(
            shape, cluster, ranks=ranks, length=length, batch=batch, recompute=recompute
        )
        best = recommend(found, cluster)
        if best is None:
            least = min(found, key=lambda c: c.memory.device_bytes)
            needed = least.memory.device_bytes / USABLE / 2**30
            text = f"does not fit: one post needs GPUs of {needed:,.1f} GiB"
            rows.append((str(ranks), text, *[""] * (len(HEAD) - 2)))
            continue
        rows.append(_row(best, cluster, shape))
        details = ["", f"{ranks} GPUs, recommended:", *best.memory.lines()]
        details += ["", f"{ranks} GPUs, alternatives:"]
        details += _table([HEAD, *(_row(candidate, cluster, shape) for candidate in found)])
    return lines + _table(rows) + details


HEAD = (
    "GPUs", "EP", "ZeRO", "posts/GPU", "accumulate", "batch", "GiB/GPU", "all-to-all MB", "reduce MB", "gather MB",
    "compute ms", "all-to-all ms", "collective ms", "optimizer ms", "step ms", "tokens/s", "rows/expert", "",
)  # fmt: skip
"""Columns of the plan: MB that one GPU sends per step, rows of one expert in one forward pass."""


def _row(candidate: Candidate, cluster: Cluster, shape: PlannedModel) -> tuple[str, ...]:
    layout, time, sent = candidate.layout, candidate.time, candidate.traffic
    reduced = sent.dense_reduce + sent.expert_reduce
    gathered = sent.dense_gather + sent.expert_gather
    rows = layout.tokens * shape.top_k * layout.ep_size / max(1, shape.num_experts)
    remark = "" if fits(candidate, cluster) else "does not fit"
    if not remark and 0 < rows < USEFUL_ROWS:
        remark = "few rows per expert"
    seconds = (time.compute, time.all_to_all, time.collectives, time.optimizer, time.total)
    counts = (layout.ranks, layout.ep_size, layout.stage, candidate.posts, layout.accumulation)
    return (
        *map(str, (*counts, candidate.batch)),
        f"{candidate.memory.device_bytes / 2**30:.2f}",
        *(f"{size / 1e6:,.1f}" for size in (sent.all_to_all, reduced, gathered)),
        *(f"{1000 * part:,.2f}" for part in seconds),
        f"{candidate.tokens_per_second:,.0f}",
        f"{rows:,.0f}",
        remark,
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Right-aligned columns; a sentence in the second cell does not count for the widths."""
    full = [row for row in rows if any(row[2:])]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if any(row[2:])
        else f"{row[0].rjust(widths[0])}  {row[1]}"
        for row in rows
    ]


def settle_plan_flags(given: argparse.Namespace, plan_flags: Mapping[str, str | None]) -> None:
    """Set the defaults of ``--plan``'s flags, in place.

    Raises:
        ValueError: a flag without effect: one of these without ``--plan``, or ``--ranks`` with it.
    """
    if given.plan and given.ranks is not None:
        raise ValueError(
            f"--ranks {given.ranks} has no effect with --plan, which plans for --gpus; leave it out."
        )
    for flag, default in plan_flags.items():
        field = flag.replace("-", "_")
        value = getattr(given, field)
        if value is not None and not given.plan:
            raise ValueError(
                f"--{flag} {value} has no effect without --plan; add --plan, or leave it out."
            )
        if value is None:
            setattr(given, field, default)


def print_plan(given: argparse.Namespace) -> None:
    """Print the plan of the recipe's model on a cluster.

    Raises:
        ValueError: a wrong recipe or number.
    """
    overrides = list(given.overrides)
    for field, key in _PLANNED.items():
        value = getattr(given, field)
        if value is not None and not key:
            raise ValueError(
                f"--plan takes no list of {field}: it recommends them, or does not depend on them."
            )
        if value is not None:
            overrides.append(f"{key}={value}")
    recipe = load_recipe(given.config, overrides)
    inside, _, outside = given.bandwidth.partition(",")
    cluster = Cluster(
        memory=_above_zero("--gpu-memory", given.gpu_memory) * 1e9,
        per_node=_count("--gpus-per-node", given.gpus_per_node),
        intra=_above_zero("--bandwidth", inside) * 1e9,
        inter=_above_zero("--bandwidth", outside) * 1e9,
        flops=_above_zero("--flops", given.flops) * 1e12,
        read=_above_zero("--memory-bandwidth", given.memory_bandwidth) * 1e9,
        efficiency=_above_zero("--efficiency", given.efficiency),
    )
    shape = shape_of_recipe(recipe, given.encoder_shape)
    if shape.counted is not None and shape.counted.two_stacks:
        raise ValueError(
            f"model.encoder ({recipe.model.encoder}) is an encoder-decoder, and --plan knows encoders and decoder-only "
            "models; `comoe train RECIPE --dry-run --gpus N` plans its memory."
        )
    lines = plan_lines(
        shape,
        cluster,
        gpus=gpu_numbers(given.gpus),
        length=_count("--length", given.length),
        batch=None if given.batch is None else _count("--batch", given.batch),
        recompute=recipe.train.activation_checkpointing,
    )
    print("\n".join(lines))


def gpu_numbers(text: str) -> list[int]:
    """Numbers of GPUs from "8,64" or, by doubling, "1..4096".

    Raises:
        ValueError: anything else.
    """
    first, dots, last = text.partition("..")
    parts = (first, last) if dots else text.split(",")
    numbers = [_count("--gpus", part) for part in parts]
    if not dots:
        return numbers
    low, high = numbers
    if low > high:
        raise ValueError(f"--gpus is {text!r}; the first number must be the smaller one.")
    return [low * 2**power for power in range((high // low).bit_length())]


def _count(flag: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()) or int(text) < 1:
        raise ValueError(f"{flag} holds {text!r}, which must be a whole number above 0.")
    return int(text)


def _above_zero(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{flag} holds {text!r}, which must be a number above 0.")
    return value


_PLANNED = {
    "experts": "model.moe.num_experts",
    "top_k": "model.moe.top_k",
    "encoder": "model.encoder",
    "gate": "",
    "ep_size": "",
    "seeds": "",
}
"""Field of the grid -> recipe key in ``--plan``; empty: not allowed."""
