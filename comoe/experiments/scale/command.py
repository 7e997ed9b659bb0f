"""The command line of ``launch/scale.py``: a scaling experiment, or the plan of a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from comoe.config.load import load_recipe
from comoe.experiments.cluster.plan import print_plan, settle_plan_flags
from comoe.experiments.runner import (
    Experiment,
    chosen_ranks,
    failure_file,
    leave_after,
    remember,
    run_points,
)
from comoe.experiments.scale.grid import Point, build_grid, plan_points
from comoe.experiments.scale.plots import write_plots
from comoe.experiments.scale.table import row_of, write_hparams, write_tables


def scale_and_exit(
    given: argparse.Namespace,
    *,
    grid_fields: Sequence[str],
    plan_flags: Mapping[str, str | None],
    train_script: Path,
) -> NoReturn:
    """Do what was asked and leave, with the exit codes of ``leave_after``.

    Args:
        given: the command line.
        grid_fields: names of its lists.
        plan_flags: flags that only ``--plan`` reads -> value where they are not given.
        train_script: what runs one point.
    """

    def work() -> bool:
        settle_plan_flags(given, plan_flags)
        if given.plan:
            print_plan(given)
            return False
        return bool(scale(given, grid_fields=grid_fields, train_script=train_script))

    leave_after(work)


def scale(
    given: argparse.Namespace, *, grid_fields: Sequence[str], train_script: Path
) -> list[Point]:
    """Run the experiment and write its report; the points that failed.

    Raises:
        ValueError: a wrong recipe, list, or output folder; nothing has been run then.
    """
    ranks = chosen_ranks(given.ranks)
    overrides = tuple(given.overrides)
    experiment = Experiment(
        given.config.resolve(),
        given.deepspeed.resolve(),
        given.output.resolve(),
        train_script,
        ranks,
        overrides,
    )
    recipe = load_recipe(experiment.config, experiment.overrides)
    grid = build_grid(recipe, **{field: getattr(given, field) for field in grid_fields})
    points, left_out = plan_points(grid, experiment)
    for line in left_out:
        print(f"left out {line}")
    if any(point.runs_all for point in points):
        print(
            "note: where k is the number of experts, model.moe.balance=none and loss.balance_weight=0: all experts run"
        )
    if not points:
        raise ValueError("no combination of the grid is possible; the lines above say why.")
    remember(experiment)
    failed = run_points(
        experiment, points, report=partial(write_report, experiment), say=partial(print, flush=True)
    )
    write_report(experiment, points)
    print(f"table   {given.output / 'table.md'}, table.csv")
    print(f"plots   {given.output / 'plots'}")
    print(f"watch   tensorboard --logdir {given.output}")
    return failed


def write_report(experiment: Experiment, points: Sequence[Point]) -> None:
    """Tables, plots and TensorBoard hparams of what is done so far."""
    rows = []
    for point in points:
        failure = failure_file(experiment, point)
        lines = failure.read_text(encoding="utf-8").splitlines() if failure.is_file() else []
        said = next(
            (line for line in reversed(lines) if line.startswith("comoe:")),
            lines[-1] if lines else "",
        )
        rows.append(row_of(point, experiment.runs / point.name, problem=said))
    write_tables(rows, experiment.output)
    write_plots(rows, experiment.output)
    write_hparams(rows, experiment.output)
