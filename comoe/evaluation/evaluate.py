"""Predictions on one split, on all ranks, and their metrics: whole, and per value of a column."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from comoe.config.errors import unknown_name
from comoe.evaluation.embedding_stats import EmbeddingSummary
from comoe.evaluation.routing_stats import RoutingSummary
from comoe.tasks.kinds.base import Detokenize, PostOutput
from comoe.tasks.metrics import LOWER_IS_BETTER
from comoe.tasks.slices import slice_values
from comoe.tasks.task import Task
from comoe.types import Batch, ModelOutput

SLICED_METRICS = ("accuracy", "macro_f1")
"""Metrics that a slice has beside the task's main one, where its kind has them."""

LEAST_POSTS = 20
"""Labeled posts that a value of a column needs to count in a gap: of fewer any value is chance."""


def slice_scores(
    gold: Any, scores: Any, task: Task, columns: Mapping[str, Sequence[str | None]]
) -> dict[str, float]:
    """``<metric>@<column>=<value>`` and ``n@<column>=<value>`` of every slice of the task, and
    ``gap/<metric>@<column>``, the largest minus the smallest value of ``LEAST_POSTS`` posts or more.

    Under a bound the column is ``<column><<bound>`` and its values are true and false. A post whose
    cell is empty is in no slice.

    Args:
        gold: of ``Kind.gold_and_scores``: an array or a list, one entry per labeled post.
        scores: as ``gold``.
        task: names the columns.
        columns: column -> its cell for each of these posts; a column that is not there has no
            slices.
    """
    found: dict[str, float] = {}
    for entry in task.slices:
        cells, different = slice_values(entry, columns)
        large: dict[str, list[float]] = {}
        for value in different:
            rows = np.flatnonzero([cell == value for cell in cells])
            values = task.rules.score(take_rows(gold, rows), take_rows(scores, rows), task)
            names = dict.fromkeys(
                (task.metric, *(name for name in SLICED_METRICS if name in values))
            )
            found |= {f"{name}@{entry}={value}": values[name] for name in names}
            found[f"n@{entry}={value}"] = float(len(rows))
            for name in names if len(rows) >= LEAST_POSTS else ():
                large.setdefault(name, []).append(values[name])
        for name, values_G in large.items():
            if len(values_G) > 1:
                found[f"gap/{name}@{entry}"] = max(values_G) - min(values_G)
    return found


def take_rows(values: Any, rows: np.ndarray) -> Any:
    """Some posts of what ``Kind.gold_and_scores`` gave."""
    return [values[row] for row in rows] if isinstance(values, list) else values[rows]


TEACHER_KL = "teacher_kl"
"""Metric: Kullback-Leibler divergence of the predictions from the soft labels, in nats per post
(word, for tags; of multi_label the mean over labels). It moves long before the metrics do."""

MEAN = "mean"
"""Name of the mean of all tasks' main metrics, as ``train.early_stop_metric`` spells it."""

