"""A grid of experts, k, gates, encoders, EP sizes and seeds over one recipe; each point is an arm."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comoe.config.errors import unknown_name
from comoe.config.load import load_recipe
from comoe.config.recipe import Recipe
from comoe.experiments.compare.arms import UNBALANCED
from comoe.experiments.compare.plan import Arm, Plan
from comoe.experiments.runner import Experiment, Trial
from comoe.models.moe.gate import GATES
from comoe.train.parallel.ds_config import load_settings, plan_layout

EVERY = "all"
"""In the list of k: as many as there are experts."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One list of the grid."""

    flag: str
    key: str
    """The recipe's key that it sets."""
    own: Callable[[Recipe], Any]
    """The recipe's own value, where no list is given."""
    least: int | None = None
    """The smallest whole number; None for names."""
    words: tuple[str, ...] = ()
    """Words that stand for a number."""

    def values(self, text: str) -> tuple[Any, ...]:
        """What a list with commas holds, each value once.

        Raises:
            ValueError: a value that is not of its kind.
        """
        return tuple(dict.fromkeys(self._value(part.strip(), text) for part in text.split(",")))

    def _value(self, part: str, text: str) -> Any:
        if part in self.words or (part and self.least is None):
            return part
        if self.least is None or not re.fullmatch(r"-?\d+", part):
            kind = "a name" if self.least is None else "a whole number"
            valid = " or ".join([kind, *self.words])
            raise ValueError(
                f"{self.flag} is {text!r}; {part!r} must be {valid}, in a list with commas."
            )
        if int(part) < self.least:
            raise ValueError(f"{self.flag} is {text!r}; {part} must be at least {self.least}.")
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
    """Name of an axis -> its values, from comma-separated lists; a missing list holds the recipe's own value.

    Raises:
        ValueError: an empty list, a value that is not of its kind, or a gate that does not exist.
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
    """An arm for every combination that can be; the notes name those that cannot.

    A combination is impossible when the recipe's own rules refuse it, or when its EP size does not
    divide the ranks and experts. Without experts k, gate and EP mean nothing, so those combinations
    are one arm.

    Raises:
        ValueError: the recipe is wrong without the grid too, an override belongs to the grid, two
            encoders end in the same name, or no combination is possible.
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
        name, words = name_of(point), words_of(point)
        trials = [Trial(name, seed, tuple(words), point["experts"]) for seed in grid[seeds]]
        arm = Arm(name, tuple(trials), point)
        if arms.get(name, arm) != arm:
            raise ValueError(
                f"two encoders would share the run folder {name}: {point['encoder']} and another; rename one."
            )
        try:
            recipe = load_recipe(experiment.config, [*experiment.overrides, *words])
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
    """Beginning of a run folder's name."""
    last = point["encoder"].rstrip("/").rpartition("/")[2]
    encoder = re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.")
    middle = "-k{top_k}-{gate}-ep{ep_size}".format(**point) if point["experts"] else ""
    return f"E{point['experts']}{middle}-{encoder}"


def words_of(point: Mapping[str, Any]) -> list[str]:
    """``key=value`` overrides that make the recipe this point."""
    names = point if point["experts"] else ("encoder", "experts")
    words = [f"{AXES[name].key}={point[name]}" for name in names]
    # Balancing what cannot be unbalanced is refused, and would make k = E impossible beside other k.
    return [*words, *(UNBALANCED if point["experts"] == point["top_k"] > 0 else ())]
