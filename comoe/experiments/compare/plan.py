"""The runs of an experiment: arms, each with one run per seed, or one per task and seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from comoe.config.errors import unknown_name
from comoe.config.load import load_recipe, load_saved_recipe, recipe_to_dict
from comoe.config.recipe import DataConfig, Recipe, RunConfig
from comoe.experiments.classical import BASELINES
from comoe.experiments.compare.arms import (
    ARMS,
    TASK_ARMS,
    WHOLE,
    WITHOUT,
    Part,
    leave_one_out,
    measured_tasks,
    single_tasks,
)
from comoe.experiments.compare.own_arms import check_name
from comoe.experiments.runner import Experiment, Trial, difference_of
from comoe.train.parallel.ds_config import load_settings, plan_layout


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the tables."""

    name: str
    trials: tuple[Trial, ...]
    """All of its runs; several runs of one seed predict one task each."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Column -> value, for a point of a grid."""

    def of_seed(self, seed: int) -> list[Trial]:
        """Its runs with this seed."""
        return [trial for trial in self.trials if trial.seed == seed]

    @property
    def classical(self) -> bool:
        """Whether it is fitted and not trained."""
        return any(trial.baseline for trial in self.trials)

    @property
    def parts(self) -> dict[str, list[str]]:
        """Part -> its overrides."""
        return {trial.part: list(trial.part_overrides) for trial in self.trials}


@dataclass(frozen=True, slots=True)
class Plan:
    """Arms in the order of the tables, seeds, and notes for the reader."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    joint: str | None
    """The arm of the unchanged recipe, if it has several tasks: the reference for transfer."""
    notes: tuple[str, ...]
    """What differs between the arms, or from their names."""

    @property
    def trials(self) -> list[Trial]:
        """All runs, each once, seeds in the outer loop: finished runs can always be compared."""
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


def read_seeds(text: str, *, flag: str) -> list[int]:
    """Different numbers from a list with commas.

    Raises:
        ValueError: another text; names ``flag``.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{flag} is {text!r}; it must be numbers from 0 up, with commas.")
    return list(dict.fromkeys(map(int, words)))


def plan_arms(
    experiment: Experiment,
    *,
    arms: Sequence[str],
    custom: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    own: Mapping[str, Sequence[Part]] | None = None,
) -> Plan:
    """Every arm with every seed.

    Args:
        experiment: recipe, DeepSpeed JSON and overrides of all runs.
        arms: keys of ``ARMS``, ``TASK_ARMS``, ``custom`` or ``own``, or ``single.<task>`` and
            ``without.<task>``.
        custom: name of a custom arm -> its ``key=value`` overrides.
        seeds: one run of each part per seed.
        own: name of an arm -> its runs, of ``classical_arms`` and ``group_arms``.

    Raises:
        ValueError: an unknown or impossible arm, two arms that would share a folder, or an override
            that the comparison sets itself.
    """
    experiment.refuse((), "--seeds and --output")
    for name in custom:
        check_name("--arm", name)
    recipe = load_recipe(experiment.config, experiment.overrides)
    named: dict[str, list[Part]] = {}
    for arm in dict.fromkeys(arms):
        known = list((own or {}).get(arm, ()))
        named |= {arm: known} if known else _parts(arm, recipe, custom)
    planned = tuple(_with_seeds(experiment, named, seeds))
    joint = None
    # Transfer needs several tasks.
    if len(recipe.tasks) > 1 and measured_tasks(recipe):
        unchanged = (arm for arm in planned if not any(map(list, arm.parts.values())))
        joint = next((arm.name for arm in unchanged if not arm.classical), None)
    left_out = [name for name in named if name.startswith(f"{WITHOUT}.") and name not in custom]
    if joint is None and left_out:
        raise ValueError(
            "leave_one_out is compared with the run of all tasks: add the arm multi to --arms."
        )
    return Plan(planned, tuple(seeds), joint, tuple(_notes(recipe, named)))


