"""What the command lines share: the look of a parser, and the recipe as the first word."""

from __future__ import annotations

import re
import sys
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe.config.extras import need
from comoe.config.plugins import add_plugins

if TYPE_CHECKING:
    from comoe.inference.predictor import Predictor

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


def add_experiment(parser: ArgumentParser, word: str, *, output: str) -> None:
    """The options of ``comoe word``, which runs a recipe many times; ``output`` says what its folder gets."""
    add = parser.add_argument
    # fmt: off
    add("--deepspeed", default=SETTINGS, metavar="JSON", help="a file, or the name of a ready one (%(default)s)")
    add("--output", type=Path, default=Path("runs", word), metavar="DIR", help=output)
    add("--ranks", type=whole(1), metavar="N", help="ranks of each run (all GPUs; without a GPU 1)")
    add("--no-verify", action="store_true", help="read what its runs left without comparing digests")
    # fmt: on


def take_recipe(given: Namespace, *, default: str | None = RECIPE) -> None:
    """Set ``given.config``: what ``--config`` says, else a first word that is no ``key=value``, else the default."""
    if given.config is None and given.overrides and "=" not in given.overrides[0]:
        given.config, *given.overrides = given.overrides
    given.config = given.config or default


def need_training(word: str) -> None:
    """End the process with one sentence where the extra ``train`` is not installed."""
    need_extra("train", word)


def need_extra(extra: str, word: str) -> None:
    """End the process with one sentence where an extra of ``comoe word`` is not installed."""
    try:
        need(extra, what=f"comoe {word}")
    except ValueError as error:
        print(f"comoe: {error}", file=sys.stderr)
        sys.exit(2)


def add_model(parser: ArgumentParser) -> None:
    """What ``load_predictor`` reads: ``--model``, ``--revision``, ``--device``, ``--no-verify``, ``--plugins``."""
    add = parser.add_argument
    # fmt: off
    add("--model", required=True, help="folder of an export, or organization/name on the hub")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one")
    add("--no-verify", action="store_true", help="read the model without comparing its digests")
    # fmt: on
    add_plugins(parser)


def load_predictor(given: Namespace, **more: Any) -> Predictor:
    """The model of the options of ``add_model``; ``more`` goes to ``Predictor.from_pretrained``."""
    from comoe.inference.predictor import Predictor

    more |= {"device": given.device, "verify": not given.no_verify, "revision": given.revision}
    return Predictor.from_pretrained(given.model, **more)


def add_columns(parser: ArgumentParser) -> None:
    """The columns of an input that a model reads."""
    add = parser.add_argument
    add("--text-column", help="column with the post (default: that of training, else text)")
    add("--pair-column", help="column with the second text (default: that of training)")
    add("--image-column", help="column with the image (default: that of training, else image)")


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
