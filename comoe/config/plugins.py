"""Plugins: modules of other packages that put a metric, kind, loss, reader or gate of their own into comoe's tables.

A plugin is code, so one that a recipe or an export names is imported only where the user agreed to
it: by its name on the command line (``--plugins``), as an argument in Python, or by installing a
package that declares it in the entry-point group ``comoe.plugins``.
"""

from __future__ import annotations

import os
import re
from argparse import Action, ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from typing import Any

GROUP = "comoe.plugins"
"""Entry-point group: name -> module."""
CONSENT = "COMOE_PLUGINS"
"""Environment variable with the plugins that the user agreed to, a comma between them; ranks and
runs of an experiment inherit it."""
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def consent(names: Sequence[str]) -> None:
    """Agree, for this process and those that it starts, that these plugins are imported."""
    agreed = [name for name in os.environ.get(CONSENT, "").split(",") if name]
    if names:
        os.environ[CONSENT] = ",".join(dict.fromkeys([*agreed, *names]))


def load_plugins(names: Any, *, place: str) -> None:
    """Import plugins; what they put into the tables counts from then on.

    Args:
        names: of a recipe or an export: dotted modules, or names of the group ``comoe.plugins``.
        place: where they are named, for messages: the file, and the line where it is known.

    Raises:
        ValueError: the user did not agree to one, or it cannot be imported.
    """
    if not names:
        return
    from importlib.metadata import entry_points  # slow, and most recipes have none

    if not isinstance(names, list) or not all(
        isinstance(name, str) and MODULE.fullmatch(name) for name in names
    ):
        raise ValueError(
            f"{place}: plugins is {names!r}; it must be a list of modules: [my_package.module]."
        )
    installed = {point.name: point.value for point in entry_points(group=GROUP)}
    agreed = {*os.environ.get(CONSENT, "").split(","), *installed, *installed.values()}
    for name in names:
        if name not in agreed:
            raise ValueError(
                f"{place} names the plugin {name}, whose code would run on this machine. Where you trust it, say so: "
                f"--plugins {name} on the command line, plugins=[{name!r}] in Python."
            )
        try:
            import_module(installed.get(name, name))
        except Exception as error:
            raise ValueError(
                f"{place}: the plugin {name} cannot be imported ({type(error).__name__}: {error}); "
                "install its package, or put its folder on PYTHONPATH."
            ) from error


def add_plugins(parser: ArgumentParser) -> None:
    """``--plugins``, which agrees as soon as it is read."""
    parser.add_argument(
        "--plugins",
        action=_Agree,
        metavar="MODULE",
        help="agree that this plugin, which the recipe or export names, is imported and its code run; several with "
        "a comma between them",
    )


class _Agree(Action):
    def __call__(self, parser: Any, given: Any, values: Any, option: Any = None) -> None:
        consent([name.strip() for name in values.split(",")])
        setattr(given, self.dest, values)
