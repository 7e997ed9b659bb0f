"""The arms of a comparison: named variants of one recipe with an equal budget of posts.

What stands beside an encoder layer's feed-forward has the same active width A = ``top_k *
expert_width`` in every arm with experts: k experts of width A / k, or one dense block of width A.
Posts, passes, seeds and rates are the recipe's.

Arms that train on fewer tasks have budgets equal in passes: every run goes over each of its tasks'
posts as often as the run of all tasks does, so a task alone has its share of the steps. A number of
steps instead of passes is refused here, because as many steps on fewer posts would be more passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comoe.config.recipe import AdversarialConfig, LossConfig, Recipe
from comoe.experiments.cluster.costs import ModelShape
from comoe.experiments.cluster.plan import shape_of_recipe
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.tasks.task import CONFIDENCE_STRATEGIES, kind_of

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
    return [
        name
        for name, task in recipe.tasks.items()
        if kind_of(task.kind).scored and not task.auxiliary
    ]


def alone(recipe: Recipe) -> dict[str, list[Part]]:
    """The arm ``single``: a run for every measured task with all others dropped.

    Raises:
        ValueError: no measured task, or ``train.max_steps`` is set.
    """
    tasks = measured_tasks(recipe)
    if not tasks:
        raise ValueError(
            "the arm single needs a task that has labels and is not auxiliary; the recipe has none."
        )
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
        ValueError: there are none, or nothing would be left to measure, or ``train.max_steps`` is
            set.
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
        # A weighting has nothing to weigh one task against; what is left of it would scale its
        # loss.
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


UNBALANCED = ("model.moe.balance=none", "loss.balance_weight=0")
"""Where every expert runs there is nothing to balance, and a balance term is refused."""


@dataclass(frozen=True, slots=True)
class Active:
    """What the arms with experts have in common."""

    experts: int
    """Experts per layer, E."""
    top_k: int
    """The recipe's own k."""
    width: int
    """Hidden width that a token sees in one layer, over all its experts: A."""

    def experts_words(self, gate: str, top_k: int, *, route_by: str | None = None) -> list[str]:
        """``top_k`` experts of width A / top_k, picked by ``gate``.

        Raises:
            ValueError: more than there are, or a width that does not divide.
        """
        if not 1 <= top_k <= self.experts:
            raise ValueError(
                f"an arm wants k = {top_k}, but the recipe has model.moe.num_experts = {self.experts}."
            )
        if self.width % top_k:
            raise ValueError(
                f"the active width {self.width} (top_k * expert_width of the recipe) does not divide into k = {top_k} "
                f"experts; set model.moe.expert_width to a multiple of {top_k}."
            )
        words = [f"model.moe.num_experts={self.experts}", f"model.moe.gate={gate}", f"model.moe.top_k={top_k}",
                 f"model.moe.expert_width={self.width // top_k}"]  # fmt: skip
        words += [] if route_by is None else [f"model.moe.route_by={route_by}"]
        return [*words, *(UNBALANCED if top_k == self.experts else ())]

    def dense_words(self, width: int) -> list[str]:
        """One block of this width that every token visits."""
        return ["model.moe.num_experts=1", "model.moe.top_k=1", "model.moe.gate=sigmoid", "model.moe.route_by=token",
                f"model.moe.expert_width={width}", *UNBALANCED]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Basis:
    """The recipe that arms vary."""

    recipe: Recipe
    """As the command line gives it, without any arm's words."""

    @property
    def shape(self) -> ModelShape:
        """The recipe's model; reads the encoder's shape.

        Raises:
            ValueError: an encoder that is not on this machine.
        """
        return shape_of_recipe(self.recipe)

    @property
    def active(self) -> Active:
        """E, k and active width of the recipe.

        Raises:
            ValueError: a recipe without experts, which has no active width to keep.
        """
        shape = self.shape
        if not shape.num_experts:
            raise ValueError(
                "model.moe.num_experts is 0: arms with experts keep the recipe's active width, and it has none. Give "
                "it experts, or choose other arms."
            )
        return Active(shape.num_experts, shape.top_k, shape.top_k * shape.expert_width)


