"""What a model needs on 1 to 4096 GPUs, and which layout to take: ``launch/scale.py --plan``."""

from __future__ import annotations

import argparse
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
    MemoryPlan,
    RunSize,
    Work,
    plan_memory,
    reduction_elements,
)

BUCKET = 50_000_000
"""``reduce_bucket_size`` of the files in ds_configs/."""


USABLE = 0.9
"""Share of a GPU's memory that may be planned for: the rest is the driver's and the allocator's."""


NEAR = 0.95
"""Layouts at least this fast beside the fastest count as equally fast; the simplest of them is
recommended."""


MICRO_BATCHES = tuple(2**power for power in range(11))
"""Posts per forward pass on one rank that are tried."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout with all that the formulas say about it."""

    layout: PlannedLayout
    """Over ranks."""
    memory: MemoryPlan
    """Of one rank."""
    traffic: Traffic
    """Of one rank and step."""
    time: StepTime
    """Of one step."""

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
        """Of all ranks together."""
        return self.batch * self.layout.length / self.time.total


def weigh(
    shape: PlannedModel, layout: PlannedLayout, cluster: Cluster, *, optimizer: str = "adamw"
) -> Candidate:
    """All that the formulas say about one layout.

    Source: ``comoe.train.memory_plan.plan_memory``, ``comoe.experiments.cluster.costs.traffic`` and
    ``step_time``.
    """
    whole = shape.dense_parameters + shape.expert_parameters // layout.ep_size
    size = RunSize(
        shape.dense_parameters,
        shape.expert_parameters,
        world_size=layout.ranks,
        ep_size=layout.ep_size,
        stage=layout.stage,
        bf16=layout.bf16,
        optimizer=optimizer,
        bucket_elements=reduction_elements(BUCKET, largest=shape.vocabulary * shape.width),
        gathered_elements=min(whole, layout.keep),
    )
    work = Work(
        tokens=layout.tokens,
        layers=shape.layers,
        width=shape.width,
        ffn_width=shape.ffn_width,
        tasks=shape.tasks,
        moe_layers=shape.moe_layers,
        top_k=shape.top_k,
        expert_width=shape.expert_width,
        recompute=layout.recompute,
    )
    memory = plan_memory(size, work)
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

    Where none fits, the micro-batch of one post stands for the layout; see ``fits``.

    Args:
        shape: the model.
        cluster: one GPU and its links.
        ranks: GPUs.
        length: tokens per post.
        batch: posts per optimizer step on all ranks; None lets every rank do one forward pass, so
            the batch grows.
        recompute: activation checkpointing.
    """
    experts = shape.num_experts or 1
    sizes = [size for size in range(1, experts + 1) if ranks % size == 0 and experts % size == 0]
    found = []
    for ep_size in sizes:
        for stage in (1, 2, 3):
            layout = PlannedLayout(ranks, ep_size, stage, length, length, recompute=recompute)
            tried = [
                weigh(shape, replace(layout, tokens=posts * length, accumulation=times), cluster)
                for posts, times in _micro_batches(ranks, batch)
            ]
            able = [candidate for candidate in tried if fits(candidate, cluster)]
            found.append(max(able, key=lambda c: c.tokens_per_second) if able else tried[0])
            if able:
                best = found[-1].tokens_per_second
                # The formulas know no cost of a pass itself: of a given batch the fewest passes are
                # the better ones.
                order = able if batch is None else reversed(able)
                found[-1] = next(c for c in order if c.tokens_per_second >= NEAR * best)
    return found


def fits(candidate: Candidate, cluster: Cluster) -> bool:
    """True when the layout leaves a tenth of the GPU free."""
    return candidate.memory.device_bytes <= USABLE * cluster.memory


def recommend(found: Sequence[Candidate], cluster: Cluster) -> Candidate | None:
    """The layout to take: of those within a twentieth of the fastest the one with the lowest ZeRO
    stage, then the smallest EP, then the smallest batch; None where nothing fits."""
    able = [candidate for candidate in found if fits(candidate, cluster)]
    best = max((candidate.tokens_per_second for candidate in able), default=0.0)
    near = [candidate for candidate in able if candidate.tokens_per_second >= NEAR * best]
    return min(near, key=lambda c: (c.layout.stage, c.layout.ep_size, c.batch), default=None)


def _micro_batches(ranks: int, batch: int | None) -> list[tuple[int, int]]:
    """(posts per forward pass, forward passes per step) to try, the smallest first."""
    if batch is None:
        return [(posts, 1) for posts in MICRO_BATCHES]
    share = max(1, -(-batch // ranks))
    return [(posts, -(-share // posts)) for posts in MICRO_BATCHES if posts <= share]


def plan_lines(
    shape: PlannedModel,
    cluster: Cluster,
    *,
    gpus: Sequence[int],
    length: int,
    batch: int | None = None,
    recompute: bool = False,
) -> list[str]:
    """The plan for people: one row per number of GPUs, then memory and alternatives of the largest that fits.

    Args:
        shape: the model.
        cluster: one GPU and its links.
        gpus: numbers of GPUs.
        length: tokens per post.
        batch: posts per optimizer step on all GPUs; None lets it grow with them.
        recompute: activation checkpointing.
    """
    lines = [
        f"parameters: {shape.dense_parameters / 1e6:,.1f} M dense, {shape.expert_parameters / 1e6:,.1f} M in experts, "
        f"{shape.active_parameters / 1e6:,.1f} M active per token",
        f"bfloat16, AdamW, {length} tokens per post, {cluster.efficiency:.0%} of the peak reached in matrix products",
        "bytes are sent by one GPU per step; the batch "
        + ("grows with the GPUs" if batch is None else "is fixed"),
        "",
    ]
    rows, details = [HEAD], []
    for ranks in gpus:
        asked = {"ranks": ranks, "length": length, "batch": batch, "recompute": recompute}
        found = alternatives(shape, cluster, **asked)
        best = recommend(found, cluster)
        if best is None:
            least = min(found, key=lambda c: c.memory.device_bytes)
            needed = least.memory.device_bytes / USABLE / 2**30
            said = f"does not fit: one post needs GPUs of {needed:,.1f} GiB"
            rows.append((str(ranks), said, *[""] * (len(HEAD) - 2)))
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
"""Columns of the plan: bytes are what one GPU sends per step, rows what one expert gets in one
forward pass."""


def _row(candidate: Candidate, cluster: Cluster, shape: PlannedModel) -> tuple[str, ...]:
    layout, time, moved = candidate.layout, candidate.time, candidate.traffic
    reduced = moved.dense_reduce + moved.expert_reduce
    gathered = moved.dense_gather + moved.expert_gather
    rows = layout.tokens * shape.top_k * layout.ep_size / max(1, shape.num_experts)
    remark = "" if fits(candidate, cluster) else "does not fit"
    if not remark and 0 < rows < USEFUL_ROWS:
        remark = "few rows per expert"
    seconds = (time.compute, time.all_to_all, time.collectives, time.optimizer, time.total)
    counts = (layout.ranks, layout.ep_size, layout.stage, candidate.posts, layout.accumulation)
    return (
        *map(str, (*counts, candidate.batch)),
        f"{candidate.memory.device_bytes / 2**30:.2f}",
        *(f"{size / 1e6:,.1f}" for size in (moved.all_to_all, reduced, gathered)),
        *(f"{1000 * part:,.2f}" for part in seconds),
        f"{candidate.tokens_per_second:,.0f}",
        f"{rows:,.0f}",
        remark,
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns flush right; a row whose second cell is a sentence keeps it out of the widths."""
    full = [row for row in rows if any(row[2:])]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if any(row[2:])
        else f"{row[0].rjust(widths[0])}  {row[1]}"
        for row in rows
    ]


