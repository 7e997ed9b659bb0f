"""The arms of a comparison: named variants of one recipe with an equal budget of posts.

The block beside an encoder layer's feed-forward network has the same active width A = ``top_k *
expert_width`` in every arm with experts: k experts of width A / k, or one dense block of width A.
Posts, passes, seeds and learning rates are the recipe's.

Arms that train on fewer tasks have budgets equal in passes: every run passes over each of its
tasks' posts as often as the run of all tasks, so a single task has its share of the steps.
``train.max_steps`` is refused here, because as many steps on fewer posts would be more passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from comoe.config.recipe import AdversarialConfig, ContrastiveConfig, LossConfig, Recipe
from comoe.evaluation.evaluate import TEACHER_KL
from comoe.experiments.cluster.shape import shape_of_recipe
from comoe.inference.export_config import read_export_config
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.models.pooling import POOLINGS
from comoe.tasks.task import CONFIDENCE_STRATEGIES, kind_of

ALONE, WITHOUT, NO_AUXILIARY = "single", "without", "no_auxiliary"
"""Prefixes of the run folders ``single.<task>-s<seed>``, ``without.<task>-s<seed>``,
``no_auxiliary-s<seed>``."""

WHOLE = "recipe"
"""Prefix of the run folders of the unchanged recipe."""

UNBALANCED = ("model.moe.balance=none", "loss.balance_weight=0")
"""Where all experts run there is nothing to balance, and a balance term is refused."""


@dataclass(frozen=True, slots=True)
class Part:
    """One run of an arm, without its seed."""

    name: str
    """Prefix of its run folder's name."""
    overrides: tuple[str, ...]
    """``key=value`` changes of the recipe."""
    baseline: tuple[str, ...] = ()
    """See ``Trial``."""


def measured_tasks(recipe: Recipe) -> list[str]:
    """Tasks that are scored and not auxiliary."""
    tasks = recipe.tasks.items()
    return [name for name, task in tasks if kind_of(task.kind).scored and not task.auxiliary]


def single_tasks(recipe: Recipe) -> dict[str, list[Part]]:
    """The arm ``single``: a run for every measured task, without all other tasks.

    Raises:
        ValueError: no measured task, or ``train.max_steps`` is set.
    """
    tasks = measured_tasks(recipe)
    if not tasks:
        raise ValueError(
            "the arm single needs a task that has labels and is not auxiliary; the recipe has none."
        )
    return {ALONE: [single_task(recipe, task) for task in tasks]}


def leave_one_out(recipe: Recipe) -> dict[str, list[Part]]:
    """The arms ``without.<task>``, one per task, also of auxiliary ones: the recipe without it.

    Raises:
        ValueError: no measured task would be left, or ``train.max_steps`` is set.
    """
    measured = measured_tasks(recipe)
    droppable = [task for task in recipe.tasks if set(measured) - {task}]
    if len(recipe.tasks) < 2 or not droppable:
        raise ValueError(
            f"the arm leave_one_out drops one task and measures the others; the recipe has {', '.join(recipe.tasks)}."
        )
    drop = partial(dropping, recipe, arm="leave_one_out")
    return {f"{WITHOUT}.{task}": [Part(f"{WITHOUT}.{task}", drop([task]))] for task in droppable}


def without_auxiliary(recipe: Recipe) -> dict[str, list[Part]]:
    """The arm ``no_auxiliary``: the recipe without the tasks that are marked auxiliary.

    Raises:
        ValueError: there are none, no measured task would be left, or ``train.max_steps`` is set.
    """
    dropped = [name for name, task in recipe.tasks.items() if task.auxiliary]
    if not dropped or not measured_tasks(recipe):
        raise ValueError(
            f"the arm {NO_AUXILIARY} drops the tasks marked auxiliary and measures the others; the recipe has "
            f"{', '.join(dropped) or 'no such tasks'}. Mark them: tasks.<name>.auxiliary=true."
        )
    return {NO_AUXILIARY: [Part(NO_AUXILIARY, dropping(recipe, dropped, arm=NO_AUXILIARY))]}


