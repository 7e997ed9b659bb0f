"""Write aspect, opinion and implied polarity of posts with a generative model: auxiliary data for a recipe.

    python launch/augment.py --input posts.jsonl --model google/flan-t5-large --output aux.jsonl
    python launch/augment.py --input posts.jsonl --model kit:smollm2 --output aux.jsonl --limit 30

--input is a file (jsonl, csv, tsv, parquet, txt), a folder with splits, or a hub name (--format hub). A run that was
stopped goes on when the same command is given again. --overwrite replaces what this command wrote, no other file.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

# An installed comoe comes first; without one, the package beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
PROMPTS = Path(__file__).resolve().parent / "configs" / "augment_prompts.yaml"


def main() -> None:
    """Read the command line, write the posts, print what became of them."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    # fmt: off
    add = parser.add_argument
    add("--input", required=True, help="file, folder or hub name")
    add("--model", required=True, help="generative model: folder, hub name, kit:smollm2")
    add("--output", required=True, type=Path, help="JSON lines; missing folders are made")
    add("--prompts", default=PROMPTS, type=Path, help="YAML file of prompts and label words")
    add("--format", default="auto", help="tweeteval, jsonl, csv, tsv, parquet, txt, hub; default: auto")
    add("--split", default="train", help="train (the default), validation or test of a folder or hub")
    add("--text-column", default="text", help="column with the post (default: %(default)s)")
    add("--pair-column", help="column with the target (default: aspect, where there is one)")
    add("--label-column", help="column with the gold label (default: polarity, where there is one)")
    add("--rounds", type=int, default=10, help="at most this many rounds for a post with a gold label, which is given "
        "from round 2 on, until the polarity is that label (default: %(default)s)")
    add("--temperature", type=float, default=0.7, help="of sampling; 0 never samples (default: %(default)s)")
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    add("--max-new-tokens", type=int, default=32,
        help="of one text; a longer one is malformed (default: %(default)s)")
    add("--limit", type=int, help="the first so many posts only")
    add("--skip-bad", action="store_true", help="leave out bad rows instead of stopping at the first")
    add("--overwrite", action="store_true", help="replace what this command wrote, begin anew")
    add("--batch-size", type=int, default=16, help="prompts at once (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ...; default: a GPU where there is one")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    # fmt: on
    options = parser.parse_args()

    from comoe.augment.command import run_command

    try:
        report = run_command(options, progress=sys.stderr.isatty())
    except (ValueError, OSError) as error:
        sys.exit(f"augment: {error}")
    except KeyboardInterrupt:
        sys.exit("augment: stopped; the same command continues")
    print("\n".join(report.lines()))


if __name__ == "__main__":
    main()
