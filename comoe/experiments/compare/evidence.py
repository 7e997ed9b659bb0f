"""What a report proves: the claim, the smallest visible differences, how options were chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comoe.evaluation.tables import markdown_table as table
from comoe.experiments.compare.cells import NAMES, cell, number, p_value
from comoe.experiments.compare.power import posts_needed, seeds_needed, smallest_difference
from comoe.experiments.compare.report import Comparison


def claim_lines(comparison: Comparison) -> list[str]:
    """The comparison that was named beforehand."""
    found = comparison.claim
    if found is None:
        return []
    claim, difference = found.claim, found.difference
    seeds = ", ".join(map(str, claim.seeds))
    named = f"named before the first run, for the seeds {seeds}"
    if claim.runs_before:
        named = f"**not** named beforehand: {claim.runs_before} runs were finished"
    text = f"**{claim}** ({named}): "
    if difference is None:
        return ["", "## Claim", "", text + "not measured yet."]
    text += f"difference {cell(difference, signed=True, digits=4)}"
    if not math.isnan(difference.p):
        text += f", p = {p_value(difference)} (not adjusted)"
    of_all = f" of {len(claim.seeds)}" if difference.seeds < len(claim.seeds) else ""
    text += f", {difference.seeds}{of_all} seeds: **{found.verdict}**."
    size = smallest_difference([difference])
    if math.isfinite(size):
        needs = _needs(seeds_needed([difference]), posts_needed([difference]))
        text += (
            f" The smallest difference that it can see is {size:.4f}; one of 0.01 needs {needs}."
        )
    if difference.seeds > len(claim.seeds):
        text += " Seeds were added after the claim: adding them until it holds makes a false finding likely."
    return ["", "## Claim", "", text]


def visible_lines(comparison: Comparison, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The smallest difference that a table can see, under it."""
    if not any(comparison.differences.values()):
        return []
    if not found:
        return [
            "",
            "One seed shows no spread over training runs: nothing can be seen. Use two or more.",
        ]
    rows = [
        [name, f"{item['smallest']:.4f}", _needs(item["seeds_for_0.01"], item["posts_for_0.01"])]
        for name, item in found.items()
    ]
    return [
        "",
        *table(["", "smallest difference", "a difference of 0.01 needs"], rows),
        "",
        _SMALLEST,
    ]


def _needs(seeds: int | None, posts: float) -> str:
    return f"{posts:.1f} times the posts, or more" if seeds is None else f"{seeds} seeds"


def tuning_lines(comparison: Comparison) -> list[str]:
    """The score of every point of every tuned run, the chosen ones in bold."""
    tuning = comparison.tuning
    if tuning is None or not tuning.scores:
        return []
    points = list(dict.fromkeys(point for found in tuning.scores.values() for point in found))
    rows = []
    for part, found in tuning.scores.items():
        best = tuning.best(part)
        shown = {point: number(tuning.mean(part, point)) for point in found}
        shown |= {best: f"**{shown[best]}**"} if best else {}
        rows.append([part, *(shown.get(point, "") for point in points)])
    what = f"{NAMES[tuning.grid.by]} of the validation posts"
    seeds = ", ".join(map(str, tuning.grid.seeds))
    text = f"Chosen by the {what}, averaged over the seeds {seeds}, which are not those of the other tables."
    return ["", "## Tuning", "", text, "", *table(["runs", *map(" ".join, points)], rows)]


_SMALLEST = (
    "Smallest difference: a true one of this size is found in 80 of 100 such comparisons at the 95 "
    "% level, by the spread of the paired differences."
)
