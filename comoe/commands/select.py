"""Choose the posts to label next, and write them as tasks of Label Studio with the model's predictions.

    comoe select --model runs/starter/export --input posts.txt --n 200 --output to_label
    comoe select --model F --input posts.csv --task mood --exclude labeled.json --output more

The folder gets posts.json (import it), interface.xml (the labeling interface) and posts.csv. A JSON
export of Label Studio is read by a recipe with format: label_studio.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import add_columns, add_model, load_predictor, new_parser, whole
from comoe.commands.guard import guarded


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("select", __doc__)
    add = found.add_argument
    add_model(found)
    add("--input", required=True, help="posts, in any form that comoe predict reads")
    add("--output", required=True, type=Path, help="folder; missing ones are made")
    add("--strategy", default="diverse",
        help="margin or entropy: the least sure; diverse: unlike ones among ten times as many of these; random")
    add("--n", type=whole(1), default=200, dest="count", help="posts to choose")
    add("--task", action="append", dest="tasks", metavar="TASK", help="to label; may be repeated (default: all)")
    add("--exclude", action="append", default=[], type=Path, metavar="FILE",
        help="posts that are labeled already, also a JSON export of Label Studio; may be repeated")
    add_columns(found)
    add("--keep", action="append", metavar="COLUMN",
        help="copy this column of the input; may be repeated (default: id, if there is one)")
    add("--seed", type=whole(0), default=0, help="of random, and of the clusters of diverse")
    add("--batch-size", type=whole(1), default=64, help="posts per forward pass")
    # fmt: on
    return found


@guarded("select")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, choose, write."""
    options = parser().parse_args(argv)

    from comoe.inference.options import PredictOptions
    from comoe.inference.select_file import select_file

    columns = PredictOptions(
        tasks=options.tasks,
        text_column=options.text_column,
        pair_column=options.pair_column,
        image_column=options.image_column,
        keep=options.keep,
        batch_size=options.batch_size,
    )
    done = select_file(
        load_predictor(options), options.input, options.output, columns, strategy=options.strategy,
        count=options.count, exclude=options.exclude, seed=options.seed,
    )  # fmt: skip
    print(done, file=sys.stderr)