def check_earlier(experiment: Experiment, trial: Trial) -> None:
    """Raise a ``ValueError`` if the run folder of this name was trained with another recipe."""
    file = experiment.runs / trial.name / "config.yaml"
    if not file.is_file():
        return
    now = load_recipe(experiment.config, [*experiment.overrides, *trial.overrides])
    if difference := difference_of(_content(load_saved_recipe(file)), _content(now)):
        raise ValueError(
            f"{file.parent} was trained with {difference}; give the arm another name, or choose another --output."
        )


def _parts(arm: str, recipe: Recipe, custom: Mapping[str, Sequence[str]]) -> dict[str, list[Part]]:
    """The arms of the tables for a name on the command line, each with its runs."""
    if arm in custom:
        return {arm: [Part(arm, tuple(custom[arm]))]}
    if arm in TASK_ARMS:
        return TASK_ARMS[arm](recipe)
    if arm in ARMS:
        overrides = tuple(ARMS[arm](recipe))
        # Arms that are the unchanged recipe share its runs.
        return {arm: [Part(arm if overrides else WHOLE, overrides)]}
    groups = [single_tasks(recipe), leave_one_out(recipe)] if "." in arm else []
    parts = {part.name: part for group in groups for parts in group.values() for part in parts}
    if arm not in parts:
        raise unknown_name("arm", arm, [*ARMS, *TASK_ARMS, *BASELINES, *custom, *parts])
    return {arm: [parts[arm]]}


def _with_seeds(
    experiment: Experiment, named: Mapping[str, Sequence[Part]], seeds: Sequence[int]
) -> Iterator[Arm]:
    settings = load_settings(experiment.deepspeed)
    recipes: dict[str, Recipe] = {}
    for name, parts in named.items():
        trials: list[Trial] = []
        for part in parts:
            recipe = load_recipe(experiment.config, [*experiment.overrides, *part.overrides])
            other = recipes.setdefault(part.name, recipe)
            if difference := difference_of(_content(other), _content(recipe)):
                raise ValueError(
                    f"two arms would share the run folders {part.name}-s{seeds[0]}, ...: one has "
                    f"{difference}. Rename the custom arm."
                )
            plan_layout(recipe, settings, world_size=experiment.ranks, gpu=False)
            experts = 0 if part.baseline else recipe.model.moe.num_experts
            trials += [
                Trial(part.name, seed, part.overrides, experts, part.baseline) for seed in seeds
            ]
        yield Arm(name, tuple(trials))


def _notes(recipe: Recipe, named: Mapping[str, Sequence[Part]]) -> Iterator[str]:
    if recipe.data.limit_eval is not None:
        yield (
            f"data.limit_eval is {recipe.data.limit_eval}: not all validation and test posts "
            "count; with null, differences are seen with fewer seeds."
        )
    if recipe.train.patience:
        yield (
            f"train.patience is {recipe.train.patience}: a run that gets no better ends early, so "
            "passes may differ (table Budget); with 0 all are made."
        )
    for name, parts in named.items():
        if name in TASK_ARMS and not any(part.overrides for part in parts):
            yield f"{name} is the recipe itself: it has one task."
    parts = [part for parts in named.values() for part in parts]
    if not any("=null" in override for part in parts for override in part.overrides):
        return
    held_out = Counter(
        task.path
        for task in recipe.tasks.values()
        if Path(task.path).suffix and "validation" not in task.splits and not task.author
    )
    shared = [path for path, tasks in held_out.items() if tasks > 1]
    if shared and recipe.data.stratify != "none":
        yield (
            f"data.stratify is {recipe.data.stratify}: of {', '.join(shared)}, runs without some of the tasks hold "
            "out other posts, and train on some that joint runs are scored on; with none all hold out the same."
        )
    default = DataConfig().mixing
    if recipe.data.mixing != default:
        yield (
            f"data.mixing is {recipe.data.mixing}: together, small data sets get more passes than alone and large "
            f"ones fewer; the sum of all posts is equal. data.mixing={default} makes each equal."
        )
    if recipe.train.eval_every != "auto":
        yield (
            f"train.eval_every is {recipe.train.eval_every} steps: short runs choose their best "
            "weights among fewer checkpoints than long ones; auto is twice an epoch in every run."
        )


def _content(recipe: Recipe) -> dict[str, object]:
    return recipe_to_dict(replace(recipe, run=RunConfig()))
