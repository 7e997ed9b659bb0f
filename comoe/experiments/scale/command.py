"""The command line of ``launch/scale.py``: a scaling experiment, or the plan of a cluster.

Below the output folder: ``runs/<point>/`` as training leaves them, ``logs/<point>.log``,
``failed/<point>.txt``, ``scale.json`` (what all runs share), tables, plots and TensorBoard hparams.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from comoe.config.load import load_recipe
from comoe.experiments.cluster.plan import print_plan, settle_plan_flags
from comoe.experiments.runner import Experiment, Trial, leave_after, remember, run_trials, say
from comoe.experiments.scale.grid import AXES, plan_grid, read_grid
from comoe.experiments.scale.plots import write_plots
from comoe.experiments.scale.table import read_rows, write_hparams, write_tables


def scale_and_exit(
    given: argparse.Namespace, *, plan_flags: Mapping[str, str | None], train_script: Path
) -> NoReturn:
    """Do what was asked and leave, with the exit codes of ``leave_after``.

    Args:
        given: the command line; its lists have the names of ``AXES``.
        plan_flags: flags that only ``--plan`` reads -> value where they are not given.
        train_script: what runs one point.
    """

    def work() -> bool:
        settle_plan_flags(given, plan_flags)
        if given.plan:
            print_plan(given)
            return False
        return bool(scale(given, train_script=train_script))

    leave_after(work)


def scale(given: argparse.Namespace, *, train_script: Path) -> list[Trial]:
    """Run the experiment and write its report; the runs that failed.

    Raises:
        ValueError: a wrong recipe, list, or output folder; nothing has been run then.
    """
    experiment = Experiment.from_command(given, train_script=train_script)
    recipe = load_recipe(experiment.config, experiment.overrides)
    grid = read_grid(recipe, {name: getattr(given, name) for name in AXES})
    plan = plan_grid(grid, experiment)
    for note in plan.notes:
        say(f"note: {note}")
    remember(experiment, file_name="scale.json")

    def report() -> None:
        rows = read_rows(plan, experiment)
        for write in (write_tables, write_plots, write_hparams):
            write(rows, experiment.output)

    failed = run_trials(experiment, plan.trials, report=report)
    report()
    print(f"table   {given.output / 'table.md'}, table.csv")
    print(f"plots   {given.output / 'plots'}")
    print(f"watch   tensorboard --logdir {given.output}")
    return failed
