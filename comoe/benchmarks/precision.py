"""``comoe bench train`` on a CPU: bfloat16 against float32, fused Adam against plain, ranks against threads.

``measure_precision`` and ``measure_alone`` run on the ranks.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comoe.benchmarks.ranks import run_on_ranks
from comoe.benchmarks.steps import WARMUP, Steps, silence
from comoe.benchmarks.timing import (
    Contestant,
    Measurements,
    median,
    ratio,
    slowest,
    spread_of,
    take_turns,
)
from comoe.benchmarks.workload import find_posts
from comoe.distributed import all_gather_objects, barrier
from comoe.train.build import build_run
from comoe.train.parallel.ds_config import ZERO_2, multiplies_bf16
from comoe.train.parallel.setup import start_ranks

CONTESTANTS: dict[str, tuple[bool, bool]] = {
    "bf16": (True, True),
    "float32": (False, True),
    "bf16, plain Adam": (True, False),
    "float32, plain Adam": (False, False),
}
"""Name -> (bfloat16, fused Adam)."""

RATIOS = {
    "float32_over_bf16": ("float32", "bf16"),
    "plain_over_fused_adam": ("bf16, plain Adam", "bf16"),
    "float32_plain_over_bf16_fused": ("float32, plain Adam", "bf16"),
}
"""Key -> contestants above and below the line."""

LAYOUTS = ((1, 2), (2, 1))
"""(Ranks, threads per rank) that share two cores."""


def _steps(config: str | None, overrides: Sequence[str], folder: Path, *, bf16: bool) -> Steps:
    device = start_ranks(timeout_seconds=600)
    with silence():
        recipe = find_posts(config, overrides).recipe
        settings = {**ZERO_2, "bf16": {"enabled": bf16}}
        return Steps(build_run(recipe, settings, folder, device=device))


def measure_precision(
    config: str | None, overrides: list[str], rounds: int
) -> dict[str, list[float | None]]:
    """Seconds per step of all ``CONTESTANTS``, on the same posts and in turns; every rank calls it."""
    with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name:
        steps = {}
        for number, (label, (bf16, fused)) in enumerate(CONTESTANTS.items()):
            steps[label] = _steps(config, overrides, Path(name) / str(number), bf16=bf16)
            for group in steps[label].run.engine.deepspeed.optimizer.optimizer.param_groups:
                group["fused"] = fused
        contestants = {label: Contestant(one.step) for label, one in steps.items()}
        with silence():
            times = take_turns(contestants, rounds=rounds, warmup=WARMUP)
        for one in steps.values():
            one.run.monitor.close()
    return times


def measure_alone(config: str | None, overrides: list[str], rounds: int, bf16: bool) -> list[float]:
    """Seconds per step of one run, the slowest rank's; every rank calls it."""
    seconds: list[float | None] = []
    with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name:
        steps = _steps(config, overrides, Path(name), bf16=bf16)
        for _ in range(WARMUP + rounds):
            barrier()
            start = time.perf_counter()
            steps.step()
            seconds.append(time.perf_counter() - start)
        steps.run.monitor.close()
    return slowest(all_gather_objects({"": seconds[WARMUP:]}))[""]


def add_precision(
    report: Measurements,
    config: str | None,
    overrides: list[str],
    *,
    rounds: int,
    cores: int,
    repetitions: int = 3,
) -> None:
    """Measure and add the rows; ranks against threads only where there are two cores.

    Args:
        report: to add to.
        config: recipe file; None is the default recipe.
        overrides: ``key=value`` changes of it.
        rounds: timed steps of each contestant.
        cores: of this machine.
        repetitions: starts of each layout.
    """
    bf16 = multiplies_bf16()
    report.notes.append(
        f"this CPU {'multiplies' if bf16 else 'does not multiply'} bfloat16 natively"
    )
    given: dict[str, Any] = {"config": config, "overrides": overrides, "rounds": rounds}
    times = run_on_ranks("comoe.benchmarks.precision:measure_precision", 1, **given)
    for key, (above, below) in RATIOS.items():
        report.add(key, asdict(ratio(times, above, below)))
    for label in CONTESTANTS:
        report.add_time(f"comoe, {label}", median(times, label), case="1 rank(s), whole step")
    if cores < 2:
        return
    # Two worlds cannot take turns step by step, so whole starts do.
    medians: dict[tuple[int, int], list[float]] = {layout: [] for layout in LAYOUTS}
    for number in range(repetitions):
        for ranks, threads in LAYOUTS[:: 1 if number % 2 == 0 else -1]:
            seconds = run_on_ranks(
                "comoe.benchmarks.precision:measure_alone",
                ranks,
                threads=threads,
                bf16=bf16,
                **given,
            )
            medians[ranks, threads].append(statistics.median(seconds))
    one, two = (medians[layout] for layout in LAYOUTS)
    report.add(
        "two_ranks_over_two_threads",
        asdict(spread_of([b / a for a, b in zip(one, two, strict=True)])),
    )
    for (ranks, threads), found in medians.items():
        case = f"{ranks} rank(s) with {threads} thread(s), whole step"
        report.add_time("comoe", statistics.median(found), case=case)