def single_task(recipe: Recipe, task: str) -> Part:
    """The run of one task without all others."""
    dropped = [other for other in recipe.tasks if other != task]
    if not dropped:
        # The recipe itself: both arms share its run.
        return Part(WHOLE, ())
    overrides = [*dropping(recipe, dropped, arm=ALONE)]
    loss, default = recipe.loss, LossConfig()
    if loss.weighting != default.weighting:
        # With one task a weighting would only scale its loss.
        overrides.append(f"loss.weighting={default.weighting}")
    if loss.adversarial.weight and loss.adversarial.predict == AdversarialConfig().predict:
        overrides.append("loss.adversarial.weight=0")
    return Part(f"{ALONE}.{task}", tuple(overrides))


def dropping(recipe: Recipe, dropped: Sequence[str], *, arm: str) -> tuple[str, ...]:
    """Overrides that take tasks out of a recipe.

    Raises:
        ValueError: ``train.max_steps`` is set; the message names ``arm``.
    """
    if recipe.train.max_steps is not None:
        raise ValueError(
            f"train.max_steps is {recipe.train.max_steps}, and the arm {arm} drops tasks: as many steps on fewer posts "
            "are more passes over each, so the arms cannot be compared. Set passes instead: "
            f"train.max_steps=null train.epochs={recipe.train.epochs:g}."
        )
    stop = recipe.train.early_stop_metric.partition("/")[0] in dropped
    overrides = [*(f"tasks.{task}=null" for task in dropped), *_teachers_left(recipe, dropped)]
    stop = stop or (
        recipe.train.early_stop_metric == TEACHER_KL and "distill.teachers=[]" in overrides
    )
    return (*overrides, *(["train.early_stop_metric=mean"] if stop else []))


def _teachers_left(recipe: Recipe, dropped: Sequence[str]) -> list[str]:
    """What is left of a distillation: teachers that know none of the tasks that remain are refused in a run.

    Raises:
        ValueError: a teacher is no export.
    """
    config = recipe.distill
    left = [task for task in config.tasks or recipe.tasks if task not in dropped]
    teachers = []
    for teacher in config.teachers:
        known = read_export_config(Path(teacher).expanduser())["tasks"]
        teachers += [teacher] if any(task["name"] in left for task in known) else []
    if config.teachers and not teachers:
        return ["distill.teachers=[]", "distill.tasks=[]", "distill.unlabelled=[]"]
    # As YAML, whatever is in a path.
    changed = {"teachers": teachers} if teachers != config.teachers else {}
    changed |= {"tasks": left} if config.tasks else {}
    return [f"distill.{key}={json.dumps(value)}" for key, value in changed.items()]


TASK_ARMS: dict[str, Callable[[Recipe], dict[str, list[Part]]]] = {
    "single": single_tasks, "leave_one_out": leave_one_out, NO_AUXILIARY: without_auxiliary,
}  # fmt: skip
"""Arm of ``--arms`` -> recipe -> arms of the tables with their runs."""


def _active(recipe: Recipe) -> tuple[int, int, int]:
    """Experts per layer, experts per token, and their hidden width (of LoRA experts: rank) together: E, k, A."""
    moe = recipe.model.moe
    if moe.num_experts and WIDTHS[moe.form] == "rank":
        return moe.num_experts, moe.top_k, moe.top_k * moe.rank
    shape = shape_of_recipe(recipe)
    if not shape.num_experts:
        raise ValueError(
            "model.moe.num_experts is 0: arms with experts keep the recipe's active width, and it "
            "has none. Set model.moe.num_experts, or choose other arms."
        )
    return shape.num_experts, shape.top_k, shape.top_k * shape.expert_width


def _of_width(recipe: Recipe, width: int) -> dict[str, float]:
    """Options that make an expert so wide; a LoRA keeps its alpha / rank."""
    moe = recipe.model.moe
    alpha = {"alpha": moe.alpha / moe.rank * width} if WIDTHS[moe.form] == "rank" else {}
    return {WIDTHS[moe.form]: width} | alpha


WIDTHS = {"beside": "expert_width", "lora": "rank"}
"""Word in ``model.moe.form`` -> option with the width of an expert."""


