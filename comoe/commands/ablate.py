"""Ablate the experts of a trained model: held-out quality with one expert of one layer removed, for all of them.

    comoe ablate --run runs/starter --limit 300 --output runs/starter/removal.json

The tokens of a removed expert go to their next best one. The run folder holds its recipe and its export.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import need_training, new_parser, whole
from comoe.commands.guard import guarded
from comoe.config.plugins import add_plugins


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("ablate", __doc__)
    add = found.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="folder of a finished run")
    add("--split", default="test", choices=("validation", "test"), help="posts to score on (test)")
    add("--limit", type=whole(1), metavar="N", help="at most this many posts per data set")
    add("--device", default="auto", help="cpu, cuda, ...; auto is a GPU where there is one")
    add("--output", type=Path, metavar="FILE", help="write the numbers there as JSON")
    add("--no-verify", action="store_true", help="read the export without comparing its digests")
    # fmt: on
    add_plugins(found)
    return found


@guarded("ablate")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print the table."""
    given = parser().parse_args(argv)
    need_training("ablate")

    from comoe.config.files import check_target, write_json
    from comoe.experiments.ablate import measure_removal, removal_lines

    if given.output:
        check_target(given.output)
    removal = measure_removal(
        given.run,
        split=given.split,
        limit=given.limit,
        device=given.device,
        verify=not given.no_verify,
    )
    if given.output:
        write_json(given.output, removal.to_dict())
    print("\n".join(removal_lines(removal)))
