"""Choose the posts to label next, and write them as tasks of Label Studio with the model's predictions.

    comoe select --model runs/starter/export --input posts.txt --n 200 --output to_label
    comoe select --model F --input posts.csv --task mood --exclude labeled.json --output to_label

The folder gets posts.json (import it), interface.xml (the labeling interface) and posts.csv. A JSON export
of Label Studio is read by a recipe with format: label_studio.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import new_parser, whole
from comoe.commands.guard import guarded
from comoe.config.plugins import add_plugins


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("select", __doc__)
    add = found.add_argument
    add("--model", required=True, help="folder of an export, or organization/name on the hub")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    add("--input", required=True, help="posts, in any form that comoe predict reads")
    add("--output", required=True, type=Path, help="folder; missing ones are made")
    add("--strategy", default="diverse",
        help="margin or entropy: the least sure; diverse: unlike ones among ten times as many of these; random")
    add("--n", type=whole(1), default=200, dest="count", help="posts to choose")
    add("--task", action="append", dest="tasks", metavar="TASK", help="to label; may be repeated (default: all)")
    add("--exclude", action="append", default=[], type=Path, metavar="FILE",
        help="posts that are labeled already, also a JSON export of Label Studio; may be repeated")
    add("--text-column", help="column with the post (default: that of training, else text)")
    add("--pair-column", help="column with the second text (default: that of training)")
    add("--image-column", help="column with the image (default: that of training, else image)")
    add("--keep", action="append", metavar="COLUMN",
        help="copy this column of the input; may be repeated (default: id, if there is one)")
    add("--seed", type=whole(0), default=0, help="of random, and of the clusters of diverse")
    add("--batch-size", type=whole(1), default=64, help="posts per forward pass")
    add("--device", default="auto", help="cpu, cuda, ...; auto is a GPU where there is one")
    add("--no-verify", action="store_true", help="read the model without comparing its digests")
    # fmt: on
    add_plugins(found)
    return found


@guarded("select")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, choose, write."""
    options = parser().parse_args(argv)

    from comoe.inference.options import PredictOptions
    from comoe.inference.predictor import Predictor
    from comoe.inference.select_file import select_file

    columns = PredictOptions(
        tasks=options.tasks,
        text_column=options.text_column,
        pair_column=options.pair_column,
        image_column=options.image_column,
        keep=options.keep,
        batch_size=options.batch_size,
    )
    predictor = Predictor.from_pretrained(
        options.model,
        device=options.device,
        verify=not options.no_verify,
        revision=options.revision,
    )
    done = select_file(
        predictor, options.input, options.output, columns, strategy=options.strategy,
        count=options.count, exclude=options.exclude, seed=options.seed,
    )  # fmt: skip
    print(done, file=sys.stderr)
