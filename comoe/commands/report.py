"""Make a report of predictions: one page of HTML with shares, their course, slices, cross-tables and examples.

    comoe predict --model F --input posts.csv --keep created_at --keep platform --output predictions.jsonl
    comoe report predictions.jsonl --labeled runs/starter/predictions/validation --time created_at --by platform

With --labeled or --gold the shares are corrected for what the model gets wrong; else they count predictions. With
--model its embeddings tell whether the posts are of the kind that the labeled ones are.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import add_model, load_predictor, new_parser, whole
from comoe.commands.guard import guarded


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("report", __doc__)
    add = found.add_argument
    add("predictions", type=Path, help="jsonl, csv or parquet of comoe predict, or its folder of parquet")
    add("--output", type=Path, help="HTML (default: beside the predictions, .html)")
    add("--json", type=Path, help="write all numbers there too")
    add("--labeled", type=Path, metavar="FOLDER",
        help="predictions of labeled posts by the same model: predictions/validation of its run")
    add("--gold", action="append", default=[], metavar="TASK=COLUMN",
        help="column with gold labels of some of these posts, best of 200 drawn at random; used instead of --labeled")
    add("--time", metavar="COLUMN", help="column with the time of a post")
    add("--period", default="auto", choices=["auto", "hour", "day", "week", "month", "year"],
        help="auto: by the time that the posts span")
    add("--by", default="", metavar="A,B", help="columns whose values are looked at one by one")
    add("--weight", metavar="COLUMN", help="column with the weight of a post")
    add("--min-posts", type=whole(1), default=50, help="posts that a period or value needs to be shown (50)")
    add("--examples", type=whole(0), default=3,
        help="typical and borderline posts of each label (3); 0 keeps the text of posts out of the page")
    add("--title", help="of the page")
    add("--seed", type=whole(0), default=0, help="of the draws for intervals")
    # fmt: on
    add_model(
        found,
        purpose="; its embeddings tell whether these posts are like those of --labeled or --gold",
    )
    return found


@guarded("report")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compute, write the page."""
    options = parser().parse_args(argv)
    print(_report(options))


def _report(options) -> str:
    from comoe.config.extras import need
    from comoe.config.files import check_target, is_read_from, same_file, write_atomic, write_json

    need("report", what="comoe report")
    from comoe.inference.checkpoint_folder import is_part_of
    from comoe.reporting.drift import Embedder
    from comoe.reporting.page import render
    from comoe.reporting.parts import ReportOptions
    from comoe.reporting.predictions import labeled_of, read_corpus, read_labeled
    from comoe.reporting.report import make_report

    output = options.output or options.predictions.with_suffix(".html")
    if options.period != "auto" and options.time is None:
        raise ValueError("--period is of --time, the column with the time of a post; name it.")
    _check_model(options)
    if options.json is not None and same_file(options.json, output):
        raise ValueError(f"--json {options.json} is the page itself; name another file.")
    for place in (output, options.json):
        for source in (options.predictions, options.labeled):
            if place is not None and source is not None and is_read_from(place, source):
                raise ValueError(f"{place} would replace what is read; name another file.")
        if place is not None and options.model and is_part_of(place, Path(options.model)):
            raise ValueError(f"{place} is a file of the model; name another one.")
        if place is not None:
            check_target(place)
    chosen = ReportOptions(
        time=options.time,
        period=options.period,
        by=[name.strip() for name in options.by.split(",") if name.strip()],
        weight=options.weight,
        least=options.min_posts,
        examples=options.examples,
        seed=options.seed,
    )
    embed = Embedder(load_predictor(options)) if options.model else None
    labeled = {} if options.labeled is None else read_labeled(options.labeled)
    corpus = read_corpus(options.predictions)
    for word in options.gold:
        task, sign, column = word.partition("=")
        if not sign:
            raise ValueError(f"--gold is {word!r}; it must be TASK=COLUMN.")
        labeled[task] = labeled_of(corpus, task, column)
    report = make_report(corpus, labeled, chosen, embed)
    title = options.title or f"Report of {options.predictions.name}"
    write_atomic(output, render(report, title=title, options=chosen))
    if options.json:
        write_json(options.json, report)
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    tasks = len(report["tasks"])
    return f"{report['posts']:,} posts, {tasks} task{'' if tasks == 1 else 's'}: {output}"


def _check_model(options) -> None:
    """Refuse options of a model without one, and a model without labeled posts."""
    of_model = {
        "--revision": options.revision is not None,
        "--device": options.device != "auto",
        "--no-verify": options.no_verify,
        "--plugins": options.plugins is not None,
    }
    alone = [flag for flag, given in of_model.items() if given and options.model is None]
    if alone:
        raise ValueError(
            f"{alone[0]} is of --model, whose embeddings tell the posts apart; name it."
        )
    if options.model is not None and options.labeled is None and not options.gold:
        raise ValueError(
            "--model compares the posts with labeled ones; name them with --labeled or --gold."
        )
