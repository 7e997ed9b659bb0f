"""The Markdown table of a comparison: quality, gains, which task helps which, gates, budget, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from comoe.evaluation.tables import markdown_table as table
from comoe.experiments.compare.report import Comparison
from comoe.experiments.compare.results import COSTS, ROUTING, Result
from comoe.experiments.compare.statistics import MEAN, Difference, Estimate, seed_interval
from comoe.experiments.compare.transfer import Reasons


def cell(item: Estimate | None, *, signed: bool = False) -> str:
    """A number with its interval, where it has one; empty for None."""
    if item is None:
        return ""
    form = "+.3f" if signed else ".3f"
    mean = format(item.mean, form)
    return f"{mean} [{item.low:{form}}, {item.high:{form}}]" if math.isfinite(item.low) else mean


def number(value: Any) -> str:
    """A number of any size in a few digits, another value as it is; empty for None."""
    if isinstance(value, float):
        size = abs(value)
        return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 20 else f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def spread(values: Sequence[float]) -> str:
    """Mean over seeds and their sample deviation; empty without any."""
    if not values:
        return ""
    deviation = f" ± {number(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return number(math.fsum(values) / len(values)) + deviation


def figure(item: Estimate | None) -> str:
    """A large number without its interval."""
    return "" if item is None else f"{item.mean:,.0f}"


def markdown_lines(comparison: Comparison) -> list[str]:
    """Quality, gains and their reasons, then the gates, then what it costs; arms in the order they were asked for."""
    arms = comparison.arms
    if not arms:
        return ["# Comparison", "", "No run is finished yet.", *_failed(comparison)]
    notes = (f"* {note}" for note in comparison.notes)
    lines = ["# Comparison", "", _scope(comparison), *notes, ""]
    columns = {name: f"{name}/{task.metric}" for name, task in comparison.tasks.items()}
    head = ["arm", "seeds", "mean", f"against {comparison.baseline}", "helped", *columns.values()]
    lines += table(head, [
        [arm, str(len(comparison.results[arm])), cell(comparison.interval(arm, "quality", MEAN)),
         cell(comparison.against.get(arm, {}).get(MEAN), signed=True), _helped(comparison, arm),
         *(spread(comparison.seeds_of(arm, "quality", name)) for name in columns.values())]
        for arm in arms
    ])  # fmt: skip
    if comparison.metrics:
        lines += ["", "## Metrics", ""]
        lines += table(["arm", *comparison.metrics], [
            [arm, *(cell(comparison.interval(arm, "figures", name)) for name in comparison.metrics)] for arm in arms
        ])  # fmt: skip
    lines += transfer_lines(comparison)
    results = comparison.results
    gated = [arm for arm in arms if any(one.routing or one.removal for one in results[arm])]
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


def removal_intervals(results: Sequence[Result]) -> list[Estimate | None]:
    """Over seeds: fall of the mean metric without an expert, mean over experts and for the most
    needed one; the same for the rise of the loss. None where it was not measured."""
    measured = [result.removal for result in results if result.removal is not None]
    if not measured:
        return [None] * len(_REMOVAL)
    return [
        seed_interval([float(reduce(getattr(removal, name))) for removal in measured])
        for name in ("drop_LE", "loss_rise_LE")
        for reduce in (np.mean, np.max)
    ]


def _scope(comparison: Comparison) -> str:
    results = [result for found in comparison.results.values() for result in found]
    runs = {trial.name for result in results for trial in result.trials}
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
    verdicts = comparison.verdicts(arm)
    if not verdicts.count:
        return ""
    gains = comparison.against[arm]
    better = sum(gains[name].mean > 0 for name in comparison.measured if name in gains)
    text = f"better in {better} of {verdicts.count}, for sure in {len(verdicts.gained)}"
    return text + (f"; worse for sure in {len(verdicts.lost)}" if verdicts.lost else "")


def _passes(result: Result) -> str:
    """How often the training posts were gone over, on average."""
    posts, there = result.costs.get("posts"), sum(result.train_posts.values())
    return f"{posts / there:.1f}" if posts and there else ""


def _failed(comparison: Comparison) -> list[str]:
    failed = [f"* {name}: {problem}" for name, problem in comparison.problems.items()]
    return ["", "## Failed", "", *failed] if failed else []


_REMOVAL = ("mean drop without an expert", "largest drop", "mean loss rise", "largest loss rise")


_BUDGET = (
    "What the arms had to learn from. Posts are those gone over, counted each time, in all runs of an arm with one "
    "seed together; passes are these over the training posts. Tasks alone go over posts that they share once per task, "
    "so their passes are more in all."
)


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
    verdicts, base = comparison.verdicts(arm), comparison.baseline
    gained, lost, unsure = verdicts.gained, verdicts.lost, verdicts.open
    if not verdicts.count:
        return []
    text = f"helped {len(gained)} of {verdicts.count} tasks for sure{_named(gained)}"
    text += f"; hurt {len(lost)}{_named(lost)}"
    if unsure:
        text += f"; the other {len(unsure)} cannot be told apart from {base}{_named(unsure)}"
    negative = [f"  Negative transfer: {', '.join(lost)}."] if lost else []
    return [f"* **{arm}** against {base}: {text}.", *negative]


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
        text = _COSINES.format(limit=found.limit, seeds=found.seeds)
        lines += ["", f"## Gradients of {arm}", "", text, ""]
        lines += table(["task", *found.tasks], [
            [task, *(f"{value:+.3f}" if np.isfinite(value) else "" for value in row)]
            for task, row in zip(found.tasks, found.mean_TT, strict=True)
        ])  # fmt: skip
    if joint is not None and (comparison.changes or cosines is not None):
        lines += ["", "## Why", "", _WHY, ""]
        against = comparison.against.get(joint, {})
        lines += table(["task", f"gain over {comparison.baseline}", "gradients against it", "nearest gradients",
                        "better without", "worse without"], [
            [name, _gain(against.get(name)), *_reason_cells(comparison.reasons(name), told=cosines is not None)]
            for name in comparison.measured
        ])  # fmt: skip
    return lines


def _reason_cells(reasons: Reasons, *, told: bool) -> list[str]:
    opposed = ", ".join(f"{task} {value:+.3f}" for task, value in reasons.opposed_by[:SHOWN])
    nearest = f"{reasons.nearest[0]} {reasons.nearest[1]:+.3f}" if reasons.nearest else ""
    changes = (
        ", ".join(f"{task} {_gain(change)}" for task, change in found[:SHOWN])
        for found in (reasons.better_without, reasons.worse_without)
    )
    return [opposed or ("none" if told else ""), nearest, *changes]


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
