"""Push an export to the Hugging Face hub: its files and its model card, in one commit.

    comoe push --model runs/starter/export --to organization/name
    HF_TOKEN=... comoe push --model runs/starter/export --to organization/name --revision v2 --private

The token is HF_TOKEN, or that of `hf auth login`; it is no argument, which others could read.
"""

from argparse import ArgumentParser
from collections.abc import Sequence

from comoe.commands.arguments import new_parser
from comoe.commands.guard import guarded


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("push", __doc__)
    add = found.add_argument
    add("--model", required=True, help="folder of an export")
    add("--to", required=True, metavar="NAME", help="organization/name; made if it is not there")
    add("--revision", metavar="BRANCH", help="branch, made if it is not there (the main branch)")
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--message", default="Export of comoe", metavar="TEXT", help="of the commit (%(default)s)")
    # fmt: on
    return found


@guarded("push")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and push."""
    options = parser().parse_args(argv)

    from comoe.inference.hub import push_export

    where = push_export(
        options.model, options.to, revision=options.revision, private=options.private, message=options.message
    )  # fmt: skip
    print(where)
