"""Rules that bind several options; those of single ones are in ``comoe.config.recipe``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import reduce

from comoe.config.errors import nearest, place_of, unknown_name
from comoe.config.fields import Table, template_fields
from comoe.config.recipe import BY_HIDING, LOSS_TABLE, OWN_COLUMNS, UNLABELLED, Recipe, TaskConfig

BY_DECODER = ("text", "label_words")
"""Kinds of task that a decoder predicts; the first one free, the other one's words are scored."""
SOFT_COLUMN = ("single_label", "multi_label")
"""Kinds whose soft labels can stand in a column, and whose head has a row of weights per label."""
BY_LABEL = (*SOFT_COLUMN, BY_DECODER[1])
"""Kinds that give a post labels of a list, by which posts can be counted."""
BY_POSTS = (*SOFT_COLUMN, "regression")
"""Kinds whose head can read several posts together."""
BY_GRADIENTS = ("gradnorm", "pcgrad", "cagrad")
"""Weightings that read each task's gradient by the last shared states."""
DRAWN = ("random",)
"""Gates that draw experts at random."""
BY_ADAPTERS = ("lora",)
"""Forms of experts that lie in the linear maps of a frozen model."""
BUILT_IN_LOSSES = Table("comoe.losses.objective", "BUILT_IN")
BY_TEMPERATURE = ("temperature", "progress")
"""Mixings that read ``data.mixing_temperature``."""
BY_PROGRESS = ("progress",)
"""Mixings whose rates change at evaluations."""
Broken = Iterator[tuple[str, str]]
"""Of the rules that a recipe breaks: key path, and the rest of a sentence."""


def validate(
    recipe: Recipe, *, origins: Mapping[str, str] | None = None, saved: bool = False
) -> None:
    """Check what needs no data, no encoder and no table of another module.

    Args:
        recipe: the recipe.
        origins: key path -> "file:line", put in front of messages.
        saved: of a run that was begun, by rules that may have been others.

    Raises:
        ValueError: the first broken rule: key path, value, rule.
    """
    for rules in RULES if saved else (*RULES, *RULES_OF_NEW):
        for path, message in rules(recipe):
            raise ValueError(f"{place_of(path, origins or {})}{path} {message}")


def _tasks(recipe: Recipe) -> Broken:
    tasks = recipe.tasks
    if not tasks:
        example = "`tasks: {mood: {path: mood.csv}}`"
        yield "tasks", f"is empty; give the recipe at least one task, as in {example}."
    for name, task in tasks.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name):
            rule = "use at most 100 letters, digits, dashes, underscores; no dash first"
            yield f"tasks.{name}", f"is not a task name; {rule}."
        if not task.path:
            # A misspelled task in an override makes a new one, which has nothing but that option.
            guess = nearest(name, [other for other in tasks if other != name])
            hint = f" Did you mean task {guess}?" if guess else ""
            rule = "it must be the folder, file or hub name of the task's posts"
            yield f"tasks.{name}.path", f"is ''; {rule}; it is empty.{hint}"
        if task.confidence_strategy != "none" and task.confidence is None:
            column = f"name the column: tasks.{name}.confidence"
            yield f"tasks.{name}.confidence_strategy", f"is {task.confidence_strategy}; {column}."
        if task.descriptions and task.kind not in SOFT_COLUMN:
            rule = f"has no meaning for kind {task.kind}, whose head has no weights of its own per label"
            yield (
                f"tasks.{name}.descriptions",
                f"{rule} ({', '.join(SOFT_COLUMN)} have); leave it out.",
            )
        if task.limit_per_label is not None and task.kind not in BY_LABEL:
            rule = f"has no meaning for kind {task.kind} ({', '.join(BY_LABEL)} have); use limit"
            yield f"tasks.{name}.limit_per_label", f"{rule}."
        yield from (_decoded if task.kind in BY_DECODER else _not_decoded)(f"tasks.{name}", task)
        yield from _together(f"tasks.{name}", task)
    labelled = {name: task for name, task in tasks.items() if task.kind != UNLABELLED}
    if not labelled:
        yield "tasks", f"has no task with labels ({', '.join(tasks)} are unlabelled); add one."
    if all(task.auxiliary for task in labelled.values()):
        rule = "is true for it and all others; set it to false for one task"
        yield f"tasks.{next(iter(labelled))}.auxiliary", f"{rule} with labels."


