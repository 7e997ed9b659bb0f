"""Score an exported model on a labeled data set, in one process.

    comoe eval --model runs/starter/export --data tweeteval/irony --task irony
    comoe eval --model F --data test.jsonl --task mood --label-column sentiment
    comoe eval --model F --data test.jsonl --by platform --suspicious suspicious.csv

--data is a file (jsonl, csv, tsv, parquet), a folder with splits, or a hub name (--format hub).
"""

import sys
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
    add("--format", default="auto", help="tweeteval, jsonl, csv, tsv, parquet, txt, label_studio, hub or auto")
    add("--split", default="test", help="train, validation or test of a folder or hub data set")
    add("--task", action="append", help="score this task only; may be repeated")
    add_columns(found)
    add("--label-column", help="column with the label (default: that of training, else label)")
    add("--by", action="append", default=[], metavar="COLUMN",
        help="also score the posts of each value of this column, with the gap between them; a bound such as "
             "'confidence<0.7' cuts numbers in two; may be repeated")
    add("--suspicious", type=Path, metavar="CSV",
        help="write the labels that are likely wrong there; of posts that the model has not learned from")
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
    from comoe.inference.checkpoint_folder import is_part_of
    from comoe.inference.score import format_scores, score
    from comoe.inference.suspicious import (
        doubted_tasks,
        find_suspicious,
        suspicious_lines,
        write_suspicious,
    )

    for flag, target in (("--output", options.output), ("--suspicious", options.suspicious)):
        if target is None:
            continue
        if is_read_from(target, Path(options.data)):
            raise ValueError(f"{flag} {target} is the --data itself; name another file.")
        if is_part_of(target, Path(options.model)):
            raise ValueError(f"{flag} {target} is a file of the model; name another one.")
        check_target(target)
    predictor = load_predictor(options, backend=options.backend, threads=options.threads)
    if options.suspicious:
        # Before an evaluation that may take long.
        doubted_tasks(predictor.choose_tasks(options.task))
    scores = score(
        predictor, options.data, tasks=options.task, batch_size=options.batch_size, progress=True,
        format=options.format, split=options.split, text=options.text_column, pair=options.pair_column,
        label=options.label_column, image=options.image_column, author=options.author_column,
        skip_bad=options.skip_bad, by=options.by,
    )  # fmt: skip
    if scores.seen:
        print(
            f"warning: the model was trained on about {scores.seen:,} of these {scores.posts:,} "
            "posts, so that scores are too high",
            file=sys.stderr,
        )
    found = find_suspicious(scores) if options.suspicious else []
    if options.output:
        gaps = {task: {"gaps": found} for task, found in scores.gaps.items()}
        metrics = scores.evaluation.metrics
        write_json(options.output, {task: metrics[task] | gaps.get(task, {}) for task in metrics})
    if options.suspicious:
        write_suspicious(options.suspicious, found, scores)
    print("\n".join([format_scores(scores), *suspicious_lines(found)]))
