"""Arms that a command line describes: the user's own, classical models, and groups of tasks."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from comoe.config.errors import unknown_name
from comoe.config.extras import need
from comoe.config.recipe import Recipe
from comoe.experiments.classical import BASELINES
from comoe.experiments.compare.arms import (
    ARMS,
    TASK_ARMS,
    WHOLE,
    Part,
    dropping,
    measured_tasks,
    single_task,
)
from comoe.tasks.lexicon import read_lexicon


def classical_arms(arms: Sequence[str], lexicon: Path | None) -> dict[str, list[Part]]:
    """The arms that are keys of ``BASELINES``, with one run per seed.

    Args:
        arms: names of any arms.
        lexicon: file that the arm lexicon reads; None is VADER. Its content is in the name of the run.

    Raises:
        ValueError: a lexicon that cannot be read, or that no arm reads.
    """
    found = {arm: [Part(arm, (), (arm,))] for arm in arms if arm in BASELINES}
    if lexicon is None:
        if LEXICON in found:
            need(LEXICON, what="the arm lexicon without --lexicon")
        return found
    if LEXICON not in found:
        raise ValueError(f"--lexicon {lexicon} is read by the arm {LEXICON}; add it to --arms.")
    read_lexicon(lexicon, columns=1)
    stem = re.sub(r"[^\w.-]", "_", lexicon.stem)
    name = f"{LEXICON}.{stem}.{zlib.crc32(lexicon.read_bytes()):08x}"
    return found | {LEXICON: [Part(name, (), (LEXICON, str(lexicon.resolve())))]}


LEXICON = "lexicon"
"""The arm that reads ``--lexicon``."""


def group_arms(texts: Iterable[str], recipe: Recipe) -> dict[str, list[Part]]:
    """Arms of several runs, each of some tasks, from ``name:a+b/c`` texts.

    A task that is not auxiliary is in one group; a group of one task is the run of ``single``.

    Raises:
        ValueError: another form, an unknown task, or one that is in no group or in two.
    """
    found: dict[str, list[Part]] = {}
    for text in texts:
        name, colon, rest = text.partition(":")
        groups = [group.split("+") for group in rest.split("/")]
        if not colon or not all(task for group in groups for task in group):
            raise ValueError(f"--groups {text!r} must read name:task+task/task.")
        check_name("--groups", name)
        places = [task for group in groups for task in group]
        for task in places:
            if task not in recipe.tasks:
                raise unknown_name(f"task (--groups {name})", task, recipe.tasks)
        measured = measured_tasks(recipe)
        wrong = [task for task in recipe.tasks if places.count(task) > 1]
        wrong += [task for task in measured if task not in places]
        if wrong:
            raise ValueError(
                f"--groups {name}: {wrong[0]} is in {places.count(wrong[0])} groups; every task must be in one."
            )
        if bare := [group for group in groups if not set(group) & set(measured)]:
            raise ValueError(
                f"--groups {name}: no task of {'+'.join(bare[0])} is measured; put it to another group."
            )
        if name in found:
            raise ValueError(f"--groups {name} is given twice; choose a name for each.")
        found[name] = [_group(recipe, group) for group in groups]
    return found


def _group(recipe: Recipe, tasks: Sequence[str]) -> Part:
    kept = [task for task in recipe.tasks if task in tasks]
    if len(kept) == 1:
        return single_task(recipe, kept[0])
    dropped = [task for task in recipe.tasks if task not in kept]
    if not dropped:
        return Part(WHOLE, ())
    return Part(f"group.{'+'.join(kept)}", dropping(recipe, dropped, arm="--groups"))


def check_name(flag: str, name: str) -> None:
    """Raise a ``ValueError`` that names ``flag`` where an arm of the user's own cannot be called so."""
    taken = name in ARMS or name in TASK_ARMS or name in BASELINES
    if taken or not re.fullmatch(r"[A-Za-z0-9][\w.]*", name, re.ASCII):
        raise ValueError(
            f"{flag} {name}: choose an unused name of letters, digits, dots and underscores."
        )


def custom_arms(texts: Iterable[str]) -> dict[str, list[str]]:
    """The user's own arms from ``name:key=value,key=value`` texts.

    Raises:
        ValueError: a text of another form.
    """
    found = {}
    for text in texts:
        name, colon, overrides = text.partition(":")
        # A comma is a separator only before a new key: a list such as [1,3] has commas.
        parts = [part.strip() for part in re.split(r",(?=[\w.-]+=)", overrides)]
        if not colon or not all("=" in part for part in parts):
            raise ValueError(f"--arm {text!r} must read name:key=value,key=value.")
        if found.setdefault(name.strip(), parts) != parts:
            raise ValueError(f"--arm {name.strip()} is given twice; choose a name for each.")
    return found
