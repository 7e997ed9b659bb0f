"""Write aspect, opinion and implied polarity of posts with a generative model: auxiliary data for a recipe.

    python launch/augment.py --input posts.jsonl --model google/flan-t5-large --output aux.jsonl
    python launch/augment.py --input posts.jsonl --model kit:smollm2 --output aux.jsonl --limit 30

--input is a file (jsonl, csv, tsv, parquet, txt), a folder with splits, or a hub name (--format
    hub). A run that was
stopped goes on when the same command is given again. --overwrite replaces what this command wrote,
    no other file.
"""

import argparse
import sys
from pathlib import Path

# An installed comoe comes first; without one, the package beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
PROMPTS = Path(__file__).resolve().parent / "configs" / "augment_prompts.yaml"

ROUNDS = """how often, at most, a post with a gold label is gone through: it is asked again, the label told, until the
 polarity of the answers is the label (default: %(default)s)"""
TEMPERATURE = "of draws (a question that comes back); 0: no draws (default: %(default)s)"
TOKENS = "tokens of an answer; a longer one is malformed (default: %(default)s)"


def main() -> None:
    """Read the command line, write the posts, print what became of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="file, folder or hub name")
    parser.add_argument(
        "--model", required=True, help="generative model: folder, hub name, kit:smollm2"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="JSON lines; missing folders are made"
    )
    parser.add_argument(
        "--prompts", default=PROMPTS, type=Path, help="YAML file of prompts and label words"
    )
    parser.add_argument(
        "--format",
        default="auto",
        help="tweeteval, jsonl, csv, tsv, parquet, txt, hub; default: auto",
    )
    parser.add_argument(
        "--split",
        default="train",
        help="train (the default), validation or test of a folder or hub",
    )
    parser.add_argument(
        "--text-column", default="text", help="column with the post (default: %(default)s)"
    )
    parser.add_argument(
        "--pair-column", help="column with the target (default: aspect, where there is one)"
    )
    parser.add_argument(
        "--label-column", help="column with the gold label (default: polarity, where there is one)"
    )
    parser.add_argument("--rounds", type=int, default=10, help=ROUNDS)
    parser.add_argument("--temperature", type=float, default=0.7, help=TEMPERATURE)
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help=TOKENS)
    parser.add_argument("--limit", type=int, help="the first so many posts only")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out bad rows instead of stopping at the first",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what this command wrote, begin anew"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="prompts at once (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ...; default: a GPU where there is one"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    options = parser.parse_args()

    from comoe.augment.command import run_command

    try:
        report = run_command(options, progress=sys.stderr.isatty())
    except (ValueError, OSError) as error:
        sys.exit(f"augment: {error}")
    except KeyboardInterrupt:
        sys.exit("augment: stopped; the same command goes on from here")
    print("\n".join(report.lines()))


if __name__ == "__main__":
    main()
