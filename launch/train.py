"""Train a cooperative mixture-of-experts encoder on all tasks of a recipe.

deepspeed launch/train.py --deepspeed ds_configs/zero2.json
deepspeed --num_accelerators 2 launch/train.py --deepspeed ds_configs/zero2.json --config my.yaml train.epochs=2
python launch/train.py --dry-run
deepspeed launch/train.py --resume runs/starter
deepspeed launch/train.py --deepspeed ds_configs/zero2.json --restarts 3
"""

import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Read the command line and run."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    # fmt: off
    add = parser.add_argument
    add("--deepspeed", type=Path, metavar="JSON",
        help="ZeRO, precision, clipping, expert parallelism (ds_configs/zero2.json; with --resume the run's own)")
    add("--config", type=Path, metavar="YAML", help="recipe (launch/configs/starter.yaml)")
    add("--resume", type=Path, metavar="RUN", help="go on with this run folder, by its own recipe")
    add("--restarts", type=int, default=0, metavar="N",
        help="start a crashed run again from its last checkpoint, at most N times")
    add("--dry-run", action="store_true", help="print recipe, labels, sample posts, memory plan; end")
    add("--gpus", type=int, metavar="N", help="with --dry-run: plan for N GPUs, not for this machine")
    # The deepspeed launcher adds this one; the rank itself is read from the environment.
    add("--local_rank", type=int, default=0, help=SUPPRESS)
    add("overrides", nargs="*", metavar="key=value", help="options of the recipe")
    # fmt: on
    given = parser.parse_intermixed_args()
    if given.restarts < 0:
        parser.error(f"--restarts is {given.restarts}; it must be 0 or more.")
    if given.gpus is not None and not (given.dry_run and given.gpus > 0):
        parser.error(f"--gpus is {given.gpus}; it must be 1 or more, and goes with --dry-run.")
    config = given.config or (None if given.resume else HERE / "configs/starter.yaml")

    # Without an installed comoe, the package beside this folder, whatever the working folder is.
    sys.path.append(str(HERE.parent))
    from comoe.train.fault.signals import StopSignal
    from comoe.train.fault.supervisor import is_child, supervise

    stop = StopSignal()  # before the imports that take seconds: it notes who started this process
    if given.restarts > 0 and not is_child():
        sys.exit(supervise(restarts=given.restarts, stop=stop))
    from comoe.train.run import Request, run_and_exit

    words = (config, given.deepspeed, given.overrides, given.resume, given.dry_run, given.gpus or 0)
    run_and_exit(Request(*words), stop)


if __name__ == "__main__":
    main()
