"""What a task is: its kind, its labels and how it is weighed and measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from comoe.config.errors import unknown_name
from comoe.config.recipe import TaskConfig
from comoe.tasks.kinds.base import OWN_ROWS, Kind, Mode
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.metrics import METRICS
from comoe.tasks.prompts import resolve_label_words


@dataclass(frozen=True, slots=True)
class Task:
    """One task with everything resolved: no ``auto``, no empty label list."""

    name: str
    """Key in the recipe."""
    kind: str
    """Key of ``KINDS``."""
    labels: tuple[str, ...]
    """Label names in the order of their ids; empty for regression."""
    metric: str
    """Main metric, one of the kind's."""
    weight: float = 1.0
    """Weight of the loss under ``loss.weighting: static``."""
    class_weights: tuple[float, ...] | None = None
    """One number per label, None for all equal."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all labels."""
    contrastive: bool = False
    """Takes part in the contrastive loss."""
    contrastive_weight: float = 1.0
    """Weight within the contrastive term."""
    contrastive_temperature: float | None = None
    """Own temperature there; None is that of the term."""
    contrastive_width: float | None = None
    """Difference of two numbers at which they are alike by 1/e; None for kinds without numbers."""
    auxiliary: bool = False
    """Helps the others: in no mean of metrics, and no checkpoint is chosen by it."""
    slices: tuple[str, ...] = ()
    """Columns by whose values the main metrics are also given."""
    confidence_strategy: str = "none"
    """Key of ``CONFIDENCE_STRATEGIES``."""
    temperature: float | None = None
    """What predictions divide logits by, so that probabilities are frequencies; no loss reads it.
    None: not fitted, 1."""
    thresholds: tuple[float, ...] | None = None
    """Probabilities from which labels are given: one per label, or, where two labels exclude one
    another, that of the label with id 1. None is 0.5."""
    prior: tuple[float, ...] | None = None
    """Share of the validation posts that have each label, half a post added to each side. None: not
    known."""
    score_prior: tuple[float, ...] | None = None
    """The mix of labels that its probabilities are for, as the validation posts show it; another
    one than ``prior`` where training weighed classes. None: not known."""
    score_power: float = 1.0
    """Power of its probabilities that goes with it."""
    label_mean: float = 0.0
    """Regression: the head's output 0 is this label."""
    label_std: float = 1.0
    """Regression: a difference of 1 in the head's output is one of this in the label."""

    reads: str = "post"
    """What is read for one prediction: a post; an author, several posts at once; a post with its
    context behind it; or with its neighbors, each read by itself (words of ``READS``)."""
    probability: float = 0.15
    """Share of the words that are hidden from the encoder, of kinds in masked mode."""
    prompt: str | None = None
    """What the encoder reads of a post where a decoder predicts, see ``comoe.tasks.prompts``; else
    None."""
    label_words: tuple[str, ...] = ()
    """Words that the decoder scores, one text per label; empty for other kinds."""
    length_normalized: bool = False
    """Predict by the mean log-probability of their tokens instead of the sum."""
    max_answer_length: int = 32
    """Most tokens of a text that the decoder writes, its end token included."""
    num_beams: int = 1
    """Beams of its search; 1 is greedy."""

    @property
    def rules(self) -> Kind:
        """The rules of this task's kind.

        Raises:
            ValueError: no such kind.
        """
        return kind_of(self.kind)

    @property
    def mode(self) -> Mode:
        """What gives its output: ``pooled``, ``tokens``, ``decoder`` or ``masked``."""
        return self.rules.mode

    @property
    def own_rows(self) -> bool:
        """True when no other task reads its rows of a batch."""
        return self.mode in OWN_ROWS

    @property
    def views(self) -> bool:
        """True when its positives in the contrastive loss are two dropout views of one post."""
        return not self.rules.num_keys(self.labels)

    def weighs(self, place: str) -> bool:
        """Whether a post's confidence counts at this place in training: "input" or "output"."""
        return place in CONFIDENCE_STRATEGIES[self.confidence_strategy]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        plain = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Task:
        """The task that ``to_dict`` wrote.

        Raises:
            ValueError: a key that tasks do not have, a value of another type, or a kind or metric
                that does not exist.
        """
        if not isinstance(plain, Mapping):
            raise ValueError(f"a task is {plain!r}; it must have a name, a kind and labels.")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in plain:
            if key not in known:
                raise unknown_name("field of a task", key, known)
        try:
            task = _checked().validate_python(dict(plain))
        except ValidationError as error:
            found = error.errors()[0]
            place = ".".join(map(str, found["loc"]))
            raise ValueError(
                f"task {plain.get('name')!r}: {place} is {found['input']!r}; {found['msg']}."
            ) from error
        _resolve_metric(task.name, task.metric, kind=task.rules, labels=task.labels)
        if task.reads not in READS:
            raise unknown_name("Task.reads", task.reads, READS)
        if task.confidence_strategy not in CONFIDENCE_STRATEGIES:
            raise unknown_name(
                "confidence strategy", task.confidence_strategy, CONFIDENCE_STRATEGIES
            )
        return task