def _together(key: str, task: TaskConfig) -> Broken:
    """Options of a task that reads more than a post."""
    if task.per == "author":
        if task.author is None:
            yield (
                f"{key}.per",
                f"is author; name the column that says who wrote a post: {key}.author.",
            )
        if task.context is not None:
            yield f"{key}.context", "is of a post, but per is author; leave one of them out."
    if task.context is None and task.context_as != "segment":
        yield (
            f"{key}.context_as",
            f"is {task.context_as}, but there is no {key}.context; name its column.",
        )
    if task.context is not None:
        if task.kind in BY_DECODER:
            yield f"{key}.context", f"has no meaning for kind {task.kind}; give it as {key}.pair."
        if task.pair is not None:
            yield f"{key}.context", "and pair are both behind the post; leave one of them out."
    several = {"per": task.per == "author", "context_as": task.context_as == "neighbors"}
    for option in (option for option, joined in several.items() if joined):
        value = getattr(task, option)
        if task.kind not in BY_POSTS:
            rule = f"({value}) has no meaning for kind {task.kind} ({', '.join(BY_POSTS)} have)"
            yield f"{key}.{option}", f"{rule}; leave it out."
        for other in ("image", "soft_label", "pair"):
            if getattr(task, other) is not None:
                rule = f"is {value}, which reads the texts of several posts and no {key}.{other}"
                yield f"{key}.{option}", f"{rule}; leave one of them out."


def _decoded(key: str, task: TaskConfig) -> Broken:
    """Options of a task that a decoder predicts."""
    scored, usual = task.kind != BY_DECODER[0], TaskConfig()
    also = " (Kind text with labels is label_words; without labels it writes.)" if scored else ""
    if task.prompt is None:
        example = f"{key}.prompt='sentiment of: {{text}}' ({{pair}} stands for the second text)"
        yield f"{key}.prompt", f"is what the encoder reads for kind {task.kind}: {example}."
    elif "pair" in template_fields(task.prompt) and task.pair is None:
        yield f"{key}.prompt", f"has {{pair}}; name the column of the second text: {key}.pair."
    if task.contrastive is True:
        yield f"{key}.contrastive", "is true, but a decoder predicts the task; make it auto."
    if task.label_smoothing:
        rule = f"has no meaning for kind {task.kind}; leave it out"
        yield f"{key}.label_smoothing", f"{rule}.{also}"
    for option in ("num_beams", "max_answer_length"):
        if scored and getattr(task, option) != getattr(usual, option):
            rule = f"has no meaning for kind {task.kind}, whose words are scored; leave it out"
            yield f"{key}.{option}", f"{rule}.{also}"
    if not scored and task.length_normalized:
        yield f"{key}.length_normalized", f"is for kind label_words, not {task.kind}; leave it out."
    if not scored and task.label_words:
        rule = f"needs {key}.labels, whose words they are; without them the text is free"
        yield f"{key}.label_words", f"{rule}."


def _not_decoded(key: str, task: TaskConfig) -> Broken:
    """Options that only a decoder reads."""
    usual = TaskConfig()
    for option in (
        "prompt",
        "label_words",
        "length_normalized",
        "max_answer_length",
        "num_beams",
    ):
        if getattr(task, option) != getattr(usual, option):
            rule = "leave it out, or let a decoder predict the task: kind text or label_words"
            yield f"{key}.{option}", f"has no meaning for kind {task.kind}; {rule}."


def _experts(recipe: Recipe) -> Broken:
    moe, loss, ep_size = recipe.model.moe, recipe.loss, recipe.parallel.ep_size
    E, k = moe.num_experts, moe.top_k
    if E and k > E:
        yield "model.moe.top_k", f"({k}) must be at most model.moe.num_experts ({E}); lower it."
    if E and k == E and loss.balance_weight:
        every = (
            f"with model.moe.top_k = num_experts ({k}) every expert runs and the loss is constant"
        )
        rule = "set it to 0, or lower top_k"
        yield "loss.balance_weight", f"is {loss.balance_weight}, but {every}; {rule}."
    # The bias of a single expert stays 0, so the default balance may stay on.
    if k == E > 1 and moe.balance != "none":
        every = f"top_k = num_experts = {E}, so every expert runs for every token"
        rule = "set model.moe.balance to none"
        yield "model.moe.balance", f"({moe.balance}) has nothing to balance: {every}; {rule}."
    if E and moe.gate in DRAWN:
        yield from _random_gate(recipe)
    if E and moe.task_prior:
        yield from _task_prior(recipe)
    if E and moe.form in BY_ADAPTERS:
        yield from _adapters(recipe)
    if isinstance(ep_size, int) and E % ep_size:
        sizes = [size for size in range(1, E + 1) if E % size == 0]
        rule = f"must divide model.moe.num_experts ({E}); set it to auto or one of {sizes}"
        yield "parallel.ep_size", f"({ep_size}) {rule}."


