"""The Markdown table of a comparison: quality, gains, which task helps which, gates, budget, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from comoe.comparing.intervals import MEAN, Interval, seed_interval
from comoe.comparing.report import Comparison
from comoe.comparing.results import COSTS, ROUTING, Result
from comoe.comparing.transfer_tables import transfer_lines
from comoe.comparing.writing import cell, figure, table


def markdown_lines(comparison: Comparison) -> list[str]:
    """Quality, gains and their reasons, then the gates, then what it costs; arms in the order they were asked for."""
    arms = comparison.arms
    if not arms:
        return ["# Comparison", "", "No run is finished yet.", *_failed(comparison)]
    lines = ["# Comparison", "", _scope(comparison), *(f"* {note}" for note in comparison.notes), ""]
    columns = {name: f"{name}/{task.metric}" for name, task in comparison.tasks.items()}
    head = ["arm", "seeds", "mean", f"against {comparison.baseline}", "helped", *columns.values()]
    lines += table(head, [
        [arm, str(len(comparison.results[arm])), cell(comparison.interval(arm, "quality", MEAN)),
         cell(comparison.against.get(arm, {}).get(MEAN), signed=True), _helped(comparison, arm),
         *(_spread(comparison.seeds_of(arm, "quality", name)) for name in columns.values())]
        for arm in arms
    ])  # fmt: skip
    if comparison.metrics:
        lines += ["", "## Metrics", ""]
        lines += table(["arm", *comparison.metrics], [
            [arm, *(cell(comparison.interval(arm, "figures", name)) for name in comparison.metrics)] for arm in arms
        ])  # fmt: skip
    lines += transfer_lines(comparison)
    gated = [arm for arm in arms if any(result.routing or result.removal for result in comparison.results[arm])]
    if gated:
        lines += ["", "## Gates", ""]
        lines += table(["arm", *ROUTING, *_REMOVAL], [
            [arm, *(cell(comparison.interval(arm, "routing", name)) for name in ROUTING),
             *(cell(item) for item in removal_intervals(comparison.results[arm]))]
            for arm in gated
        ])  # fmt: skip
    lines += ["", "## Budget", "", _BUDGET, ""]
    lines += table(["arm", "runs per seed", "steps", "posts", "passes", "training posts"], [
        [arm, str(len(comparison.results[arm][0].trials)),
         *(figure(comparison.interval(arm, "costs", name)) for name in ("steps", "posts")),
         _passes(comparison.results[arm][0]),
         ", ".join(f"{name} {count:,}" for name, count in comparison.results[arm][0].train_posts.items())]
        for arm in arms
    ])  # fmt: skip
    lines += ["", "## Cost", ""]
    lines += table(["arm", *COSTS], [
        [arm, *(figure(comparison.interval(arm, "costs", name)) for name in COSTS)] for arm in arms
    ])  # fmt: skip
    return lines + _failed(comparison)


def removal_intervals(results: Sequence[Result]) -> list[Interval | None]:
    """Over seeds: fall of the mean metric without an expert, mean over experts and for the most needed one; the same
    for the rise of the loss. None where it was not measured."""
    measured = [result.removal for result in results if result.removal is not None]
    if not measured:
        return [None] * len(_REMOVAL)
    return [
        seed_interval([float(reduce(getattr(removal, name))) for removal in measured])
        for name in ("drop_LE", "loss_rise_LE")
        for reduce in (np.mean, np.max)
    ]


def _scope(comparison: Comparison) -> str:
    runs = {trial.name for results in comparison.results.values() for result in results for trial in result.trials}
    split = comparison.results[comparison.arms[0]][0].split
    fewest = min(len(comparison.results[arm]) for arm in comparison.arms)
    advice = "Two seeds give intervals far wider than the scale itself: take three or more."
    if fewest == 1:
        advice = (
            "With one seed they tell what other posts would change, and nothing of another training run: what is sure "
            "here may be luck of the seed. Take three or more."
        )
    return (
        f"{len(runs)} runs, quality on the {split} posts, tasks with the deviation over seeds. Brackets are 95 % "
        f"intervals: Student's t over seeds; for the difference to {comparison.baseline} over the paired seeds and a "
        f"paired bootstrap of the posts together. {advice}"
    )


def _helped(comparison: Comparison, arm: str) -> str:
    outcome = comparison.outcome(arm)
    if not outcome.told:
        return ""
    better = sum(item.mean > 0 for name, item in comparison.against[arm].items() if name in comparison.measured)
    told = f"better in {better} of {outcome.told}, for sure in {len(outcome.gained)}"
    return told + (f"; worse for sure in {len(outcome.lost)}" if outcome.lost else "")


def _passes(result: Result) -> str:
    """How often the training posts were gone over, on average."""
    posts, there = result.costs.get("posts"), sum(result.train_posts.values())
    return f"{posts / there:.1f}" if posts and there else ""


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{math.fsum(values) / len(values):.3f}{deviation}"


def _failed(comparison: Comparison) -> list[str]:
    failed = [f"* {name}: {problem}" for name, problem in comparison.problems.items()]
    return ["", "## Failed", "", *failed] if failed else []


_REMOVAL = ("mean drop without an expert", "largest drop", "mean loss rise", "largest loss rise")
_BUDGET = (
    "What the arms had to learn from. Posts are those gone over, counted each time, in all runs of an arm with one "
    "seed together; passes are these over the training posts. Tasks alone go over posts that they share once per task, "
    "so their passes are more in all."
)
