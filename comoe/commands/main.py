"""``comoe <command> ...``: finds the module of the first word and hands it the others."""

import importlib
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from difflib import get_close_matches

from comoe import __version__
from comoe.commands.arguments import Parser

COMMANDS = {
    "init": "write a recipe for a file of posts",
    "train": "train a recipe, or continue a run",
    "predict": "predict the posts of a file with an export",
    "select": "the posts to label next, for Label Studio",
    "report": "one page of HTML of predictions: shares, their course, slices",
    "serve": "answer requests over HTTP with exports",
    "eval": "score an export on labeled posts",
    "export": "make an export from a checkpoint",
    "push": "upload an export to the Hugging Face hub",
    "compare": "variants of a recipe over seeds, with intervals",
    "ablate": "what each expert of a trained model is worth",
    "tune": "search the options of a recipe (Optuna)",
    "scale": "one recipe over a grid of experts; --plan computes a cluster",
    "augment": "auxiliary data by a generative model",
    "doctor": "look at this machine: versions, devices, disk, one training step",
    "bench": "speed against other libraries (in a checkout)",
}
"""Word -> what the command does; its module is comoe.commands.<word>."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; ``argv`` instead of the words of this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        importlib.import_module(f"comoe.commands.{words[0]}").main(words[1:])
        return
    listed = "\n".join(f"  {word:<8}  {meaning}" for word, meaning in COMMANDS.items())
    parser = Parser(
        prog="comoe",
        usage="comoe <command> [--help] ...",
        description="Multi-task learning on social-media posts with mixtures of experts.",
        epilog=f"commands:\n{listed}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"comoe {__version__}")
    parser.add_argument("command", nargs="?", help="one of those below")
    given = parser.parse_args(words[:1])
    if given.command is None:
        parser.print_help()
        sys.exit(2)
    guess = get_close_matches(given.command, COMMANDS, n=1)
    hint = f"; did you mean {guess[0]}?" if guess else ""
    parser.error(f"{given.command} is not a command{hint} (one of: {', '.join(COMMANDS)})")
