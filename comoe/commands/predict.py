"""Predict the posts of a file with an exported model, in one process.

    comoe predict --model runs/starter/export --input posts.txt --output predictions.jsonl
    comoe predict --model F --input test_text.txt --output irony.txt --format tweeteval --task irony
    comoe predict --model F --input corpus/ --output answers/ --format parquet --resume

--input is .txt (one post per line), .csv, .tsv or .jsonl, each also with .gz or .zst; .parquet, or a
folder of them; hf://name[:split], a data set of the Hugging Face hub; or -, standard input.
--format is jsonl, csv, html (a page to look at), parquet (a file that ends so, else a folder of
shards) or tweeteval (one label id per line). Memory does not grow with the number of posts.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from comoe.commands.arguments import (
    add_backend,
    add_columns,
    add_model,
    load_predictor,
    new_parser,
    whole,
)
from comoe.commands.guard import guarded
from comoe.config.files import check_target, is_read_from, write_json


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("predict", __doc__)
    add = found.add_argument
    add_model(found)
    add("--input", required=True, help="posts: a file, a folder of Parquet, hf://name[:split], or -")
    add("--input-format", help="txt, csv, tsv, jsonl or parquet (default: by the ending)")
    add("--output", required=True, type=Path,
        help="predictions; missing folders are made; - is standard output")
    add("--format", help="jsonl, csv, html, parquet or tweeteval (default: parquet for an --output that "
        "ends so, else jsonl)")
    add("--resume", action="store_true", help="go on behind what an unfinished run has predicted")
    add("--json-summary", metavar="FILE", help="write counts and speed as JSON; - is standard output")
    add("--task", action="append", dest="tasks", metavar="TASK", help="predict this task only; may be repeated")
    add_columns(found)
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
    add("--dedupe", action="store_true", help="predict posts with the same text once")
    add("--batch-size", type=whole(1), default=64, help="posts per forward pass")
    add("--batch-tokens", type=whole(1), metavar="N",
        help="most tokens of a forward pass, padding counted")
    add("--precision", default="auto",
        help="of products: float32, bfloat16 or float16 (default auto: bfloat16 on GPUs that have it, float16 on "
        "older ones, else float32)")
    add("--long", default="cut", metavar="cut|windows|error",
        help="posts with more tokens than the model reads: cut, read in windows, or set aside")
    add("--long-scores", default="mean", metavar="mean|max", help="how the logits of windows are merged")
    add("--long-overlap", type=whole(0), metavar="N",
        help="tokens that neighboring windows share (default: a quarter of a window)")
    add("--workers", type=whole(1, 256), default=1,
        help="processes, each with the model: one per GPU, or sharing the CPU's threads")
    add("--engine", default="processes", help="processes of this machine, or ray (extra ray)")
    # fmt: on
    add_backend(found)
    return found


@guarded("predict", interrupted="stopped; the same command with --resume goes on")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and predict."""
    options = parser().parse_args(argv)

    from comoe.inference.options import PredictOptions

    if options.output == Path("-"):
        if options.json_summary == "-":
            raise ValueError("--output and --json-summary are both standard output; name a file.")
        options.output = Path("/dev/stdout")
    _check_summary(options)
    if options.format is None:
        options.format = "parquet" if options.output.suffix == ".parquet" else "jsonl"
    names = [field.name for field in fields(PredictOptions)]
    asked = PredictOptions(**{name: getattr(options, name) for name in names})
    predictor = load_predictor(
        options, precision=options.precision, backend=options.backend, threads=options.threads
    ).with_long(options.long, scores=options.long_scores, overlap=options.long_overlap)
    from comoe.inference.predict_file import predict_file

    done = predict_file(predictor, options.input, options.output, asked)
    print(done, file=sys.stderr)
    if options.json_summary == "-":
        print(json.dumps(done.record()))
    elif options.json_summary is not None:
        write_json(Path(options.json_summary), done.record())


def _check_summary(options: Namespace) -> None:
    """Refuse, before the work, a summary that could not be written at its end or would replace what is read."""
    from comoe.inference.checkpoint_folder import is_part_of

    if options.json_summary in (None, "-"):
        return
    place = Path(options.json_summary)
    read = {"--input": Path(options.input), "--output": options.output}
    taken = next((flag for flag, other in read.items() if is_read_from(place, other)), None)
    taken = taken or ("--model" if is_part_of(place, Path(options.model)) else None)
    if taken:
        raise ValueError(
            f"--json-summary {place} would replace what {taken} names; name another file."
        )
    check_target(place)
