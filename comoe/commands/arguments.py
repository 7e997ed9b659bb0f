"""What the command lines share: the look of a parser, and the recipe as the first word."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

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


class Parser(ArgumentParser):
    """A parser that names the nearest option where the command line has an unknown one."""

    _words: Sequence[str] = ()

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As that of ``ArgumentParser``."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_args(args, namespace)

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As that of ``ArgumentParser``."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the process; what is unknown goes first, as it may be the cause of the rest."""
        super().error("; ".join(self._unknown()) or message)

    def _unknown(self) -> Iterator[str]:
        """One sentence for each word that is no option, and no beginning of one."""
        known = [name for action in self._actions for name in action.option_strings]
        for word in takewhile(lambda word: word != "--", self._words):
            name, _, value = word.partition("=")
            begins = any(option.startswith(name) for option in known)
            if begins or " " in word or not re.match(r"-[^\d.]", name):
                continue
            yield f"{name} is no option of {self.prog}{self._hint(name, known, value)} (--help lists all)"

    def _hint(self, name: str, known: Sequence[str], value: str) -> str:
        from comoe.config.errors import nearest

        bare = name.lstrip("-")
        names = {option.lstrip("-"): option for option in known}
        if any(action.dest == "overrides" for action in self._actions):
            from comoe.config.reference import options

            paths = [option.path for option in options()]
            leaves = {path.rpartition(".")[2]: path for path in reversed(paths)}
            leaf = bare.replace("-", "_")
            meant = leaves.get(leaf)
            if "." in bare:
                meant = nearest(bare, paths) or bare
            elif not meant and not nearest(bare, names):
                meant = leaves.get(nearest(leaf, leaves))
            if meant:
                return f"; did you mean {meant}={value or '...'}, without dashes?"
        guess = nearest(bare, names)
        # A letter stands for none of them here, as it does in other programs.
        guesses = [guess] if guess else [each for each in names if bare == each[:1] != each]
        meant = " or ".join(names[each] for each in guesses)
        return f"; did you mean {meant}?" if meant else ""


def new_parser(word: str, description: str) -> ArgumentParser:
    """The empty parser of ``comoe word``."""
    return Parser(
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


def add_model(parser: ArgumentParser, *, purpose: str = "") -> None:
    """What ``load_predictor`` reads: ``--model``, ``--revision``, ``--device``, ``--no-verify``, ``--plugins``.

    With a ``purpose``, which the help says, the model may be left out.
    """
    add = parser.add_argument
    what = "folder of an export, or organization/name on the hub"
    # fmt: off
    add("--model", required=not purpose, help=f"{what}{purpose}")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one")
    add("--no-verify", action="store_true", help="read the model without comparing its digests")
    # fmt: on
    add_plugins(parser)


def load_predictor(given: Namespace, **more: Any) -> Predictor:
    """The model of the options of ``add_model``; ``more`` goes to ``Predictor.from_pretrained``."""
    more |= {"device": given.device, "verify": not given.no_verify, "revision": given.revision}
    with _no_collection():
        from comoe.inference.predictor import Predictor

        return Predictor.from_pretrained(given.model, **more)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, nobody looks for garbage: modules and weights stay, and set off one search after another."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def add_columns(parser: ArgumentParser) -> None:
    """The columns of an input that a model reads."""
    add = parser.add_argument
    add("--text-column", help="column with the post (default: that of training, else text)")
    add("--pair-column", help="column with the second text (default: that of training)")
    add(
        "--author-column",
        help="column with the author, for tasks of authors (default: that of training)",
    )
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
