"""Search the options of a recipe with Optuna: TPE proposes, the validation posts judge, hopeless runs end early.

comoe tune smoke --space space.yaml --trials 20 --output runs/tune train.epochs=2
It goes on where an earlier call with the same --output stopped, even if it was killed.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import (
    add_experiment,
    add_recipe,
    need_extra,
    need_training,
    new_parser,
    take_recipe,
    whole,
)
from comoe.commands.guard import GOES_ON, guarded


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("tune", __doc__)
    add = found.add_argument
    add("--space", type=Path, required=True, metavar="YAML",
        help="options to search: `options:`, then per option a list of values, or low, high, log, step")
    add("--trials", type=whole(1), default=20, metavar="N",
        help="runs in all, those of earlier calls included (%(default)s)")
    add("--seed", type=whole(0), default=0, help="of the proposals; that of the runs is the recipe's (%(default)s)")
    # fmt: on
    add_experiment(found, "tune", output="study, runs, table, plot, best recipe")
    add_recipe(found)
    return found


@guarded("tune", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    given = parser().parse_intermixed_args(argv)
    take_recipe(given)
    need_training("tune")
    need_extra("tune", "tune")

    from comoe.experiments.tune import tune_and_exit

    tune_and_exit(given)
