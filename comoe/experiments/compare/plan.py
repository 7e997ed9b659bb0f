"""What an experiment will run: arms, each of one run per seed or of one run per task and seed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comoe.config.errors import unknown_name
from comoe.config.load import load_recipe, recipe_to_dict
from comoe.config.recipe import DataConfig, Recipe, RunConfig
from comoe.experiments.compare.arms import (
    ARMS,
    TASK_ARMS,
    WHOLE,
    WITHOUT,
    Part,
    measured_tasks,
    one_by_one,
)
from comoe.experiments.runner import Experiment, Trial, difference_of
from comoe.train.parallel.ds_config import load_settings, plan_layout


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the tables."""

    name: str
    trials: tuple[Trial, ...]
    """All of its runs; several of one seed predict for a task each."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Column -> value that makes it a point of a grid."""

    def of_seed(self, seed: int) -> list[Trial]:
        """Its runs with this seed."""
        return [trial for trial in self.trials if trial.seed == seed]

    @property
    def parts(self) -> dict[str, list[str]]:
        """Part -> its words."""
        return {trial.part: list(trial.words) for trial in self.trials}


@dataclass(frozen=True, slots=True)
class Plan:
    """Arms, seeds and what a reader must know about them."""

    arms: tuple[Arm, ...]
    """In the order of the tables."""
    seeds: tuple[int, ...]
    joint: str | None
    """The arm that is the recipe as it is, where it has several tasks; what single tasks lose or
    gain by."""
    notes: tuple[str, ...]
    """What is not quite equal, or is not what its name says."""

    @property
    def trials(self) -> list[Trial]:
        """All runs, each once, the seeds in the outer loop: what is done at any time can be compared."""
        ordered = (trial for seed in self.seeds for arm in self.arms for trial in arm.of_seed(seed))
        return list({trial.name: trial for trial in ordered}.values())

    def arm(self, name: str, *, flag: str) -> Arm:
        """The arm of this name.

        Raises:
            ValueError: there is none; names ``flag``.
        """
        known = {arm.name: arm for arm in self.arms}
        if name not in known:
            raise unknown_name(f"arm of this comparison ({flag})", name, known)
        return known[name]


def plan_arms(
    experiment: Experiment,
    *,
    arms: Sequence[str],
    custom: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
) -> Plan:
    """Every arm with every seed.

    Args:
        experiment: recipe, DeepSpeed JSON and words that all runs share.
        arms: keys of ``ARMS``, ``TASK_ARMS`` or ``custom``, or ``single.<task>`` and
            ``without.<task>``.
        custom: name of an arm of the user's -> its ``key=value`` words.
        seeds: one run of each part per seed.

    Raises:
        ValueError: an unknown arm, an impossible one, two that would share a folder, or a shared
            word that belongs to the comparison.
    """
    experiment.refuse((), "--seeds and --output")
    for name in custom:
        taken = name in ARMS or name in TASK_ARMS
        if taken or not re.fullmatch(r"[A-Za-z0-9][\w.]*", name, re.ASCII):
            raise ValueError(
                f"--arm {name}: choose a name of letters, digits, dots, underscores that is not taken."
            )
    recipe = load_recipe(experiment.config, experiment.overrides)
    named: dict[str, list[Part]] = {}
    for arm in dict.fromkeys(arms):
        named |= _parts(arm, recipe, custom)
    planned = tuple(_with_seeds(experiment, named, seeds))
    joint = None
    # One task can gain or lose by another only where there are several.
    if len(recipe.tasks) > 1 and measured_tasks(recipe):
        whole = (arm.name for arm in planned if not any(trial.words for trial in arm.trials))
        joint = next(whole, None)
    left_out = [name for name in named if name.startswith(f"{WITHOUT}.") and name not in custom]
    if joint is None and left_out:
        raise ValueError(
            "leaving a task out is held against the run of all tasks: add the arm multi to --arms."
        )
    return Plan(planned, tuple(seeds), joint, tuple(_notes(recipe, named)))


def check_earlier(experiment: Experiment, trial: Trial) -> None:
    """Make sure that a run of this name, where there is one, is of this part.

    Raises:
        ValueError: it was trained by another recipe.
    """
    file = experiment.runs / trial.name / "config.yaml"
    if not file.is_file():
        return
    now = _recipe_of(experiment, trial.overrides)
    if difference := difference_of(_bare(load_recipe(file)), _bare(now)):
        raise ValueError(
            f"{file.parent} was trained with {difference}; give the arm another name, or choose another --output."
        )


def _parts(arm: str, recipe: Recipe, custom: Mapping[str, Sequence[str]]) -> dict[str, list[Part]]:
    """The arms of the tables that a name of the command line means, each with its runs."""
    if arm in custom:
        return {arm: [Part(arm, tuple(custom[arm]))]}
    if arm in TASK_ARMS:
        return TASK_ARMS[arm](recipe)
    if arm in ARMS:
        words = tuple(ARMS[arm](recipe))
        # Two names of one thing share its runs.
        return {arm: [Part(arm if words else WHOLE, words)]}
    several = {part.name: part for part in one_by_one(recipe)} if "." in arm else {}
    if arm not in several:
        raise unknown_name("arm", arm, [*ARMS, *TASK_ARMS, *custom, *several])
    return {arm: [several[arm]]}


def _with_seeds(
    experiment: Experiment, named: Mapping[str, Sequence[Part]], seeds: Sequence[int]
) -> Iterator[Arm]:
    settings = load_settings(experiment.deepspeed)
    recipes: dict[str, Recipe] = {}
    for name, parts in named.items():
        trials: list[Trial] = []
        for part in parts:
            recipe = _recipe_of(experiment, part.words)
            other = recipes.setdefault(part.name, recipe)
            if difference := difference_of(_bare(other), _bare(recipe)):
                raise ValueError(
                    f"two arms would share the run folders {part.name}-s{seeds[0]}, ...: one has {difference}. Give "
                    "yours another name."
                )
            plan_layout(recipe, settings, world_size=experiment.ranks, gpu=False)
            experts = recipe.model.moe.num_experts
            trials += [Trial(part.name, seed, part.words, experts) for seed in seeds]
        yield Arm(name, tuple(trials))


def _notes(recipe: Recipe, named: Mapping[str, Sequence[Part]]) -> Iterator[str]:
    for name, parts in named.items():
        if name in TASK_ARMS and not any(part.words for part in parts):
            yield f"{name} is the recipe itself: it has one task."
    words = [word for parts in named.values() for part in parts for word in part.words]
    if not any("=null" in word for word in words):
        return
    usual = DataConfig().mixing
    if recipe.data.mixing != usual:
        yield (
            f"data.mixing is {recipe.data.mixing}: together, small data sets are passed over more often than alone and "
            f"large ones less often; the sum of all posts is equal. data.mixing={usual} makes each equal."
        )
    if recipe.train.eval_every != "auto":
        yield (
            f"train.eval_every is {recipe.train.eval_every} steps: where runs are longer than that, shorter ones "
            "choose their best weights among fewer checkpoints; auto is twice an epoch everywhere."
        )


def _recipe_of(experiment: Experiment, words: Sequence[str]) -> Recipe:
    return load_recipe(experiment.config, [*experiment.overrides, *words])


def _bare(recipe: Recipe) -> dict[str, object]:
    return recipe_to_dict(replace(recipe, run=RunConfig()))