def tasks_from(plain: Sequence[Mapping[str, Any]], *, place: object) -> list[Task]:
    """The tasks that ``to_dict`` wrote into a file; ValueError names it (``place``) and what is wrong."""
    try:
        return [Task.from_dict(one) for one in plain]
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


@functools.cache
def _checked() -> TypeAdapter[Task]:
    return TypeAdapter(Task)


def decoder_tasks(tasks: Sequence[Task]) -> dict[int, Task]:
    """Number -> task, of those whose output the decoder gives."""
    return {number: task for number, task in enumerate(tasks) if task.mode == "decoder"}


def masked_tasks(tasks: Sequence[Task]) -> dict[int, Task]:
    """Number -> task, of those that find words which are hidden from the encoder."""
    return {number: task for number, task in enumerate(tasks) if task.mode == "masked"}


def head_tasks(tasks: Sequence[Task]) -> dict[int, Task]:
    """Number -> task, of those whose output a head gives of the post as it is."""
    return {number: task for number, task in enumerate(tasks) if not task.own_rows}


def kind_of(name: str) -> Kind:
    """The rules of a kind of task.

    Raises:
        ValueError: no such kind.
    """
    if name not in KINDS:
        raise unknown_name("kind of task", name, KINDS)
    return KINDS[name]


def build_task(
    name: str,
    config: TaskConfig,
    *,
    labels: Sequence[str],
    label_counts: Mapping[str, int],
    label_moments: tuple[float, float] | None = None,
) -> Task:
    """Resolve one task of the recipe against its data.

    Args:
        name: key in the recipe.
        config: the task's options.
        labels: label names in the order of their ids, from the recipe or found in the training
            split.
        label_counts: label name -> training posts (words, for tags) that have it; ``class_weights:
            balanced`` reads it.
        label_moments: mean and standard deviation of the training labels where they are numbers;
            ``contrastive_width: auto`` and ``standardize`` read them.

    Raises:
        ValueError: kind, metric, labels or class weights that do not exist or do not fit one
            another.
    """
    kind, labels = KINDS[config.kind], tuple(labels)
    _check_labels(name, config, labels)
    label_mean, label_std = (config.standardize and label_moments) or (0.0, 1.0)
    return Task(
        name=name,
        kind=config.kind,
        labels=labels,
        metric=_resolve_metric(name, config.metric, kind=kind, labels=labels),
        weight=config.weight,
        class_weights=_class_weights(
            name, config.class_weights, kind=kind, labels=labels, counts=label_counts
        ),
        label_smoothing=config.label_smoothing,
        contrastive=(
            kind.mode == "pooled" if config.contrastive == "auto" else bool(config.contrastive)
        ),
        contrastive_weight=config.contrastive_weight,
        contrastive_temperature=config.contrastive_temperature,
        contrastive_width=(label_moments and label_moments[1])
        if config.contrastive_width == "auto"
        else float(config.contrastive_width),
        auxiliary=config.auxiliary,
        slices=tuple(config.slices),
        confidence_strategy=config.confidence_strategy,
        label_mean=label_mean,
        label_std=label_std,
        reads=_reads(config),
        probability=config.probability,
        prompt=config.prompt,
        label_words=resolve_label_words(name, config.label_words, kind=kind, labels=labels),
        length_normalized=config.length_normalized,
        max_answer_length=config.max_answer_length,
        num_beams=config.num_beams,
    )


