"""What ``comoe scale`` does: a grid of experts, k, gates, encoders, EP sizes, seeds; or a cluster plan.

Each point of the grid is an arm. Output folder: the run folders ``runs/<point>/``,
``logs/<point>.log``, ``failed/<point>.txt``, ``scale.json`` (shared settings), tables, plots and
TensorBoard hparams.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comoe.config.errors import unknown_name
from comoe.config.load import load_recipe
from comoe.config.recipe import Recipe
from comoe.experiments.cluster.plan import print_plan, settle_plan_flags
from comoe.experiments.compare.arms import UNBALANCED
from comoe.experiments.compare.plan import Arm, Plan
from comoe.experiments.runner import (
    Experiment,
    Trial,
    print_now,
    record_settings,
    run_trials,
)
from comoe.experiments.scale.report import read_rows, write_hparams, write_plots, write_tables
from comoe.models.moe.gate import GATES
from comoe.train.parallel.ds_config import load_settings, plan_layout

EVERY = "all"
"""Value of k that means all experts."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One list of the grid."""

    flag: str
    key: str
    """The recipe's key that it sets."""
    own: Callable[[Recipe], Any]
    """The recipe's own value, used without a list."""
    minimum: int | None = None
    """The smallest integer; None for names."""
    keywords: tuple[str, ...] = ()
    """Names that stand for a number."""

    def values(self, text: str) -> tuple[Any, ...]:
        """The values of a list with commas, each once.

        Raises:
            ValueError: a wrong value.
        """
        return tuple(dict.fromkeys(self._value(part.strip(), text) for part in text.split(",")))

    def _value(self, part: str, text: str) -> Any:
        if part in self.keywords or (part and self.minimum is None):
            return part
        if self.minimum is None or not re.fullmatch(r"-?\d+", part):
            kind = "a name" if self.minimum is None else "an integer"
            valid = " or ".join([kind, *self.keywords])
            raise ValueError(
                f"{self.flag} is {text!r}; {part!r} must be {valid}, in a list with commas."
            )
        if int(part) < self.minimum:
            raise ValueError(f"{self.flag} is {text!r}; {part} must be at least {self.minimum}.")
        return int(part)


MOE = "model.moe"
AXES = {
    "encoder": Axis("--encoder", "model.encoder", lambda recipe: recipe.model.encoder),
    "gate": Axis("--gate", f"{MOE}.gate", lambda recipe: recipe.model.moe.gate),
    "ep_size": Axis(
        "--ep", "parallel.ep_size", lambda recipe: recipe.parallel.ep_size, 1, ("auto",)
    ),
    "experts": Axis(
        "--experts", f"{MOE}.num_experts", lambda recipe: recipe.model.moe.num_experts, 0
    ),
    "top_k": Axis("--top-k", f"{MOE}.top_k", lambda recipe: recipe.model.moe.top_k, 1, (EVERY,)),
    "seeds": Axis("--seeds", "train.seed", lambda recipe: recipe.train.seed, 0),
}
"""Lists of the grid, the outermost loop first."""


def read_grid(recipe: Recipe, lists: Mapping[str, str | None]) -> dict[str, tuple[Any, ...]]:
    """Name of an axis -> its values, from lists with commas; without a list the recipe's own value.

    Raises:
        ValueError: an empty list, a wrong value, or an unknown gate.
    """
    grid = {}
    for name, axis in AXES.items():
        text = lists.get(name)
        grid[name] = (axis.own(recipe),) if text is None else axis.values(text)
    for gate in grid["gate"]:
        if gate not in GATES:
            raise unknown_name("gate", gate, GATES)
    return grid