def _random_gate(recipe: Recipe) -> Broken:
    moe = recipe.model.moe
    drawn = "draws one expert for each post, whatever router and balance say"
    wanted = {
        "model.moe.top_k": (moe.top_k, 1),
        "model.moe.route_by": (moe.route_by, "token"),
        "model.moe.balance": (moe.balance, "none"),
        "loss.balance_weight": (recipe.loss.balance_weight, 0),
        "loss.z_weight": (recipe.loss.z_weight, 0),
        "loss.task_separation_weight": (recipe.loss.task_separation_weight, 0),
    }
    for key, (value, only) in wanted.items():
        if value != only:
            yield key, f"is {value}, but model.moe.gate {moe.gate} {drawn}; make it {only}."
    for name, task in recipe.tasks.items():
        if task.kind in BY_DECODER:
            rule = f"is predicted by a decoder, where model.moe.gate {moe.gate} draws nothing; choose another gate"
            yield f"tasks.{name}.kind", f"({task.kind}) {rule}."


def _adapters(recipe: Recipe) -> Broken:
    moe, ep_size = recipe.model.moe, recipe.parallel.ep_size
    if ep_size not in ("auto", 1):
        rule = f"but expert parallelism is for model.moe.form beside, and it is {moe.form}, whose experts are small"
        yield "parallel.ep_size", f"is {ep_size}, {rule} and whole on every rank; make it auto."
    if moe.gate in DRAWN:
        rule = "but a gate that draws is for model.moe.form beside: the mean of low-rank experts is no low-rank expert"
        yield "model.moe.gate", f"is {moe.gate}, {rule}; choose sigmoid or softmax."
    if moe.shared_width:
        rule = "but a shared expert is for model.moe.form beside; make it 0, or take more experts"
        yield "model.moe.shared_width", f"is {moe.shared_width}, {rule}."


def _task_prior(recipe: Recipe) -> Broken:
    moe, tasks = recipe.model.moe, len(recipe.tasks)
    if moe.route_by == "token":
        rule = "but a gate that is routed by token does not know the task; set model.moe.route_by to task or both"
        yield "model.moe.task_prior", f"is {moe.task_prior}, {rule}, or make it 0."
    if moe.task_prior == "own" and (moe.num_experts % tasks or moe.num_experts < moe.top_k * tasks):
        rule = f"wants as many experts for each of the {tasks} tasks, at least model.moe.top_k ({moe.top_k})"
        given = f"set model.moe.num_experts ({moe.num_experts}) to a multiple of {tasks}"
        yield "model.moe.task_prior", f"(own) {rule}; {given}, at least {moe.top_k * tasks}."


def _encoder(recipe: Recipe) -> Broken:
    model = recipe.model
    frozen = model.moe.num_experts and model.moe.form in BY_ADAPTERS
    whole = ("all",) if frozen else ("all", "auto")
    if model.random_width is not None and model.train_layers not in whole:
        why = f"but model.random_width ({model.random_width}) starts from random weights"
        yield "model.train_layers", f"is {model.train_layers}, {why}; make it all."
    for name, task in recipe.tasks.items():
        if model.own_layers and task.kind in BY_DECODER:
            why = f"but a decoder predicts {name}, for which all tasks share the layers"
            remedy = "make it 0, or give the task a kind that a head predicts"
            yield "model.own_layers", f"is {model.own_layers}, {why}; {remedy}."
        if model.random_width is not None and task.descriptions:
            why = f"model.random_width ({model.random_width}) starts from random weights"
            yield (
                f"tasks.{name}.descriptions",
                f"need a pre-trained encoder, but {why}; leave it out.",
            )


def _lexicon(recipe: Recipe) -> Broken:
    path, weight = recipe.model.lexicon.path, recipe.loss.lexicon_weight
    if weight and path is None:
        yield "loss.lexicon_weight", f"is {weight}; give model.lexicon.path too, or make it 0."
    if path and not (weight or recipe.model.lexicon.input):
        yield "model.lexicon.input", f"is false, so nothing reads {path}; set loss.lexicon_weight."
    for name in (name for name, task in recipe.tasks.items() if path and task.kind in BY_DECODER):
        rule = "whose prompt has no numbers of words; leave it out, or choose a kind with a head"
        yield "model.lexicon.path", f"is {path}, but a decoder predicts {name}, {rule}."


