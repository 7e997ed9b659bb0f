"""What the command lines share: the look of a parser, and the recipe as the first word."""

import re
import sys
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable

from comoe.config.extras import need
from comoe.config.plugins import add_plugins

RECIPE, SETTINGS = "starter", "zero2"
"""Names of the recipe and the DeepSpeed file that are taken where none is given."""

MOST = 1_000_000_000
"""Largest number that an option takes."""


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that takes a whole number, from ``least`` to ``most``."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not least <= int(text) <= most:
            rule = f"must be a whole number, at least {least}, at most {most:,}"
            raise ArgumentTypeError(f"{text!r} {rule}")
        return int(text)

    return read


def number(text: str) -> float:
    """The type of an option that takes a number, at least 0."""
    plain = re.fullmatch(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?", text)
    value = float(text) if plain else -1.0
    if not 0 <= value <= MOST:
        raise ArgumentTypeError(f"{text!r} must be a number, at least 0, at most {MOST:,}")
    return value


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


def add_backend(parser: ArgumentParser) -> None:
    """``--backend`` and ``--threads``: what runs the model of an export."""
    parser.add_argument(
        "--backend",
        default="torch",
        help="torch, or onnx: the ONNX file of `comoe export --format onnx`, on the CPU",
    )
    parser.add_argument(
        "--threads",
        type=whole(1, 4096),
        metavar="N",
        help="of each operation on the CPU (default: OMP_NUM_THREADS, else a thread per core)",
    )
