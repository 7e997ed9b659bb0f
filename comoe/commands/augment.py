"""Write aspect, opinion and implied polarity of posts with a generative model: auxiliary data for a recipe.

    comoe augment --input posts.jsonl --model google/flan-t5-large --output aux.jsonl
    comoe augment --input posts.jsonl --model kit:smollm2 --output aux.jsonl --limit 30

--input is a file (jsonl, csv, tsv, parquet, txt), a folder with splits, or a hub name (--format hub). A run that was
stopped goes on when the same command is given again. --overwrite replaces what this command wrote, no other file.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import new_parser, number, whole
from comoe.commands.guard import GOES_ON, guarded


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("augment", __doc__)
    add = found.add_argument
    add("--input", required=True, help="file, folder or hub name")
    add("--model", required=True, help="generative model: folder, hub name, kit:smollm2")
    add("--output", required=True, type=Path, help="JSON lines; missing folders are made")
    add("--prompts", metavar="YAML", help="prompts and label words (default: those that come with comoe)")
    add("--format", default="auto", help="tweeteval, jsonl, csv, tsv, parquet, txt, hub; default: auto")
    add("--split", default="train", help="train (the default), validation or test of a folder or hub")
    add("--text-column", default="text", help="column with the post (default: %(default)s)")
    add("--pair-column", help="column with the target (default: aspect, where there is one)")
    add("--label-column", help="column with the gold label (default: polarity, where there is one)")
    add("--rounds", type=whole(1), default=10,
        help="at most this many rounds for a post with a gold label, which is given "
        "from round 2 on, until the polarity is that label (default: %(default)s)")
    add("--temperature", type=number, default=0.7, help="of sampling; 0 never samples (default: %(default)s)")
    add("--seed", type=whole(0), default=0, help="of sampling (default: %(default)s)")
    add("--max-new-tokens", type=whole(1), default=32,
        help="of one text; a longer one is malformed (default: %(default)s)")
    add("--limit", type=whole(1), help="the first so many posts only")
    add("--skip-bad", action="store_true", help="leave out bad rows instead of stopping at the first")
    add("--overwrite", action="store_true", help="replace what this command wrote, begin anew")
    add("--batch-size", type=whole(1), default=16, help="prompts at once (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ...; default: a GPU where there is one")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    # fmt: on
    return found


@guarded("augment", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, write the posts, print what became of them."""
    options = parser().parse_args(argv)

    from comoe.augment.command import run_command

    report = run_command(options, progress=sys.stderr.isatty())
    print("\n".join(report.lines()))
