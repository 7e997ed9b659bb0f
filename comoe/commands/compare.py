"""Compare variants ("arms") of one recipe over seeds: tasks alone and together, gates, experts, weightings.

comoe compare tweeteval --arms single,multi,leave_one_out --seeds 0,1,2 \\
    --output runs/together data.root=<folder> data.limit_per_task=1000 data.mixing=proportional
comoe compare --arms no_experts,dense,sigmoid --against dense --claim "sigmoid < dense on loss"
comoe compare --arms single,multi --splits validation+typos data.noise=[typos]
comoe compare --arms majority,lexicon,naive_bayes,tfidf_svm,multi --against tfidf_svm
An interrupted comparison goes on with the same command; arms and seeds may be added later.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import (
    add_experiment,
    add_recipe,
    need_training,
    new_parser,
    take_recipe,
    whole,
)
from comoe.commands.guard import GOES_ON, guarded

ARMS = "no_experts,dense,softmax,sigmoid"


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("compare", __doc__)
    add = found.add_argument
    add_experiment(found, "compare", output="runs, tables, plots")
    add("--arms", default=ARMS, metavar="LIST", help=f"names with commas; docs/experiments.md has all ({ARMS})")
    add("--arm", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="an arm of your own")
    add("--groups", action="append", default=[], metavar="NAME:TASK+TASK/TASK",
        help="an arm of one run per group of tasks; may be repeated")
    add("--propose-groups", action="store_true",
        help="propose a grouping by gradients and leave_one_out, and print the command that tests it")
    add("--lexicon", type=Path, metavar="FILE", help="of the arm lexicon: a word and a number per line (VADER)")
    add("--seeds", default="0,1,2", metavar="LIST", help="one run of each arm per seed (0,1,2)")
    add("--against", metavar="ARM", help="arm that the others are compared with (the first one)")
    add("--claim", metavar="TEXT",
        help='one comparison, recorded before any run: "A > B", "A > B on task/metric", "A < B on loss"')
    add("--tune", action="append", default=[], metavar="KEY=A,B,...",
        help="choose the value per arm by runs of their own; repeat it for a grid")
    add("--tune-by", choices=("loss", "metric", "teacher_kl"), help="of the validation posts (loss)")
    add("--tune-seeds", metavar="LIST", help="not those of --seeds (1000,1001)")
    add("--measure", choices=("metric", "loss", "teacher_kl"),
        help="order and compare the arms by it (metric, arms as given)")
    add("--metrics", metavar="LIST", help="task/metric with commas: a table and plot of these alone")
    add("--splits", metavar="LIST", help="further evaluated sets, each with a table: unseen, validation+typos, ...")
    add("--affinity", metavar="ARMS", help="measure task gradients of these arms (multi, if there)")
    add("--affinity-posts", type=whole(0), default=256, metavar="N", help="posts a task there (256); 0: no")
    add("--remove-experts", metavar="ARMS", help="ablate each expert of these arms")
    add("--removal-posts", type=whole(1), default=250, metavar="N", help="test posts per set there (250)")
    add("--resamples", type=whole(0), default=300, metavar="N", help="of the bootstrap (300); 0: no differences")
    add("--dry-run", action="store_true", help="check everything, print the runs and their options; end")
    add("--keep-checkpoints", action="store_true", help="else a finished run keeps its export only")
    # fmt: on
    add_recipe(found, overrides="options of the recipe, for all arms")
    return found


@guarded("compare", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    given = parser().parse_intermixed_args(argv)
    take_recipe(given)
    need_training("compare")

    from comoe.experiments.compare.command import run_comparison

    sys.exit(1 if run_comparison(given) else 0)
