"""The Markdown tables of a comparison: quality, gains, transfer between tasks, gates, budget, cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from comoe.evaluation.tables import markdown_table as table
from comoe.experiments.compare.cells import NAMES, cell, digits_of, gain, p_value, spread
from comoe.experiments.compare.evidence import claim_lines, tuning_lines, visible_lines
from comoe.experiments.compare.grouping import proposal_lines
from comoe.experiments.compare.report import Comparison
from comoe.experiments.compare.results import (
    COSTS,
    EXPERTS,
    MEASURES,
    METRIC,
    ROUTING,
    Result,
)
from comoe.experiments.compare.splits import further_lines
from comoe.experiments.compare.statistics import MEAN, Estimate, seed_interval


def markdown_lines(comparison: Comparison) -> list[str]:
    """Quality, gains and their reasons, gates, budget and cost; arms in the order of ``--arms``."""
    arms = comparison.arms
    if not arms:
        return ["# Comparison", "", "No run is finished yet.", *_failed(comparison)]
    notes = (f"* {note}" for note in comparison.notes)
    lines = ["# Comparison", *claim_lines(comparison), "", _scope(comparison), *notes, ""]
    lines += [*_quality(comparison), *tuning_lines(comparison)]
    if comparison.metrics:
        lines += ["", "## Metrics", ""]
        lines += table(["arm", *comparison.metrics], [
            [arm, *(cell(comparison.interval(arm, "figures", name)) for name in comparison.metrics)] for arm in arms
        ])  # fmt: skip
    lines += [line for one in comparison.further for line in further_lines(one, arms)]
    lines += transfer_lines(comparison)
    lines += proposal_lines(comparison.proposal, comparison.proposal_command)
    results = comparison.results
    gated = [arm for arm in arms if any(one.routing or one.removal for one in results[arm])]
    if gated:
        lines += ["", "## Gates", ""]
        lines += table(["arm", *ROUTING, *_REMOVAL], [
            [arm, *(cell(comparison.interval(arm, "routing", name)) for name in ROUTING),
             *(cell(item) for item in removal_intervals(comparison.results[arm]))]
            for arm in gated
        ])  # fmt: skip
    if blocks := [arm for arm in arms if any(one.experts for one in results[arm])]:
        lines += ["", "## Experts off", "", _OFF, ""]
        lines += table(["arm", *EXPERTS], [
            [arm, *(cell(comparison.interval(arm, "experts", name), signed=True) for name in EXPERTS)] for arm in blocks
        ])  # fmt: skip
    costs = {arm: {name: comparison.interval(arm, "costs", name) for name in COSTS} for arm in arms}
    means = {arm: {name: f"{item.mean:,.0f}" if item else "" for name, item in found.items()}
             for arm, found in costs.items()}  # fmt: skip
    lines += ["", "## Budget", "", _BUDGET, ""]
    lines += table(["arm", "runs per seed", "steps", "posts", "passes", "training posts"], [
        [arm, str(len(results[arm][0].trials)), means[arm]["steps"], means[arm]["posts"], results[arm][0].passes,
         ", ".join(f"{name} {count:,}" for name, count in results[arm][0].train_posts.items())]
        for arm in arms
    ])  # fmt: skip
    lines += ["", "## Cost", ""]
    lines += table(["arm", *COSTS], [[arm, *means[arm].values()] for arm in arms])
    return lines + _failed(comparison)


def _quality(comparison: Comparison) -> list[str]:
    """The first table: means and losses of the arms, their differences to the baseline, and the tasks."""
    base, first = comparison.baseline, comparison.measure or METRIC
    every = [one for found in comparison.results.values() for one in found]
    known = [name for name in MEASURES if any(getattr(one, MEASURES[name]) for one in every)]
    order = [first, *(name for name in known if name != first)]
    tasks = {
        name: f"{name}/{task.metric if first == METRIC else first}"
        for name, task in comparison.tasks.items()
    }
    # A metric is named with its task there, a loss is not.
    keys = list(tasks.values()) if first == METRIC else list(tasks)
    tuned = list(comparison.tuning.grid.options) if comparison.tuning else []
    settings = {arm.name: arm.settings for arm in comparison.plan.arms}
    rows = []
    for arm in comparison.arms:
        row = [
            arm,
            str(len(comparison.results[arm])),
            *(settings[arm].get(key, "") for key in tuned),
        ]
        for measure in order:
            found = comparison.differences[measure].get(arm, {}).get(MEAN)
            digits = digits_of(measure)
            row += [cell(comparison.interval(arm, MEASURES[measure], MEAN), digits=digits)]
            row += [gain(found, digits=digits), p_value(found)]
        row += [_helped(comparison, arm)]
        rows.append(
            [*row, *(spread(comparison.seeds_of(arm, comparison.values, key)) for key in keys)]
        )
    heads = []
    for measure in order:
        metric = measure == METRIC
        heads += [NAMES[measure], f"{'against' if metric else 'lower than'} {base}", "p"]
    lines = table(["arm", "seeds", *tuned, *heads, "helped", *tasks.values()], rows)
    means = {
        NAMES[measure]: comparison.smallest(measure)[MEAN]
        for measure in order
        if MEAN in comparison.smallest(measure)
    }
    return lines + visible_lines(comparison, means)


def removal_intervals(results: Sequence[Result]) -> list[Estimate | None]:
    """Drop of the mean metric without an expert, mean and maximum over experts; the same for the
    rise of the loss. Over seeds; None if not measured."""
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
    advice = "Intervals of two seeds are wider than the scale: use three or more."
    if fewest == 1:
        advice = (
            "With one seed they cover other posts, but not other training runs: a significant "
            "difference may be an effect of the seed. Use three or more."
        )
    return (
        f"{len(runs)} runs, quality on the {split} posts, tasks with the standard deviation over seeds. Brackets are "
        f"95 % intervals: Student's t over seeds; for the difference to {comparison.baseline} paired seeds together "
        f"with a paired bootstrap of the posts; for losses paired seeds only. {_posts(comparison)} p-values are "
        f"adjusted for all comparisons of this report but the claim (Holm); bold: p < 0.05. {advice}"
    )


def _posts(comparison: Comparison) -> str:
    """How many posts the metrics and the losses are of, over all runs."""
    results = [result for found in comparison.results.values() for result in found]
    parts = []
    for what, split in (("Metrics", results[0].split), ("Losses", "validation")):
        counts = {
            name: sorted(
                {one.posts[split][name] for one in results if name in one.posts.get(split, {})}
            )
            for name in comparison.tasks
        }
        shown = [
            f"{name} {found[0]:,}" + (f" to {found[-1]:,}" if len(found) > 1 else "")
            for name, found in counts.items()
            if found
        ]
        if shown:
            parts.append(f"{what}: {split} posts of {', '.join(shown)}.")
    return " ".join(parts)


def _helped(comparison: Comparison, arm: str) -> str:
    verdicts = comparison.verdicts(arm)
    if not verdicts.count:
        return ""
    gains = comparison.against[arm]
    better = sum(gains[name].mean > 0 for name in comparison.measured if name in gains)
    text = f"better in {better} of {verdicts.count}, significantly in {len(verdicts.gained)}"
    return text + (f"; significantly worse in {len(verdicts.lost)}" if verdicts.lost else "")


def _failed(comparison: Comparison) -> list[str]:
    failed = [f"* {name}: {problem}" for name, problem in comparison.problems.items()]
    return ["", "## Failed", "", *failed] if failed else []


_REMOVAL = ("mean drop without an expert", "largest drop", "mean loss rise", "largest loss rise")

_OFF = (
    "Validation posts, relative rise of the mean loss (0.1 is 10 %) and change of the mean metric: with all experts, "
    "or the one block, switched off, and with tokens sent to experts in turn. Near 0 they add nothing."
)

_BUDGET = (
    "Training data of the arms. Posts are processed posts, with repetition, in all runs of an arm with one seed; "
    "passes are processed posts over training posts. Single tasks process the posts that they "
    "share once per task, so their passes are more in total."
)


SHOWN = 2
"""Maximum of tasks in a reason."""


def transfer_lines(comparison: Comparison) -> list[str]:
    """Gains and losses per task, and transfer between tasks; empty without differences to the baseline."""
    lines: list[str] = []
    if comparison.against:
        names = [*comparison.tasks, MEAN]
        measure = comparison.measure or METRIC
        digits = digits_of(measure)
        unit = "" if measure == METRIC else f" in {NAMES[measure]}"
        lines += ["", f"## Gains{unit} over {comparison.baseline}", "", _SIGNS, ""]
        lines += table(["arm", *names], [
            [arm, *(gain(differences.get(name), digits=digits) for name in names)]
            for arm, differences in comparison.against.items()
        ])  # fmt: skip
        sizes = comparison.smallest(measure)
        lines += visible_lines(comparison, {name: sizes[name] for name in names if name in sizes})
        lines += ["", *(line for arm in comparison.against for line in _verdicts(comparison, arm))]
    return lines + _affinity_lines(comparison)


def _verdicts(comparison: Comparison, arm: str) -> list[str]:
    verdicts, base = comparison.verdicts(arm), comparison.baseline
    gained, lost, other = verdicts.gained, verdicts.lost, verdicts.open
    if not verdicts.count:
        return []
    text = f"helped {len(gained)} of {verdicts.count} tasks significantly{_named(gained)}"
    text += f"; hurt {len(lost)}{_named(lost)}"
    if other:
        text += f"; no significant difference to {base} for {len(other)}{_named(other)}"
    trained = not any(one.classical for one in comparison.plan.arms if one.name in (arm, base))
    negative = [f"  Negative transfer: {', '.join(lost)}."] if lost and trained else []
    return [f"* **{arm}** against {base}: {text}.", *negative]


def _affinity_lines(comparison: Comparison) -> list[str]:
    joint, lines = comparison.plan.joint, []
    cosines = comparison.cosines.get(joint or "")
    if comparison.changes:
        lines += ["", "## Without one task", "", _CHANGES.format(joint=joint), ""]
        names = [*comparison.tasks]
        lines += table(["dropped", *names], [
            [dropped, *(gain(of_task.get(name)) for name in names)] for dropped, of_task in comparison.changes.items()
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
        rows = []
        for name in comparison.measured:
            found = comparison.reasons(name)
            opposed = ", ".join(f"{task} {value:+.3f}" for task, value in found.opposed_by[:SHOWN])
            nearest = f"{found.nearest[0]} {found.nearest[1]:+.3f}" if found.nearest else ""
            changes = (", ".join(f"{task} {gain(change)}" for task, change in pairs[:SHOWN])
                       for pairs in (found.better_without, found.worse_without))  # fmt: skip
            empty = "" if cosines is None else "none"
            rows.append([name, gain(against.get(name)), opposed or empty, nearest, *changes])
        lines += table(["task", f"gain over {comparison.baseline}", "opposed gradients", "nearest gradients",
                        "better without", "worse without"], rows)  # fmt: skip
    return lines


def _named(tasks: Sequence[str]) -> str:
    return f" ({', '.join(tasks)})" if tasks else ""


_SIGNS = (
    "Larger is better; errors and losses are negated. Bold: the adjusted p-value is below 0.05. "
    "Intervals are not adjusted: one of twenty excludes 0 by chance. p-values are in gains.csv."
)


_CHANGES = (
    "Improvement of a task (column) without another one (row), against {joint}: above 0 the "
    "dropped task did harm, below 0 it helped."
)

_COSINES = (
    "Cosine of the gradients of two tasks' mean losses with respect to the shared weights, at the end of training, on "
    "up to {limit} validation posts per task, mean over {seeds} run(s): below 0 they undo each other's steps. The "
    "diagonal is the highest cosine that the noise of so few posts permits: 1 without noise, 0 for pure noise."
)

_WHY = (
    "Opposed gradients: below 0 in every seed. Better without: any improvement, bold if "
    "significant; worse without: significant ones only."
)