def settle_plan_flags(given: argparse.Namespace, plan_flags: Mapping[str, str | None]) -> None:
    """Fill in the flags of ``--plan``, in place.

    Raises:
        ValueError: one was given without ``--plan``, or ``--ranks`` with it: it would change
            nothing.
    """
    if given.plan and given.ranks is not None:
        raise ValueError(
            f"--ranks {given.ranks} changes nothing under --plan, which plans for --gpus; leave it out."
        )
    for flag, default in plan_flags.items():
        field = flag.replace("-", "_")
        value = getattr(given, field)
        if value is not None and not given.plan:
            raise ValueError(
                f"--{flag} {value} changes nothing without --plan; add --plan, or leave it out."
            )
        if value is None:
            setattr(given, field, default)


def print_plan(given: argparse.Namespace) -> None:
    """Print the plan of the recipe's model on a cluster.

    Raises:
        ValueError: a wrong recipe, or a number that is none.
    """
    overrides = list(given.overrides)
    for field, key in _PLANNED.items():
        value = getattr(given, field)
        if value is not None and not key:
            raise ValueError(
                f"--plan takes no list of {field}: it does not change with them, or it recommends them."
            )
        if value is not None:
            overrides.append(f"{key}={value}")
    recipe = load_recipe(given.config, overrides)
    inside, _, outside = given.bandwidth.partition(",")
    cluster = Cluster(
        memory=_above_zero("--gpu-memory", given.gpu_memory) * 1e9,
        per_node=int(_above_zero("--gpus-per-node", given.gpus_per_node)),
        intra=_above_zero("--bandwidth", inside) * 1e9,
        inter=_above_zero("--bandwidth", outside) * 1e9,
        flops=_above_zero("--flops", given.flops) * 1e12,
        read=_above_zero("--memory-bandwidth", given.memory_bandwidth) * 1e9,
        efficiency=_above_zero("--efficiency", given.efficiency),
    )
    lines = plan_lines(
        shape_of_recipe(recipe, given.encoder_shape),
        cluster,
        gpus=gpu_numbers(given.gpus),
        length=int(_above_zero("--length", given.length)),
        batch=None if given.batch is None else int(_above_zero("--batch", given.batch)),
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
    numbers = [int(_above_zero("--gpus", part)) for part in parts]
    if not dots:
        return numbers
    low, high = numbers
    if low > high:
        raise ValueError(f"--gpus is {text!r}; the first number must be the smaller one.")
    return [low * 2**power for power in range((high // low).bit_length())]


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
"""Field of the grid -> the recipe's key that ``--plan`` reads it as."""
