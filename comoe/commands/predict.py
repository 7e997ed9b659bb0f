"""Predict the posts of a file with an exported model, in one process.

    comoe predict --model runs/starter/export --input posts.txt --output predictions.jsonl
    comoe predict --model F --input test_text.txt --output irony.txt --format tweeteval --task irony

--input is .txt (one post per line), .csv, .tsv, .jsonl or .parquet; --format is jsonl, csv,
html (a page to look at) or tweeteval (one label id per line).
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from comoe.commands.arguments import new_parser, whole
from comoe.commands.guard import guarded
from comoe.config.plugins import add_plugins


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("predict", __doc__)
    add = found.add_argument
    add("--model", required=True, help="folder of an export, or organization/name on the hub")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    add("--input", required=True, type=Path, help="file of posts")
    add("--output", required=True, type=Path, help="file of predictions; missing folders are made")
    add("--format", default="jsonl", help="jsonl, csv, html or tweeteval")
    add("--task", action="append", dest="tasks", metavar="TASK", help="predict this task only; may be repeated")
    add("--text-column", help="column with the post (default: that of training, else text)")
    add("--pair-column", help="column with the second text (default: that of training)")
    add("--image-column", help="column with the image (default: that of training, else image)")
    add("--keep", action="append", metavar="COLUMN",
        help="copy this column of the input; may be repeated (default: id, if there is one)")
    add("--raw-csv", action="store_true",
        help="csv: leave text as it is, also where a spreadsheet would run it as a formula")
    add("--explain", nargs="?", const="attention", default=False, metavar="METHOD",
        help="what words count: attention (also if no METHOD is given), gradients or experts (jsonl, html)")
    add("--assume-rate", action="append", dest="assume_rates", default=[], metavar="TASK.LABEL=RATE",
        help="adapt the scores to this rate of a label, such as hate.hate=0.42; may be repeated")
    add("--adapt-prior", metavar="em",
        help="em: adapt the scores to the rates of labels estimated from all of these posts together")
    add("--batch-size", type=whole(1), default=64, help="posts per forward pass")
    add("--device", default="auto",
        help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one")
    add("--no-verify", action="store_true", help="read the model without comparing its digests")
    # fmt: on
    add_plugins(found)
    return found


@guarded("predict")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and predict."""
    options = parser().parse_args(argv)

    from comoe.inference.options import PredictOptions
    from comoe.inference.predict_adapted import predict_adapted
    from comoe.inference.predict_file import predict_file
    from comoe.inference.predictor import Predictor

    names = [field.name for field in fields(PredictOptions)]
    asked = PredictOptions(**{name: getattr(options, name) for name in names})
    predictor = Predictor.from_pretrained(
        options.model,
        device=options.device,
        verify=not options.no_verify,
        revision=options.revision,
    )
    predict = predict_adapted if asked.adapts else predict_file
    print(predict(predictor, options.input, options.output, asked), file=sys.stderr)
