"""What logging, progress and routing statistics take of a training run, by clocks inside that run."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comoe.assemble import assemble
from comoe.benchmarks.timing import spread_of
from comoe.benchmarks.workload import deepspeed_json, find_posts
from comoe.train.evaluation import Evaluator
from comoe.train.monitor import Monitor
from comoe.train.parallel import start_ranks
from comoe.train.progress import Interval
from comoe.train.routing_stats import RoutingStats
from comoe.train.trainer import Trainer

STEPS, EVAL_EVERY = 40, 20
"""Training steps of the run, and between two evaluations; the default recipe logs every tenth."""
WATCHED: dict[str, list[tuple[type, str]]] = {
    "step": [(Trainer, "_step")],
    "evaluation": [(Evaluator, "run"), (Monitor, "log_evaluation")],
    "log": [(Interval, "add"), (Interval, "reduce"), (Monitor, "log_train")],
    "statistics": [(RoutingStats, "update"), (RoutingStats, "summary"), (Monitor, "log_evaluation")],
}
"""Part -> methods whose time is added up."""


@contextmanager
def clocked_methods(parts: dict[str, list[tuple[type, str]]]) -> Iterator[dict[str, list[float]]]:
    """While open, each call of the methods adds its seconds to its part's list."""
    found: dict[str, list[float]] = {part: [] for part in parts}
    originals = [(owner, name, getattr(owner, name)) for methods in parts.values() for owner, name in methods]
    for part, methods in parts.items():
        for owner, name in methods:
            setattr(owner, name, _clocked(getattr(owner, name), found[part]))
    try:
        yield found
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


def _clocked(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def measure(config: str | None) -> dict[str, Any]:
    """Train for a while, with two evaluations.

    Args:
        config: recipe file; None is the default recipe.

    Returns:
        share: of the training steps' time, what gathers and writes the log. evaluation_share: of an evaluation's time,
        what counts routes, writes and draws. note: a line on what ran.
    """
    device = start_ranks(timeout_seconds=600)
    source = find_posts(
        config,
        [
            f"train.max_steps={STEPS}",
            "data.limit_eval=400",
            f"train.eval_every={EVAL_EVERY}",
            "train.save_every=100000",
        ],
    )
    with tempfile.TemporaryDirectory(prefix="comoe-bench-") as name, open(os.devnull, "w", encoding="utf-8") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            run = assemble(
                source.recipe, deepspeed_json(), folder=Path(name), on_ready=lambda: None, device=device, dry_run=False,
                resume=False,
            )  # fmt: skip
            assert run is not None
            with clocked_methods(WATCHED) as seconds:
                run.trainer.run()
        run.trainer.monitor.close()
    share = sum(seconds["log"]) / sum(seconds["step"])
    evaluation = sum(seconds["statistics"]) / sum(seconds["evaluation"])
    rounds = len(seconds["step"])
    return {
        "share": asdict(spread_of([share])) | {"rounds": rounds},
        "evaluation_share": asdict(spread_of([evaluation])) | {"rounds": len(seconds["statistics"])},
        "note": f"monitoring: {rounds} steps of the recipe {source.recipe.run.name} on {source.name}, "
        f"{1000 * sum(seconds['step']) / rounds:.0f} ms per step; each evaluation counts, writes and draws for "
        f"{1000 * sum(seconds['statistics']) / (STEPS // EVAL_EVERY):.0f} ms",
    }
