"""Train a cooperative mixture-of-experts encoder on all tasks of a recipe.

comoe train                                     the starter recipe
comoe train my.yaml train.epochs=2              a recipe of your own, or the name of a ready one: smoke, tweeteval, ...
comoe train my.yaml --dry-run                   only look
comoe train --resume runs/starter
deepspeed --num_accelerators 2 --module comoe train my.yaml --deepspeed zero2
deepspeed launch/train.py --deepspeed ds_configs/zero2.json --restarts 3          in a checkout
"""

import os
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import (
    RECIPE,
    add_recipe,
    need_training,
    new_parser,
    take_recipe,
    whole,
)
from comoe.commands.guard import guarded


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("train", __doc__)
    add = found.add_argument
    add("--deepspeed", metavar="JSON",
        help="ZeRO, precision, clipping, expert parallelism: a file, or the name of a ready one (zero2; with --resume "
             "the run's own)")
    add("--resume", type=Path, metavar="RUN", help="go on with this run folder, by its own recipe")
    add("--ranks", type=whole(1), metavar="N",
        help="ranks to start on this machine (one per GPU, or one); a launcher starts its own")
    add("--restarts", type=whole(0), default=0, metavar="N",
        help="start a crashed run again from its last checkpoint, at most N times")
    add("--dry-run", action="store_true", help="print recipe, labels, sample posts, memory plan; end")
    add("--gpus", type=whole(1), metavar="N", help="with --dry-run: plan for N GPUs, not for this machine")
    add("--no-verify", action="store_true",
        help="with --resume: read the checkpoint without comparing its digests")
    # The deepspeed launcher adds this one; the rank itself is read from the environment.
    add("--local_rank", type=int, default=0, help=SUPPRESS)
    # fmt: on
    add_recipe(found)
    return found


@guarded("train")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    line = parser()
    given = line.parse_intermixed_args(argv)
    if given.gpus is not None and not given.dry_run:
        line.error(f"--gpus is {given.gpus}; it goes with --dry-run.")
    if given.gpus is not None and given.ranks is not None:
        line.error("--gpus plans for other machines, --ranks for this one; give one of them.")
    take_recipe(given, default=None if given.resume else RECIPE)
    need_training("train")

    from comoe.train.fault.signals import StopSignal
    from comoe.train.fault.supervisor import is_child, supervise
    from comoe.train.launchers import (
        check_ranks,
        refuse_restarts_under_torchrun,
        settle_place,
        start_ranks_here,
    )

    stop = StopSignal()  # before the imports that take seconds: it notes who started this process
    try:
        place = settle_place(os.environ)
        refuse_restarts_under_torchrun(0 if is_child() else given.restarts)
        check_ranks(given.ranks)
    except ValueError as error:
        print(f"comoe: {error}", file=sys.stderr)
        sys.exit(2)
    if place is not None and given.ranks not in (None, place.world):
        line.error(
            f"--ranks is {given.ranks}, but the launcher started {place.world}; leave it out."
        )
    if given.restarts > 0 and not is_child():
        sys.exit(supervise(restarts=given.restarts, stop=stop))
    if place is None and not given.dry_run and (code := start_ranks_here(given.ranks)) is not None:
        sys.exit(code)
    from comoe.train.exit import run_and_exit
    from comoe.train.request import Request

    words = (
        given.config,
        given.deepspeed,
        given.overrides,
        given.resume,
        given.dry_run,
        given.gpus or 0,
    )
    ranks = given.ranks if place is None and given.ranks else 0
    run_and_exit(Request(*words, verify=not given.no_verify, ranks=ranks), stop)


if __name__ == "__main__":
    main()