def _losses(recipe: Recipe) -> Broken:
    loss, sides = recipe.loss, recipe.loss.image_text
    if loss.r_drop_weight and loss.weighting in BY_GRADIENTS:
        rule = (
            f"does not go with loss.weighting {loss.weighting}, which reads gradients of one pass"
        )
        yield "loss.r_drop_weight", f"{rule}; set one of them otherwise."
    if loss.orthogonal_weight and not recipe.model.private_width:
        rule = "set model.private_width, or make it 0"
        yield "loss.orthogonal_weight", f"needs private parts to keep apart; {rule}."
    if sides.itc_weight + sides.itm_weight >= 1:
        share = f"{sides.itc_weight} + loss.image_text.itm_weight {sides.itm_weight}"
        rule = "leaves nothing of 1 to the tasks; lower one of them"
        yield "loss.image_text.itc_weight", f"{share} {rule}."
    if loss.contrastive.queue_size and loss.contrastive.over == "local":
        rule = "needs loss.contrastive.over: global, so that all ranks hold one queue"
        yield "loss.contrastive.queue_size", f"{rule}."
    if loss.contrastive.chunk_size is not None and recipe.train.micro_batch_size != "auto":
        rule = "but loss.contrastive.chunk_size already sets it; make it auto"
        yield "train.micro_batch_size", f"is {recipe.train.micro_batch_size}, {rule}."
    if recipe.model.own_layers and loss.weighting in BY_GRADIENTS:
        reads = "reads the gradient of each task by the last states that all tasks share"
        rule = f"which lie inside of the encoder with model.own_layers ({recipe.model.own_layers})"
        remedy = (
            "choose another weighting, such as uncertainty_positive, or set model.own_layers to 0"
        )
        yield "loss.weighting", f"({loss.weighting}) {reads}, {rule}; {remedy}."
    decoded = [name for name, task in recipe.tasks.items() if task.kind in BY_DECODER]
    if decoded and loss.weighting in BY_GRADIENTS:
        reads = "reads the gradient of each task by the last states that all tasks share"
        rule = f"which leaves a decoder out, but a decoder predicts {', '.join(decoded)}"
        others = "choose another weighting, such as uncertainty_positive or dynamic_average"
        remedy = f"{others}, or give these tasks a kind that a head predicts"
        yield "loss.weighting", f"({loss.weighting}) {reads}, {rule}; {remedy}."


def _added_losses(recipe: Recipe) -> Broken:
    known = sorted({*LOSS_TABLE.words()} - {*BUILT_IN_LOSSES.words()})
    for name in recipe.loss.added:
        if name not in known:
            there = ", ".join(known) or "none; name its module in plugins"
            yield (
                "loss.added",
                f"has {name!r}, which no plugin of this recipe adds (there is {there}).",
            )


def _fractions(recipe: Recipe) -> Broken:
    test, validation = recipe.data.test_fraction, recipe.data.validation_fraction
    if test and test + validation >= 1:
        both = f"is {test:g} and data.validation_fraction {validation:g}"
        yield "data.test_fraction", f"{both}; together they leave nothing to train on: lower one."


def _mixing(recipe: Recipe) -> Broken:
    temperature = recipe.data.mixing_temperature
    if recipe.data.mixing in BY_TEMPERATURE and temperature < 1:
        why = "below, small data sets would vanish. 1 is proportional, 2 is usual, more is closer"
        yield "data.mixing_temperature", f"({temperature}) must be at least 1: {why} to uniform."


