"""A scaling experiment: one recipe over a grid of experts, k, gates, encoders, EP sizes and seeds, a process each.

``launch/scale.py`` calls it. Below the output folder: ``runs/<point>/`` as training leaves them,
``logs/<point>.log``, ``failed/<point>.txt``, ``scale.json`` (what all runs share), and what
``comoe.experiments.scale.table`` and ``comoe.experiments.scale.plots`` write.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from comoe.config.errors import unknown_name
from comoe.config.load import load_recipe
from comoe.config.recipe import Recipe
from comoe.experiments.runner import OWN, Experiment
from comoe.models.moe.gate import GATES
from comoe.train.parallel.ds_config import load_settings, plan_layout

EVERY = "all"
"""In the list of k: as many as there are experts."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What is varied; every combination is a point."""

    experts: tuple[int, ...]
    """Experts per layer; 0 is the encoder alone."""
    top_k: tuple[int | str, ...]
    """Experts per token; ``all`` is as many as there are."""
    gates: tuple[str, ...]
    """Keys of ``GATES``."""
    ep_sizes: tuple[int | str, ...]
    """Ranks that share one set of experts, or auto."""
    encoders: tuple[str, ...]
    """As ``model.encoder`` takes them."""
    seeds: tuple[int, ...]
    """One run per seed."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run of the grid."""

    experts: int
    """Experts per layer."""
    top_k: int
    """Experts per token; 0 without experts."""
    gate: str
    """The gate; empty without experts."""
    ep_size: int | str
    """As asked for; 1 without experts."""
    encoder: str
    """The encoder."""
    seed: int
    """The seed."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        encoder = re.sub(
            r"[^A-Za-z0-9._]+", "-", self.encoder.rstrip("/").rpartition("/")[2]
        ).strip("-.")
        middle = f"-k{self.top_k}-{self.gate}-ep{self.ep_size}" if self.experts else ""
        return f"E{self.experts}{middle}-{encoder}-s{self.seed}"

    @property
    def runs_all(self) -> bool:
        """True where every expert runs for every token."""
        return self.experts > 0 and self.top_k == self.experts

    @property
    def overrides(self) -> list[str]:
        """``key=value`` words that make the recipe this point."""
        words = [
            f"model.encoder={self.encoder}",
            f"train.seed={self.seed}",
            f"model.moe.num_experts={self.experts}",
        ]
        if self.experts:
            words += [
                f"model.moe.top_k={self.top_k}",
                f"model.moe.gate={self.gate}",
                f"parallel.ep_size={self.ep_size}",
            ]
        if self.runs_all:
            # Balancing what cannot be unbalanced is refused, and would make k = E impossible beside
            # other k.
            words += ["model.moe.balance=none", "loss.balance_weight=0"]
        return words


def build_grid(recipe: Recipe, **lists: str | None) -> Grid:
    """The grid from comma-separated lists; a list that is None holds the recipe's own value.

    Args:
        recipe: the recipe that the lists vary.
        lists: field of ``Grid`` -> text such as "2,4,8".

    Raises:
        ValueError: an empty list, a value that is not of its kind, or a gate that does not exist.
    """
    moe = recipe.model.moe
    own = {
        "experts": moe.num_experts, "top_k": moe.top_k, "gates": moe.gate, "ep_sizes": recipe.parallel.ep_size,
        "encoders": recipe.model.encoder, "seeds": recipe.train.seed,
    }  # fmt: skip
    values = {
        name: _values(name, lists[name]) if lists.get(name) is not None else (value,)
        for name, value in own.items()
    }
    for gate in values["gates"]:
        if gate not in GATES:
            raise unknown_name("gate", str(gate), GATES)
    return Grid(**values)


def plan_points(grid: Grid, experiment: Experiment) -> tuple[list[Point], list[str]]:
    """The runs to make, and a line for every combination that cannot be.

    A combination is impossible when the recipe's own rules refuse it, or when its EP size does not
    divide the ranks and experts. Without experts k, gate and EP mean nothing, so those combinations
    are one run.

    Raises:
        ValueError: the recipe is wrong without the grid too, an override belongs to the grid, or
            two encoders end in the same name.
    """
    keys = {override.partition("=")[0].strip().lstrip("-") for override in experiment.overrides}
    taken = sorted(keys & {*OWN, *(word.partition("=")[0] for word in _SAMPLE.overrides)})
    if taken:
        raise ValueError(
            f"{taken[0]} cannot be an override here: the grid's options or --output set it."
        )
    load_recipe(experiment.config, experiment.overrides)
    settings = load_settings(experiment.deepspeed)
    points: dict[str, Point] = {}
    left_out: list[str] = []
    lists = (grid.encoders, grid.gates, grid.ep_sizes, grid.experts, grid.top_k, grid.seeds)
    for encoder, gate, ep_size, experts, top_k, seed in itertools.product(*lists):
        if experts:
            point = Point(
                experts, experts if top_k == EVERY else int(top_k), gate, ep_size, encoder, seed
            )
        else:
            point = Point(0, 0, "", 1, encoder, seed)
        if points.get(point.name, point) != point:
            raise ValueError(
                f"two encoders would share the run folder {point.name}: {encoder} and another; rename one."
            )
        try:
            recipe = load_recipe(experiment.config, [*experiment.overrides, *point.overrides])
            plan_layout(recipe, settings, world_size=experiment.ranks, gpu=False)
            points[point.name] = point
        except ValueError as error:
            left_out.append(f"{point.name}: {error}")
    return list(points.values()), list(dict.fromkeys(left_out))


def _values(name: str, text: str) -> tuple[Any, ...]:
    kind, words = _KINDS[name]
    values = []
    for part in (part.strip() for part in text.split(",")):
        if part in words:
            values.append(part)
            continue
        try:
            values.append(kind(part))
        except ValueError:
            valid = " or ".join([_WORDS[kind], *words])
            raise ValueError(
                f"{_FLAGS[name]} is {text!r}; {part!r} must be {valid}, in a list with commas."
            ) from None
        if kind is int and values[-1] < _LEAST[name]:
            raise ValueError(f"{_FLAGS[name]} is {text!r}; {part} must be at least {_LEAST[name]}.")
    return tuple(dict.fromkeys(values))


def _word(text: str) -> str:
    if not text:
        raise ValueError
    return text


_SAMPLE = Point(2, 1, "", 1, "", 0)


_KINDS: dict[str, tuple[Callable[[str], Any], Sequence[str]]] = {
    "experts": (int, ()),
    "top_k": (int, (EVERY,)),
    "gates": (_word, ()),
    "ep_sizes": (int, ("auto",)),
    "encoders": (_word, ()),
    "seeds": (int, ()),
}


_WORDS: dict[Callable[[str], Any], str] = {int: "a whole number", _word: "a name"}


_LEAST = {"experts": 0, "top_k": 1, "ep_sizes": 1, "seeds": 0}


_FLAGS = {
    "experts": "--experts",
    "top_k": "--top-k",
    "gates": "--gate",
    "ep_sizes": "--ep",
    "encoders": "--encoder",
    "seeds": "--seeds",
}