READS = ("post", "author", "context", "neighbors")
"""Words of ``Task.reads``."""

TOGETHER = ("author", "neighbors")
"""Those that are several rows of a batch."""


def _reads(config: TaskConfig) -> str:
    if config.per == "author":
        return "author"
    if config.context is None:
        return "post"
    return "context" if config.context_as == "segment" else "neighbors"


def _check_labels(name: str, config: TaskConfig, labels: tuple[str, ...]) -> None:
    """Labels against the kind."""
    kind = KINDS[config.kind]
    listed = ", ".join(labels) or "none"
    if len(labels) < kind.min_labels:
        raise ValueError(
            f"tasks.{name} is a {config.kind} task with {len(labels)} label(s): {listed}; it needs {kind.min_labels} "
            f"or more. Check the column tasks.{name}.label, add other posts, or drop the task with tasks.{name}=null."
        )
    if labels and kind.num_outputs(labels) != len(labels):
        raise ValueError(
            f"tasks.{name}.labels ({listed}) has no meaning for a task of kind {config.kind}; leave it out."
        )
    if config.descriptions and (set(config.descriptions) != set(labels) or len(labels) < 2):
        for label in config.descriptions:
            if label not in labels:
                raise unknown_name(f"tasks.{name}.descriptions", label, labels)
        missing = ", ".join(label for label in labels if label not in config.descriptions)
        raise ValueError(
            f"tasks.{name}.descriptions has no text for {missing}; describe every label ({listed})."
            if missing
            else f"tasks.{name}.descriptions needs two labels or more to tell apart, not {listed}; leave it out."
        )
    if not kind.scored and config.contrastive is False:
        raise ValueError(
            f"tasks.{name} ({config.kind}) is there for the contrastive loss alone; set "
            f"tasks.{name}.contrastive to auto, or drop the task with tasks.{name}=null."
        )
    if CONFIDENCE_STRATEGIES[config.confidence_strategy] and not kind.scored:
        raise ValueError(
            f"tasks.{name}.confidence_strategy ({config.confidence_strategy}) has no meaning for a "
            "task without labels; leave it out."
        )
    if config.label_smoothing and not kind.min_labels:
        raise ValueError(
            f"tasks.{name}.label_smoothing has no meaning for a {config.kind} task; leave it out."
        )


def _resolve_metric(name: str, metric: str, *, kind: Kind, labels: tuple[str, ...]) -> str:
    """The main metric, checked against kind and labels."""
    if metric == "auto" or not kind.scored and metric in kind.metrics:
        return kind.metrics[0]
    if not kind.scored:
        raise ValueError(
            f"tasks.{name}.metric ({metric}) has no meaning for a task without labels; leave it out."
        )
    if metric not in kind.metrics:
        raise unknown_name(f"tasks.{name}.metric", metric, ("auto", *kind.metrics))
    try:
        # A metric that needs certain labels says so on no rows at all, before anything is trained.
        METRICS[metric]([], [], labels)
    except ValueError as error:
        raise ValueError(f"tasks.{name}.metric: {error}") from error
    return metric


def _class_weights(
    name: str,
    weights: str | Sequence[float],
    *,
    kind: Kind,
    labels: tuple[str, ...],
    counts: Mapping[str, int],
) -> tuple[float, ...] | None:
    """One number per label: as given, or N / (Y * count); a label without training posts has 1."""
    key = f"tasks.{name}.class_weights"
    if weights == "none":
        return None
    if not kind.min_labels:
        raise ValueError(
            f"{key} ({weights}) has no meaning for a task without labels; leave it out."
        )
    if weights == "balanced":
        counts_Y = [counts.get(label, 0) for label in labels]
        return tuple(sum(counts_Y) / (len(labels) * count) if count else 1.0 for count in counts_Y)
    if len(weights) != len(labels):
        listed = ", ".join(labels)
        raise ValueError(
            f"{key} has {len(weights)} numbers for {len(labels)} labels; give one each, in order: {listed}."
        )
    return tuple(float(weight) for weight in weights)


CONFIDENCE_STRATEGIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "input": ("input",),
    "output": ("output",),
    "input_output": ("input", "output"),
}
"""``confidence_strategy`` -> where the confidence of a post counts (MT-ISA, arXiv:2412.09046)."""
