"""Predictions adapted to another mix of labels: one that the user knows, or one that is found in the posts themselves.

Off unless asked for: with a mix that is found in the posts, what is said of a post depends on the
others.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np

from comoe.config.errors import unknown_name
from comoe.evaluation.calibration import RULES
from comoe.evaluation.prior_shift import adapted, completed, estimated
from comoe.tasks.task import Task

ASSUMED, EM = "assumed", "em"
"""How rates were had: under ``prior`` of each task's prediction."""

CHUNK = 65_536
"""Posts of one part of an estimate."""


def adaptable(task: Task) -> bool:
    """Whether a task gives a post probabilities of labels."""
    return task.kind in RULES and task.mode != "tokens"


@dataclass(frozen=True, slots=True)
class Rates:
    """The mix of labels that the predictions of a task are adapted to."""

    task: Task
    rates_Y: np.ndarray
    """Rates of the labels, in the order of the task's."""
    how: str
    """``ASSUMED`` or ``EM``."""

    def apply(self, prediction: Mapping[str, Any]) -> dict[str, Any]:
        """A prediction of the task with adapted scores and what they decide, and with ``prior``."""
        task, labels = self.task, self.task.labels
        scores_1Y = np.array([[prediction["scores"][label] for label in labels]])
        scores_1Y = _moved(task, scores_1Y, self.rates_Y)
        (decided,) = task.rules.decided(scores_1Y, moved_thresholds(task))
        found = dict(prediction)
        if task.rules.exclusive:
            found["label"] = labels[int(decided)]
        else:
            found["labels"] = [label for label, taken in zip(labels, decided, strict=True) if taken]
        found["scores"] = dict(zip(labels, scores_1Y[0].tolist(), strict=True))
        return found | {"prior": self.how}

    def __str__(self) -> str:
        rates = zip(self.task.labels, self.task.prior, self.rates_Y, strict=True)
        told = ", ".join(f"{label} {rate:.4f} (validation {old:.4f})" for label, old, rate in rates)
        return f"{self.task.name} adapted to rates that were {WAYS[self.how]}: {told}"


WAYS = {ASSUMED: "assumed", EM: "estimated from these posts (em)"}


def read_rates(words: Sequence[str], tasks: Sequence[Task]) -> list[Rates]:
    """What ``--assume-rate TASK.LABEL=RATE`` says, a ``Rates`` per task.

    Raises:
        ValueError: no such task or label, a task without probabilities of labels or whose mix the
            export does not know, or rates that cannot be.
    """
    given: dict[str, dict[str, float]] = {}
    known = {task.name: task for task in tasks}
    for word in words:
        place, sign, number = word.rpartition("=")
        names = [name for name in known if place.startswith(f"{name}.")]
        if not sign or not names:
            some = f"TASK.LABEL=RATE, such as hate.hate=0.42, with a task of {', '.join(known)}"
            raise ValueError(f"--assume-rate {word}: it must be {some}.")
        task = known[max(names, key=len)]
        _check(task, "--assume-rate")
        label = place.removeprefix(f"{task.name}.")
        if label not in task.labels:
            raise unknown_name(f"label of {task.name} (--assume-rate {word})", label, task.labels)
        if label in given.setdefault(task.name, {}):
            raise ValueError(f"--assume-rate {word}: {place} has a rate already; give it once.")
        try:
            given[task.name][label] = float(number)
        except ValueError:
            raise ValueError(f"--assume-rate {word}: {number!r} is no number.") from None
    found = []
    for name, rates in given.items():
        task = known[name]
        try:
            rates_Y = completed(rates, task.labels, task.prior, exclusive=task.rules.exclusive)
        except ValueError as error:
            raise ValueError(f"--assume-rate {name}: {error}.") from error
        found.append(Rates(task, rates_Y, ASSUMED))
    return found


def _check(task: Task, option: str) -> None:
    if not adaptable(task):
        raise ValueError(
            f"{option}: {task.name} is a {task.kind} task, which gives a post no probability of each label to adapt."
        )
    if task.prior is None or task.score_prior is None:
        raise ValueError(
            f"{option}: this export does not know the mix of labels that the scores of {task.name} are for; train and "
            "export with this comoe, with at least 20 validation posts of the task."
        )


def choose_adapted(tasks: Sequence[Task]) -> list[Task]:
    """The tasks that ``--adapt-prior`` adapts, of those that are predicted.

    Raises:
        ValueError: none can be.
    """
    if not tasks:
        raise ValueError(
            "--adapt-prior: each of these tasks has its rates from --assume-rate; give one of the two, or more tasks."
        )
    able = [task for task in tasks if adaptable(task)]
    if not able:
        names = ", ".join(task.name for task in tasks)
        raise ValueError(
            f"--adapt-prior: {names} gives a post no probability of each label to adapt."
        )
    for task in able:
        _check(task, "--adapt-prior")
    return able


def find_rates(predictions: Iterable[Mapping[str, Any]], tasks: Sequence[Task]) -> list[Rates]:
    """The mix of labels in some posts, by expectation-maximization; scores wait in files that vanish.

    Args:
        predictions: of all posts, read once; those without a prediction of a task do not count.
        tasks: of ``choose_adapted``.
    """
    with ExitStack() as stack:
        files = {task.name: stack.enter_context(tempfile.TemporaryFile()) for task in tasks}
        for prediction in predictions:
            for task in tasks:
                if task.name in prediction:
                    scores = prediction[task.name]["scores"]
                    row_Y = np.array([scores[label] for label in task.labels], dtype=np.float32)
                    files[task.name].write(row_Y.tobytes())
        return [_estimate(task, files[task.name]) for task in tasks]


def _estimate(task: Task, file: IO[bytes]) -> Rates:
    width = len(task.labels)

    def chunks() -> Iterator[np.ndarray]:
        file.seek(0)
        while part := file.read(4 * width * CHUNK):
            yield np.frombuffer(part, dtype=np.float32).reshape(-1, width)

    prior_Y, exclusive = np.array(task.score_prior), task.rules.exclusive
    rates_Y = estimated(chunks, prior_Y, exclusive=exclusive, power=task.score_power)
    return Rates(task, rates_Y, EM)


def _moved(task: Task, scores_NY: np.ndarray, rates_Y: np.ndarray) -> np.ndarray:
    prior_Y = np.array(task.score_prior)
    exclusive = task.rules.exclusive
    return adapted(scores_NY, prior_Y, rates_Y, exclusive=exclusive, power=task.score_power)


@functools.lru_cache
def moved_thresholds(task: Task) -> Task:
    """The task with thresholds that decide scores of the validation mix as its own decide its scores."""
    if task.thresholds is None:
        return task
    edges, prior_Y = np.array(task.thresholds), np.array(task.prior)
    if task.rules.exclusive:
        edges_Y = _moved(task, np.array([[1 - edges[0], edges[0]]]), prior_Y)[0, 1:]
    else:
        edges_Y = _moved(task, edges[None], prior_Y)[0]
    return replace(task, thresholds=tuple(edges_Y.tolist()))


def apply_rates(
    predictions: Iterable[dict[str, Any]], rates: Sequence[Rates]
) -> Iterator[dict[str, Any]]:
    """The predictions, adapted."""
    for prediction in predictions:
        changed = {
            one.task.name: one.apply(prediction[one.task.name])
            for one in rates
            if one.task.name in prediction
        }
        yield prediction | changed