def _experts(
    recipe: Recipe,
    *,
    gate: str = "",
    top_k: int | None = None,
    every: bool = False,
    route_by: str = "",
) -> list[str]:
    """``top_k`` experts of width A / top_k, selected by ``gate``; the recipe's own where none is given, or all."""
    experts, own, width = _active(recipe)
    top_k = experts if every else top_k or own
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"an arm needs k = {top_k}, but the recipe has model.moe.num_experts = {experts}."
        )
    if width % top_k:
        raise ValueError(
            f"the active width {width} (top_k * expert_width of the recipe) is not a multiple of k "
            f"= {top_k} experts; set model.moe.expert_width to a multiple of {top_k}."
        )
    gate = gate or recipe.model.moe.gate
    moe = {"num_experts": experts, "gate": gate, "top_k": top_k}
    moe |= _of_width(recipe, width // top_k)
    moe |= {"route_by": route_by} if route_by else {}
    moe |= {"task_prior": 0} if route_by == "token" else {}
    overrides = [f"model.moe.{key}={value}" for key, value in moe.items()]
    return [*overrides, *(UNBALANCED if top_k == experts else ())]


def _dense(recipe: Recipe, *, total: bool = False) -> list[str]:
    """One block for every token, as wide as the active experts, or as all of them."""
    experts, top_k, width = _active(recipe)
    width = width // top_k * experts if total else width
    moe = {"num_experts": 1, "top_k": 1, "gate": "sigmoid", "route_by": "token", "task_prior": 0}
    # A factor that the recipe gives its k experts is not one of a single block.
    moe |= _of_width(recipe, width) | {"gate_scale": "auto"}
    return [*(f"model.moe.{key}={value}" for key, value in moe.items()), *UNBALANCED]


def _one_per_task(recipe: Recipe) -> list[str]:
    """A block of the active width for each task."""
    _, _, width = _active(recipe)
    moe = {"num_experts": len(recipe.tasks), "top_k": 1, "gate": "sigmoid", "route_by": "task"}
    moe |= {"task_prior": "own", "gate_scale": "auto"} | _of_width(recipe, width)
    return [*(f"model.moe.{key}={value}" for key, value in moe.items()), *UNBALANCED]


def _shared(recipe: Recipe, *more: str) -> list[str]:
    """Half of the active width in an expert that every token visits, the other half in k routed ones."""
    _, top_k, width = _active(recipe)
    if width % (2 * top_k):
        raise ValueError(
            f"the active width {width} (top_k * expert_width of the recipe) does not split into a shared expert and "
            f"k = {top_k} routed ones of the same width together; make model.moe.expert_width even."
        )
    widths = {"expert_width": width // 2 // top_k, "shared_width": width // 2}
    return [*(f"model.moe.{key}={value}" for key, value in widths.items()), *more]


def _adamix(recipe: Recipe) -> list[str]:
    """Experts of the whole active width, one drawn per post, two passes that agree; predicts with one block."""
    experts, _, width = _active(recipe)
    moe = {"num_experts": experts, "top_k": 1, "gate": "random", "expert_width": width}
    moe |= {"route_by": "token", "task_prior": 0, "gate_scale": "auto"}
    terms = {"r_drop": recipe.loss.r_drop_weight or 0.5, "z": 0, "task_separation": 0}
    overrides = [f"model.moe.{key}={value}" for key, value in moe.items()]
    return [
        *overrides,
        *(f"loss.{key}_weight={value}" for key, value in terms.items()),
        *UNBALANCED,
    ]


def _confidence(recipe: Recipe, strategy: str) -> list[str]:
    known = [name for name, task in recipe.tasks.items() if task.confidence is not None]
    if not known:
        raise ValueError(
            f"the arm confidence_{strategy} needs tasks with confidences, and the recipe has none; "
            "set their column: tasks.<name>.confidence."
        )
    return [f"tasks.{name}.confidence_strategy={strategy}" for name in known]


def _contrast(recipe: Recipe, *, beside: bool, before: bool, bare: bool) -> list[str]:
    """The contrastive loss beside the tasks, before them, or never; ``bare``: random heads."""
    config = recipe.loss.contrastive
    if before and not config.first_steps:
        raise ValueError(
            "the arm contrastive_before needs the number of steps of its contrastive stage; set "
            "loss.contrastive.first_steps."
        )
    described = [name for name, task in recipe.tasks.items() if task.descriptions]
    if bare and not described:
        raise ValueError(
            "an arm ..._bare is without tasks.<name>.descriptions, and the recipe has none; leave _bare out."
        )
    weight = (config.weight or ContrastiveConfig().weight) if beside else 0
    return [
        f"loss.contrastive.weight={weight}",
        f"loss.contrastive.first_steps={config.first_steps if before else 0}",
        *(f"tasks.{name}.descriptions={{}}" for name in described if bare),
    ]


CONTRASTS = {
    "no_contrastive": {"beside": False, "before": False},
    "contrastive_beside": {"beside": True, "before": False},
    "contrastive_before": {"beside": False, "before": True},
}
"""Arm -> where it has the contrastive loss."""


def _private(recipe: Recipe) -> list[str]:
    # As wide as the encoder's own experts are by default.
    return [f"model.private_width={max(16, shape_of_recipe(recipe).width // 4)}"]


def _own_layers(recipe: Recipe, *, tied: bool) -> list[str]:
    weight = (recipe.loss.soft_sharing_weight or 0.01) if tied else 0
    return [
        f"model.own_layers={recipe.model.own_layers or 1}",
        f"loss.soft_sharing_weight={weight}",
    ]


def _task_attention(recipe: Recipe) -> list[str]:
    # As wide as a private part.
    return [f"model.task_attention_width={max(16, shape_of_recipe(recipe).width // 4)}"]


def _fixed(*overrides: str) -> Callable[[Recipe], list[str]]:
    return lambda recipe: list(overrides)


ARMS: dict[str, Callable[[Recipe], list[str]]] = {
    "multi": _fixed(),
    "recipe": _fixed(),
    "no_experts": _fixed("model.moe.num_experts=0"),
    "dense": _dense,
    "dense_total": partial(_dense, total=True),
    **{gate: partial(_experts, gate=gate) for gate in ("softmax", "sigmoid")},
    **{
        f"{gate}_k{top_k}": partial(_experts, gate=gate, top_k=top_k)
        for gate in ("softmax", "sigmoid")
        for top_k in (1, 2, 4)
    },
    **{f"{gate}_all": partial(_experts, gate=gate, every=True) for gate in ("softmax", "sigmoid")},
    "paper": partial(_experts, gate="sigmoid", every=True, route_by="task"),
    **{f"by_{what}": partial(_experts, route_by=what) for what in ("token", "task", "both")},
    "task_and_token": partial(_experts, gate="sigmoid", route_by="both"),
    "adamix": _adamix,
    "one_per_task": _one_per_task,
    "shared": _shared,
    "ple": lambda recipe: _shared(recipe, "model.moe.route_by=both", "model.moe.task_prior=1"),
    "no_balance": _fixed(*UNBALANCED),
    "averaged": _fixed("train.average_weights=0.99"),
    **{
        f"{name}{suffix}": partial(_contrast, **where, bare=bool(suffix))
        for name, where in CONTRASTS.items()
        for suffix in ("", "_bare")
    },
    "adversarial": _fixed("loss.adversarial.weight=0.1"),
    "private": _private,
    "own_layers": partial(_own_layers, tied=False),
    "soft_sharing": partial(_own_layers, tied=True),
    "task_attention": _task_attention,
    **{f"pooling_{name}": _fixed(f"model.pooling={name}") for name in POOLINGS},
    **{name: _fixed(f"loss.weighting={name}") for name in WEIGHTINGS},
    **{f"confidence_{name}": partial(_confidence, strategy=name) for name in CONFIDENCE_STRATEGIES},
}
"""Arm of one run per seed -> its overrides. ``dense_total`` has the parameters of all experts in
one block, so it costs more. Each task weighting is an arm; a confidence strategy applies to all
tasks with a column of confidences."""
