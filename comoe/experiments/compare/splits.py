"""Arms on further evaluated sets (``--splits``): held-out values, noisy posts; how far each falls there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.errors import unknown_name
from comoe.config.recipe import Recipe
from comoe.data.posts import PART_NAMES, UNSEEN
from comoe.data.text.noise import NOISY, SEPARATOR
from comoe.evaluation.evaluate import higher_is_better
from comoe.evaluation.tables import markdown_table as table
from comoe.experiments.compare.arms import measured_tasks
from comoe.experiments.compare.cells import cell, gain, p_value
from comoe.experiments.compare.differences import Differences, PairedDifferences
from comoe.experiments.compare.plan import Plan
from comoe.experiments.compare.power import smallest_difference
from comoe.experiments.compare.results import Result, read_arms
from comoe.experiments.compare.statistics import MEAN, paired_difference, seed_interval
from comoe.tasks.task import Task

_Values = dict[str, dict[str, dict[int, tuple[float, tuple[Any, ...]]]]]
"""Arm -> task, or ``mean`` -> seed -> main metric, larger is better, and the posts that it is of."""

_COMPARED = ("differences", "steadier")
"""Fields of a ``FurtherSet`` with p-values."""


@dataclass(frozen=True, slots=True)
class FurtherSet:
    """The arms on one more evaluated set, and the split that they fall from."""

    name: str
    origin: str
    """Split of the same posts without noise, else that of the other tables."""
    baseline: str
    results: Mapping[str, Sequence[Result]]
    """Arm -> its results on this set; arms that have some."""
    falls: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """Arm -> task, or ``mean`` over the tasks that both have -> per seed the main metric on
    ``origin`` minus that on the set; of an error its rise."""
    differences: Differences = field(default_factory=dict)
    """To the baseline, larger is better."""
    steadier: Differences = field(default_factory=dict)
    """By how much less an arm falls than the baseline, over paired seeds."""
    resampled: bool = False
    """Whether ``differences`` are over resampled posts, too."""
    notes: Sequence[str] = ()
    """What cannot be compared, or why there is nothing."""

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks that are scored on it."""
        results = (result for found in self.results.values() for result in found)
        return {name: task for result in results for name, task in result.tasks.items()}

    @property
    def rows(self) -> dict[str, str]:
        """``mean`` and tasks -> key of ``Result.quality``."""
        return {MEAN: MEAN} | {name: f"{name}/{task.metric}" for name, task in self.tasks.items()}

    @property
    def posts(self) -> dict[str, list[int]]:
        """Task -> numbers of its labeled posts, the different ones of all runs."""
        results = [result for found in self.results.values() for result in found]
        counts: dict[str, set[int]] = {name: set() for name in self.tasks}
        for one in results:
            for name, metrics in one.metrics.items():
                counts[name] |= {int(metrics["n"])} if "n" in metrics else set()
        return {name: sorted(found) for name, found in counts.items()}

    def values(self, arm: str, name: str) -> list[float]:
        """A row of an arm, per seed that has it."""
        found = [one.quality.get(self.rows[name]) for one in self.results[arm]]
        return [value for value in found if value is not None]

    def smallest(self, name: str) -> float:
        """The smallest difference of the means that can be seen, of ``differences`` or ``steadier``;
        NaN with fewer than two seeds."""
        groups = getattr(self, name).values()
        return smallest_difference([of_arm[MEAN] for of_arm in groups if MEAN in of_arm])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, as ``comparison.json`` has them."""

        def compared(differences: Differences, arm: str) -> dict[str, Any]:
            of_arm = differences.get(arm, {}).items()
            return {name: item.to_dict() | {"verdict": item.verdict} for name, item in of_arm}

        def about(arm: str, found: Sequence[Result]) -> dict[str, Any]:
            quality = {key: self.values(arm, name) for name, key in self.rows.items()}
            falls = self.falls.get(arm, {})
            return {
                "seeds": [one.seed for one in found],
                "quality": {key: _entry(values) for key, values in quality.items() if values},
                "against_baseline": compared(self.differences, arm),
                "fall": {name: _entry(values) for name, values in falls.items()},
                "falls_less_than_baseline": compared(self.steadier, arm),
            }

        sizes = {name: self.smallest(name) for name in _COMPARED}
        return {
            "from": self.origin,
            "baseline": self.baseline,
            "posts": self.posts,
            "resampled_posts": self.resampled,
            "notes": list(self.notes),
            "smallest_difference": {name: x for name, x in sizes.items() if math.isfinite(x)},
            "arms": {arm: about(arm, found) for arm, found in self.results.items()},
        }


def check_splits(text: str | None, recipe: Recipe) -> list[str]:
    """The sets of ``--splits``, each once.

    Args:
        text: names with commas; None: no set.
        recipe: of the comparison.

    Raises:
        ValueError: a set that the runs of the recipe will not have.
    """
    held = any(recipe.tasks[name].hold_out for name in measured_tasks(recipe))
    known = [name for name in PART_NAMES[1:] if held or name != UNSEEN]
    known += [f"{split}{SEPARATOR}{noise}" for split in NOISY for noise in recipe.data.noise]
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            error = unknown_name("set that these runs are scored on (--splits)", name, known)
            raise ValueError(
                f"{error}. tasks.<name>.hold_out makes {UNSEEN}, and data.noise=[typos] makes "
                f"{' and '.join(f'{split}{SEPARATOR}typos' for split in NOISY)}."
            )
    return list(dict.fromkeys(names))


def further_sets(
    plan: Plan,
    runs: Path,
    asked: Mapping[str, str],
    *,
    main: Mapping[str, Sequence[Result]],
    resamples: int,
) -> list[FurtherSet]:
    """The finished runs on other evaluated sets.

    Args:
        plan: all runs.
        runs: folder of the run folders.
        asked: set -> the arm that the others are compared with there.
        main: arm -> its results on the split of the other tables.
        resamples: of the bootstrap of the posts, where every run has its predictions for them.
    """
    split = next((one.split for found in main.values() for one in found), "")
    sets = []
    for name, baseline in asked.items():
        clean, noise, _ = name.partition(SEPARATOR)
        origin = clean if noise else split
        before = main if origin == split else read_arms(plan, runs, split=origin)
        results = {} if name == split else read_arms(plan, runs, split=name)
        results = {arm: found for arm, found in results.items() if found}
        found = FurtherSet(name, origin, baseline, results)
        if results:
            found = replace(found, resampled=_predicted(results, runs))
            pairs = PairedDifferences(results, runs, resamples=resamples)
            sets.append(_compared(found, before, pairs))
        else:
            sets.append(replace(found, notes=(_SAME if name == split else _NONE,)))
    return sets


def groups_of(sets: Sequence[FurtherSet]) -> dict[str, Differences]:
    """All differences of the sets, as groups of ``comoe.experiments.compare.power.adjust``."""
    return {f"{one.name} {name}": getattr(one, name) for one in sets for name in _COMPARED}


def with_adjusted(
    sets: Sequence[FurtherSet], groups: dict[str, dict[str, dict[str, Any]]]
) -> list[FurtherSet]:
    """The sets with their differences as adjusted; these are taken out of ``groups``."""
    return [
        replace(one, **{name: groups.pop(f"{one.name} {name}") for name in _COMPARED})
        for one in sets
    ]


def further_lines(found: FurtherSet, arms: Sequence[str]) -> list[str]:
    """The table of a set: a row for the mean and each task of every arm.

    Args:
        found: a set.
        arms: in the order of the rows.
    """
    lines = ["", f"## Split {found.name}", ""]
    notes = [f"* {note}" for note in found.notes]
    if not found.results:
        return lines + notes
    base, origin = found.baseline, found.origin
    posts = ", ".join(
        f"{name} {counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")
        for name, counts in found.posts.items()
        if counts
    )
    lines += [_TEXT.format(name=found.name, posts=posts, how=_HOW[found.resampled], baseline=base,
                           origin=origin), *notes, ""]  # fmt: skip
    rows = []
    for arm in [arm for arm in arms if arm in found.results]:
        for name, key in found.rows.items():
            values, falls = found.values(arm, name), found.falls.get(arm, {}).get(name)
            better = found.differences.get(arm, {}).get(name)
            less = found.steadier.get(arm, {}).get(name)
            if values:
                fall = cell(seed_interval(falls), signed=True) if falls else ""
                rows.append([arm, key, str(len(values)), cell(seed_interval(values)), gain(better),
                             p_value(better), fall, gain(less), p_value(less)])  # fmt: skip
    lines += table(["arm", "of", "seeds", found.name, f"against {base}", "p", f"fall from {origin}",
                    f"less than {base}", "p"], rows)  # fmt: skip
    better, less = map(found.smallest, _COMPARED)
    if math.isfinite(less):
        seen = f"{better:.4f} in the mean, and " if math.isfinite(better) else ""
        lines += ["", f"Smallest difference that this table can see: {seen}{less:.4f} in its fall."]
    return lines


def _compared(
    found: FurtherSet, before: Mapping[str, Sequence[Result]], pairs: PairedDifferences
) -> FurtherSet:
    """The set with its falls, differences and what cannot be compared.

    Args:
        found: with its results.
        before: arm -> its results on the split that the arms fall from.
        pairs: of the set's predictions.
    """
    tasks = [name for name, task in found.tasks.items() if not task.auxiliary]
    there = {name for results in before.values() for one in results for name in one.tasks}
    values = _values(found.results, tasks)
    both = [name for name in tasks if name in there]
    changes = _changes(_values(before, both), _values(found.results, both))
    base = found.baseline
    differences = pairs.against(base) if found.resampled else _paired(values, base)
    other = {arm: set(names) for arm, names in pairs.incomparable.items()}
    for arm, of_arm in values.items():
        if bad := {name for name in of_arm if name != MEAN and _others(values, base, arm, name)}:
            other.setdefault(arm, set()).update(bad)
    notes = [
        f"{arm} predicts for other posts of {', '.join(sorted(names))} than {base}, with one seed "
        "or more: there is no difference for these."
        for arm, names in other.items()
    ]
    falls = {
        arm: {name: [0.0 - value for value, _ in seeds.values()] for name, seeds in of_arm.items()}
        for arm, of_arm in changes.items()
    }
    steadier = _paired(changes, base)
    return replace(found, falls=falls, differences=differences, steadier=steadier, notes=notes)


def _predicted(results: Mapping[str, Sequence[Result]], runs: Path) -> bool:
    """Whether every run has its predictions for the set; runs write none for noisy posts."""
    return all(
        (runs / folder / "predictions" / one.split / f"{name}.jsonl").is_file()
        for found in results.values()
        for one in found
        for name, folder in one.folders.items()
    )


def _values(results: Mapping[str, Sequence[Result]], tasks: Sequence[str]) -> _Values:
    """The main metrics, and their mean over ``tasks`` where a result has all of them."""
    found: _Values = {arm: {} for arm in results}
    for arm, of_arm in results.items():
        for one in of_arm:
            own = {
                name: (
                    higher_is_better(task.metric, one.metrics[name][task.metric]),
                    (one.metrics[name].get("n"),),
                )
                for name, task in one.tasks.items()
            }
            if tasks and all(name in own for name in tasks):
                numbers, posts = zip(*(own[name] for name in tasks), strict=True)
                own[MEAN] = float(np.mean(numbers)), sum(posts, ())
            for name, value in own.items():
                found[arm].setdefault(name, {})[one.seed] = value
    return found


def _changes(before: _Values, after: _Values) -> _Values:
    """From one set to another, per seed that has both."""
    found: _Values = {arm: {} for arm in after}
    for arm, of_arm in after.items():
        for name, seeds in of_arm.items():
            known = before.get(arm, {}).get(name, {})
            for seed in [seed for seed in seeds if seed in known]:
                (old, old_posts), (new, new_posts) = known[seed], seeds[seed]
                found[arm].setdefault(name, {})[seed] = new - old, old_posts + new_posts
    return found


def _paired(values: _Values, baseline: str) -> Differences:
    """Arms minus the baseline over paired seeds, where their posts are as many."""
    of_base = values.get(baseline, {})
    found: dict[str, dict[str, Any]] = {}
    for arm, of_arm in values.items():
        for name, seeds in of_arm.items() if arm != baseline else ():
            base = of_base.get(name, {})
            pairs = [
                value - base[seed][0]
                for seed, (value, posts) in seeds.items()
                if seed in base and base[seed][1] == posts
            ]
            if pairs:
                found.setdefault(arm, {})[name] = paired_difference(pairs)
    return found


def _others(values: _Values, baseline: str, arm: str, name: str) -> bool:
    """Whether an arm has more or fewer posts of a task than the baseline, with some seed."""
    base = values.get(baseline, {}).get(name, {})
    return any(
        seed in base and base[seed][1] != posts for seed, (_, posts) in values[arm][name].items()
    )


def _entry(values: Sequence[float]) -> dict[str, Any]:
    return seed_interval(values).to_dict() | {"values": list(values)}


_SAME = "The other tables are of these posts."

_NONE = "No finished run has labeled posts there."

_HOW = {
    True: "paired seeds together with a paired bootstrap of the posts",
    False: "paired seeds only, since the runs wrote no predictions for these posts",
}
"""Whether posts are resampled -> what the differences are over."""

_TEXT = (
    "Main metrics on the posts of {name} ({posts}); the difference to {baseline}, over {how}; the fall from {origin} "
    "to {name} (of an error its rise; of the mean over the tasks that both have), and by how much less an arm falls "
    "than {baseline}, over paired seeds: these intervals cover other seeds, not other posts."
)
