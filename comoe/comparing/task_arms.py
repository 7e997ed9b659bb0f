"""Arms that train on fewer tasks than the recipe has: each task alone, all but one, without the auxiliary ones.

Budgets are equal in passes: every run goes over each of its tasks' posts as often as the run of all tasks does, so a
task alone has its share of the steps. A number of steps instead of passes is refused here, because as many steps on
fewer posts would be more passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from comoe.schema import AdversarialConfig, LossConfig, Recipe
from comoe.tasks.catalog import kind_of

ALONE, WITHOUT = "single", "without"
"""Beginnings of the run folders ``single.<task>-s<seed>`` and ``without.<task>-s<seed>``."""
NO_AUXILIARY = "no_auxiliary"
"""Beginning of the run folders without auxiliary tasks."""
WHOLE = "recipe"
"""Beginning of the run folders of the recipe as it is."""


@dataclass(frozen=True, slots=True)
class Part:
    """One run of an arm, but for its seed."""

    name: str
    """Beginning of the name of its run folder."""
    words: tuple[str, ...]
    """``key=value`` words that make the recipe this run."""


def measured_tasks(recipe: Recipe) -> list[str]:
    """Tasks that are trained for their own sake: they have answers, and they are not marked auxiliary."""
    return [name for name, task in recipe.tasks.items() if kind_of(task.kind).scored and not task.auxiliary]


def alone(recipe: Recipe) -> dict[str, list[Part]]:
    """The arm ``single``: a run for every measured task with all others dropped.

    Raises:
        ValueError: no measured task, or ``train.max_steps`` is set.
    """
    tasks = measured_tasks(recipe)
    if not tasks:
        raise ValueError("the arm single needs a task that has labels and is not auxiliary; the recipe has none.")
    return {ALONE: [_alone(recipe, task) for task in tasks]}


def all_but_one(recipe: Recipe) -> dict[str, list[Part]]:
    """The arms ``without.<task>``, one per task, auxiliary ones too: the recipe with this task dropped.

    Raises:
        ValueError: nothing would be left to measure, or ``train.max_steps`` is set.
    """
    measured = measured_tasks(recipe)
    droppable = [task for task in recipe.tasks if set(measured) - {task}]
    if len(recipe.tasks) < 2 or not droppable:
        raise ValueError(
            f"the arm leave_one_out drops one task and measures the others; the recipe has {', '.join(recipe.tasks)}."
        )
    return {f"{WITHOUT}.{task}": [_without(recipe, task)] for task in droppable}


def without_auxiliary(recipe: Recipe) -> dict[str, list[Part]]:
    """The arm ``no_auxiliary``: the recipe without the tasks that are marked auxiliary.

    Raises:
        ValueError: there are none, or nothing would be left to measure, or ``train.max_steps`` is set.
    """
    dropped = [name for name, task in recipe.tasks.items() if task.auxiliary]
    if not dropped or not measured_tasks(recipe):
        raise ValueError(
            f"the arm {NO_AUXILIARY} drops the tasks marked auxiliary and measures the others; the recipe has "
            f"{', '.join(dropped) or 'no such tasks'}. Mark them: tasks.<name>.auxiliary=true."
        )
    return {NO_AUXILIARY: [Part(NO_AUXILIARY, tuple(_dropping(recipe, dropped, arm=NO_AUXILIARY)))]}


def is_joint(recipe: Recipe) -> bool:
    """Whether one task can gain or lose by another here."""
    return len(recipe.tasks) > 1 and bool(measured_tasks(recipe))


def _alone(recipe: Recipe, task: str) -> Part:
    dropped = [other for other in recipe.tasks if other != task]
    if not dropped:
        # The recipe itself: its run serves both arms.
        return Part(WHOLE, ())
    words = _dropping(recipe, dropped, arm=ALONE)
    loss, usual = recipe.loss, LossConfig()
    if loss.weighting != usual.weighting:
        # A weighting has nothing to weigh one task against; what is left of it would scale its loss.
        words.append(f"loss.weighting={usual.weighting}")
    if loss.adversarial.weight and loss.adversarial.predict == AdversarialConfig().predict:
        words.append("loss.adversarial.weight=0")
    return Part(f"{ALONE}.{task}", tuple(words))


def _without(recipe: Recipe, task: str) -> Part:
    return Part(f"{WITHOUT}.{task}", tuple(_dropping(recipe, [task], arm="leave_one_out")))


def _dropping(recipe: Recipe, dropped: list[str], *, arm: str) -> list[str]:
    if recipe.train.max_steps is not None:
        raise ValueError(
            f"train.max_steps is {recipe.train.max_steps}, and the arm {arm} drops tasks: as many steps on fewer posts "
            f"are more passes over each, so nothing could be compared. Say passes instead: train.max_steps=null "
            f"train.epochs={recipe.train.epochs:g}."
        )
    words = [f"tasks.{task}=null" for task in dropped]
    if recipe.train.early_stop_metric.partition("/")[0] in dropped:
        words.append("train.early_stop_metric=mean")
    return words


TASK_ARMS: dict[str, Callable[[Recipe], dict[str, list[Part]]]] = {
    "single": alone, "leave_one_out": all_but_one, NO_AUXILIARY: without_auxiliary,
}  # fmt: skip
"""Arm as it is asked for -> recipe -> arms of the tables with their runs."""

ONE_BY_ONE = (alone, all_but_one)
"""Those whose runs can be asked for one by one, as ``single.<task>`` and ``without.<task>``."""
