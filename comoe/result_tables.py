"""Further tables that end a run: scores by slice, and what noise costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comoe.data.noise import SEPARATOR
from comoe.tasks.catalog import Task
from comoe.train.records import in_columns, marked

Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Split -> task -> metric -> value, as in ``results.json``."""

_COUNT = "n@"


def slice_lines(metrics: Metrics, tasks: Sequence[Task]) -> list[str]:
    """Metrics of every value of the tasks' slices, a column per split; no lines without any.

    ``n`` is the number of posts in the last split that has the slice.
    """
    splits = [split for split in metrics if SEPARATOR not in split]
    rows = []
    for task in tasks:
        found = [metrics[split].get(task.name, {}) for split in splits]
        names = dict.fromkeys(name for values in found for name in values)
        # By their counts: a label's name may hold any sign too.
        for where in [name.removeprefix(_COUNT) for name in names if name.startswith(_COUNT)]:
            count = next(values[_COUNT + where] for values in reversed(found) if _COUNT + where in values)
            for name in [name for name in names if name.endswith(f"@{where}") and name != _COUNT + where]:
                shown = [_decimal(values.get(name)) for values in found]
                rows.append((marked(task), where, name.removesuffix(f"@{where}"), *shown, f"{count:.0f}"))
    return ["", *in_columns(("task", "slice", "metric", *splits, "n"), rows, left=3)] if rows else []


def noise_lines(metrics: Metrics, tasks: Sequence[Task]) -> list[str]:
    """Main metric of each task on clean posts and under each noise, with the change; no lines without noise."""
    lines = []
    for split in dict.fromkeys(name.partition(SEPARATOR)[0] for name in metrics if SEPARATOR in name):
        noises = [name.partition(SEPARATOR)[2] for name in metrics if name.startswith(f"{split}{SEPARATOR}")]
        rows = []
        for task in tasks:
            clean = metrics[split].get(task.name, {}).get(task.metric)
            if clean is None:
                continue
            noisy = [metrics[f"{split}{SEPARATOR}{noise}"].get(task.name, {}).get(task.metric) for noise in noises]
            shown = ["-" if value is None else f"{value:.3f} ({value - clean:+.3f})" for value in noisy]
            rows.append((marked(task), task.metric, _decimal(clean), *shown))
        lines += ["", *in_columns(("task", "metric", split, *noises), rows, left=2)]
    return lines


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
