"""Score an exported model on a labeled data set, in one process.

    comoe eval --model runs/starter/export --data tweeteval/irony --task irony
    comoe eval --model F --data test.jsonl --task mood --label-column sentiment

--data is a file (jsonl, csv, tsv, parquet), a folder with splits, or a hub name (--format hub).
"""

from argparse import ArgumentParser
from collections.abc import Sequence
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


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("eval", __doc__)
    add = found.add_argument
    add_model(found)
    add("--data", required=True, help="file, folder or hub name")
    add("--format", default="auto", help="tweeteval, jsonl, csv, tsv, parquet, txt, hub or auto")
    add("--split", default="test", help="train, validation or test of a folder or hub data set")
    add("--task", action="append", help="score this task only; may be repeated")
    add_columns(found)
    add("--label-column", help="column with the label (default: that of training, else label)")
    add("--skip-bad", action="store_true", help="skip bad rows instead of stopping at the first")
    add("--batch-size", type=whole(1), default=64, help="posts per forward pass")
    add("--output", type=Path, help="write all metrics there as JSON")
    # fmt: on
    add_backend(found)
    return found


@guarded("eval")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, score, print the table."""
    options = parser().parse_args(argv)

    from comoe.config.files import check_target, is_read_from, write_json
    from comoe.inference.score import format_scores, score

    if options.output:
        if is_read_from(options.output, Path(options.data)):
            raise ValueError(f"--output {options.output} is the --data itself; name another file.")
        check_target(options.output)
    predictor = load_predictor(options, backend=options.backend, threads=options.threads)
    scores = score(
        predictor, options.data, tasks=options.task, batch_size=options.batch_size, progress=True,
        format=options.format, split=options.split, text=options.text_column, pair=options.pair_column,
        label=options.label_column, image=options.image_column, skip_bad=options.skip_bad,
    )  # fmt: skip
    if options.output:
        write_json(options.output, scores.evaluation.metrics)
    print(format_scores(scores))
