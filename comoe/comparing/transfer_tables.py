"""The part of the Markdown table that tells whether training together helped, and why not where it did not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from comoe.comparing.intervals import MEAN, Difference
from comoe.comparing.report import Comparison
from comoe.comparing.transfer import Cosines, Reasons
from comoe.comparing.writing import cell, table

SHOWN = 2
"""Tasks that a reason names."""


def transfer_lines(comparison: Comparison) -> list[str]:
    """Gains per task, what was lost, which task helps which; empty where nothing was held against the baseline."""
    lines: list[str] = []
    if comparison.against:
        names = [*comparison.tasks, MEAN]
        lines += ["", f"## Gains over {comparison.baseline}", "", _SIGNS, ""]
        lines += table(["arm", *names], [
            [arm, *(_gain(differences.get(name)) for name in names)] for arm, differences in comparison.against.items()
        ])  # fmt: skip
        lines += ["", *(line for arm in comparison.against for line in _verdicts(comparison, arm))]
    return lines + _affinity_lines(comparison)


def _verdicts(comparison: Comparison, arm: str) -> list[str]:
    outcome, base = comparison.outcome(arm), comparison.baseline
    if not outcome.told:
        return []
    parts = [f"helped {len(outcome.gained)} of {outcome.told} tasks for sure{_named(outcome.gained)}"]
    parts.append(f"hurt {len(outcome.lost)}{_named(outcome.lost)}")
    if outcome.open:
        parts.append(f"the other {len(outcome.open)} cannot be told apart from {base}{_named(outcome.open)}")
    lines = [f"* **{arm}** against {base}: {'; '.join(parts)}."]
    if outcome.lost:
        lines.append(f"  Negative transfer: {', '.join(outcome.lost)}.")
    return lines


def _affinity_lines(comparison: Comparison) -> list[str]:
    joint, lines = comparison.plan.joint, []
    cosines = comparison.cosines.get(joint or "")
    if comparison.changes:
        lines += ["", "## Without one task", "", _CHANGES.format(joint=joint), ""]
        names = [*comparison.tasks]
        lines += table(["dropped", *names], [
            [dropped, *(_gain(of_task.get(name)) for name in names)] for dropped, of_task in comparison.changes.items()
        ])  # fmt: skip
    for arm, found in comparison.cosines.items():
        lines += ["", f"## Gradients of {arm}", "", _COSINES.format(limit=found.limit, seeds=found.seeds), ""]
        lines += _matrix(found)
    if joint is not None and (comparison.changes or cosines is not None):
        lines += ["", "## Why", "", _WHY, ""]
        against = comparison.against.get(joint, {})
        lines += table(["task", f"gain over {comparison.baseline}", "gradients against it", "nearest gradients",
                        "better without", "worse without"], [
            [name, _gain(against.get(name)), *_reason_cells(comparison.reasons(name), told=cosines is not None)]
            for name in comparison.measured
        ])  # fmt: skip
    return lines


def _matrix(cosines: Cosines) -> list[str]:
    return table(["task", *cosines.tasks], [
        [task, *(f"{value:+.3f}" if np.isfinite(value) else "" for value in row)]
        for task, row in zip(cosines.tasks, cosines.mean_TT, strict=True)
    ])  # fmt: skip


def _reason_cells(reasons: Reasons, *, told: bool) -> list[str]:
    opposed = ", ".join(f"{task} {value:+.3f}" for task, value in reasons.opposed_by[:SHOWN])
    nearest = f"{reasons.nearest[0]} {reasons.nearest[1]:+.3f}" if reasons.nearest else ""
    return [opposed or ("none" if told else ""), nearest, _changes(reasons.better_without),
            _changes(reasons.worse_without)]  # fmt: skip


def _changes(changes: Sequence[tuple[str, Difference]]) -> str:
    return ", ".join(f"{task} {_gain(change)}" for task, change in changes[:SHOWN])


def _gain(item: Difference | None) -> str:
    if item is None:
        return ""
    text = cell(item, signed=True)
    return f"**{text}**" if item.verdict else text


def _named(tasks: Sequence[str]) -> str:
    return f" ({', '.join(tasks)})" if tasks else ""


_SIGNS = (
    "Larger is better, also for metrics that fall. Bold: the 95 % interval leaves 0 out, told for each task by itself, "
    "not for all at once: one of twenty would by chance. p-values are in gains.csv."
)
_CHANGES = (
    "How much better a task (column) is when another one (row) is dropped from {joint}: above 0 the dropped task did "
    "it harm, below 0 it helped."
)
_COSINES = (
    "Cosine of the gradients of two tasks' mean losses with respect to the weights that they share, at the end of "
    "training, on up to {limit} validation posts per task, mean over {seeds} run(s): below 0 they undo each other's "
    "steps. The diagonal says how high a cosine can get with so few posts: 1 without noise, 0 where all is noise."
)
_WHY = (
    "Gradients against a task: below 0 in every seed. Better without: any rise, bold where it is sure; worse without: "
    "sure falls alone."
)