CHOSEN = "chosen"
"""Name of the number that ``train.early_stop_metric`` asks for, larger is better, in the lines of a run."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics of a model on a split, the same on every rank; only of scored kinds."""

    metrics: dict[str, dict[str, float]]
    """Task -> metric -> value; ``n`` counts labeled rows, ``loss`` is their mean. A task without
    any is left out."""
    confusions: dict[str, np.ndarray]
    """Task -> counts of (gold, predicted), int64, (Y, Y), where its kind has such a thing."""
    predictions: dict[str, list[dict[str, Any]]]
    """Task -> per post, in the order of the split: ``row``, ``text`` where given, ``gold`` or None,
    and the prediction."""
    outputs: dict[str, list[PostOutput]] = field(default_factory=dict)
    """Task -> what all of this was made of, in the order of the split; see ``compute_metrics``."""
    routing: RoutingSummary | None = None
    """The gates' measures, where they were taken and there are experts."""
    embeddings: EmbeddingSummary | None = None
    """The embeddings and their measures, where they were taken."""
    forward_seconds: float | None = None
    """Seconds in forward passes, of the slowest rank, where they were taken."""
    divergences: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Task with soft labels -> (post, sum of its divergences from the teacher, how many), float64,
    (N, 3), of all posts that have one, labeled or not."""
    auxiliary: Container[str] = ()
    """Tasks that are in no mean."""

    def teacher_kl(self, rows: Container[int] | None = None) -> dict[str, float]:
        """Task with soft labels -> ``TEACHER_KL``, of some posts or all; ``MEAN`` leaves auxiliary tasks out."""
        found = {}
        for task, posts in self.divergences.items():
            kept = [row for row in posts if rows is None or int(row[0]) in rows]
            if kept:
                _, sums, counts = np.array(kept).T
                found[task] = float(sums.sum() / counts.sum())
        counted = [value for task, value in found.items() if task not in self.auxiliary]
        return found | ({MEAN: float(np.mean(counted))} if counted else {})


class Collate(Protocol):
    """What is needed of ``comoe.data.collator.Collator``."""

    def __call__(self, split: Any, indices: np.ndarray) -> Batch: ...


def evaluate(
    forward: Callable[[Batch], ModelOutput],
    split: Any,
    *,
    collator: Collate,
    tasks: Sequence[Task],
    batches: Iterable[np.ndarray],
    gather: Callable[[Any], list[Any]],
    detokenize: Detokenize | None = None,
    **options: Any,
) -> Evaluation:
    """Run the model over a split and score it.

    The outputs of all ranks are gathered, ordered by post and freed of duplicates before they are
    scored, so the metrics depend neither on the number of ranks nor on the batches. A post counts
    for the tasks whose label it has. A post without any label is scored nowhere and predicted for
    all tasks that it has rows for.

    Args:
        forward: the model in evaluation mode, which gets batches on the CPU; called under
            ``torch.no_grad``.
        split: what ``collator`` makes batches of.
        collator: (split, row ids) -> batch on the CPU; a filler row for no ids.
        tasks: tasks in the order of the model's.
        batches: row ids of each batch of this rank. Every rank brings the same number of them,
            empty ones if need be: under expert parallelism each forward is a collective.
        gather: object of this rank -> objects of all ranks, on all ranks.
        detokenize: ``Collator.detokenize``; needed where the decoder generates texts.
        options: ``texts``, ``columns`` and ``predictions`` of ``compute_metrics``.
    """
    scored = [task for task in tasks if task.rules.scored]
    outputs: dict[str, list[PostOutput]] = {task.name: [] for task in scored}
    divergences: dict[str, list[tuple[int, float, float]]] = {task.name: [] for task in scored}
    with torch.no_grad():
        for indices in batches:
            batch = collator(split, indices)
            output = forward(batch)
            kept = _rows_to_keep(batch, tasks)
            for task in scored:
                if rows := kept[task.name]:
                    outputs[task.name] += task.rules.outputs(
                        output, batch, rows, task=task, detokenize=detokenize
                    )
                if task.name in batch.soft_labels:
                    divergences[task.name] += _divergences(output, batch, task)
    ordered, divergences = _of_all_ranks(gather((outputs, divergences)), scored)
    return compute_metrics(ordered, tasks, divergences=divergences, **options)


def reporting(
    batches: Iterable[np.ndarray], progress: Callable[[int], object]
) -> Iterator[np.ndarray]:
    """The batches; ``progress`` is called with the number of posts of each when the next one is taken."""
    for indices in batches:
        yield indices
        progress(len(indices))


_Shares = Sequence[tuple[Mapping[str, Sequence[PostOutput]], Mapping[str, Sequence[tuple]]]]


def _of_all_ranks(
    shares: _Shares, tasks: Sequence[Task]
) -> tuple[dict[str, list[PostOutput]], dict[str, np.ndarray]]:
    """Outputs and divergences in the order of their posts."""
    ordered, divergences = {}, {}
    for task in tasks:
        by_row = {output.row: output for share, _ in shares for output in share[task.name]}
        ordered[task.name] = [by_row[row] for row in sorted(by_row)]
        found = sorted({post for _, share in shares for post in share[task.name]})
        if found:
            divergences[task.name] = np.array(found)
    return ordered, divergences


def compute_metrics(
    outputs: Mapping[str, Sequence[PostOutput]],
    tasks: Sequence[Task],
    *,
    texts: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[str | None]] | None = None,
    predictions: bool = True,
    divergences: Mapping[str, np.ndarray] | None = None,
) -> Evaluation:
    """Score outputs as these tasks read them: with their temperatures and thresholds.

    ``loss`` is that of the logits as they are, so it can be compared with the losses of training.

    Args:
        outputs: ``Evaluation.outputs``.
        tasks: those of the outputs; temperatures and thresholds may have been fitted since.
        texts: text per row of the split, shown beside the predictions.
        columns: column -> its cell per row of the split, for the tasks' slices.
        predictions: False leaves them out.
        divergences: ``Evaluation.divergences``.
    """
    metrics, confusions, shown = {}, {}, {}
    for task in tasks:
        if not task.rules.scored:
            continue
        logits, targets = task.rules.stack(outputs[task.name], task)
        gold, scores = task.rules.gold_and_scores(outputs[task.name], task)
        if len(gold):
            loss = task.rules.loss(logits, targets, task) / task.rules.normalizer(targets, task)
            metrics[task.name] = {"n": float(len(gold)), "loss": float(loss)} | task.rules.score(
                gold, scores, task
            )
            labelled = np.flatnonzero(task.rules.labelled(targets))
            rows = [outputs[task.name][place].row for place in labelled]
            cells = {
                name: [column[row] for row in rows] for name, column in (columns or {}).items()
            }
            metrics[task.name] |= slice_scores(gold, scores, task, cells)
            confusion = task.rules.confusion(gold, scores, task)
            if confusion is not None:
                confusions[task.name] = confusion
        if predictions:
            shown[task.name] = _predictions(outputs[task.name], task=task, texts=texts)
    found = Evaluation(
        metrics,
        confusions,
        shown,
        dict(outputs),
        divergences=divergences or {},
        auxiliary=[task.name for task in tasks if task.auxiliary],
    )
    for name, value in found.teacher_kl().items():
        if name in metrics:
            metrics[name][TEACHER_KL] = value
    return found


def mean_metric(metrics: Mapping[str, Mapping[str, float]], tasks: Sequence[Task]) -> float:
    """Mean of the tasks' main metrics, larger is better: where lower is better, negated.

    Auxiliary tasks are in no mean: they are there for the others.

    Raises:
        ValueError: no task that counts has a labeled post in the split.
    """
    counted = [task for task in tasks if not task.auxiliary]
    values = [
        higher_is_better(task.metric, metrics[task.name][task.metric])
        for task in counted
        if task.name in metrics
    ]
    if not values:
        names = ", ".join(task.name for task in counted)
        raise ValueError(
            f"the split has no labeled post of any task ({names}), so there is no metric to choose by."
        )
    return float(np.mean(values))


def chosen_metric(
    metrics: Mapping[str, Mapping[str, float]], tasks: Sequence[Task], name: str
) -> float:
    """The number that early stopping and the best checkpoint go by; larger is better.

    Args:
        metrics: ``Evaluation.metrics``.
        tasks: all tasks.
        name: ``mean``, ``teacher_kl`` (the mean over tasks), or ``task/metric`` with any key of
            that task's metrics ("mood/f1/joy", "mood/loss").

    Raises:
        ValueError: no such task or metric, or no labeled post of the task in the split.
    """
    check_chosen_metric(name, tasks, distilled=[task.name for task in tasks])
    if name == MEAN:
        return mean_metric(metrics, tasks)
    if name == TEACHER_KL:
        counted = [metrics.get(task.name, {}) for task in tasks if not task.auxiliary]
        return -float(np.mean([found[TEACHER_KL] for found in counted if TEACHER_KL in found]))
    task, _, metric = name.partition("/")
    if task not in metrics:
        raise ValueError(
            f"train.early_stop_metric is {name!r}, but the split has no labeled post of {task}; use mean."
        )
    return higher_is_better(metric, metrics[task][metric])


def check_chosen_metric(
    name: str,
    tasks: Sequence[Task],
    *,
    measured: Container[str] | None = None,
    distilled: Container[str] = (),
) -> None:
    """Refuse an ``early_stop_metric`` that no evaluation will have; called before training.

    Args:
        name: ``train.early_stop_metric``.
        tasks: all tasks.
        measured: names of the tasks that validation posts have a label of; None does not ask for
            any.
        distilled: names of the tasks that teachers know, which have ``teacher_kl``.

    Raises:
        ValueError: no such metric, with the nearest one; or nothing to measure it on.
    """
    scored = [task for task in tasks if task.rules.scored and not task.auxiliary]
    valid = [MEAN, *(f"{task.name}/{metric}" for task in scored for metric in metric_names(task))]
    known = [task.name for task in scored if task.name in distilled]
    if known:
        valid += [TEACHER_KL, *(f"{task}/{TEACHER_KL}" for task in known)]
    if name not in valid:
        raise unknown_name("train.early_stop_metric", name, valid)
    task, slash, _ = name.partition("/")
    wanted = [task.name for task in scored]
    if slash or name == TEACHER_KL:
        wanted = [task] if slash else known
    if measured is not None and not any(task in measured for task in wanted):
        raise ValueError(
            f"train.early_stop_metric is {name!r}, but no validation post has a label of {', '.join(wanted)}; add such "
            "posts, or remove the validation file: a part of the training posts is held out then."
        )


def metric_names(task: Task) -> tuple[str, ...]:
    """What ``Evaluation.metrics`` will have of a task besides the count ``n``."""
    return ("loss", *task.rules.score(*task.rules.gold_and_scores([], task), task))


def higher_is_better(metric: str, value: float) -> float:
    """The value where larger is better, else its negative."""
    return -value if metric in LOWER_IS_BETTER else value


def _rows_to_keep(batch: Batch, tasks: Sequence[Task]) -> dict[str, list[int]]:
    """Scored task -> rows of the batch that are scored or shown for it; no filler rows."""
    labelled = {
        task.name: task.rules.labelled(batch.labels[task.name])
        for task in tasks
        if task.rules.scored
    }
    known = batch.row_ids_B[torch.stack(list(labelled.values())).any(dim=0)]
    # A row that is there for a soft label has none of its own, though its post may have one.
    bare = ~torch.isin(batch.row_ids_B, known)
    real = (batch.row_ids_B >= 0) & batch.leads_B()
    kept = {}
    for index, task in enumerate(tasks):
        if task.name in labelled:
            meant = task.rules.serves(batch.task_ids_B, index)
            kept[task.name] = torch.nonzero(real & (labelled[task.name] | (bare & meant)))[
                :, 0
            ].tolist()
    return kept


def _divergences(output: ModelOutput, batch: Batch, task: Task) -> list[tuple[int, float, float]]:
    """(post, sum of its divergences, how many) of the posts with a soft label of a task."""
    soft = batch.soft_labels[task.name]
    present = task.rules.soft_present(soft)
    logits = output.logits[task.name].detach().float().cpu()
    values = task.rules.soft_divergences(logits, soft, task).double()
    sums_B, counts_B = (part.reshape(len(soft), -1).sum(dim=1) for part in (values, present))
    found = zip(batch.row_ids_B.tolist(), sums_B.tolist(), counts_B.tolist(), strict=True)
    return [(row, total, float(count)) for row, total, count in found if count]


def _predictions(
    outputs: Sequence[PostOutput], *, task: Task, texts: Sequence[str] | None
) -> list[dict[str, Any]]:
    """One dict per output, in order."""
    golds = task.rules.gold([output.target for output in outputs], task)
    return [
        {"row": output.row}
        | ({} if texts is None else {"text": texts[output.row]})
        | {"gold": gold}
        | shown
        for output, gold, shown in zip(
            outputs, golds, task.rules.decode(outputs, task), strict=True
        )
    ]