def custom_arms(texts: Sequence[str]) -> dict[str, list[str]]:
    """The user's own arms from ``name:key=value,key=value`` texts.

    Raises:
        ValueError: a text of another form.
    """
    found = {}
    for text in texts:
        name, colon, words = text.partition(":")
        # A comma separates words only where a new key follows: a list such as [1,3] has commas of
        # its own.
        parts = [part.strip() for part in re.split(r",(?=[\w.-]+=)", words)]
        if not colon or not all("=" in part for part in parts):
            raise ValueError(f"--arm {text!r} must read name:key=value,key=value.")
        found[name.strip()] = parts
    return found


def _of_gate(gate: str, top_k: int | None = None) -> Callable[[Basis], list[str]]:
    return lambda basis: basis.active.experts_words(gate, top_k or basis.active.top_k)


def _of_all(gate: str, route_by: str | None = None) -> Callable[[Basis], list[str]]:
    return lambda basis: basis.active.experts_words(gate, basis.active.experts, route_by=route_by)


def _dense_total(basis: Basis) -> list[str]:
    active = basis.active
    return active.dense_words(active.width // active.top_k * active.experts)


def _of_weighting(name: str) -> Callable[[Basis], list[str]]:
    return lambda basis: [f"loss.weighting={name}"]


def _of_confidence(strategy: str) -> Callable[[Basis], list[str]]:
    def words(basis: Basis) -> list[str]:
        sure = [name for name, task in basis.recipe.tasks.items() if task.confidence is not None]
        if not sure:
            raise ValueError(
                f"the arm confidence_{strategy} is about tasks with confidences, and the recipe has none; name their "
                "column: tasks.<name>.confidence."
            )
        return [f"tasks.{name}.confidence_strategy={strategy}" for name in sure]

    return words


ARMS: dict[str, Callable[[Basis], list[str]]] = {
    "multi": lambda basis: [],
    "recipe": lambda basis: [],
    "no_experts": lambda basis: ["model.moe.num_experts=0"],
    "dense": lambda basis: basis.active.dense_words(basis.active.width),
    "dense_total": _dense_total,
    "softmax": _of_gate("softmax"),
    "sigmoid": _of_gate("sigmoid"),
    "sigmoid_k1": _of_gate("sigmoid", 1),
    "sigmoid_k2": _of_gate("sigmoid", 2),
    "sigmoid_k4": _of_gate("sigmoid", 4),
    "sigmoid_all": _of_all("sigmoid"),
    "softmax_k1": _of_gate("softmax", 1),
    "softmax_k2": _of_gate("softmax", 2),
    "softmax_k4": _of_gate("softmax", 4),
    "softmax_all": _of_all("softmax"),
    "paper": _of_all("sigmoid", route_by="task"),
    "task_and_token": lambda basis: basis.active.experts_words(
        "sigmoid", basis.active.top_k, route_by="both"
    ),
    "no_balance": lambda basis: list(UNBALANCED),
    "no_contrastive": lambda basis: ["loss.contrastive.weight=0"],
    "adversarial": lambda basis: ["loss.adversarial.weight=0.1"],
    # As wide as the encoder's own experts are by default.
    "private": lambda basis: [f"model.private_width={max(16, basis.shape.width // 4)}"],
    **{name: _of_weighting(name) for name in WEIGHTINGS},
    **{f"confidence_{name}": _of_confidence(name) for name in CONFIDENCE_STRATEGIES},
}
"""Arm of one run per seed -> the words that make it; ``dense_total`` has the parameters of all
experts in one block, so it costs more. Each weighting of the tasks is an arm of its own name; a
confidence strategy is that of all tasks which name a column of confidences."""
