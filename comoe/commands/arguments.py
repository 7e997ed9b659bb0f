"""What the command lines share: the look of a parser, and the recipe as the first word."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from comoe.config.extras import need
from comoe.config.plugins import add_plugins

RECIPE, SETTINGS = "starter", "zero2"
"""Names of the recipe and the DeepSpeed file that are taken where none is given."""


def new_parser(word: str, description: str) -> ArgumentParser:
    """The empty parser of ``comoe word``."""
    return ArgumentParser(
        prog=f"comoe {word}", description=description, formatter_class=RawDescriptionHelpFormatter
    )


def add_recipe(parser: ArgumentParser, *, overrides: str = "options of the recipe") -> None:
    """``--config``, ``--plugins``, and the words ``[recipe] key=value ...``."""
    add_plugins(parser)
    parser.add_argument(
        "--config",
        metavar="YAML",
        help=f"recipe: a file, or the name of a ready one, also as the first word ({RECIPE})",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)


def take_recipe(given: Namespace, *, default: str | None = RECIPE) -> None:
    """Set ``given.config``: what ``--config`` says, else a first word that is no ``key=value``, else the default."""
    if given.config is None and given.overrides and "=" not in given.overrides[0]:
        given.config, *given.overrides = given.overrides
    given.config = given.config or default


def need_training(word: str) -> None:
    """End the process with one sentence where the extra ``train`` is not installed."""
    need_extra("train", word)


def need_extra(extra: str, word: str) -> None:
    """End the process with one sentence where an extra that ``comoe word`` needs is not installed."""
    try:
        need(extra, what=f"comoe {word}")
    except ValueError as error:
        print(f"comoe: {error}", file=sys.stderr)
        sys.exit(2)
