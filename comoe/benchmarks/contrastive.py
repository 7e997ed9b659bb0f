"""``launch/bench.py contrastive``: the closed form, the full matrix, open_clip's local form, the reference code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from comoe.benchmarks.contrastive_costs import BYTES_PER_PAIR, needs
from comoe.benchmarks.contrastive_forms import FORMS
from comoe.benchmarks.ranks import run_on_ranks
from comoe.benchmarks.report import Report, Target
from comoe.benchmarks.timing import median, ratio, spread_of

COSTS = "comoe.benchmarks.contrastive_costs"


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured."""

    batches: tuple[int, ...] = (256, 1024, 4096, 8192, 16384, 65536)
    """Posts G on all ranks."""
    ranks: int = 8
    """Ranks W that one process plays, itself the first."""
    width: int = 128
    """P."""
    rounds: int = 15
    """Timed rounds of the small batches; the large ones have fewer."""
    limit: int = 3 << 30
    """Bytes that a contestant's matrices may take; larger ones are not run, and their memory is computed."""
    checked: int = 8192
    """Posts at which the computed memory of the full form is held against the measured one."""


TARGETS = {
    "memory_over_full_65536": Target(at_most=0.05),
    "time_over_full_1024": Target(at_most=1.0),
    "time_over_full_8192": Target(at_most=1.0),
    "wire_over_gather_grad": Target(at_most=0.55),
}
"""Rows without a target are for information."""


def run(
    json_path: Path | None = None,
    *,
    config: Path | None = None,
    rounds: int | None = None,
    size: Size | None = None,
) -> Report:
    """Measure, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: not read: the loss does not depend on a recipe.
        rounds: timed rounds instead of the usual number.
        size: other sizes than the usual ones.
    """
    size = size or Size()
    size = size if rounds is None else replace(size, rounds=rounds)
    report = Report("contrastive: forward and backward of the loss on one rank of several", TARGETS)
    shape = {"batches": list(size.batches), "width": size.width, "rounds": size.rounds, "limit": size.limit}
    spread = run_on_ranks(f"{COSTS}:times", 1, ranks=size.ranks, **shape)
    few = [count for count in size.batches if count in (1024, 8192)]
    single = run_on_ranks(f"{COSTS}:times", 1, ranks=1, **(shape | {"batches": few}))
    report.notes += [
        spread["note"],
        f"width {size.width}, {size.ranks} ranks, one process plays the first of them; full: every rank computes G x G",
        "one rank: the same with all posts on a single rank, so all anchors are its own",
    ]
    add_memory(report, size)
    add_times(report, spread["times"], suffix="")
    add_times(report, single["times"], suffix="_one_rank")
    sent = run_on_ranks(f"{COSTS}:wire", 2, count=1024, width=size.width)
    report.add("wire_over_gather_grad", asdict(spread_of([sent["ours"] / sent["gather with gradient"]])))
    print("\n".join(report.lines()))
    if json_path is not None:
        report.write(json_path)
    return report


def add_memory(report: Report, size: Size) -> None:
    """Peak extra memory of ours, measured in fresh processes, over that of the full form."""
    shape = {"ranks": size.ranks, "width": size.width}
    for count in size.batches:
        measured = run_on_ranks(f"{COSTS}:peak", 1, form="ours", count=count, **shape)
        whole = needs("full", count, size.ranks, size.width)
        report.add(f"memory_over_full_{count}", asdict(spread_of([measured / whole])))
        report.notes.append(f"peak extra memory of ours at {count:,} posts: {measured / 2**20:,.0f} MiB")
    peaks = {name: run_on_ranks(f"{COSTS}:peak", 1, form=name, count=size.checked, **shape) for name in FORMS}
    computed = needs("full", size.checked, size.ranks, size.width)
    report.add("full_measured_over_computed", asdict(spread_of([peaks["full"] / computed])))
    listed = ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in peaks.items())
    report.notes += [
        f"peak extra memory at {size.checked:,} posts: {listed}",
        f"memory of the full form is computed: {BYTES_PER_PAIR} bytes per pair, {computed / 2**20:,.0f} MiB at "
        f"{size.checked:,}; measured there: {peaks['full'] / 2**20:,.0f} MiB",
    ]


def add_times(report: Report, times: Mapping[str, Any], *, suffix: str) -> None:
    """Time of ours over that of each other form that ran, per batch, and the medians behind."""
    for name in times:
        form, _, count = name.partition("/")
        # The reference code's few posts are the same work at every size: a time, no ratio.
        if form in ("full", "local"):
            report.add(f"time_over_{form}_{count}{suffix}", asdict(ratio(times, f"ours/{count}", name)))
        report.add_time(form, median(times, name), case=f"{int(count):,} posts{suffix.replace('_', ' ')}")
