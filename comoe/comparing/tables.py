"""The Markdown table of a comparison: quality, gates, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from comoe.comparing.intervals import MEAN, Interval, seed_interval
from comoe.comparing.report import ROUTING, Comparison, Result
from comoe.scaling_table import COSTS


def markdown_lines(comparison: Comparison) -> list[str]:
    """Quality, then the gates, then what it costs, arms in the order they were asked for."""
    arms = [arm for arm, results in comparison.results.items() if results]
    if not arms:
        return ["# Comparison", "", "No run is finished yet."]
    first = comparison.results[arms[0]][0]
    tasks = [name for name in first.quality if name != MEAN]
    lines = ["# Comparison", "", _scope(comparison, first.split), ""]
    head = ["arm", "seeds", "mean", f"against {comparison.baseline}", *tasks]
    lines += _table(head, [
        [arm, str(len(comparison.results[arm])), _cell(comparison.interval(arm, "quality", MEAN)),
         _cell(comparison.against.get(arm, {}).get(MEAN), signed=True),
         *(_cell(comparison.interval(arm, "quality", name), ends=False) for name in tasks)]
        for arm in arms
    ])  # fmt: skip
    gated = [arm for arm in arms if any(result.routing or result.removal for result in comparison.results[arm])]
    if gated:
        lines += ["", "## Gates", ""]
        lines += _table(["arm", *ROUTING, *_REMOVAL], [
            [arm, *(_cell(comparison.interval(arm, "routing", name)) for name in ROUTING),
             *(_cell(item) for item in removal_intervals(comparison.results[arm]))]
            for arm in gated
        ])  # fmt: skip
    lines += ["", "## Cost", ""]
    lines += _table(["arm", *COSTS], [
        [arm, *(_number(comparison.interval(arm, "costs", name)) for name in COSTS)] for arm in arms
    ])  # fmt: skip
    failed = [f"* {name}: {problem}" for name, problem in comparison.problems.items()]
    return lines + (["", "## Failed", "", *failed] if failed else [])


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


def _scope(comparison: Comparison, split: str) -> str:
    runs = sum(len(results) for results in comparison.results.values())
    return (
        f"{runs} runs, quality on the {split} posts. Brackets are 95 % intervals: Student's t over seeds; for the "
        f"difference to {comparison.baseline} t over the paired seeds, widened by a paired bootstrap over the posts. "
        "Two seeds give intervals far wider than the scale itself: take three or more."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _cell(item: Interval | None, *, signed: bool = False, ends: bool = True) -> str:
    if item is None:
        return ""
    form = "+.3f" if signed else ".3f"
    mean = format(item.mean, form)
    return f"{mean} [{item.low:{form}}, {item.high:{form}}]" if ends and math.isfinite(item.low) else mean


def _number(item: Interval | None) -> str:
    return "" if item is None else f"{item.mean:,.0f}"


_REMOVAL = ("mean drop without an expert", "largest drop", "mean loss rise", "largest loss rise")