def plan_grid(grid: Mapping[str, tuple[Any, ...]], experiment: Experiment) -> Plan:
    """An arm for every possible combination; notes name the impossible ones.

    A combination is impossible if the recipe's validation refuses it, or if its EP size does not
    divide the ranks and experts. Without experts k, gate and EP have no effect, so those
    combinations are one arm.

    Raises:
        ValueError: the recipe itself is wrong, an override belongs to the grid, two encoders have
            the same last name, or no combination is possible.
    """
    experiment.refuse([axis.key for axis in AXES.values()], "the grid's options or --output")
    load_recipe(experiment.config, experiment.overrides)
    settings = load_settings(experiment.deepspeed)
    arms: dict[str, Arm] = {}
    notes: list[str] = []
    *axes, seeds = AXES
    for values in itertools.product(*(grid[name] for name in axes)):
        point = dict(zip(axes, values, strict=True))
        if not point["experts"]:
            point |= {"gate": "", "ep_size": 1, "top_k": 0}
        elif point["top_k"] == EVERY:
            point["top_k"] = point["experts"]
        name, overrides = name_of(point), overrides_of(point)
        trials = [Trial(name, seed, tuple(overrides), point["experts"]) for seed in grid[seeds]]
        arm = Arm(name, tuple(trials), point)
        if arms.get(name, arm) != arm:
            raise ValueError(
                f"two encoders would share the run folder {name}: {point['encoder']} and another; rename one."
            )
        try:
            recipe = load_recipe(experiment.config, [*experiment.overrides, *overrides])
            plan_layout(recipe, settings, world_size=experiment.ranks, gpu=False)
            arms[name] = arm
        except ValueError as error:
            notes.append(f"left out {name}: {error}")
    if any(arm.settings["experts"] == arm.settings["top_k"] > 0 for arm in arms.values()):
        notes.append(
            f"where k is the number of experts, {' and '.join(UNBALANCED)}: all experts run"
        )
    if not arms:
        raise ValueError("\n".join([*notes, "no combination of the grid is possible."]))
    return Plan(tuple(arms.values()), grid[seeds], None, tuple(dict.fromkeys(notes)))


def name_of(point: Mapping[str, Any]) -> str:
    """Prefix of a run folder's name."""
    last = point["encoder"].rstrip("/").rpartition("/")[2]
    encoder = re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.")
    middle = "-k{top_k}-{gate}-ep{ep_size}".format(**point) if point["experts"] else ""
    return f"E{point['experts']}{middle}-{encoder}"


def overrides_of(point: Mapping[str, Any]) -> list[str]:
    """``key=value`` changes of the recipe for this point."""
    names = point if point["experts"] else ("encoder", "experts")
    overrides = [f"{AXES[name].key}={point[name]}" for name in names]
    # Balancing is refused where all experts run, so k = E would be impossible beside other k.
    return [*overrides, *(UNBALANCED if point["experts"] == point["top_k"] > 0 else ())]


def scale_or_plan(
    given: argparse.Namespace, *, plan_flags: Mapping[str, str | None]
) -> list[Trial]:
    """Run the command; returns the failed runs.

    Args:
        given: the command line; its lists have the names of ``AXES``.
        plan_flags: flags of ``--plan`` -> default.
    """
    settle_plan_flags(given, plan_flags)
    if given.plan:
        print_plan(given)
        return []
    return scale(given)


def scale(given: argparse.Namespace) -> list[Trial]:
    """Run the experiment and write its report; returns the failed runs.

    Raises:
        ValueError: a wrong recipe, list, or output folder; nothing has run then.
    """
    experiment = Experiment.from_command(given)
    recipe = load_recipe(experiment.config, experiment.overrides)
    grid = read_grid(recipe, {name: getattr(given, name) for name in AXES})
    plan = plan_grid(grid, experiment)
    for note in plan.notes:
        print_now(f"note: {note}")
    record_settings(experiment, file_name="scale.json")

    def report() -> None:
        rows = read_rows(plan, experiment)
        for write in (write_tables, write_plots, write_hparams):
            write(rows, experiment.output)

    failed = run_trials(experiment, plan.trials, report=report)
    report()
    print(f"table   {given.output / 'table.md'}, table.csv")
    print(f"plots   {given.output / 'plots'}")
    print(f"watch   tensorboard --logdir {given.output}")
    return failed