def _reptile(recipe: Recipe) -> Broken:
    train, loss, steps = recipe.train, recipe.loss, recipe.train.reptile_steps
    if not steps:
        return
    if train.max_steps and train.max_steps % steps:
        rule = (
            f"is {train.max_steps}, which cuts an inner loop of train.reptile_steps ({steps}) short"
        )
        more = -(-train.max_steps // steps) * steps
        yield "train.max_steps", f"{rule}; take a multiple of {steps}, such as {more}."
    together = "which compares data sets within a step, and each step has one of them"
    by_task = loss.adversarial.weight and loss.adversarial.predict == "task"
    wrong = {
        "train.average_weights": (train.average_weights, "which chooses the weights to export too"),
        "data.mixing": (recipe.data.mixing in BY_PROGRESS, "whose rates change within their turns"),
        "loss.weighting": (loss.weighting in BY_GRADIENTS, together),
        "loss.task_separation_weight": (loss.task_separation_weight, together),
        "loss.adversarial.weight": (by_task, f"{together} (loss.adversarial.predict: task)"),
        "loss.contrastive.first_steps": (
            loss.contrastive.first_steps,
            "a stage in which no task is learned",
        ),
    }
    for key, (broken, why) in wrong.items():
        if broken:
            *path, name = key.split(".")
            value = getattr(reduce(getattr, path, recipe), name)
            rule = f"is {value}, {why}, and does not go with train.reptile_steps ({steps})"
            yield key, f"{rule}; leave one of them out."


def _early_stop(recipe: Recipe) -> Broken:
    key, metric, tasks = "train.early_stop_metric", recipe.train.early_stop_metric, recipe.tasks
    soft = recipe.distill.teachers or any(task.soft_label for task in tasks.values())
    if metric == "mean" or (metric == "teacher_kl" and soft):
        return
    task, slash, _ = metric.partition("/")
    if not slash:
        some = f"mean or task/metric: {next(iter(tasks))}/macro_f1"
        yield (
            key,
            f"is {metric!r}; give {some}; with distill.teachers or tasks.<name>.soft_label also teacher_kl.",
        )
    if task not in tasks:
        yield key, f"is {metric!r}: {unknown_name('task', task, tasks)}"
    if tasks[task].auxiliary:
        yield key, f"is {metric!r}, but tasks.{task} is auxiliary; name another task, or mean."


def _distillation(recipe: Recipe) -> Broken:
    config = recipe.distill
    for name, task in recipe.tasks.items():
        if task.soft_label is not None and task.kind not in SOFT_COLUMN:
            rule = (
                f"has no meaning for kind {task.kind}; leave it out ({', '.join(SOFT_COLUMN)} have)"
            )
            yield f"tasks.{name}.soft_label", f"{rule}."
    if config.unlabelled and not config.teachers:
        rule = "is given, but there are no teachers to label these posts; name some in distill.teachers"
        yield "distill.unlabelled", f"{rule}, or make the posts a task of kind unlabelled."
    for name in config.tasks:
        if name not in recipe.tasks:
            yield "distill.tasks", f"names {name!r}: {unknown_name('task', name, recipe.tasks)}"
    learning = config.tasks or recipe.tasks if config.teachers else ()
    for name in learning:
        if recipe.tasks[name].per == "author" or recipe.tasks[name].context_as == "neighbors":
            rule = "which reads several posts together, and teachers say something of one"
            yield "distill.tasks", f"has {name}, {rule}; list the other tasks."
        if recipe.tasks[name].kind == BY_DECODER[0]:
            others = ", ".join(task for task in recipe.tasks if task != name) or "none"
            rule = "free text has no soft labels, and is learned from gold ones alone"
            yield "distill.tasks", f"has {name}, but {rule}; list the other tasks ({others})."


def _hiding(recipe: Recipe) -> Broken:
    """Options of a task that hides words."""
    for name, task in recipe.tasks.items():
        key, usual = f"tasks.{name}", TaskConfig()
        if task.kind != BY_HIDING:
            if task.probability != usual.probability:
                rule = f"has no meaning for kind {task.kind}, which hides no word; leave it out"
                yield f"{key}.probability", f"{rule}."
            continue
        if task.contrastive is True:
            rule = "is true, but the task pools nothing; make it auto, or add a task of kind unlabelled"
            yield f"{key}.contrastive", f"{rule} on these posts."
        if recipe.data.hide == "text":
            yield (
                "data.hide",
                f"is text, and {key} hides words of it; make it none, or drop the task.",
            )
        if name in recipe.distill.tasks:
            yield "distill.tasks", f"has {name}, whose words need no teacher; list the other tasks."


def _names(recipe: Recipe) -> Broken:
    """Names that stand for something else where predictions and results are read."""
    by_letters: dict[str, str] = {}
    for name in recipe.tasks:
        if name in TAKEN:
            yield f"tasks.{name}", f"is no name for a task: {TAKEN[name]}; rename it."
        if (other := by_letters.setdefault(name.casefold(), name)) != name:
            rule = "some file systems take their plots and predictions for the same files"
            shown = f"and tasks.{other} differ by upper and lower case alone; {rule}; rename one."
            yield f"tasks.{name}", shown


TAKEN = dict.fromkeys(OWN_COLUMNS, "each prediction has a field of that name itself") | {
    "mean": "results and train.early_stop_metric call the mean of all tasks so"
}
"""Name -> what it is taken for."""

RULES_OF_NEW: tuple[Callable[[Recipe], Broken], ...] = (_names,)
"""Rules of later versions, which runs from before may break."""

RULES: tuple[Callable[[Recipe], Broken], ...] = (
    _tasks,
    _encoder,
    _experts,
    _lexicon,
    _losses,
    _added_losses,
    _fractions,
    _mixing,
    _reptile,
    _early_stop,
    _distillation,
    _hiding,
)
